"""Soft-target losses against torch's own, and every way to name a teacher."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from effdl.core import distill
from effdl.core.distill import (
    classes_of,
    is_frozen,
    mean_probabilities,
    network_inputs,
    resolve_teacher,
    soft_cross_entropy,
    soft_kl,
    teacher_logits,
    temperature_kl,
)
from effdl.core.errors import ConfigurationError
from effdl.core.export import save_timm
from tests.support import unreachable_hub

NAME = "test_resnet"


def logits(seed=0, shape=(5, 4), dtype=torch.float64):
    return 2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_losses_against_torch(temperature):
    s, t = logits(0), logits(1)
    log_s, q = (s / temperature).log_softmax(-1), (t / temperature).softmax(-1)
    kl = F.kl_div(log_s, q, reduction="batchmean")
    assert torch.allclose(temperature_kl(s, t, temperature), temperature**2 * kl)
    assert torch.allclose(temperature_kl(s, t, temperature, "element_mean"), temperature**2 * kl / 4)
    assert torch.allclose(soft_kl(s / temperature, q), kl)
    assert torch.allclose(soft_cross_entropy(s / temperature, q), F.cross_entropy(s / temperature, q))
    assert torch.allclose(soft_cross_entropy(s / temperature, q, "element_mean"), F.cross_entropy(s, q) / 4) == (
        temperature == 1.0
    )


def test_where_both_agree_there_is_no_loss_and_no_gradient():
    t = logits(1)
    s = (t + 3.0).requires_grad_()  # logits are free up to a constant
    for loss in (temperature_kl(s, t, 2.0), soft_kl(s, t.softmax(-1))):
        (gradient,) = torch.autograd.grad(loss, s)
        assert abs(float(loss.detach())) < 1e-12
        assert gradient.abs().max() < 1e-12
    one_hot = torch.eye(4)[:3]  # 0 log 0 = 0
    assert soft_kl(torch.zeros(3, 4), one_hot).isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_losses_are_float32_and_the_teacher_carries_no_gradient(dtype):
    s, t = (60 * logits(i, dtype=dtype) for i in (0, 1))
    s, t = s.detach().requires_grad_(), t.detach().requires_grad_()
    loss = temperature_kl(s, t, 2.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert s.grad.isfinite().all()
    assert t.grad is None


def test_the_mean_of_probabilities_is_not_the_softmax_of_a_mean():
    z = [logits(i) for i in range(3)]
    q = mean_probabilities(z)
    assert torch.allclose(q, torch.stack(z).softmax(-1).mean(0))
    assert torch.allclose(q.sum(-1), torch.ones(5, dtype=torch.float64))
    assert (q - torch.stack(z).mean(0).softmax(-1)).abs().max() > 0.01
    assert torch.allclose(mean_probabilities(z, [0, 1, 0]), z[1].softmax(-1))


def test_shapes_and_reductions_are_checked():
    for loss in (soft_cross_entropy, soft_kl, temperature_kl):
        with pytest.raises(ConfigurationError, match=r"teacher.*\(5, 3\).*\(5, 4\)"):
            loss(logits(), logits(shape=(5, 3)))
        with pytest.raises(ConfigurationError, match="reduction='mean'"):
            loss(logits(), logits(), reduction="mean")
    for temperature in (0, -1.0, float("nan")):
        with pytest.raises(ConfigurationError, match="temperature"):
            temperature_kl(logits(), logits(), temperature)


# ---- asking -------------------------------------------------------------------------------------------------------


def test_inputs_of_images_and_of_text():
    x, y = torch.zeros(2, 3, 8, 8), torch.tensor([0, 1])
    assert network_inputs((x, y)) is network_inputs({"pixel_values": x, "label": y}) is x
    text = {"input_ids": y, "attention_mask": y, "labels": y, "index": y}
    assert sorted(network_inputs(text)) == ["attention_mask", "input_ids"]


def test_a_teacher_answers_without_gradient_in_its_own_dtype():
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    teacher = resolve_teacher(net)
    x = torch.ones(2, 3, requires_grad=True)
    assert not teacher_logits(teacher, x).requires_grad
    assert teacher_logits(teacher, x.to(torch.bfloat16)).dtype == torch.float32
    assert torch.equal(teacher_logits(teacher, x), net[0](x))
    with pytest.raises(ConfigurationError, match="Identity returns no logits"):
        distill.ask(nn.Identity(), None)


# ---- naming -------------------------------------------------------------------------------------------------------


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    save_timm(timm.create_model(NAME, num_classes=3), path / "model", {"mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)})
    return path


def test_networks_and_lightning_modules():
    from effdl.tasks.image import ImageClassifier

    net = small()
    assert resolve_teacher(net).module is net
    assert is_frozen(net)
    module = ImageClassifier(small(), num_classes=4)
    assert resolve_teacher(module).module is module.model
    student = small()
    with pytest.raises(ConfigurationError, match="teacher='Sequential'.*shares no parameter.*deepcopy"):
        resolve_teacher(student, student)
    assert not is_frozen(student)
    assert is_frozen(resolve_teacher(copy.deepcopy(student), student).module)


def test_folders_and_files(folder, tmp_path):
    x = torch.randn(2, 3, 32, 32)
    want = timm.create_model(f"local-dir:{folder / 'model'}", pretrained=True).eval()
    weights = folder / "model" / "model.safetensors"
    torch.save({"state_dict": {f"model.{k}": v for k, v in want.state_dict().items()}}, folder / "last.ckpt")
    save_file(dict(want.state_dict()), tmp_path / "alone.safetensors")
    named = {"model": NAME, "checkpoint": str(tmp_path / "alone.safetensors"), "num_classes": 3}
    places = (folder, folder / "model", weights, folder / "last.ckpt", f"local-dir:{folder / 'model'}")
    for source in (*map(str, places), named):
        found = resolve_teacher(source)
        assert torch.equal(teacher_logits(found, x), want(x)), source
        assert is_frozen(found.module)
    student = timm.create_model(NAME, num_classes=3)  # the student's own architecture
    assert torch.equal(teacher_logits(resolve_teacher(str(tmp_path / "alone.safetensors"), student), x), want(x))
    assert not torch.equal(student.eval()(x), want(x))


def test_a_transformers_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=3
    )
    source = transformers.BertForSequenceClassification(config).eval()
    source.save_pretrained(tmp_path)
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.ones(1, 3).long(), "labels": torch.ones(1)}
    teacher = resolve_teacher(str(tmp_path))
    inputs = network_inputs(batch)
    assert torch.allclose(teacher_logits(teacher, inputs), source(**inputs).logits)
    assert classes_of(teacher.module) == classes_of(source) == 3


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("resnet_50", "teacher='resnet_50'.*Did you mean 'resnet50'"),
        ("resnet18.a7", "teacher='resnet18.a7'.*timm has weights of .*resnet18.a1_in1k"),
        ("coatnet_0_224", "teacher='coatnet_0_224'.*timm has no weights"),
        ("no/such.safetensors", "teacher='no/such.safetensors'.*an existing file"),
        ("", "teacher='' .*a timm name"),
        (3, "teacher=3 .*a timm name"),
        ("tests", "teacher='tests'.*config.json"),
        ({"checkpoint": "x.pt"}, "a dict with 'model'"),
        ({"modell": "resnet18"}, "teacher key='modell'.*'model'"),
        ({"model": "resnet18"}, "num_classes"),
        ({"model": "resnet18", "num_classes": 3, "checkpoint": "x.pt"}, "checkpoint='x.pt'.*existing"),
    ],
)
def test_what_names_no_teacher_says_why(teacher, message):
    with pytest.raises(ConfigurationError, match=message):
        resolve_teacher(teacher)


def test_weights_that_do_not_fit_the_student_ask_for_the_architecture(tmp_path):
    save_file(dict(small().state_dict()), tmp_path / "w.safetensors")
    with pytest.raises(ConfigurationError, match="beside their config.json.*'model'"):
        resolve_teacher(str(tmp_path / "w.safetensors"))
    with pytest.raises(ConfigurationError, match="does not fit the model.*Name its architecture"):
        resolve_teacher(str(tmp_path / "w.safetensors"), nn.Linear(2, 2))
    (tmp_path / "w.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(ConfigurationError, match="teachers='.*config.json.*checkpoint': '.*model.safetensors"):
        resolve_teacher(str(tmp_path), argument="teachers")


def test_old_names_of_timm_find_their_weights(monkeypatch):
    asked = []
    monkeypatch.setattr(distill, "from_hub", lambda load, name, **kw: asked.append(name) or nn.Linear(1, 1))
    for name in ("gluon_senet154", "tf_efficientnet_b4_ns", "resnet50", "resnet50.a1_in1k", "timm/resnet50.a1_in1k"):
        resolve_teacher(name)
    assert asked == [
        "senet154.gluon_in1k", "tf_efficientnet_b4.ns_jft_in1k", "resnet50", "resnet50.a1_in1k",
        "hf-hub:timm/resnet50.a1_in1k",
    ]  # fmt: skip


def test_without_a_network_one_sentence(monkeypatch):
    with unreachable_hub(monkeypatch), pytest.raises(ConfigurationError, match="cannot be loaded.*config.json"):
        resolve_teacher("test_vit")


def test_classes():
    assert classes_of(small()) == 4
    assert classes_of(timm.create_model(NAME, num_classes=7)) == 7
    assert classes_of(nn.ReLU()) is None


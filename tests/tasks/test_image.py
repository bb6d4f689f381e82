"""effdl.tasks.image: the ways to name a network and its weights, what trains it, what it logs."""

from __future__ import annotations

import time
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import timm
import torch
from lightning.pytorch.cli import ReduceLROnPlateau
from safetensors.torch import save_file
from torch import nn
from torch.optim import SGD, Adam, lr_scheduler
from torch.utils.data import DataLoader

from effdl.core import hub
from effdl.core.errors import ConfigurationError
from effdl.core.export import save_timm
from effdl.tasks.image import ImageClassifier
from tests.support import unreachable_hub

NAME = "test_resnet"  # timm's own tiny one


def images(count=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 32, 32, generator=g), torch.randint(0, 3, (count,), generator=g)


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 3))


def classifier(**kwargs):
    return ImageClassifier(**{"model": linear(), "num_classes": 3, **kwargs})


def trainer(**kwargs):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return L.Trainer(**{"max_epochs": 3, "enable_checkpointing": False, **quiet, **kwargs})


def loader(sizes=(6, 6, 6, 3)):
    return DataLoader([images(size, seed) for seed, size in enumerate(sizes)], batch_size=None)


# ---- networks -----------------------------------------------------------------------------------------------------


def test_a_timm_name_with_further_arguments():
    module = ImageClassifier(NAME, num_classes=5, model_kwargs={"drop_rate": 0.25})
    assert module(images()[0]).shape == (6, 5)
    assert module.model.drop_rate == 0.25
    assert timm.is_model(ImageClassifier(f"{NAME}.r160_in1k", num_classes=3).model.pretrained_cfg["architecture"])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"model": "resnet_18"}, r"model='resnet_18' is no timm model. Did you mean 'resnet18'"),
        ({"model": "resnet18.a7"}, r"model='resnet18.a7': timm has .*'resnet18.a1_in1k'"),
        ({"model": "tests"}, "The folder is model='local-dir:tests'"),
        ({"model": "local-dir:no/such"}, "model='local-dir:no/such' is not valid: expected a folder with timm's"),
        ({"model": "zip:resnet18"}, "model='zip:resnet18'"),
        ({"model": None}, "model=None .*a timm name, a network or a timm folder"),
        ({"model": NAME, "model_kwargs": {"drop": 1}}, r"model_kwargs=\{'drop': 1\}: .*unexpected keyword"),
        ({"model": "coatnet_0_224", "pretrained": True}, "pretrained=True: timm has no weights of model='coatnet_0"),
        ({"pretrained": True}, "pretrained=True is not valid: expected False where model is a network"),
        ({"model_kwargs": {"drop_rate": 0.1}}, "model_kwargs="),
        ({"num_classes": 1}, "num_classes=1"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"checkpoint": "no/such.pt"}, "checkpoint='no/such.pt' is not valid: expected an existing file"),
    ],
)
def test_what_cannot_be_built_says_why(kwargs, message):
    with pytest.raises(ConfigurationError, match=message):
        classifier(**kwargs)


def test_a_timm_folder_brings_its_weights_and_never_asks_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("probed for a local folder"))
    source, (x, _) = ImageClassifier(NAME, num_classes=3).eval(), images()
    save_timm(source.model, tmp_path)
    for pretrained in (False, True):
        module = ImageClassifier(f"local-dir:{tmp_path}", num_classes=3, pretrained=pretrained).eval()
        assert torch.equal(module(x), source(x))
    other = ImageClassifier(f"local-dir:{tmp_path}", num_classes=7)  # another task: the head alone is new
    assert other(x).shape == (6, 7)
    assert torch.equal(other.model.conv1[0].weight, source.model.conv1[0].weight)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match="No suitable checkpoints"):
        ImageClassifier(f"local-dir:{tmp_path}", num_classes=3)


@pytest.mark.parametrize("answer", ["logits", "mapping", "tuple"])
def test_any_network_whatever_it_wraps_its_logits_in(answer):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = linear()

        def forward(self, x):
            out = self.net(x)
            return {"logits": SimpleNamespace(logits=out), "mapping": {"logits": out}, "tuple": (out, None)}[answer]

    module, (x, _) = ImageClassifier(Wrapped(), num_classes=3), images()
    assert torch.equal(module(x), module.model.net(x))
    trainer(max_epochs=1).fit(module, loader())


# ---- weights ------------------------------------------------------------------------------------------------------


def lightning_checkpoint(path):
    module = classifier()
    run = trainer(max_epochs=1)
    run.fit(module, loader())
    run.save_checkpoint(path)
    return module.model.state_dict()


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "model._orig_mod.", "net.backbone."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_file_of_weights_under_any_prefix(prefix, suffix, tmp_path):
    want = {key: torch.randn_like(value) for key, value in linear().state_dict().items()}
    state = {prefix + key: value for key, value in want.items()}
    if prefix:
        state |= {f"teacher.{key}": torch.zeros_like(value) for key, value in want.items()}
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    if prefix in ("module.", "net.backbone."):  # which of the two networks is meant?
        with pytest.raises(ConfigurationError, match=f"several networks like this, under {prefix}, teacher"):
            classifier(checkpoint=str(path))
        del state["teacher.2.bias"]
        save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    found = classifier(checkpoint=str(path)).model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in want.items())


@pytest.mark.parametrize("key", ["lightning", "state_dict", "model"])
def test_a_training_checkpoint(key, tmp_path):
    path = tmp_path / "last.ckpt"
    if key == "lightning":
        want = lightning_checkpoint(path)
    else:
        want = {name: torch.randn_like(value) for name, value in linear().state_dict().items()}
        torch.save({key: want, "epoch": 3}, path)
    found = classifier(checkpoint=str(path)).model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in want.items())


def test_a_file_that_is_no_file_of_weights_says_so_in_one_line(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save(linear(), path)  # a pickled network could run anything
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"\x10\x00\x00")
    other = tmp_path / "other.pt"
    torch.save(nn.Sequential(nn.Flatten(), nn.Identity(), nn.Linear(48, 7)).state_dict(), other)
    number = tmp_path / "number.pt"
    torch.save(3, number)
    for file, message in ((path, "no file of weights"), (torn, "no file of weights"), (number, "no file of weights"),
                          (other, "does not fit the model: .*size mismatch for 2.weight")):  # fmt: skip
        with pytest.raises(ConfigurationError, match=message) as raised:
            classifier(checkpoint=str(file))
        assert "\n" not in str(raised.value)
        assert str(file) in str(raised.value)


def test_pretrained_with_the_hub_out_of_reach_is_one_sentence_at_once(monkeypatch, tmp_path):
    with unreachable_hub(monkeypatch):
        start = time.perf_counter()
        with pytest.raises(hub.HubError) as raised:
            ImageClassifier("resnet18", pretrained=True)
        assert time.perf_counter() - start < 3.5
        message = str(raised.value)
        assert "\n" not in message
        assert message.startswith("'resnet18' cannot be loaded")
        assert message.endswith("model='local-dir:FOLDER', or weights as checkpoint='FILE.safetensors'.")
        with pytest.raises(hub.HubError, match="local-dir:FOLDER"):
            ImageClassifier("hf-hub:timm/resnet18.a1_in1k")
        # the advice, taken: the same arguments and a file
        save_file(timm.create_model(NAME, num_classes=3).state_dict(), tmp_path / "weights.safetensors")
        ImageClassifier(NAME, num_classes=3, pretrained=True, checkpoint=str(tmp_path / "weights.safetensors"))


# ---- optimizers ---------------------------------------------------------------------------------------------------


class Rates(L.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, *args):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def rates(scheduler, **kwargs):
    module, seen = classifier(optimizer=partial(SGD, lr=1.0), scheduler=scheduler), Rates()
    trainer(callbacks=[seen], **kwargs).fit(module, loader(), loader())
    return seen.seen


def test_default_is_adam_at_a_constant_rate():
    made = classifier().configure_optimizers()
    assert type(made) is Adam
    assert made.param_groups[0]["lr"] == 1e-3


def test_a_scheduler_steps_per_epoch_or_per_step():
    assert rates(partial(lr_scheduler.StepLR, step_size=1, gamma=0.5)) == [1.0] * 4 + [0.5] * 4 + [0.25] * 4
    halving = rates(partial(lr_scheduler.LambdaLR, lr_lambda=lambda step: 0.5**step))
    assert halving == pytest.approx([0.5**step for step in range(12)])
    once = rates(partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=12))
    assert once.index(max(once)) == 3
    assert once[-1] < 1e-3


@pytest.mark.parametrize("kind", ["torch", "lightning"])
def test_a_plateau_watches_the_validation(kind):
    never = {"patience": 0, "threshold": 1e9, "factor": 0.5, "threshold_mode": "abs"}  # nothing is good enough
    if kind == "torch":
        scheduler, monitor = partial(lr_scheduler.ReduceLROnPlateau, **never), "val/loss"
    else:
        scheduler, monitor = partial(ReduceLROnPlateau, monitor="train/loss", **never), "train/loss"
    assert classifier(scheduler=scheduler).configure_optimizers()["lr_scheduler"]["monitor"] == monitor
    assert rates(scheduler) == [1.0] * 8 + [0.5] * 4


def test_what_makes_an_optimizer_is_wanted_not_an_optimizer():
    made = SGD(linear().parameters(), 0.1)
    with pytest.raises(ConfigurationError, match="optimizer=.* a callable that makes one"):
        classifier(optimizer=made).configure_optimizers()
    with pytest.raises(ConfigurationError, match="scheduler=.* a callable that makes one"):
        classifier(scheduler=lr_scheduler.StepLR(made, 1)).configure_optimizers()


def test_frozen_parameters_are_left_out():
    module = classifier()
    module.model[2].weight.requires_grad_(False)
    (group,) = module.configure_optimizers().param_groups
    assert [id(p) for p in group["params"]] == [id(module.model[2].bias)]
    before = module.model[2].weight.clone()
    trainer().fit(module, loader())
    assert torch.equal(module.model[2].weight, before)
    module.requires_grad_(False)
    with pytest.raises(ConfigurationError, match="All parameters are frozen"):
        module.configure_optimizers()


# ---- steps --------------------------------------------------------------------------------------------------------


def test_label_smoothing_is_of_the_training_loss_alone():
    module, (x, y) = classifier(label_smoothing=0.3), images()
    logits = module(x)
    smooth = nn.functional.cross_entropy(logits, y, label_smoothing=0.3)
    assert torch.equal(module.compute_loss(logits, (x, y)), smooth)
    (row,) = trainer().validate(module, DataLoader([(x, y)], batch_size=None), verbose=False)
    assert row["val/loss"] == pytest.approx(float(nn.functional.cross_entropy(logits, y)))


@pytest.mark.parametrize("form", ["dict", "transformers", "tuple", "indexed"])
def test_batches_of_every_form_train_alike(form):
    def shaped(x, y):
        index = torch.arange(len(y))
        known = {"dict": {"image": x, "label": y, "index": index}, "transformers": {"pixel_values": x, "labels": y}}
        return known.get(form) or ((x, y, index) if form == "indexed" else [x, y])

    plain, module = classifier(), classifier()
    trainer().fit(plain, loader())
    trainer().fit(module, DataLoader([shaped(*batch) for batch in loader()], batch_size=None))
    assert torch.equal(plain.model[2].weight, module.model[2].weight)


def test_metrics_count_examples_not_batches():
    module, run = classifier(), trainer(max_epochs=1)
    run.fit(module, loader(), loader())
    assert {"train/loss_epoch", "train/accuracy", "val/loss", "val/accuracy"} <= set(run.callback_metrics)
    (row,) = run.test(module, loader(), verbose=False)
    batches = list(loader())
    hits = torch.cat([module(x).argmax(-1) == y for x, y in batches])
    losses = torch.cat([nn.functional.cross_entropy(module(x), y, reduction="none") for x, y in batches])
    assert row["test/accuracy"] == pytest.approx(float(hits.float().mean()))
    assert row["test/loss"] == pytest.approx(float(losses.mean()), rel=1e-5)


def test_prediction_needs_no_labels_and_training_says_that_it_does():
    module, (x, _) = classifier(), images()
    for batch in (x, (x,), {"image": x}):
        (out,) = trainer().predict(module, DataLoader([batch], batch_size=None))
        assert out.shape == (6, 3)
        assert torch.allclose(out.sum(-1), torch.ones(6))
    with pytest.raises(ConfigurationError, match="the batch has no labels"):
        trainer().fit(module, DataLoader([{"image": x}], batch_size=None))

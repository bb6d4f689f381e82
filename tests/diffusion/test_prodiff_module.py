"""prodiff on a Trainer: what is frozen, labels and calls, padding, rounds, folders, samplers, refusals."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import load_file
from torch import nn

from effdl import ProDiffModule
from effdl.core.errors import ConfigurationError
from effdl.core.random import generator
from effdl.diffusion._prodiff_batch import read
from effdl.diffusion.prodiff import (
    ClassEncoder,
    DiffNet,
    absolute_error,
    alphas_cumprod,
    noised,
    sample,
    sample_posterior,
)
from tests.diffusion.prodiff_parts import ENCODER, Constant, batch_of, fit, taught
from tests.support import golden

GOLDEN = golden("prodiff")
MEL = torch.tensor(GOLDEN["mel_BTM"]).transpose(1, 2)[:, None]
NOISE = torch.tensor(GOLDEN["noise_B1MT"])


def test_must_03_a_student_of_a_constant_teacher_has_nothing_to_learn():
    student = ProDiffModule(stage="distill", teacher=ProDiffModule(Constant(), ENCODER))
    student.log = student.log_dict = lambda *args, **kwargs: None
    student._trainer = type("T", (), {"current_epoch": 0})()
    loss = student.training_step(batch_of(), 0)
    loss.backward()
    assert float(loss.detach()) < 1e-6
    assert float(student.model.value.grad.abs().max()) < 1e-6


def test_must_04_teacher_and_encoder_stay_frozen_and_out_of_the_checkpoint():
    teacher = taught()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = fit(ProDiffModule(stage="distill", teacher=teacher, optimizer=torch.optim.SGD))
    for module in (teacher, student.teacher.module):
        for name, value in module.state_dict().items():
            assert torch.equal(value, before[name if module is teacher else f"model.{name}"])
    assert all(p.grad is None for p in student.teacher.module.parameters())
    for name, value in student.encoder.state_dict().items():
        assert torch.equal(value, before[f"encoder.{name}"])
    assert not student.encoder.training
    assert set(student.state_dict()) == set(teacher.state_dict())
    assert any(not torch.equal(value, before[name]) for name, value in student.state_dict().items() if "model" in name)


def test_must_07_labels_and_calls():
    spy = Constant()
    teacher = ProDiffModule(spy, ENCODER)
    student = ProDiffModule(stage="distill", teacher=teacher)
    student.model.labels.clear()
    noise = torch.randn(2, 1, 3, 8, generator=generator(0))
    batch = {"label": torch.tensor([0, 1]), "mel": noise}
    first = student.sample(batch, noise=noise)
    assert student.model.labels == [[2, 2], [0, 0]]
    assert torch.equal(first, student.sample(batch, noise=noise))
    spy.labels.clear()
    teacher.sample(batch, noise=noise)
    assert spy.labels == [[4, 4], [3, 3], [2, 2], [1, 1]]
    spy.labels.clear()
    teacher.sample(batch, noise=noise, calls=2, sampler="posterior")
    assert spy.labels == [[2, 2], [0, 0]]
    student.model.labels.clear()
    fit(student)
    assert {label for labels in student.model.labels for label in labels} == {0, 2}
    with pytest.raises(ConfigurationError, match="calls"):
        student.sample(batch, noise=noise, calls=4)


def test_must_07_the_label_of_the_index_itself_would_be_another_network():
    student = ProDiffModule(stage="distill", teacher=taught())
    x, t = torch.randn(2, 1, 3, 8, generator=generator(0)), torch.tensor([2, 4])
    condition = student.encoder(batch_of(count=2), 8)
    assert not torch.allclose(student(x, t - 2, condition), student(x, t, condition), atol=1e-4)


class Pointwise(nn.Module):
    """No frame sees another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Conv1d(3, 3, 1)

    def forward(self, x, t, condition):
        return self.map(x.squeeze(1)).unsqueeze(1) + 0.01 * t.view(-1, 1, 1, 1)


@pytest.mark.parametrize("network", ["pointwise", "diffnet"])
def test_must_08_padding_changes_nothing_that_counts(network):
    torch.manual_seed(0)
    denoiser = Pointwise() if network == "pointwise" else DiffNet(3, 8, 8, 2)
    if network == "diffnet":
        nn.init.normal_(denoiser.output.weight, std=0.2)
    module = ProDiffModule(denoiser, {**ENCODER, "frames": 20}, loss="l1")
    short = batch_of(8, 2)
    mask = torch.zeros(2, 14, dtype=torch.bool)
    mask[:, :8] = True
    padded = {**short, "mel": torch.nn.functional.pad(short["mel"], (0, 6), value=5.0), "mask": mask}
    noise = torch.randn(2, 1, 3, 14, generator=generator(3))
    t = torch.tensor([3, 1])
    losses, samples = [], []
    for batch, n in ((short, noise[..., :8]), (padded, noise)):
        x, m, condition, _ = read(module.encoder, batch, True)
        noisy = noised(x, n, t, module.alphas_cumprod)
        noisy = noisy if m is None else noisy * m[:, None, None]
        losses.append(absolute_error(module(noisy, t, condition, m), x, m))
        samples.append(module.sample(batch, noise=n)[..., :8])
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*samples, rtol=1e-5, atol=1e-5)


def test_must_09_two_rounds_end_at_two_calls_and_resume_in_the_second(tmp_path):
    def student():
        return ProDiffModule(stage="distill", teacher=taught(8), steps=8, rounds=2, optimizer=torch.optim.SGD)

    save = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=3)
    whole = fit(student(), [save], epochs=3)  # 12 steps, promoted after 6
    assert whole.round == 1
    assert (int(whole.timesteps), int(whole.time_scale), whole.calls) == (2, 4, 2)
    again = fit(student(), epochs=3, ckpt_path=str(tmp_path / "step=9.ckpt"), weights_only=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    for name, value in whole.teacher.module.state_dict().items():
        assert torch.equal(value, again.teacher.module.state_dict()[name]), name
    original = taught(8).model.state_dict()
    assert any(not torch.equal(value, original[name]) for name, value in whole.teacher.module.state_dict().items())
    noise = torch.randn(2, 1, 3, 8, generator=generator(0))
    calls = []
    handle = whole.model.register_forward_pre_hook(lambda module, args: calls.append(args[1].tolist()))
    whole.sample({"label": torch.tensor([0, 1]), "mel": noise}, noise=noise)
    handle.remove()
    assert calls == [[4, 4], [0, 0]]


def test_the_average_of_a_student_teaches_the_next_round():
    student = ProDiffModule(stage="distill", teacher=taught(8), steps=8, rounds=2)
    average = EMAWeightAveraging(decay=0.5)
    seen = {}

    def keep(trainer, module, batch, index):
        if module.round == 0:
            seen["average"] = {k: v.clone() for k, v in average._average_model.module.model.state_dict().items()}

    watcher = Callback()
    watcher.on_train_batch_start = keep
    fit(student, [average, watcher], epochs=2)
    for name, value in student.teacher.module.state_dict().items():
        assert torch.equal(value, seen["average"][name]), name


def test_saved_and_opened_by_folder_and_without_this_library(tmp_path):
    student = fit(ProDiffModule(stage="distill", teacher=taught()), epochs=1)
    student.save_pretrained(tmp_path / "student")
    taught().save_pretrained(tmp_path / "teacher")
    noise = torch.randn(3, 1, 3, 8, generator=generator(0))
    batch = {"label": torch.arange(3), "mel": noise}
    opened = ProDiffModule(stage="distill", teacher=str(tmp_path / "teacher"))
    fresh = ProDiffModule(stage="distill", teacher=taught())
    assert torch.equal(opened.sample(batch, noise=noise), fresh.sample(batch, noise=noise))
    tensors = load_file(tmp_path / "student" / "model.safetensors")
    record = json.loads((tmp_path / "student" / "prodiff.json").read_text())
    net, encoder = DiffNet(**record["denoiser"]["config"]), ClassEncoder(**record["encoder"]["config"])
    for part, name in ((net, "denoiser"), (encoder, "encoder")):
        part.load_state_dict({k.removeprefix(name + "."): v for k, v in tensors.items() if k.startswith(name)})
    with torch.no_grad():
        condition, shift = encoder(batch, 8), record["label_shift"]
        alpha_bar = torch.tensor(record["alphas_cumprod"], dtype=torch.float64)
        by_hand = sample(lambda x, t: net(x, t, condition), noise, alpha_bar, record["time_scale"], shift)
    torch.testing.assert_close(by_hand, student.sample(batch, noise=noise), rtol=1e-5, atol=1e-6)
    assert set(load_file(tmp_path / "teacher" / "model.safetensors")) == set(tensors)


def test_a_stock_network_and_the_posterior_sampler():
    from effdl.tasks.tiny import tiny_unet

    module = ProDiffModule(tiny_unet(8, 1, num_classes=3), loss="l1")
    noise = torch.randn(2, 1, 8, 8, generator=generator(0))
    batch = {"image": noise, "label": torch.tensor([0, 2])}
    assert module.sample(batch, noise=noise).shape == (2, 1, 8, 8)
    assert torch.equal(module.sample(batch, noise=noise, sampler="posterior", seed=1),
                       module.sample(batch, noise=noise, sampler="posterior", seed=1))  # fmt: skip
    exact = sample_posterior(lambda x, t: MEL, NOISE, alphas_cumprod("vpsde", 4), 2)
    torch.testing.assert_close(exact, MEL)


@pytest.mark.parametrize(
    ("kwargs", "name"),
    [
        ({"steps": 1}, "steps"), ({"steps": 6, "time_scale": 4}, "steps"), ({"time_scale": 3}, "time_scale"),
        ({"schedule": "cubic"}, "schedule"), ({"loss": "l2"}, "loss"), ({"denoiser": {"bin": 3}}, "denoiser"),
        ({"stage": "distill"}, "teacher"), ({"rounds": 2}, "rounds"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(kwargs, name):
    with pytest.raises(ConfigurationError, match=name):
        ProDiffModule(**kwargs)


def test_a_teacher_of_another_schedule_is_refused():
    with pytest.raises(ConfigurationError, match="teacher"):
        ProDiffModule(stage="distill", teacher=taught(), schedule="cosine")


def test_samples_want_conditions_alone():
    mel = taught().sample({"label": torch.tensor([0, 2])}, frames=8)
    assert mel.shape == (2, 1, 3, 8)
    with pytest.raises(ConfigurationError, match="noise"):
        taught().sample({"label": torch.tensor([0, 2])})


def test_lengths_must_agree():
    module = taught()
    batch = batch_of()
    for extra, name in (({"mask": torch.ones(6, 5)}, "mask"), ({"mel": torch.zeros(6, 1, 1, 1, 8)}, "batch")):
        with pytest.raises(ConfigurationError, match=name):
            read(module.encoder, {**batch, **extra}, True)

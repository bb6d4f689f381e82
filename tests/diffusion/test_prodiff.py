"""prodiff: schedules, two steps into one, padding, samplers, rounds; official numbers."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from safetensors.torch import load_file
from torch import nn

from effdl import ProDiffModule
from effdl.core.errors import ConfigurationError
from effdl.core.noise import betas
from effdl.core.random import generator
from effdl.data.loading import ResumableLoader
from effdl.diffusion._prodiff_batch import read
from effdl.diffusion._prodiff_steps import at, dissimilarity, step
from effdl.diffusion.prodiff import (
    ClassEncoder,
    DiffNet,
    absolute_error,
    alphas_cumprod,
    noised,
    posterior,
    sample,
    sample_posterior,
    two_into_one,
)
from tests.support import golden

GOLDEN = golden("prodiff")
COND = torch.tensor(GOLDEN["cond_BTM"]).transpose(1, 2)
MEL = torch.tensor(GOLDEN["mel_BTM"]).transpose(1, 2)[:, None]
NOISE = torch.tensor(GOLDEN["noise_B1MT"])
MASK = torch.tensor(GOLDEN["mel2ph"]).ne(0)
DIFFNET = {"bins": 3, "condition": 8, "channels": 8, "layers": 2}
ENCODER = {"classes": 3, "frames": 8, "width": 8}


def rule(name: str, mask: torch.Tensor | None = MASK):
    """The official run's toy denoiser, x_0 = A x + b + c t + d cond."""
    told = GOLDEN[name]

    def denoise(x, t):
        out = torch.einsum("ij,bcjt->bcit", torch.tensor(told["A"]), x) + torch.tensor(told["b"])[:, None]
        out = out + told["c"] * t.float().view(-1, 1, 1, 1) + told["d"] * COND[:, None]
        return out if mask is None else out * mask[:, None, None]

    return denoise


def close(ours, theirs, tolerance=1e-4):
    theirs = torch.tensor(theirs)
    print(f"largest error {float((ours.float() - theirs).abs().max()):.1e}")
    torch.testing.assert_close(ours.float(), theirs, rtol=tolerance, atol=1e-5)


def test_must_01_golden_schedules():
    for key, values in GOLDEN["betas"].items():
        name, count = key.split(",n=")
        close(betas(name, int(count), 0.1, 40.0) if name == "vpsde" else betas(name, int(count)), values)
    torch.testing.assert_close(
        alphas_cumprod("vpsde", 4).float(), torch.tensor(GOLDEN["buffers_T4"]["alphas_cumprod"]), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['teacher_steps']}-{case['time_scale']}")
def test_must_01_golden_two_half_steps_and_their_target(case):
    alpha_bar, scale = alphas_cumprod("vpsde", case["teacher_steps"]), case["time_scale"]
    t = scale * torch.tensor(case["index_draw"]).long()
    assert t.tolist() == case["t"]
    x = noised(MEL * MASK[:, None, None], NOISE, t, alpha_bar) * MASK[:, None, None]
    close(x, case["x_t"])
    target = two_into_one(rule("teacher"), x, t, scale, alpha_bar)
    for ours, key in zip(target[1:], ("teacher_x0_at_t", "x_mid", "teacher_x0_at_mid", "x_end")):
        close(ours, case[key])
    (a_t, s_t), (a_e, s_e) = at(alpha_bar, t, x), at(alpha_bar, t - scale, x)
    theirs = torch.tensor(case["x_target"])
    # the official quotient (x_e - r x_t) / (alpha_e - r alpha_t) in fp32 carries the rounding of its numerator
    rounding = torch.finfo(torch.float32).eps * (target.end.abs() + x.abs()) / (a_e - s_e / s_t * a_t)
    error = (target.x0 - theirs).abs()
    print(f"target: largest error {float(error.max()):.1e}, of which rounding may make {float(rounding.max()):.1e}")
    assert (error <= 1e-4 * theirs.abs() + 1e-5 + rounding).all()
    prediction = rule("student")(x, t - scale)
    close(prediction, case["student_pred"])
    close(absolute_error(prediction, target.x0, MASK, "official"), case["loss_l1"])
    close(absolute_error(prediction, target.x0, MASK), case["masked_mean_loss"])


def test_must_01_golden_posterior_and_a_step():
    told, alpha_bar = GOLDEN["posterior"], alphas_cumprod("vpsde", 4)
    x0, x, t = (torch.tensor(told[key]) for key in ("x0", "x_t", "t"))
    mean, variance = posterior(x0, x, t.long(), alpha_bar)
    close(mean, told["mean"])
    close(variance, told["var"])
    told = GOLDEN["ddim_step_scale2"]
    x, t = torch.tensor(told["x_t"]), torch.tensor(told["t"]).long()
    close(step(rule("student", None)(x, t), x, t, t - 2, alpha_bar), told["out"])


@pytest.mark.parametrize("steps", [4, 8])
def test_must_02_the_target_lands_where_two_half_steps_do(steps):
    alpha_bar = alphas_cumprod("vpsde", steps)
    x, t = torch.randn(2, 1, 3, 4, generator=generator(0)).double(), torch.tensor([2, 4])
    target = two_into_one(rule("teacher"), x.float(), t, 2, alpha_bar)
    torch.testing.assert_close(step(target.x0, x.float(), t, t - 2, alpha_bar), target.end, rtol=1e-5, atol=1e-6)
    exact = two_into_one(lambda x, t: MEL, x.float(), t, 2, alpha_bar)
    torch.testing.assert_close(exact.x0, MEL, rtol=1e-5, atol=1e-5)
    clean = two_into_one(rule("teacher"), x.float(), torch.tensor([1, 1]), 2, alpha_bar)  # from 1 by 0 to the data
    torch.testing.assert_close(clean.x0, clean.second, rtol=1e-5, atol=1e-6)


class Constant(nn.Module):
    """Says the same, whatever it is asked; notes the labels that it is called with."""

    def __init__(self):
        super().__init__()
        self.value, self.labels = nn.Parameter(torch.full((3, 1), 0.3)), []

    def forward(self, x, t, condition):
        self.labels.append(t.tolist())
        return self.value.expand(x.shape)


def batch_of(frames: int = 8, count: int = 6, bins: int = 3) -> dict:
    mel = torch.rand(count, bins, frames, generator=generator(1)) * 2 - 1
    return {"mel": mel, "label": torch.arange(count) % 3}


def loader(batch_size: int = 6):
    batch = batch_of(count=24)
    return ResumableLoader(
        torch.utils.data.TensorDataset(batch["mel"], batch["label"]), batch_size=batch_size, shuffle=True
    )


def fit(module, callbacks=(), epochs=2, **kwargs):
    settings = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    settings["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", logger=False, callbacks=list(callbacks), **settings)
    trainer.fit(module, loader(), loader(), **kwargs)
    return module


def taught(steps=4, seed=0, **kwargs) -> ProDiffModule:
    torch.manual_seed(seed)
    module = ProDiffModule(DIFFNET, ENCODER, steps=steps, **kwargs)
    nn.init.normal_(module.model.output.weight, std=0.2)
    return module


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


def test_ssim_of_equals_is_zero_and_padding_does_not_count():
    mel = torch.rand(2, 1, 12, 16, generator=generator(0)) * 2 - 1
    assert float(dissimilarity(mel, mel)) < 1e-5
    assert float(dissimilarity(mel, mel.flip(0))) > 0.5  # another random one
    mask = torch.ones(2, 16)
    mask[:, 10:] = 0
    other = mel.clone()
    other[..., 15:] = 0  # farther from what counts than the window reaches
    assert float(dissimilarity(other, mel, mask)) < 1e-5


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

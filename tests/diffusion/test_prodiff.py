"""prodiff: schedules, two steps into one, posterior, losses; official numbers."""

from __future__ import annotations

import pytest
import torch

from effdl.core.noise import betas
from effdl.core.random import generator
from effdl.diffusion._prodiff_steps import at, dissimilarity, step
from effdl.diffusion.prodiff import (
    absolute_error,
    alphas_cumprod,
    noised,
    posterior,
    two_into_one,
)
from tests.support import golden

GOLDEN = golden("prodiff")
COND = torch.tensor(GOLDEN["cond_BTM"]).transpose(1, 2)
MEL = torch.tensor(GOLDEN["mel_BTM"]).transpose(1, 2)[:, None]
NOISE = torch.tensor(GOLDEN["noise_B1MT"])
MASK = torch.tensor(GOLDEN["mel2ph"]).ne(0)


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


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_the_log_snr_schedule_ends_where_vpsde_does_and_two_steps_make_one(steps):
    alpha_bar = alphas_cumprod("logsnr", steps)
    assert alpha_bar.shape == (steps + 1,)
    assert float(alpha_bar[-1]) == pytest.approx(float(torch.tensor(-20.0, dtype=torch.float64).sigmoid()), rel=1e-6)
    assert float(alpha_bar[-1]) == pytest.approx(float(alphas_cumprod("vpsde", steps)[-1]), rel=0.1)
    x, t = torch.randn(2, 1, 3, 4, generator=generator(0)), torch.tensor([2, steps])
    target = two_into_one(rule("teacher"), x, t, 2, alpha_bar)
    torch.testing.assert_close(step(target.x0, x, t, t - 2, alpha_bar), target.end, rtol=1e-4, atol=1e-5)


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


def test_ssim_of_equals_is_zero_and_padding_does_not_count():
    mel = torch.rand(2, 1, 12, 16, generator=generator(0)) * 2 - 1
    assert float(dissimilarity(mel, mel)) < 1e-5
    assert float(dissimilarity(mel, mel.flip(0))) > 0.5  # another random one
    mask = torch.ones(2, 16)
    mask[:, 10:] = 0
    other = mel.clone()
    other[..., 15:] = 0  # farther from what counts than the window reaches
    assert float(dissimilarity(other, mel, mask)) < 1e-5

"""ProDiff's equations: few-step schedules, two DDIM steps into one, samplers, losses.

Times are indices of a schedule of T + 1 entries: index T is noise, index 0 is *still noisy* (alpha-bar 0.44 at T = 4),
index -1 is the data. A *denoiser* is ``f(x, label)`` and says x_0. Source: Huang et al., 2207.06389; what follows
the released code instead says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from effdl.core.errors import check, check_choice, check_integer
from effdl.core.noise import add_noise, betas, ddim_step, expand
from effdl.core.random import generator

Denoiser = Callable[[Tensor, Tensor], Tensor]
SCHEDULES = {"vpsde": (0.1, 40.0), "linear": (1e-6, 0.01), "cosine": (0.0, 0.0), "logsnr": (0.0, 0.0)}
LOSSES = ("l1_ssim", "l1")
REDUCTIONS = ("mean", "official")


def alphas_cumprod(schedule: str, steps: int) -> Tensor:
    """alpha-bar of indices 0 to T, ``[T + 1]`` float64; ``"vpsde"`` is the paper's.

    Example::

        alphas_cumprod("vpsde", 4)                              # 0.4413, 0.0395, 7e-4, 3e-6, 2e-9
    """
    check_choice("schedule", schedule, SCHEDULES)
    check_integer("steps", steps, 2)
    return (1 - betas(schedule, steps + 1, *SCHEDULES[schedule])).cumprod(0)


def at(alpha_bar: Tensor, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """``(a, s)`` of indices ``[B]`` beside ``like``, float64 (alpha_4 = 4e-5 and differences of it); -1 is (1, 0)."""
    value = torch.where(t < 0, 1.0, alpha_bar.to(t.device)[t.clamp(min=0)])
    return expand(value, like).sqrt(), expand(1 - value, like).sqrt()


def noised(x0: Tensor, noise: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
    """``x_t = alpha_t x_0 + sigma_t eps``."""
    a, s = at(alpha_bar, t, x0)
    return add_noise(x0, noise, a.to(x0.dtype), s.to(x0.dtype))


def step(x0: Tensor, x: Tensor, t: Tensor, end: Tensor, alpha_bar: Tensor) -> Tensor:
    """One DDIM step from index t to ``end``."""
    return ddim_step(x0, x, *at(alpha_bar, t, x), *at(alpha_bar, end, x)).to(x.dtype)


class Target(NamedTuple):
    """``x0`` the single step's clean data; the teacher's way there: ``first``, ``middle``, ``second``, ``end``."""

    x0: Tensor
    first: Tensor
    middle: Tensor
    second: Tensor
    end: Tensor


@torch.no_grad()
def two_into_one(teacher: Denoiser, x: Tensor, t: Tensor, scale: int, alpha_bar: Tensor, shift: int = 0) -> Target:
    """What one step from t to t - scale must say to land where the teacher's two half steps do.

    ``x* = (x_e - r x_t) / (alpha_e - r alpha_t)`` with ``r = sigma_e / sigma_t``; with the two half steps put in, x_t
    drops out and ``x* = p_1 + w (p_0 - p_1)``, ``w = (alpha_h sigma_e / sigma_h - r alpha_t) / (alpha_e - r alpha_t)``:
    no difference of nearly equal states is left (at T = 8 it costs half of fp32's digits).

    Args:
        teacher: ``f(x, label)``, called at labels ``t - shift`` and ``t - scale / 2 - shift``.
        x: x_t ``[B, ...]``.
        t: indices ``[B]``.
        scale: even, >= 2.
        alpha_bar: ``[T + 1]`` float64.
        shift: 0 for a network trained on data; the time scale of a student that teaches the next round.
    """
    half, end = t - scale // 2, t - scale
    first = teacher(x, t - shift)
    middle = step(first, x, t, half, alpha_bar)
    second = teacher(middle, half - shift)
    x_end = step(second, middle, half, end, alpha_bar)
    (a_t, s_t), (a_h, s_h), (a_e, s_e) = (at(alpha_bar, time, x) for time in (t, half, end))
    ratio = s_e / s_t
    weight = (a_h * s_e / s_h - ratio * a_t) / (a_e - ratio * a_t)
    weight = torch.where(s_h > 0, weight, 0.0).to(x.dtype)  # where the middle is the data already
    clean = second + weight * (first - second)
    return Target(clean, first, middle, second, x_end)


class Round(NamedTuple):
    """One round of a distillation: ``scale`` indices in each of the student's steps (asked at label t - scale), the
    teacher's label shift, the schedule."""

    scale: int
    teacher_shift: int
    alpha_bar: Tensor


def distillation_loss(
    student: Denoiser,
    teacher: Denoiser,
    x0: Tensor,
    noise: Tensor,
    uniform: Tensor,
    now: Round,
    mask: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """``|f_S(x_t, t - s, c) - x*|`` of data ``[B, 1, M, T]`` at t = s k, k uniform; ``uniform`` ``[B]`` draws it."""
    calls = (len(now.alpha_bar) - 1) // now.scale
    t = now.scale * (1 + (uniform * calls).long())
    x = noised(x0, noise, t, now.alpha_bar)
    x = x if mask is None else x * mask[:, None, None]
    target = two_into_one(teacher, x, t, now.scale, now.alpha_bar, now.teacher_shift).x0
    return absolute_error(student(x, t - now.scale), target, mask, reduction)


def absolute_error(prediction: Tensor, target: Tensor, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Mean of ``|prediction - target|`` over the frames that count, fp32.

    Args:
        prediction, target: ``[B, 1, M, T]``.
        mask: ``[B, T]``, 1 where a frame counts; ``None``: all.
        reduction: ``"mean"`` over those elements; ``"official"`` over all, padded ones too (depends on the padding).
    """
    check_choice("reduction", reduction, REDUCTIONS)
    return _reduced((prediction.float() - target.float()).abs(), mask, reduction)


def dissimilarity(prediction: Tensor, target: Tensor, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """``1 - SSIM`` of mels in [-1, 1], as :func:`absolute_error`.

    The window is Gaussian, 11 wide with a deviation of 1.5, and shrinks with mels that have fewer bins or frames.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    check_choice("reduction", reduction, REDUCTIONS)
    first, second = prediction.float(), target.float()
    sigma = 1.5 * min(1.0, min(prediction.shape[2:]) / 11)
    with torch.autocast(first.device.type, enabled=False):
        _, similar = ssim(first, second, sigma=sigma, data_range=2.0, return_full_image=True)
    return _reduced(1 - similar, mask, reduction)


def _reduced(error: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    if mask is None:
        return error.mean()
    weights = mask[:, None, None].to(error).expand_as(error)
    return (error * weights).sum() / (weights.sum() if reduction == "mean" else error.numel())


def checked_schedule(schedule: str, steps: int, time_scale: int, rounds: int, reduction: str, seed: int) -> Tensor:
    """:func:`alphas_cumprod` of what every distillation is told; raises unless ``rounds`` halvings end at
    ``steps / time_scale`` network calls, and ``reduction`` and ``seed`` are ones that there are."""
    check_choice("reduction", reduction, REDUCTIONS)
    check_integer("seed", seed, 0)
    check_integer("steps", steps, 2)
    check_integer("rounds", rounds, 1)
    check_integer("time_scale", time_scale, 2)
    check(time_scale % 2 == 0, "time_scale", time_scale, "an even number: a step is two half steps of the teacher")
    last = time_scale * 2 ** (rounds - 1)
    valid = f"a multiple of {last} = time_scale * 2^(rounds - 1)"
    check(steps % last == 0, "steps", steps, valid, f"{max(1, steps // last) * last} is near.")
    return alphas_cumprod(schedule, steps)


@torch.no_grad()
def sample(
    denoiser: Denoiser, noise: Tensor, alpha_bar: Tensor, scale: int, shift: int, mask: Tensor | None = None
) -> Tensor:
    """DDIM from index T in T / scale calls at labels ``t - shift``; the last call's x_0 is the answer."""
    x = noise if mask is None else noise * mask[:, None, None]
    times = range(len(alpha_bar) - 1, 0, -scale)
    for t in (torch.full((len(x),), time, device=x.device) for time in times):
        x0 = denoiser(x, t - shift)
        x = step(x0, x, t, t - scale, alpha_bar)
    return x0


def posterior(x0: Tensor, x: Tensor, t: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``[B, ...]`` and variance ``[B, 1, ...]`` of q(x_{t-1} | x_t, x_0) of the fine chain; at t = 0: x_0, 0."""
    now = expand(alpha_bar.to(t.device)[t], x)
    before = expand(torch.where(t > 0, alpha_bar.to(t.device)[(t - 1).clamp(min=0)], 1.0), x)
    beta = 1 - now / before
    first = beta * before.sqrt() / (1 - now)
    second = (1 - before) * (1 - beta).sqrt() / (1 - now)
    return (first * x0 + second * x).to(x.dtype), beta * (1 - before) / (1 - now)


@torch.no_grad()
def sample_posterior(
    denoiser: Denoiser, noise: Tensor, alpha_bar: Tensor, scale: int, mask: Tensor | None = None, seed: int = 0
) -> Tensor:
    """The released sampler: labels ``T - scale, ..., 0``, each followed by a draw of the *fine* chain's posterior.

    Its noise levels are off by ``scale`` (x_T is taken for x_{T - scale}); it works because x_0 hardly depends on them.
    """
    x, random = noise if mask is None else noise * mask[:, None, None], generator(seed)
    for time in range(len(alpha_bar) - 1 - scale, -1, -scale):
        t = torch.full((len(x),), time, device=x.device)
        mean, variance = posterior(denoiser(x, t), x, t, alpha_bar)
        draw = torch.randn(x.shape, generator=random).to(x)
        x = mean + variance.sqrt().to(x) * (draw if time > 0 else 0)
        x = x if mask is None else x * mask[:, None, None]
    return x

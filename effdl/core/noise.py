"""Noise schedules and what a diffusion network may predict: ``x_t = a x_0 + s eps``, in one place.

``a`` (signal) and ``s`` (noise) belong to a time; on variance-preserving schedules ``a^2 = alpha-bar = 1 - s^2``, on
the straight line of flow matching ``a = 1 - t``, ``s = t``. A table of ``alpha-bar`` is a diffusers scheduler's
``alphas_cumprod``; a schedule in continuous time is a small object with ``log_alpha`` and its inverse.

Sources: Ho et al., DDPM (2006.11239); Song et al., DDIM (2010.02502) and Score SDE (2011.13456); Salimans and Ho,
Progressive Distillation (2202.00512); Lu et al., DPM-Solver (2206.00927).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from effdl.core.errors import check, check_choice, check_integer, check_number

PREDICTIONS = ("epsilon", "sample", "v_prediction", "velocity", "score")
SCHEDULES = ("linear", "scaled_linear", "cosine", "vpsde", "logsnr")
LARGEST_LOG_SNR = 20.0  # of "logsnr", at the data; its negative at the noise


def betas(name: str, steps: int, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """Per-step variances beta, ``[steps]`` float64, index 0 next to the data.

    Args:
        name: ``"linear"`` from ``start`` to ``end``; ``"scaled_linear"``: their square roots are linear (Stable
            Diffusion: 0.00085 to 0.012); ``"cosine"``: alpha-bar = cos^2((t + .008)/1.008 pi/2), beta at most 0.999;
            ``"vpsde"``: the steps of the continuous VP-SDE whose rate rises from ``start`` to ``end`` (ProDiff: 0.1
            and 40), ``beta_t = 1 - exp(-start/n - (end - start)(2 t - 1)/(2 n^2))``; ``"logsnr"``: a cosine whose
            log-SNR log(a^2/s^2) falls from 20 to -20, ``-2 log tan(A t/n + B)``, so that alpha-bar is
            ``cos^2(A t/n + B)``, B = arctan(e^-10), A = arctan(e^10) - B (Salimans and Ho). (ProDiff's released code
            hands these log-SNRs on as betas, which gives no schedule: they are above 1 and negative.)
        steps: n >= 1.
        start, end: as said; the cosines have no use for them.

    Raises:
        ConfigurationError: unknown name, n < 1, rates out of order.

    Example::

        scheduler = DDPMScheduler(trained_betas=betas("vpsde", 5, 0.1, 40.0).numpy())
    """
    check_choice("schedule", name, SCHEDULES)
    check_integer("steps", steps, 1)
    if name == "cosine":
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        alpha_bar = ((t + 0.008) / 1.008 * math.pi / 2).cos().square()
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    if name == "logsnr":
        near = math.atan(math.exp(-LARGEST_LOG_SNR / 2))
        t = torch.arange(steps + 1, dtype=torch.float64) / steps
        alpha_bar = (t * (math.pi / 2 - 2 * near) + near).cos().square()
        alpha_bar[0] = 1  # the first step leaves from the data
        return 1 - alpha_bar[1:] / alpha_bar[:-1]
    check_number("start", start, 0, float("inf"), closed="[)")
    check(start <= end, "start", start, f"at most end={end}")
    if name == "vpsde":
        t = torch.arange(1, steps + 1, dtype=torch.float64)
        return -torch.expm1(-start / steps - 0.5 * (end - start) * (2 * t - 1) / steps**2)
    if name == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square()


def expand(t: Tensor, like: Tensor) -> Tensor:
    """``t`` of shape ``[B]``, seen as ``[B, 1, ..., 1]`` beside ``like``."""
    return t.reshape(-1, *[1] * (like.dim() - 1))


def alpha_sigma(alphas_cumprod: Tensor, t: Tensor, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``(a, s)`` of integer times, ``a = sqrt(alpha-bar_t)``, ``s = sqrt(1 - alpha-bar_t)``, in at least fp32.

    Args:
        alphas_cumprod: alpha-bar, ``[T]``; moved to the device of ``t``.
        t: int ``[B]``, or any shape.
        like: a tensor ``[B, ...]``: the answer takes shape ``[B, 1, ..., 1]``.
    """
    alpha_bar = alphas_cumprod.to(t.device)[t]
    alpha_bar = alpha_bar.to(torch.promote_types(alpha_bar.dtype, torch.float32))
    alpha_bar = alpha_bar if like is None else expand(alpha_bar, like)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def add_noise(x0: Tensor, noise: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """``x_t = a x_0 + s eps`` (DDPM, eq. 4)."""
    return a * x0 + s * noise


def data_and_noise(output: Tensor, x_t: Tensor, a: Tensor, s: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """``(x_0, eps)`` that a network's output means at ``x_t``; see :func:`convert` for the predictions.

    No division by zero is avoided: x_0 from ``"epsilon"`` wants a > 0, eps from ``"sample"`` s > 0.
    """
    check_choice("prediction", prediction, PREDICTIONS)
    if prediction == "sample":
        return output, (x_t - a * output) / s
    if prediction == "v_prediction":
        square = a.square() + s.square()  # 1 on variance-preserving schedules
        return (a * x_t - s * output) / square, (s * x_t + a * output) / square
    if prediction == "velocity":
        return (x_t - s * output) / (a + s), (x_t + a * output) / (a + s)
    eps = output if prediction == "epsilon" else -s * output
    return (x_t - s * eps) / a, eps


def prediction_of(x0: Tensor, noise: Tensor, a: Tensor, s: Tensor, prediction: str) -> Tensor:
    """What a network with this prediction should say: a training target, or the end of a conversion."""
    check_choice("prediction", prediction, PREDICTIONS)
    if prediction == "epsilon":
        return noise
    if prediction == "sample":
        return x0
    if prediction == "v_prediction":
        return a * noise - s * x0
    return noise - x0 if prediction == "velocity" else -noise / s


def convert(output: Tensor, x_t: Tensor, a: Tensor, s: Tensor, source: str, target: str) -> Tensor:
    """A network's output at ``x_t = a x_0 + s eps``, said in another way.

    ================ ============================================
    ``epsilon``      eps
    ``sample``       x_0
    ``v_prediction`` a eps - s x_0 (Salimans and Ho)
    ``velocity``     eps - x_0, of the straight line a = 1 - t
    ``score``        grad log p_t(x_t) = -eps / s
    ================ ============================================

    Args:
        output: ``[B, ...]``, and ``x_t`` of the same shape.
        a, s: broadcastable; :func:`alpha_sigma`.
        source, target: names from the table.

    Example::

        a, s = alpha_sigma(scheduler.alphas_cumprod, t, x_t)
        x0 = convert(unet(x_t, t).sample, x_t, a, s, "epsilon", "sample")
    """
    check_choice("target", target, PREDICTIONS)
    if source == target:
        return output
    return prediction_of(*data_and_noise(output, x_t, a, s, source), a, s, target)


def ddim_step(x0: Tensor, x_t: Tensor, a_t: Tensor, s_t: Tensor, a_e: Tensor, s_e: Tensor) -> Tensor:
    """From ``x_t`` to time e without new noise: ``a_e x_0 + (s_e / s_t)(x_t - a_t x_0)`` (DDIM, eq. 12 at eta = 0)."""
    return a_e * x0 + (s_e / s_t) * (x_t - a_t * x0)


class VPSchedule:
    """A variance-preserving schedule in continuous time t in [0, 1], data at 0; subclasses give two functions.

    ``log_alpha(t)`` is log a; everything else follows from ``a^2 + s^2 = 1``. Times and answers are tensors of one
    shape, in the dtype of ``t`` (use fp32 or fp64).
    """

    def log_alpha(self, t: Tensor) -> Tensor:
        raise NotImplementedError

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        raise NotImplementedError

    def alpha(self, t: Tensor) -> Tensor:
        """a(t)."""
        return self.log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        """s(t) = sqrt(1 - a^2), by expm1: exact near the data, where 1 - a^2 would underflow."""
        return (-torch.expm1(2 * self.log_alpha(t))).sqrt()

    def half_log_snr(self, t: Tensor) -> Tensor:
        """lambda_t = log(a / s) (DPM-Solver's)."""
        log_alpha = self.log_alpha(t)
        return log_alpha - 0.5 * torch.log(-torch.expm1(2 * log_alpha))

    def inverse(self, half_log_snr: Tensor) -> Tensor:
        """t of lambda: ``log a = -log(1 + exp(-2 lambda)) / 2``."""
        return self.time_of_log_alpha(-0.5 * torch.nn.functional.softplus(-2 * half_log_snr))


@dataclass(frozen=True)
class LinearVP(VPSchedule):
    """``beta(t) = beta_min + t (beta_max - beta_min)``; ``log a = -t^2 (beta_max - beta_min)/4 - t beta_min/2``.

    Example::

        schedule = LinearVP()
        t = schedule.inverse(schedule.half_log_snr(torch.tensor([0.5])))     # 0.5
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        check_number("beta_min", self.beta_min, 0, float("inf"), closed="[)")
        valid = "above 0 and at least beta_min"
        check(0 < self.beta_max < float("inf") and self.beta_max >= self.beta_min, "beta_max", self.beta_max, valid)

    def beta(self, t: Tensor) -> Tensor:
        """The rate of the VP-SDE, dx = -beta x / 2 dt + sqrt(beta) dw."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * t.square() * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        rise, linear = self.beta_max - self.beta_min, self.beta_min
        # the root written without the difference of two nearly equal numbers
        return -4 * log_alpha / (linear + (linear**2 - 4 * rise * log_alpha).sqrt())


@dataclass(frozen=True)
class CosineVP(VPSchedule):
    """``a(t) = cos((t + .008)/1.008 pi/2) / cos(.008/1.008 pi/2)`` (Nichol and Dhariwal); a(1) = 0: stop short of 1."""

    offset: float = 0.008

    def _angle(self, t: Tensor | float) -> Tensor | float:
        return (t + self.offset) / (1 + self.offset) * math.pi / 2

    def log_alpha(self, t: Tensor) -> Tensor:
        return torch.log(torch.cos(self._angle(t))) - math.log(math.cos(self._angle(0.0)))

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        angle = torch.acos(torch.exp(log_alpha) * math.cos(self._angle(0.0)))
        return angle * 2 / math.pi * (1 + self.offset) - self.offset


class TableVP(VPSchedule):
    """A table of alpha-bar as a schedule: entry i is time (i + 1)/T, log a is linear between (DPM-Solver's reading).

    Args:
        alphas_cumprod: alpha-bar ``[T]``, falling; kept in float64.

    Example::

        schedule = TableVP(DDPMScheduler().alphas_cumprod)
        label = schedule.label(t)                               # what a network trained on the table wants
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        table = 0.5 * torch.as_tensor(alphas_cumprod).double().cpu().log()
        valid = "a falling table of numbers in (0, 1)"
        falling = bool((table.diff() < 0).all()) and bool((table < 0).all()) and bool(torch.isfinite(table).all())
        check(table.dim() == 1 and len(table) >= 2 and falling, "alphas_cumprod", tuple(table.shape), valid)
        self._log_alpha = table

    def _on(self, like: Tensor) -> tuple[Tensor, Tensor]:
        count = len(self._log_alpha)
        times = torch.arange(1, count + 1, dtype=torch.float64, device=like.device) / count
        return times, self._log_alpha.to(like.device)

    def label(self, t: Tensor) -> Tensor:
        """The (fractional) index of a time: ``t T - 1``, at least 0."""
        return (t * len(self._log_alpha) - 1).clamp(min=0)

    def log_alpha(self, t: Tensor) -> Tensor:
        times, table = self._on(t)
        return _interpolate(t, times, table)

    def time_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        times, table = self._on(log_alpha)
        return _interpolate(log_alpha, table.flip(0), times.flip(0))


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise-linear through (xs, ys), xs rising; goes on straight beyond the ends. In the dtype of ``x``."""
    index = torch.searchsorted(xs, x.detach().double().contiguous()).clamp(1, len(xs) - 1)
    left, right = xs[index - 1], xs[index]
    weight = (x.double() - left) / (right - left)
    return (ys[index - 1] + weight * (ys[index] - ys[index - 1])).to(x.dtype)

"""Densities of a flow's training times: uniform, logit-normal, mode, cosmap; and how resolution shifts them.

The convention of this file is the paper's and diffusers': data at t = 0, noise at t = 1, t = sigma,
``z_t = (1 - t) x_0 + t eps`` and the logarithm of the signal-to-noise ratio ``lambda = 2 log((1 - t) / t)``.

Source: Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (arXiv 2403.03206),
sections 3.1 and 5.3.2.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from effdl.core.errors import check, check_choice, check_number
from effdl.diffusion._flow import wide

MODE_MAX = 2 / (math.pi - 2)  # beyond it f is no longer monotone


class TimestepSampler(ABC):
    """A probability density pi on the times [0, 1]; a subclass says its quantile function, its cdf and its pdf.

    Drawing t from pi and keeping the plain velocity loss weights the loss with pi(t) in expectation, with less variance
    where pi is large: never do both.
    """

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """``count`` times ``[count]`` in fp32, on the generator's device (half precision has too few near 1)."""
        return self.icdf(torch.rand(count, generator=generator, device=generator.device if generator else None))

    @abstractmethod
    def icdf(self, q: Tensor) -> Tensor:
        """The time below which a share ``q`` in [0, 1] of the draws lies."""

    @abstractmethod
    def cdf(self, t: Tensor) -> Tensor:
        """The share of draws below times ``t`` in [0, 1]."""

    def pdf(self, t: Tensor) -> Tensor:
        """pi(t), of any shape; 0 outside [0, 1]."""
        t = wide(t)
        return torch.where((t >= 0) & (t <= 1), self._pdf(t.clamp(0, 1)), torch.zeros_like(t))

    @abstractmethod
    def _pdf(self, t: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Uniform(TimestepSampler):
    """pi(t) = 1: the plain rectified flow."""

    def icdf(self, q: Tensor) -> Tensor:
        return wide(q)

    def cdf(self, t: Tensor) -> Tensor:
        return wide(t)

    def _pdf(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True)
class LogitNormal(TimestepSampler):
    """``t = sigmoid(m + s n)``, n ~ N(0, 1) (eq. 19): most draws in the middle, none at the ends.

    Args:
        mean: m; above 0 it moves the draws to the noise.
        std: s > 0.

    Example::

        t = LogitNormal(0.0, 1.0).sample(64, torch.Generator().manual_seed(0))
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        check_number("density", self.mean, -float("inf"), float("inf"), closed="()", fix="m of logit_normal(m, s).")
        check_number("density", self.std, 0, float("inf"), closed="()", fix="s of logit_normal(m, s), above 0.")

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        device = generator.device if generator else None
        return self.from_normal(torch.randn(count, generator=generator, device=device))

    def from_normal(self, n: Tensor) -> Tensor:
        """The time of a standard normal draw."""
        return torch.sigmoid(self.mean + self.std * wide(n))

    def icdf(self, q: Tensor) -> Tensor:
        return self.from_normal(torch.special.ndtri(wide(q)))

    def cdf(self, t: Tensor) -> Tensor:
        return torch.special.ndtr((torch.logit(wide(t)) - self.mean) / self.std)

    def _pdf(self, t: Tensor) -> Tensor:
        inside = t.clamp(torch.finfo(t.dtype).tiny, 1 - torch.finfo(t.dtype).eps)
        z = (torch.logit(inside) - self.mean) / self.std
        density = torch.exp(-z.square() / 2) / (self.std * math.sqrt(2 * math.pi) * inside * (1 - inside))
        return torch.where((t > 0) & (t < 1), density, torch.zeros_like(t))


@dataclass(frozen=True)
class Mode(TimestepSampler):
    """``t = f(u) = 1 - u - s (cos^2(pi u / 2) - 1 + u)``, u ~ U(0, 1) (eq. 20), symmetric and above 0 at the ends.

    Args:
        scale: s in [-1, 2 / (pi - 2)]; 0 is uniform, above it favours the middle, below it the ends.

    Example::

        t = Mode(1.29).sample(64)
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        fix = f"s of mode(s): f is monotone there alone, {MODE_MAX:.4f} at most."
        check_number("density", self.scale, -1, MODE_MAX, fix=fix)

    def map(self, u: Tensor) -> Tensor:
        """f(u)."""
        u = wide(u)
        return (1 - u - self.scale * (torch.cos(math.pi / 2 * u).square() - 1 + u)).clamp(0, 1)

    def slope(self, u: Tensor) -> Tensor:
        """f'(u) = -1 - s + s (pi / 2) sin(pi u), nowhere above 0."""
        return -1 - self.scale + self.scale * (math.pi / 2) * torch.sin(math.pi * wide(u))

    def icdf(self, q: Tensor) -> Tensor:
        return self.map(1 - wide(q))  # f falls

    def cdf(self, t: Tensor) -> Tensor:
        return (1 - self._inverse(t)).to(wide(t).dtype)

    def _inverse(self, t: Tensor) -> Tensor:
        """u with f(u) = t, by bisection in fp64."""
        t = t.double()
        low, high = torch.zeros_like(t), torch.ones_like(t)
        for _ in range(60):
            middle = (low + high) / 2
            right = self.map(middle) > t
            low, high = torch.where(right, middle, low), torch.where(right, high, middle)
        return (low + high) / 2

    def _pdf(self, t: Tensor) -> Tensor:
        return (1 / self.slope(self._inverse(t)).abs()).to(t.dtype)


@dataclass(frozen=True)
class CosMap(TimestepSampler):
    """``t = 1 - 1 / (tan(pi u / 2) + 1)`` (eq. 21): the signal-to-noise ratios of the cosine schedule.

    diffusers' ``cosmap`` draws uniformly and *weights* with this pdf: equal in expectation, not in variance.
    """

    def icdf(self, q: Tensor) -> Tensor:
        angle = math.pi / 2 * wide(q)
        return torch.sin(angle) / (torch.sin(angle) + torch.cos(angle))

    def cdf(self, t: Tensor) -> Tensor:
        t = wide(t)
        return 2 / math.pi * torch.atan2(t, 1 - t)

    def _pdf(self, t: Tensor) -> Tensor:
        return 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t.square())


@dataclass(frozen=True)
class Mirrored(TimestepSampler):
    """Another density with t and 1 - t exchanged: what diffusers' training scripts draw.

    They take a draw u for an index into the scheduler's times, which fall: idx = int(1000 u) is t = 1 - u, so their
    ``logit_mean`` has the sign opposite to the paper's m.
    """

    density: TimestepSampler

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        return 1 - self.density.sample(count, generator)

    def icdf(self, q: Tensor) -> Tensor:
        return 1 - self.density.icdf(1 - wide(q))

    def cdf(self, t: Tensor) -> Tensor:
        return 1 - self.density.cdf(1 - wide(t))

    def _pdf(self, t: Tensor) -> Tensor:
        return self.density.pdf(1 - t)


DENSITIES = {"uniform": Uniform, "logit_normal": LogitNormal, "mode": Mode, "cosmap": CosMap}
SIGNS = ("paper", "diffusers")


def timestep_sampler(density: str | TimestepSampler, convention: str = "paper") -> TimestepSampler:
    """A density by the name that the paper gives it.

    Args:
        density: ``"uniform"``, ``"logit_normal(0, 1)"`` (m, s), ``"mode(1.29)"`` (s), ``"cosmap"``; numbers may be left
            out. Or a sampler of one's own.
        convention: ``"diffusers"``: mirrored, as its training scripts mean m.

    Raises:
        ConfigurationError: an unknown name, numbers outside their range.

    Example::

        t = timestep_sampler("logit_normal(0.5, 0.6)").sample(64)
    """
    check_choice("convention", convention, SIGNS)
    if isinstance(density, str):
        found = re.fullmatch(r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*", density)
        check(found is not None, "density", density, "a name and perhaps numbers", "For example 'logit_normal(0, 1)'.")
        name, numbers = found.groups()
        check_choice("density", name, DENSITIES)
        density = DENSITIES[name](*_numbers(density, numbers, len(DENSITIES[name].__dataclass_fields__)))
    named = ", ".join(DENSITIES)
    check(isinstance(density, TimestepSampler), "density", density, f"a TimestepSampler or one of {named}")
    return Mirrored(density) if convention == "diffusers" else density


def _numbers(density: str, text: str | None, most: int) -> list[float]:
    try:
        numbers = [float(part) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        numbers = [math.nan] * (most + 1)
    check(len(numbers) <= most, "density", density, f"at most {most} numbers in the brackets")
    return numbers


def check_shift(shift: float, argument: str = "shift") -> None:
    """Raise unless alpha is a positive number."""
    check_number(argument, shift, 0, float("inf"), closed="()", fix="1 shifts nothing; the paper takes 3 at 1024^2.")


def shift_time(t: Tensor, alpha: float) -> Tensor:
    """``t_m = alpha t_n / (1 + (alpha - 1) t_n)`` (eq. 23): as much destroyed at m pixels as was at n.

    It adds -2 log alpha to the logarithm of the signal-to-noise ratio. alpha = exp(mu) is Flux's dynamic shift.

    Args:
        t: times ``[...]`` in [0, 1].
        alpha: sqrt(m / n) (:func:`resolution_shift`), or what looks best: the paper takes 3 where this says 4.

    Raises:
        ConfigurationError: alpha <= 0.

    Example::

        t = shift_time(torch.rand(64), resolution_shift(1024**2, 256**2))
    """
    check_shift(alpha, "alpha")
    return alpha * t / (1 + (alpha - 1) * t)


def resolution_shift(pixels: int, tuned_at: int) -> float:
    """``alpha = sqrt(m / n)`` for m pixels (or tokens) where the density was tuned at n."""
    for name, value in (("pixels", pixels), ("tuned_at", tuned_at)):
        check_number(name, value, 0, float("inf"), closed="()")
    return math.sqrt(pixels / tuned_at)


def log_snr(t: Tensor) -> Tensor:
    """``lambda(t) = 2 log((1 - t) / t)``, finite also at 0 and 1 (clamped inside the logarithm alone)."""
    t = wide(t)
    info = torch.finfo(t.dtype)
    return 2 * (torch.log1p(-t.clamp(max=1 - info.eps)) - torch.log(t.clamp(min=info.tiny)))


def loss_weight(t: Tensor, density: TimestepSampler | None = None) -> Tensor:
    """w(t) of ``-1/2 E_{t~U} [w lambda' || eps_theta - eps ||^2]`` that the plain velocity loss amounts to.

    ``t / (1 - t) pi(t)`` for times drawn from pi (section 3.1), so all objectives compare on one scale.

    Args:
        t: times ``[...]`` in (0, 1).
        density: pi; ``None``: uniform.
    """
    t = wide(t)
    return t / (1 - t) * (density or Uniform()).pdf(t)

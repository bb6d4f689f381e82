"""score-sde: the three forward equations, as small classes.

``dx = f(x, t) dt + g(t) dw``, t in [0, 1], data at 0, noise at 1. All three have a linear drift ``f = rate(t) x``,
hence ``p(x_t | x_0) = N(scale(t) x_0, std(t)^2 I)``. With ``L(t) = -t^2 (b1 - b0)/4 - t b0/2``, which is
``LinearVP.log_alpha``:

======= ============= ============================ ======= ===================== ==============
name    rate          g^2                          scale   std                   prior
======= ============= ============================ ======= ===================== ==============
ve      0             2 sigma^2 ln(smax/smin)      1       sigma(t)              N(0, smax^2 I)
vp      -beta(t)/2    beta(t)                      e^L     sqrt(1 - e^{2 L})     N(0, I)
subvp   -beta(t)/2    beta(t) (1 - e^{4 L})        e^L     1 - e^{2 L} (no root) N(0, I)
======= ============= ============================ ======= ===================== ==============

Source: Song et al., Score-Based Generative Modeling through Stochastic Differential Equations (2011.13456), appendices
B, C and E. Times are ``[B]``, fp32 or fp64; answers of shape ``[B]`` in the same dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from effdl.core.errors import ConfigurationError, check, check_choice, check_integer, check_number
from effdl.core.noise import LinearVP, add_noise, expand
from effdl.diffusion._flow import wide

Score = Callable[[Tensor, Tensor], Tensor]  # s(x [B, ...], t [B]) -> grad log p_t(x), [B, ...]


class SDE:
    """A forward equation with a linear drift; see the table in this file.

    Args:
        steps: N, of the discretised reverse process (predictors, correctors); training knows nothing of it.

    Attributes:
        name: in ``sde.json`` and checkpoints.
        eps: where sampling stops short of the data; below, the score is too steep.
        snr: r of the Langevin corrector.
        corrector: which one is worth its calls: none for vp and subvp.
        reduce_mean: whether the paper's configurations average (or halve and sum) the loss over the pixels.
        prior_std: of p_1.
    """

    name: ClassVar[str]
    eps: ClassVar[float] = 1e-3
    snr: ClassVar[float] = 0.01
    corrector: ClassVar[str] = "none"
    reduce_mean: ClassVar[bool] = True
    prior_std: float = 1.0

    def __init__(self, steps: int = 1000) -> None:
        check_integer("steps", steps, 1)
        self.steps = steps

    def rate(self, t: Tensor) -> Tensor:
        """f(x, t) = rate(t) x."""
        raise NotImplementedError

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t)."""
        raise NotImplementedError

    def scale(self, t: Tensor) -> Tensor:
        """E[x_t | x_0] = scale(t) x_0."""
        raise NotImplementedError

    def std(self, t: Tensor) -> Tensor:
        """Of x_t given x_0."""
        raise NotImplementedError

    def index(self, t: Tensor) -> Tensor:
        """i = floor(t (N - 1)), the step of the discretised process that a time belongs to."""
        # the sampler's times are i / (N - 1) and a little more, which fp32 may round to a little less
        return (t * (self.steps - 1) + 1e-3).long()

    def discrete(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``(rate_i, G_i)``: one forward step is ``x + rate_i x + G_i z``. Here Euler's, with dt = 1/N."""
        return self.rate(t) / self.steps, self.diffusion(t) / math.sqrt(self.steps)

    def langevin_alpha(self, t: Tensor) -> Tensor:
        """alpha_i in the corrector's step size."""
        return torch.ones_like(t)

    def ancestral(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(a, b, c)`` of ancestral sampling, ``x <- (x + a s) b + c z``."""
        raise ConfigurationError(f"predictor='ancestral' is not defined for {self.name}: use 'reverse_diffusion'.")

    def marginal(self, x0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``[B, ...]`` and std ``[B, 1, ...]`` of x_t given x_0, in at least fp32."""
        return expand(self.scale(t), x0) * wide(x0), expand(self.std(t), x0)

    def perturb(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """``x_t = scale x_0 + std z``."""
        return add_noise(wide(x0), noise, expand(self.scale(t), x0), expand(self.std(t), x0))

    def flow(self, score: Score, x: Tensor, t: Tensor) -> Tensor:
        """The probability-flow ODE's slope ``f - g^2 s / 2`` (eq. 13)."""
        return expand(self.rate(t), x) * x - 0.5 * expand(self.diffusion(t), x).square() * score(x, t)

    def prior(self, shape: tuple[int, ...], generator: torch.Generator | None = None) -> Tensor:
        """x(1), drawn on the generator's device (without one on the CPU)."""
        device = "cpu" if generator is None else generator.device
        return self.prior_std * torch.randn(shape, generator=generator, device=device)

    def prior_log_density(self, x: Tensor) -> Tensor:
        """log p_1 of states ``[B, ...]``, in nats, ``[B]``."""
        square = wide(x).flatten(1).square().sum(1) / self.prior_std**2
        return -0.5 * (square + x[0].numel() * math.log(2 * math.pi * self.prior_std**2))

    def config(self) -> dict[str, Any]:
        """Name and arguments: ``sde_of(sde.config())`` is the same equation."""
        return {"name": self.name, "steps": self.steps}

    def with_steps(self, steps: int | None) -> SDE:
        """The same equation with another N; ``None``: itself."""
        return self if steps is None else sde_of(self.config() | {"steps": steps})


class VE(SDE):
    """Variance exploding: ``sigma(t) = smin (smax / smin)^t``.

    Paper and official code leave out the smin^2 that the exact std^2 = sigma^2 - smin^2 has: keep the data's variance
    well above it.

    Args:
        sigma_min: smin > 0.
        sigma_max: smax > smin, about the largest distance of two data points (CIFAR-10: 50; 256 x 256: 378).
        steps: N.
    """

    name = "ve"
    eps = 1e-5
    snr = 0.16
    corrector = "langevin"
    reduce_mean = False

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0, steps: int = 1000) -> None:
        super().__init__(steps)
        check_number("sigma_min", sigma_min, 0, float("inf"), closed="()")
        check_number("sigma_max", sigma_max, sigma_min, float("inf"), closed="()", fix="It is the prior's std.")
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)
        self.prior_std = self.sigma_max
        self._log_ratio = math.log(self.sigma_max / self.sigma_min)

    def rate(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.std(t) * math.sqrt(2 * self._log_ratio)

    def scale(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def std(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.exp(t * self._log_ratio)

    def _sigmas(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sigma_i and sigma_{i-1} of a geometric table, sigma_{-1} = 0."""
        i = self.index(t).to(t.dtype)
        now, before = (self.std(k / max(self.steps - 1, 1)) for k in (i, i - 1))
        return now, torch.where(i > 0, before, 0.0)

    def discrete(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """SMLD's: ``G_i = sqrt(sigma_i^2 - sigma_{i-1}^2)``."""
        now, before = self._sigmas(t)
        return torch.zeros_like(t), (now.square() - before.square()).sqrt()

    def ancestral(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        now, before = self._sigmas(t)
        gap = now.square() - before.square()
        return gap, torch.ones_like(t), before * gap.sqrt() / now

    def config(self) -> dict[str, Any]:
        return {"name": self.name, "sigma_min": self.sigma_min, "sigma_max": self.sigma_max, "steps": self.steps}


class VP(SDE):
    """Variance preserving: DDPM in continuous time, ``beta(t) = b0 + t (b1 - b0)``.

    Args:
        beta_min: b0 >= 0.
        beta_max: b1 >= b0.
        steps: N.
    """

    name = "vp"

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0, steps: int = 1000) -> None:
        super().__init__(steps)
        self.schedule = LinearVP(beta_min, beta_max)

    def rate(self, t: Tensor) -> Tensor:
        return -0.5 * self.schedule.beta(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.schedule.beta(t).sqrt()

    def scale(self, t: Tensor) -> Tensor:
        return self.schedule.alpha(t)

    def std(self, t: Tensor) -> Tensor:
        return self.schedule.sigma(t)

    def _beta(self, t: Tensor) -> Tensor:
        """beta_i of ``linspace(b0 / N, b1 / N, N)``."""
        check(self.steps > self.schedule.beta_max, "steps", self.steps, f"more than beta_max={self.schedule.beta_max}",
              "Fewer steps: predictor='euler_maruyama', or the ODE.")  # fmt: skip
        return self.schedule.beta(self.index(t).to(t.dtype) / max(self.steps - 1, 1)) / self.steps

    def discrete(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """DDPM's: ``x <- sqrt(1 - beta_i) x + sqrt(beta_i) z``."""
        beta = self._beta(t)
        return torch.sqrt(1 - beta) - 1, beta.sqrt()

    def langevin_alpha(self, t: Tensor) -> Tensor:
        return 1 - self._beta(t)

    def ancestral(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        beta = self._beta(t)
        return beta, (1 - beta).rsqrt(), beta.sqrt()

    def config(self) -> dict[str, Any]:
        b0, b1 = self.schedule.beta_min, self.schedule.beta_max
        return {"name": self.name, "beta_min": b0, "beta_max": b1, "steps": self.steps}


class SubVP(VP):
    """Sub-variance preserving: VP's mean with a smaller variance, for better likelihoods.

    The official code has no ``alphas`` here, so that its Langevin corrector fails; alpha_i = 1 - beta_i, as for VP.
    """

    name = "subvp"

    def diffusion(self, t: Tensor) -> Tensor:
        return (-self.schedule.beta(t) * torch.expm1(4 * self.schedule.log_alpha(t))).sqrt()

    def std(self, t: Tensor) -> Tensor:
        return -torch.expm1(2 * self.schedule.log_alpha(t))  # 1 - e^{2 L} would be 0 in fp32 near the data

    def discrete(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return SDE.discrete(self, t)

    def ancestral(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return SDE.ancestral(self, t)


SDES: dict[str, type[SDE]] = {cls.name: cls for cls in (VE, VP, SubVP)}


def sde_of(given: SDE | dict[str, Any] | str) -> SDE:
    """An equation by name, from its :meth:`SDE.config`, or itself.

    Raises:
        ConfigurationError: another name, an argument that the equation does not have, or one out of range.

    Example::

        sde = sde_of({"name": "ve", "sigma_max": 378.0})
    """
    if isinstance(given, SDE):
        return given
    options = {"name": given} if isinstance(given, str) else given
    check(isinstance(options, dict) and "name" in options, "sde", given, f"an SDE, or a name among {sorted(SDES)}")
    check_choice("sde", options["name"], SDES)
    options = {key: value for key, value in options.items() if key != "name"}
    try:
        return SDES[given if isinstance(given, str) else given["name"]](**options)
    except TypeError as error:
        raise ConfigurationError(f"sde={given!r} is not valid: {error}.") from error

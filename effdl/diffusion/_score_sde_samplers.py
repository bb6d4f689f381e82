"""score-sde: predictors, correctors, the predictor-corrector loop and the ODE.

A predictor and a corrector are functions ``(sde, score, x, t, noise) -> (x, x_mean)`` with t ``[B]``; ``x_mean`` is the
state before its noise, and the last one is the sample. Source: appendices E to G of the paper.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from effdl.core.errors import check, check_choice, check_integer, check_number
from effdl.core.noise import expand
from effdl.core.solvers import rk45
from effdl.diffusion._flow import wide
from effdl.diffusion._score_sde_equations import SDE, Score

Pair = tuple[Tensor, Tensor]
Constraint = Callable[[Tensor, Tensor, Tensor], Pair]  # (x, x_mean, t) -> (x, x_mean)


def euler_maruyama(sde: SDE, score: Score, x: Tensor, t: Tensor, noise: Tensor, ode: bool = False) -> Pair:
    """``x_mean = x - (f - g^2 s) / N``; ``x = x_mean + g sqrt(1/N) z``."""
    return _reverse(sde.rate(t) / sde.steps, sde.diffusion(t) / sde.steps**0.5, score, x, t, noise, ode)


def reverse_diffusion(sde: SDE, score: Score, x: Tensor, t: Tensor, noise: Tensor, ode: bool = False) -> Pair:
    """``x_mean = x - (f_i - G_i^2 s)``; ``x = x_mean + G_i z`` (eq. 46): the forward discretisation, run back."""
    return _reverse(*sde.discrete(t), score, x, t, noise, ode)


def _reverse(rate: Tensor, g: Tensor, score: Score, x: Tensor, t: Tensor, noise: Tensor, ode: bool) -> Pair:
    rate, g = expand(rate, x), expand(g, x)
    mean = x - rate * x + (0.5 if ode else 1.0) * g.square() * score(x, t)
    return (mean if ode else mean + g * noise), mean


def ancestral(sde: SDE, score: Score, x: Tensor, t: Tensor, noise: Tensor) -> Pair:
    """DDPM's (vp) or SMLD's (ve) posterior step (appendix F)."""
    weight, growth, std = (expand(value, x) for value in sde.ancestral(t))
    mean = (x + weight * score(x, t)) * growth
    return mean + std * noise, mean


def langevin(sde: SDE, score: Score, x: Tensor, t: Tensor, noise: Tensor, snr: float) -> Pair:
    """One Langevin step: ``eps = 2 alpha (r mean ||z|| / mean ||s||)^2``; ``x + eps s + sqrt(2 eps) z`` (algorithm 4).

    The norms are averaged over the batch (of this process), so a batch of one takes noisier steps.

    Raises:
        FloatingPointError: the score is zero everywhere, or not finite: there is no step size.
    """
    gradient = score(x, t)
    z_norm, s_norm = (v.flatten(1).norm(dim=1).mean() for v in (noise, gradient))
    step = 2 * sde.langevin_alpha(t) * (snr * z_norm / s_norm).square()
    if not bool(torch.isfinite(step).all()):
        where = f"t = {t[0].item():.3g}: mean |s| = {s_norm.item():.3g}"
        raise FloatingPointError(f"the corrector's step is not finite at {where}.")
    return _langevin_step(x, gradient, step, noise)


def annealed_langevin(sde: SDE, score: Score, x: Tensor, t: Tensor, noise: Tensor, snr: float) -> Pair:
    """Langevin with ``eps = 2 alpha (r std)^2``: the annealed dynamics of NCSN."""
    return _langevin_step(x, score(x, t), 2 * sde.langevin_alpha(t) * (snr * sde.std(t)).square(), noise)


def _langevin_step(x: Tensor, gradient: Tensor, step: Tensor, noise: Tensor) -> Pair:
    step = expand(step, x)
    mean = x + step * gradient
    return mean + (2 * step).sqrt() * noise, mean


PREDICTORS: dict[str, Callable[..., Pair] | None] = {
    "reverse_diffusion": reverse_diffusion, "euler_maruyama": euler_maruyama, "ancestral": ancestral, "none": None,
}  # fmt: skip
CORRECTORS: dict[str, Callable[..., Pair] | None] = {
    "langevin": langevin, "ald": annealed_langevin, "none": None,
}  # fmt: skip


class PCSampler:
    """Predictor-corrector sampling (algorithm 1): at each of N times from 1 to eps M corrector steps, then a predictor.

    It takes N (M + 1) calls of the score. What is returned is the mean of the last step, without its noise.

    Args:
        predictor: ``"reverse_diffusion"``, ``"euler_maruyama"``, ``"ancestral"`` (vp, ve) or ``"none"``.
        corrector: ``"langevin"``, ``"ald"`` or ``"none"``; ``None``: ``"langevin"`` for ve, else ``"none"``.
        corrector_steps: M.
        snr: r > 0; ``None``: 0.16 for ve, 0.01 for vp and subvp.
        eps: last time, in (0, 1); ``None``: 1e-5 for ve, 1e-3 for vp and subvp.
        probability_flow: the predictor steps along the ODE, without noise.

    Raises:
        ConfigurationError: an unknown name, a number out of range, ``"ancestral"`` with the ODE or (when called) with
            subvp.

    Example::

        x = PCSampler(corrector="langevin", snr=0.16)(VE(steps=200), score, (16, 3, 32, 32), generator(0))
    """

    def __init__(
        self,
        predictor: str = "reverse_diffusion",
        corrector: str | None = None,
        corrector_steps: int = 1,
        snr: float | None = None,
        eps: float | None = None,
        probability_flow: bool = False,
    ) -> None:
        check_choice("predictor", predictor, PREDICTORS)
        check_choice("corrector", corrector, (None, *CORRECTORS))
        check_integer("corrector_steps", corrector_steps, 1)
        check_range(snr=snr, eps=eps)
        check(not (probability_flow and predictor == "ancestral"), "predictor", predictor,
              "'reverse_diffusion' or 'euler_maruyama' with probability_flow")  # fmt: skip
        self.predictor, self.corrector, self.corrector_steps = predictor, corrector, corrector_steps
        self.snr, self.eps, self.probability_flow = snr, eps, probability_flow

    def check(self, sde: SDE) -> None:
        """Raise where the predictor does not exist for this equation."""
        if self.predictor == "ancestral":
            sde.ancestral(torch.ones(1))
        both = (self.predictor, self.corrector or sde.corrector)
        check(both != ("none", "none"), "predictor", "none", "a predictor or a corrector")

    @torch.no_grad()
    def __call__(
        self, sde: SDE, score: Score, start: Tensor | tuple[int, ...], generator: torch.Generator | None = None,
        constrain: Constraint | None = None,
    ) -> Tensor:  # fmt: skip
        """Samples ``[B, ...]``.

        Args:
            sde: the forward equation; its ``steps`` are N.
            score: s(x, t).
            start: x(1), or the shape of a draw from the prior.
            generator: of all noise.
            constrain: applied to (x, x_mean, t) after every update; see :class:`Known`.

        Raises:
            FloatingPointError: the state left the finite numbers (a larger N or a smaller snr helps).
        """
        self.check(sde)
        x = mean = wide(start) if isinstance(start, Tensor) else sde.prior(start, generator)
        for time in torch.linspace(1, self.eps or sde.eps, sde.steps, dtype=torch.float64).tolist():
            t = x.new_full((len(x),), time)
            for update in self._updates(sde, score):
                x, mean = update(x, t, normal_like(x, generator))
                x, mean = (x, mean) if constrain is None else constrain(x, mean, t)
            check_finite(mean, f"the sampler at t = {time:.3g} of N = {sde.steps}")
        return mean

    def _updates(self, sde: SDE, score: Score) -> list[Callable[[Tensor, Tensor, Tensor], Pair]]:
        predictor, corrector = PREDICTORS[self.predictor], CORRECTORS[self.corrector or sde.corrector]
        snr = self.snr or sde.snr
        ode = {"ode": True} if self.probability_flow else {}
        updates: list[Callable[[Tensor, Tensor, Tensor], Pair]] = []
        if corrector is not None:
            updates += [lambda x, t, noise: corrector(sde, score, x, t, noise, snr)] * self.corrector_steps
        if predictor is not None:
            updates += [lambda x, t, noise: predictor(sde, score, x, t, noise, **ode)]
        return updates


class ODESampler:
    """The probability-flow ODE (eq. 13) from 1 to eps by Runge-Kutta 4(5): deterministic, adaptive, invertible.

    The batch is one system, as in the official code: a sample depends on its batch mates at the size of the tolerance.

    Args:
        tolerance: relative and absolute, in (0, 1).
        eps: last time, in (0, 1); ``None``: 1e-5 for ve, 1e-3 for vp and subvp.
        denoise: end with a reverse-diffusion step without its noise.
        per_sample: solve row by row, each with step sizes of its own.

    Example::

        x = ODESampler()(sde, score, (16, 3, 32, 32), generator(0))
    """

    def __init__(
        self, tolerance: float = 1e-5, eps: float | None = None, denoise: bool = False, per_sample: bool = False
    ) -> None:
        check_number("tolerance", tolerance, 0, 1, closed="()")
        check_range(snr=None, eps=eps)
        self.tolerance, self.eps, self.denoise, self.per_sample = tolerance, eps, denoise, per_sample

    def check(self, sde: SDE) -> None:
        """Every equation has its ODE."""

    @torch.no_grad()
    def __call__(
        self, sde: SDE, score: Score, start: Tensor | tuple[int, ...], generator: torch.Generator | None = None
    ) -> Tensor:
        """Samples ``[B, ...]`` from x(1), given or drawn; arguments as in :meth:`PCSampler.__call__`."""
        x = wide(start) if isinstance(start, Tensor) else sde.prior(start, generator)
        eps = self.eps or sde.eps
        x = solve_flow(sde, score, x, 1.0, eps, self.tolerance, self.per_sample)
        if self.denoise:
            _, x = reverse_diffusion(sde, score, x, x.new_full((len(x),), eps), torch.zeros_like(x))
        return x


def solve_flow(
    sde: SDE, score: Score, x: Tensor, start: float, end: float, tolerance: float = 1e-5, per_sample: bool = False
) -> Tensor:
    """The probability-flow ODE between two times: a sample from x(1), or the latent code of data from x(eps).

    Args:
        sde: the forward equation.
        score: s(x, t).
        x: state ``[B, ...]`` at ``start``, kept in fp32 at least.
        start, end: times in [0, 1].
        tolerance, per_sample: as in ``core.solvers.rk45``.

    Example::

        code = solve_flow(sde, score, images, 1e-5, 1.0)
        torch.testing.assert_close(solve_flow(sde, score, code, 1.0, 1e-5), images, atol=1e-3, rtol=0)
    """

    def slope(time: float, state: Tensor) -> Tensor:
        return check_finite(sde.flow(score, state, state.new_full((len(state),), time)), f"the ODE at t = {time:.3g}")

    with full_precision(x):
        return rk45(slope, wide(x), start, end, tolerance, per_sample)


def full_precision(x: Tensor) -> torch.autocast:
    """No autocast: the rounding of half precision is far above an ODE's tolerance, and would stall the solver."""
    return torch.autocast(x.device.type, enabled=False)


def normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """N(0, I), drawn on the generator's device (without one on x's) and moved."""
    device = x.device if generator is None else generator.device
    return torch.randn(x.shape, generator=generator, device=device, dtype=x.dtype).to(x.device)


def check_range(snr: float | None, eps: float | None) -> None:
    """Raise unless r > 0 and 0 < eps < 1, where given."""
    if snr is not None:
        check_number("snr", snr, 0, float("inf"), closed="()")
    if eps is not None:
        check_number("eps", eps, 0, 1, closed="()")


def check_finite(x: Tensor, what: str) -> Tensor:
    """``x``, or a FloatingPointError; it waits for the device."""
    if not bool(torch.isfinite(x).all()):
        raise FloatingPointError(f"{what} met NaN or infinity: a larger N, a smaller snr or a larger eps may help.")
    return x

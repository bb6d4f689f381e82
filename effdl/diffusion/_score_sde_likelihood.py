"""score-sde: exact likelihoods and latent codes by the probability-flow ODE (section 4.3, appendix D.2)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from effdl.core.errors import check_choice
from effdl.core.solvers import rk45
from effdl.diffusion._flow import wide
from effdl.diffusion._score_sde_equations import SDE, Score
from effdl.diffusion._score_sde_samplers import check_finite, check_range, full_precision, normal_like

PROBES = ("rademacher", "gaussian", "exact")


class Likelihood(NamedTuple):
    """``bits`` per dimension ``[B]``, ``log_density`` in nats ``[B]``, ``latent`` x(1) ``[B, ...]``, and how often the
    score was called."""

    bits: Tensor
    log_density: Tensor
    latent: Tensor
    calls: int


def hutchinson(field: Callable[[Tensor], Tensor], x: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
    """``F(x)`` ``[B, ...]`` and ``v^T (dF/dx) v`` ``[B]``: unbiased for the divergence where E[v v^T] = I.

    Args:
        field: F, row by row.
        x: ``[B, ...]``; neither it nor its graph is touched.
        probe: v, like ``x``.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x, probe = x.detach().clone().requires_grad_(), probe.clone()
        value = field(x)
        (product,) = torch.autograd.grad((value * probe).sum(), x)
    return value.detach(), (product * probe).flatten(1).sum(1).detach()


def exact_divergence(field: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """``F(x)`` and its divergence ``[B]`` by D vector-Jacobian products, for small D."""
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        value = field(x)
        columns = value.flatten(1).unbind(1)
        total = torch.zeros_like(columns[0])
        for i, column in enumerate(columns):
            (row,) = torch.autograd.grad(column.sum(), x, retain_graph=i + 1 < len(columns))
            total = total + row.flatten(1)[:, i]
    return value.detach(), total.detach()


def likelihood(
    sde: SDE,
    score: Score,
    x: Tensor,
    divergence: Literal["rademacher", "gaussian", "exact"] = "rademacher",
    offset: float = 7.0,
    eps: float = 1e-5,
    tolerance: float = 1e-5,
    generator: torch.Generator | None = None,
) -> Likelihood:
    """log p_0 of data: ``log p_1(x(1))`` plus the integral of ``div F`` from eps to 1, F the ODE's slope.

    Args:
        sde: the forward equation.
        score: s(x, t), differentiable in x.
        x: dequantised data ``[B, ...]``.
        divergence: Hutchinson's estimate with a Rademacher or Gaussian probe, drawn once and kept over the whole solve
            (drawn anew, it would stall the solver); or ``"exact"``: D vector-Jacobian products per call.
        offset: added to the bits: log2 of the grey levels per unit of x. 256 levels: 7 in [-1, 1], 8 in [0, 1].
        eps: where the integral begins, in (0, 1).
        tolerance: of RK45, relative and absolute; the batch is one system.
        generator: of the probe.

    Warns:
        UserWarning: the data look quantised: a density has no bound there, and the bits mean nothing.

    Raises:
        ConfigurationError: unknown divergence, eps or tolerance out of range.
        FloatingPointError: the score is not finite on the way.

    Example::

        result = likelihood(VP(), score, dequantise(images, 256))
        print(result.bits.median(), result.calls)
    """
    check_choice("divergence", divergence, PROBES)
    check_range(snr=None, eps=eps)
    warn_if_quantised(x)
    x = wide(x) if x.is_floating_point() else x.float()
    probe, calls, size = _probe(x, divergence, generator), 0, x[0].numel()

    def slope(time: float, state: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        t = state.new_full((len(state),), time)
        field = lambda y: sde.flow(score, y, t)  # noqa: E731
        here = state[:, :size].reshape(x.shape)
        value, trace = exact_divergence(field, here) if probe is None else hutchinson(field, here, probe)
        return check_finite(torch.cat([value.flatten(1), trace[:, None]], 1), f"the ODE at t = {time:.3g}")

    begin = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], 1)
    with full_precision(x):
        end = rk45(slope, begin, eps, 1.0, tolerance)
    latent = end[:, :size].reshape(x.shape)
    log_density = sde.prior_log_density(latent) + end[:, size]
    return Likelihood(-log_density / (size * math.log(2)) + offset, log_density, latent, calls)


def _probe(x: Tensor, divergence: str, generator: torch.Generator | None) -> Tensor | None:
    if divergence == "exact":
        return None
    normal = normal_like(x, generator)
    return normal if divergence == "gaussian" else torch.where(normal < 0, -1.0, 1.0).to(x)


def warn_if_quantised(x: Tensor) -> None:
    """Warn of integers, or of at most 256 different values among many."""
    if not x.is_floating_point() or (x.numel() > 2048 and len(x.unique()) <= 256):
        text = "likelihood of quantised data means nothing (it has no bound): add uniform noise with dequantise()."
        warnings.warn(text, stacklevel=3)

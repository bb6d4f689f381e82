"""Straight-line flow matching as plain functions: interpolation, times, loss, samplers, guidance, straightness.

The convention of this file, and of every method built on it: noise ``x0`` at ``t = 0``, data ``x1`` at ``t = 1``,
``X_t = t x1 + (1 - t) x0`` and velocity ``x1 - x0``. A *velocity* is a callable ``v(x, t)`` with ``x`` of shape
``[B, ...]`` and ``t`` of shape ``[B]``; a *denoiser* is ``v(x, t, condition)``. Networks that count time the other
way are adapted once, by :class:`effdl.diffusion.instaflow.FlowDenoiser`.

Sources: Liu et al., Flow Straight and Fast (arXiv 2209.03003); Liu et al., InstaFlow (arXiv 2309.06380).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effdl.core import solvers
from effdl.core.errors import check, check_choice, check_integer, check_number
from effdl.core.noise import expand

Velocity = Callable[[Tensor, Tensor], Tensor]
Condition = Tensor | dict[str, Tensor] | None
REDUCTIONS = ("mean", "half_sum", "none")
TIMES = ("uniform", "t0", "t1")


def interpolate(x0: Tensor, x1: Tensor, t: Tensor) -> Tensor:
    """``X_t = t x1 + (1 - t) x0``, the straight line from noise to data (Flow Straight and Fast, eq. 1).

    Args:
        x0: noise ``[B, ...]``.
        x1: data of the same shape.
        t: times ``[B]`` in [0, 1].

    Example::

        x_t = interpolate(torch.randn_like(images), images, torch.rand(len(images)))
    """
    weight = expand(t, x0)
    return weight * x1 + (1 - weight) * x0


def check_times(schedule: Any, eps: Any) -> None:
    """Raise unless ``schedule`` is uniform, t0, t1 or a positive integer and ``eps`` lies in [0, 0.1)."""
    if isinstance(schedule, str):
        check_choice("times", schedule, TIMES)
    else:
        check_integer("times", schedule, 1, fix="An integer K draws t from {0, 1/K, ..., (K-1)/K}.")
    check_number("eps", eps, 0, 0.1, closed="[)")


def time_points(uniform: Tensor, schedule: str | int, eps: float = 1e-3) -> Tensor:
    """Training times from uniform draws.

    Args:
        uniform: draws ``[B]`` in [0, 1).
        schedule: ``"uniform"``: t in [eps, 1); ``"t0"``: t = eps; ``"t1"``: t = 1; an integer K: one of the K
            points where K Euler steps evaluate the velocity, k (1 - eps) / K + eps.
        eps: the smallest time, in [0, 0.1); keeps 1/t weightings finite in the official code, 0 is legal here.

    Returns:
        Times ``[B]``.

    Raises:
        ConfigurationError: unknown schedule, K < 1, eps outside [0, 0.1).

    Example::

        t = time_points(torch.rand(64), "uniform")
    """
    check_times(schedule, eps)
    if schedule == "t0":
        return torch.full_like(uniform, eps)
    if schedule == "t1":
        return torch.ones_like(uniform)
    fraction = uniform if schedule == "uniform" else torch.floor(uniform * schedule) / schedule
    return fraction * (1 - eps) + eps


def squared_error(prediction: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Squared error in fp32: ``"mean"`` over all elements, ``"half_sum"``: batch mean of half the squared norm, or
    ``"none"``: of each element, ``[B, ...]``."""
    check_choice("reduction", reduction, REDUCTIONS)
    square = (wide(prediction) - wide(target)).square()
    if reduction == "none":
        return square
    return square.mean() if reduction == "mean" else 0.5 * square.flatten(1).sum(1).mean()


def rectified_flow_loss(velocity: Velocity, x0: Tensor, x1: Tensor, t: Tensor, reduction: str = "mean") -> Tensor:
    """``E || v(X_t, t) - (x1 - x0) ||^2`` (Flow Straight and Fast, eq. 1).

    On reflow pairs it is InstaFlow's reflow loss, and with ``t = 0`` its distillation loss in L2.

    Args:
        velocity: ``v(x, t)``.
        x0: noise ``[B, ...]``.
        x1: data ``[B, ...]``; for reflow and distillation the end point of the teacher's ODE *from this very x0*.
        t: times ``[B]``.
        reduction: see :func:`squared_error`.

    Example::

        t = time_points(torch.rand(len(x1)), "uniform")
        loss = rectified_flow_loss(net, torch.randn_like(x1), x1, t)
        loss.backward()
    """
    return squared_error(velocity(interpolate(x0, x1, t), t), x1 - x0, reduction)


def wide(x: Tensor) -> Tensor:
    """``x`` in at least fp32: sums over steps and elements lose digits in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def euler_times(steps: int, eps: float = 0.0) -> list[float]:
    """Where ``steps`` Euler steps evaluate the velocity: ``i / N (1 - eps) + eps``."""
    check_integer("steps", steps, 1)
    return [i / steps * (1 - eps) + eps for i in range(steps)]


def euler(velocity: Velocity, x0: Tensor, steps: int, eps: float = 0.0) -> Tensor:
    """``x <- x + v(x, t_i) / N`` for ``i = 0 .. N-1``: calls ``velocity`` exactly ``steps`` times.

    Args:
        velocity: ``v(x, t)``.
        x0: noise ``[B, ...]``; the state is kept in fp32 at least.
        steps: N >= 1.
        eps: 0 is InstaFlow's rule, t_i = i/N; 1e-3 the one of Flow Straight and Fast, t_i = i/N (1-eps) + eps.

    Returns:
        The state at t = 1, ``[B, ...]``.

    Example::

        image = euler(net, torch.randn(4, 3, 32, 32), steps=1)
    """
    x = wide(x0)
    for time in euler_times(steps, eps):
        x = x + velocity(x, x.new_full((len(x),), time)) / steps
    return x


@torch.no_grad()
def rk45(
    velocity: Velocity, x: Tensor, eps: float = 1e-3, tolerance: float = 1e-5, reverse: bool = False
) -> Tensor:
    """The ODE from ``t = eps`` to 1 (or back) by SciPy's adaptive Runge-Kutta 4(5), one step size for the batch.

    Args:
        velocity: ``v(x, t)``.
        x: state ``[B, ...]`` at ``t = eps``, or at ``t = 1`` when ``reverse``.
        eps: where the interval begins.
        tolerance: relative and absolute.
        reverse: integrate from data to noise.

    Returns:
        The state at the other end, same shape, dtype and device.

    Example::

        x1 = rk45(net, x0)
        torch.testing.assert_close(rk45(net, x1, reverse=True), x0, atol=1e-3, rtol=0)
    """

    def slope(time: float, state: Tensor) -> Tensor:
        return velocity(state, state.new_full((len(state),), time))

    start, end = (1.0, eps) if reverse else (eps, 1.0)
    return solvers.rk45(slope, x, start, end, tolerance)


@torch.no_grad()
def straightness(velocity: Velocity, x0: Tensor, steps: int = 100) -> Tensor:
    """``S(v) = int_0^1 E || (X1 - X0) - v(X_t, t) ||^2 dt`` along v's own ODE path; 0 iff every path is straight.

    With Euler's path ``X1 - X0`` is the mean of the velocities met on the way, so S is their variance over time,
    summed over elements and averaged over the batch. Welford's update keeps it exact near zero, without a stored path.

    Args:
        velocity: ``v(x, t)``.
        x0: noise ``[B, ...]``.
        steps: Euler steps, N >= 2 (one step is straight by construction).

    Returns:
        A scalar tensor, in squared units of x.

    Example::

        self.log("instaflow/straightness", straightness(net, torch.randn(64, 3, 32, 32)))
    """
    check_integer("steps", steps, 2)
    x = wide(x0)
    mean, spread = torch.zeros_like(x), torch.zeros_like(x)
    for count, time in enumerate(euler_times(steps), start=1):
        v = wide(velocity(x, x.new_full((len(x),), time)))
        before = v - mean
        mean = mean + before / count
        spread = spread + before * (v - mean)
        x = x + v / steps
    return spread.flatten(1).sum(1).mean() / steps


def concatenate(first: Condition, second: Condition) -> Condition:
    """Two conditions, one batch: tensors are concatenated along dimension 0, dicts entry by entry."""
    if isinstance(first, dict):
        return {name: torch.cat([value, second[name]]) for name, value in first.items()}
    return torch.cat([first, second])


def guided_velocity(
    denoiser: Callable[[Tensor, Tensor, Any], Tensor], condition: Condition, null: Condition, guidance: float
) -> Velocity:
    """``v_alpha = v(x, t | null) + alpha (v(x, t | c) - v(x, t | null))`` (InstaFlow's guidance), as a velocity.

    Args:
        denoiser: ``v(x, t, condition)``.
        condition: tensor ``[B, ...]``, a dict of such tensors, or ``None``.
        null: the empty condition, shaped like ``condition``.
        guidance: alpha >= 0. At alpha <= 1 the conditional branch runs alone, as in the official pipeline; above, one
            call on the doubled batch (null rows first). A reflowed net is guided already: beyond 2 it over-saturates.

    Raises:
        ConfigurationError: alpha < 0, or alpha > 1 without both conditions.

    Example::

        image = euler(guided_velocity(net, labels, torch.full_like(labels, 10), guidance=1.5), x0, steps=25)
    """
    check_number("guidance", guidance, 0, float("inf"), closed="[)")
    if guidance <= 1:
        return lambda x, t: denoiser(x, t, condition)
    check(
        condition is not None and null is not None, "guidance", guidance, "at most 1 without a condition and a null",
        "Give both, or guidance=1.",
    )

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        both = denoiser(torch.cat([x, x]), torch.cat([t, t]), concatenate(null, condition))
        v_null, v_condition = both.chunk(2)
        return v_null + guidance * (v_condition - v_null)

    return velocity

"""ODE stepping and sampling loops: SciPy's and torchdiffeq's solvers, and diffusers' schedulers, by way of tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from effdl.core.errors import check, check_choice, check_number, require

Slope = Callable[[float, Tensor], Tensor]
FIXED_GRID = ("euler", "midpoint", "rk4", "explicit_adams")


@torch.no_grad()
def rk45(
    slope: Slope, x: Tensor, start: float, end: float, tolerance: float = 1e-5, per_sample: bool = False
) -> Tensor:
    """``dx/dt = slope(t, x)`` from ``start`` to ``end`` (either may be the larger) by SciPy's Runge-Kutta 4(5).

    The state is integrated in float64 on the host; ``slope`` gets it in the dtype and on the device of ``x``.

    Args:
        slope: called with a float and a tensor shaped like ``x`` (like ``x[:1]`` if ``per_sample``).
        x: state ``[B, ...]`` at ``start``.
        start, end: of the interval.
        tolerance: relative and absolute.
        per_sample: one solve, with step sizes of its own, for each row: a sample then does not depend on its batch
            mates, at the cost of calls with one row. Otherwise the batch is one system.

    Returns:
        The state at ``end``, same shape, dtype and device.

    Raises:
        ConfigurationError: tolerance <= 0.
        RuntimeError: the solver gave up (steps too small: a slope that explodes or changes from call to call).

    Example::

        decayed = rk45(lambda t, x: -x, torch.ones(4, 3), 0.0, 1.0)           # exp(-1)
    """
    from scipy.integrate import solve_ivp

    check_number("tolerance", tolerance, 0, 1, closed="()")
    if per_sample:
        return torch.cat([rk45(slope, row, start, end, tolerance) for row in x.split(1)])

    def flat(time: float, state: np.ndarray) -> np.ndarray:
        return slope(time, torch.from_numpy(state).to(x).reshape(x.shape)).double().flatten().cpu().numpy()

    begin = x.double().flatten().cpu().numpy()
    solution = solve_ivp(flat, (start, end), begin, method="RK45", rtol=tolerance, atol=tolerance)
    if not solution.success:
        raise RuntimeError(f"RK45 stopped at t = {solution.t[-1]:.3g} of [{start}, {end}]: {solution.message}")
    return torch.from_numpy(solution.y[:, -1]).to(x).reshape(x.shape)


def odeint(slope: Callable[[Tensor, Tensor], Tensor], x: Tensor, grid: Tensor, method: str = "midpoint") -> Tensor:
    """``dx/dt = slope(t, x)`` along the points of ``grid``, one step of ``method`` between two (torchdiffeq).

    Args:
        slope: called with a scalar tensor and a state.
        x: state ``[B, ...]`` at ``grid[0]``; differentiable.
        grid: ``[N + 1]``, strictly rising or falling; best on the host, where its values cost no wait for a device.
        method: ``"euler"``, ``"midpoint"``, ``"rk4"`` or ``"explicit_adams"``.

    Returns:
        States at all points, ``[N + 1, B, ...]``.

    Raises:
        ConfigurationError: unknown method, fewer than two points, points on the host that neither rise nor fall.
    """
    check_choice("method", method, FIXED_GRID)
    valid = "two or more strictly rising or falling points"
    check(grid.dim() == 1 and len(grid) >= 2, "grid", tuple(grid.shape), valid)
    if grid.device.type == "cpu":  # elsewhere it would be a wait, and torchdiffeq asserts the same
        difference = grid.detach().diff()
        check(bool((difference > 0).all() | (difference < 0).all()), "grid", tuple(grid.shape), valid)
    return require("torchdiffeq", "ode").odeint(slope, x, grid.to(x.device, non_blocking=True), method=method)


class Visit(NamedTuple):
    """One call of a sampler's network: ``t`` the scheduler's time (a scalar tensor), ``x`` what the network was given,
    ``output`` what it said, ``after`` the state that the scheduler made of it."""

    t: Tensor
    x: Tensor
    output: Tensor
    after: Tensor


@torch.no_grad()
def denoising_path(
    predict: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    scheduler: Any,
    steps: int,
    generator: torch.Generator | None = None,
    **step: Any,
) -> Iterator[Visit]:
    """The sampling loop of a diffusers scheduler, call by call.

    Args:
        predict: ``predict(x_t, t)`` with ``t`` of shape ``[B]``.
        x: unit noise ``[B, ...]``.
        scheduler: any diffusers scheduler; its timesteps are set here.
        steps: its inference steps.
        generator: of the noise that stochastic schedulers add.
        step: further arguments of ``scheduler.step`` (``eta=0.5``).

    Example::

        for visit in denoising_path(unet_eps, noise, DDIMScheduler(), 50):
            calibration.append((visit.x, visit.t))
    """
    scheduler.set_timesteps(steps, device=x.device)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    if "generator" in inspect.signature(scheduler.step).parameters:
        step["generator"] = generator
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = predict(given, t.expand(len(x)))
        x = scheduler.step(output, t, x, **step).prev_sample
        yield Visit(t, given, output, x)


def sample_loop(
    predict: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    scheduler: Any,
    steps: int,
    generator: torch.Generator | None = None,
    **step: Any,
) -> Tensor:
    """The end of :func:`denoising_path`: from unit noise ``[B, ...]`` to a sample."""
    for visit in denoising_path(predict, x, scheduler, steps, generator, **step):
        x = visit.after
    return x

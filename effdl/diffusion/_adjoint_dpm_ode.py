"""adjoint-dpm: an ODE solved forwards without a graph, and its continuous adjoint solved backwards.

With ``dy/ds = v(s, y, c)``, weights theta, a loss L of the end point and ``a = dL/dy`` (Chen et al., 2018; AdjointDPM,
eqs. 6-8), solved from the end of the grid to its start::

    da/ds = - (dv/dy)^T a        dL/d(theta, c) = int a^T dv/d(theta, c) ds over the forward direction

The slope is evaluated under grad at one point at a time, so the activations of one call are all that is ever held.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effdl.core.errors import check, check_choice
from effdl.core.solvers import FIXED_GRID, odeint

STATES = ("stored", "recompute")
Slope = Callable[..., Tensor]


@functools.cache
def stage_weights(method: str) -> tuple[float, ...]:
    """The weights b of one step ``y + h sum_i b_i k_i`` of a Runge-Kutta method, asked of the solver itself.

    ``"explicit_adams"`` has no history within one step: there it is ``"rk4"``.

    Example::

        stage_weights("midpoint")       # (0.0, 1.0)
    """
    calls = 0

    def unit(_t: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.nn.functional.one_hot(torch.tensor(calls - 1), len(y)).to(y)

    end = odeint(unit, torch.zeros(8, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64), method)[-1]
    return tuple(round(b, 15) for b in end[:calls].tolist())


def check_steps(steps: int, backward_steps: int, state: str) -> None:
    """Raise unless the backward grid can use the states of the forward one."""
    check_choice("state", state, STATES)
    fits = state == "recompute" or backward_steps % steps == 0 or steps % backward_steps == 0
    valid = f"a multiple or a divisor of steps={steps} with state='stored'"
    check(fits, "backward_steps", backward_steps, valid, "state='recompute' takes any number.")


@dataclass
class _Problem:
    """Everything about a solve that is no differentiable tensor."""

    slope: Slope
    grid: Tensor
    back: Tensor
    method: str
    stored: bool
    inputs: int  # how many of the tensors are arguments of the slope; the rest are parameters inside of it
    parameters: tuple[Tensor, ...]
    device_type: str

    def __post_init__(self) -> None:
        self.half = torch.is_autocast_enabled(self.device_type)
        self.dtype = torch.get_autocast_dtype(self.device_type)

    def precision(self) -> Any:
        """The autocast of the forward pass, for the backward pass too, which Lightning runs outside of it.

        Without its cache: weights cast under no_grad would be reused, without a gradient, by whoever calls the
        network next.
        """
        return torch.autocast(self.device_type, dtype=self.dtype, enabled=self.half, cache_enabled=False)


def adjoint_odeint(
    slope: Slope,
    y: Tensor,
    grid: Tensor,
    *inputs: Tensor,
    method: str = "midpoint",
    parameters: Sequence[Tensor] = (),
    back: Tensor | None = None,
    state: str = "stored",
) -> Tensor:
    """The end of ``dy/ds = slope(s, y, *inputs)`` along ``grid``, differentiable by the continuous adjoint.

    Peak memory does not grow with the grid but for the stored states (N + 1 copies of ``y``). The gradient is that of
    the exact ODE, discretised once more; it differs from backpropagation through the solver by the solver's error, and
    agrees in the limit. A step takes as many calls of ``slope`` as the method has stages, forwards and backwards.

    Args:
        slope: called with a scalar tensor, a state and ``inputs``; deterministic.
        y: state ``[B, ...]`` at ``grid[0]``; it is integrated in its own dtype.
        grid: ``[N + 1]`` float64, strictly monotone.
        inputs: further tensors, such as a conditioning; those that require grad get one.
        method: of :func:`effdl.core.solvers.odeint`; backwards ``"explicit_adams"`` takes ``"rk4"`` steps.
        parameters: tensors that ``slope`` closes over and that shall get a gradient.
        back: another grid with the same ends for the backward pass, of a multiple or a divisor of N steps (nodes in
            common at the same s); with ``state="recompute"`` of any number.
        state: ``"stored"`` re-sets y at every forward grid point, so the way back does not drift (the official code);
            ``"recompute"`` keeps the end alone and integrates y back too.

    Raises:
        ConfigurationError: unknown method or state, grids that do not fit.
        RuntimeError: in backward, an adjoint that is not finite (not under fp16, where the gradient scaler looks for
            it), or a second derivative.

    Example::

        end = adjoint_odeint(lambda s, y, w: y @ w, y0, torch.linspace(0, 1, 31, dtype=torch.float64), w)
        end.square().sum().backward()
    """
    check_choice("solver", method, FIXED_GRID)
    back = grid if back is None else back
    check_steps(len(grid) - 1, len(back) - 1, state)
    problem = _Problem(
        slope, grid, back, method, state == "stored", len(inputs), tuple(parameters), y.device.type
    )
    return _Adjoint.apply(problem, y, *inputs, *parameters)


class _Adjoint(torch.autograd.Function):
    """Everything that wants a gradient is an input: DDP's hooks fire when ``backward`` returns."""

    @staticmethod
    def forward(ctx: Any, problem: _Problem, y: Tensor, *tensors: Tensor) -> Tensor:
        inputs = [tensor.detach() for tensor in tensors[: problem.inputs]]
        with problem.precision():
            states = odeint(lambda s, y: problem.slope(s, y, *inputs), y.detach(), problem.grid, problem.method)
        keep = max(1, (len(problem.grid) - 1) // (len(problem.back) - 1))
        states = (states[::keep] if problem.stored else states[-1:]).clone()
        ctx.problem = problem
        ctx.save_for_backward(states, *tensors)  # also notices weights that change before the backward pass
        return states[-1].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        again = torch.is_grad_enabled()  # only under create_graph=True
        with torch.no_grad():
            found = _solve_back(ctx.problem, gradient, *ctx.saved_tensors, wanted=ctx.needs_input_grad[2:])
        return None, *(_differentiable_once(found) if again else found)


def _solve_back(
    problem: _Problem, gradient: Tensor, states: Tensor, *tensors: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """dL/dy at the start of the grid, and dL/d of each tensor (``None`` where it is not wanted or has no effect)."""
    inputs = [t.detach().requires_grad_(w) for t, w in zip(tensors[: problem.inputs], wanted)]
    leaves = [*inputs, *problem.parameters]
    want = [leaf for leaf, w in zip(leaves, wanted) if w]
    total: list[Tensor | None] = [None] * len(want)
    y, a = states[-1], gradient.to(states.dtype)
    back, points = problem.back.to(y.device), problem.back.tolist()
    stride = (len(back) - 1) // max(1, len(states) - 1)
    finite = [a.isfinite().all()]
    for j in range(len(back) - 1, 0, -1):
        if problem.stored and j % stride == 0:
            y = states[j // stride]
        step = _Step(problem, inputs, want, total, points[j] - points[j - 1])
        y, a = odeint(step, torch.stack([y, a]), back[j - 1 : j + 1].flip(0), problem.method)[-1]
        finite.append(a.isfinite().all())
    if not (problem.half and problem.dtype == torch.float16):
        _raise_unless(torch.stack(finite), len(back) - 1)
    sums = iter(total)
    found = [next(sums) if w else None for w in wanted]
    return [a, *(f if f is None else f.to(leaf.dtype) for f, leaf in zip(found, leaves))]


class _Step:
    """The slope of (y, a) within one backward step of length ``length``; gradients of the leaves are summed on the way.

    The integrand of dL/dtheta does not depend on dL/dtheta, so its quadrature needs the step's weights b alone: one
    buffer of the size of the weights instead of one per stage, and no such gradient where b is 0 (midpoint's first).
    """

    def __init__(
        self, problem: _Problem, inputs: list[Tensor], want: list[Tensor], total: list[Tensor | None], length: float
    ) -> None:
        self.problem, self.inputs, self.want, self.total, self.length = problem, inputs, want, total, length
        self.weights = iter(stage_weights(problem.method))

    def __call__(self, s: Tensor, pair: Tensor) -> Tensor:
        weight = next(self.weights)
        y, a = pair.detach()
        leaves = self.want if weight else []
        with torch.enable_grad(), self.problem.precision():
            y = y.clone().requires_grad_()
            slope = self.problem.slope(s, y, *self.inputs)
            if not slope.requires_grad:  # neither y nor a leaf enters
                return torch.stack([slope, torch.zeros_like(a)])
            to_y, *products = torch.autograd.grad(slope, [y, *leaves], a.to(slope.dtype), allow_unused=True)
        for i, product in enumerate(products):
            if product is not None:
                if self.total[i] is None:
                    wide = torch.promote_types(product.dtype, torch.float32)
                    self.total[i] = torch.zeros_like(product, dtype=wide)
                self.total[i].add_(product, alpha=weight * self.length)
        return torch.stack([slope.detach(), torch.zeros_like(a) if to_y is None else -to_y])


def _raise_unless(finite: Tensor, steps: int) -> None:
    """One look at the device per backward pass; the first entry is the incoming gradient."""
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0])
        where = "the gradient of the loss" if first == 0 else f"the adjoint after backward step {first} of {steps}"
        raise RuntimeError(f"{where} is not finite. A denoiser in half precision, or a step that is too long?")


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError("the adjoint can be differentiated once: its gradient knows nothing of second derivatives.")


def _differentiable_once(found: list[Tensor | None]) -> list[Tensor | None]:
    """The same gradients, which raise instead of being taken for constants when they are differentiated."""
    there = [g for g in found if g is not None]
    marked = iter(_Once.apply(torch.zeros((), device=there[0].device, requires_grad=True), *there))
    return [None if g is None else next(marked) for g in found]

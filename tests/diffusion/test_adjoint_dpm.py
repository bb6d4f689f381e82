"""adjoint-dpm: closed forms, official numbers, two modes, autograd's corners, two processes."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from effdl.core.noise import LinearVP
from effdl.core.solvers import odeint
from effdl.diffusion._adjoint_dpm_sampler import AdjointSampler, rho_grid, time_grid
from tests.diffusion.adjoint_dpm_problems import (
    DOUBLE,
    NAMES,
    NUMBERS,
    SCHEDULE,
    SPREAD,
    error,
    expected,
    gaussian,
    official,
    true_ratio,
)
from tests.diffusion.adjoint_dpm_ranks import batch, gradients, sampler
from tests.support import run_ranks

# --- 1, 5: a Gaussian, in closed form ------------------------------------------------------------------------------


@functools.cache
def ratios(solver: str, steps: int) -> tuple[float, float, float]:
    """Relative errors: forwards, of backpropagation, of the adjoint."""
    x_T = torch.ones(1, 1, dtype=DOUBLE, requires_grad=True)
    made = AdjointSampler(gaussian, SCHEDULE, steps, solver)
    x_0 = made(x_T)
    (adjoint,) = torch.autograd.grad(x_0.sum(), x_T)
    (back,) = torch.autograd.grad(made.backprop(x_T).sum(), x_T)
    exact = true_ratio()
    return tuple(abs(float(value.detach()) / exact - 1) for value in (x_0, back, adjoint))


def test_must_01_closed_form_gaussian():
    midpoint = {n: ratios("midpoint", n) for n in (40, 200, 400)}
    assert max(midpoint[40][:2]) < 1e-3
    assert max(midpoint[200][:2]) < 1e-5
    assert midpoint[200][2] < 1e-2
    assert midpoint[200][2] / midpoint[400][2] >= 3.5
    euler = {n: ratios("euler", n) for n in (200, 400)}
    assert euler[200][2] / euler[400][2] >= 1.8
    rk4 = ratios("rk4", 40)
    assert max(rk4) < 1e-4
    print("\nmidpoint", midpoint, "\neuler", euler, "\nrk4", rk4)


def test_must_05_the_change_of_variable_pays():
    """Midpoint on (y, rho) against midpoint on the raw ODE, on the same times."""

    def raw(t, x):
        a, s = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
        rate = SCHEDULE.beta(t)
        return -0.5 * rate * x + rate / (2 * s) * s * x / (a.square() * SPREAD**2 + s.square())

    for steps, factor in ((40, 4), (200, 20)):
        times = time_grid(SCHEDULE, steps)
        end = odeint(raw, torch.ones(1, dtype=DOUBLE), times, "midpoint")[-1]
        plain = abs(float(end) / true_ratio() - 1)
        ours = ratios("midpoint", steps)[0]
        assert ours < plain / factor, (steps, ours, plain)


# --- 2, 3: the official numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "solver", "how", "steps"),
    [
        ("euler_backprop", "euler", "backprop", 20), ("midpoint_backprop", "midpoint", "backprop", 20),
        ("euler_official_adjoint", "euler", "adjoint", 20), ("midpoint_official_adjoint", "midpoint", "adjoint", 20),
        ("converged", "rk4", "adjoint", 400), ("converged", "rk4", "backprop", 400),
    ],
)  # fmt: skip
def test_must_02_golden_parity(name, solver, how, steps):
    found, want = official(solver, steps, how), expected(name)
    worst = 0.0
    for key, value in want.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-5)
        worst = max(worst, error(found[key], value))
    print(f"\n{name} {how}: largest error {worst:.1e} of the largest entry")
    assert worst < 1e-6 or name == "converged"


def test_golden_grids():
    schedule = LinearVP(0.1, 8.0)
    times = time_grid(schedule, 20)
    torch.testing.assert_close(times, torch.tensor(NUMBERS["t_grid"], dtype=DOUBLE), atol=1e-7, rtol=1e-7)
    rho = torch.tensor(NUMBERS["rho_grid"], dtype=DOUBLE)
    torch.testing.assert_close(rho_grid(schedule, times), rho, atol=1e-7, rtol=1e-6)
    made = AdjointSampler(gaussian, schedule)
    assert made.alpha_T == pytest.approx(NUMBERS["alpha_T"], abs=1e-7)


def test_must_03_every_gradient_matches_backpropagation():
    adjoint, back = (official("midpoint", 400, how) for how in ("adjoint", "backprop"))
    for name in ("x_T", "c", *NAMES):
        assert error(adjoint[name], back[name]) < 1e-3, name
    coarse = [official("midpoint", 100, how) for how in ("adjoint", "backprop")]
    assert all(error(adjoint[n], back[n]) < error(coarse[0][n], coarse[1][n]) for n in ("x_T", "c", *NAMES))


# --- 7: two modes --------------------------------------------------------------------------------------------------


def mixture(x, t, c=None):
    """The exact eps of half a Gaussian of spread 0.5 at (2, 0) and half at (-2, 0)."""
    a, s = SCHEDULE.alpha(t)[:, None], SCHEDULE.sigma(t)[:, None]
    spread, mean = a.square() * 0.25 + s.square(), a * torch.tensor([2.0, 0.0])
    side = torch.tanh((x * mean).sum(1, keepdim=True) / spread)
    return s * (x - side * mean) / spread


def test_must_07_noise_moves_into_the_other_mode():
    made = AdjointSampler(mixture, SCHEDULE, 30, "midpoint")
    start = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        side = made(start)[:, :1].sign()
    other = torch.cat([-2 * side, torch.zeros_like(side)], 1)
    x_T = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([x_T], 0.1)
    for _ in range(30):
        optimizer.zero_grad()
        (made(x_T) - other).square().sum(1).mean().backward()
        optimizer.step()
    direction = torch.randn(400, 2, generator=torch.Generator().manual_seed(1))
    lengths = (x_T.detach() - start).norm(dim=1, keepdim=True)
    with torch.no_grad():
        moved = (made(x_T)[:, :1].sign() != side).float().mean()
        chance = (made(start + lengths * nn.functional.normalize(direction))[:, :1].sign() != side).float().mean()
    print(f"\nmoved: {moved:.3f}, by a random step of the same length {lengths.mean():.2f}: {chance:.3f}")
    assert moved >= 0.9
    assert chance <= 0.45


# --- 8, 9: autograd's corners, two processes -----------------------------------------------------------------------


def test_must_08_backward_twice_and_second_derivatives():
    made, (x, c) = sampler(), batch()
    x.requires_grad_()
    x_0 = made(x, c)
    first, second = (torch.autograd.grad(x_0.sum(), x, retain_graph=keep)[0] for keep in (True, False))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(x_0.sum(), x)
    for loss in (torch.sum, lambda out: out.square().sum()):  # the first one's gradient depends on nothing
        (gradient,) = torch.autograd.grad(loss(made(x, c)), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once"):
            (gradient.square().sum() + x.square().sum()).backward()
    x_0 = made(x, c)
    with torch.no_grad():
        next(made.parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        x_0.sum().backward()


@pytest.mark.ddp
def test_must_09_two_processes_have_the_joined_batch_s_gradient(tmp_path):
    run_ranks("tests.diffusion.adjoint_dpm_ranks", tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, gradient in gradients(sampler(), *batch()).items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], gradient, atol=1e-6, rtol=0)

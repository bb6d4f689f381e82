"""adjoint-dpm: nine checks of the method, and what the sampler refuses."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from torch import nn

from effdl.core.errors import ConfigurationError
from effdl.core.noise import CosineVP, LinearVP, TableVP, betas
from effdl.core.solvers import odeint
from effdl.diffusion._adjoint_dpm_ode import adjoint_odeint, stage_weights
from effdl.diffusion._adjoint_dpm_sampler import AdjointSampler, rho_grid, time_grid
from tests.diffusion.adjoint_dpm_ranks import Small, batch, gradients, sampler
from tests.support import golden, run_ranks

DOUBLE = torch.float64


def error(found, expected) -> float:
    """Largest difference, relative to the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max())


# --- 1, 5: a Gaussian, in closed form ------------------------------------------------------------------------------

SCHEDULE, SPREAD = LinearVP(0.1, 20.0), 0.5


def gaussian(x, t, c=None):
    """The exact eps of data N(0, SPREAD^2)."""
    a, s = SCHEDULE.alpha(t)[:, None], SCHEDULE.sigma(t)[:, None]
    return s * x / (a.square() * SPREAD**2 + s.square())


def true_ratio(start: float = 1.0, end: float = 1e-3) -> float:
    a, s = (f(torch.tensor([start, end], dtype=DOUBLE)) for f in (SCHEDULE.alpha, SCHEDULE.sigma))
    spread = a.square() * SPREAD**2 + s.square()
    return float((spread[1] / spread[0]).sqrt())


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

NUMBERS = golden("adjoint-dpm")
NAMES = ("W1", "b", "u", "W2")


class Tanh(nn.Module):
    """eps = W2 tanh(W1 x + b + t u + c)."""

    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            setattr(self, name, nn.Parameter(torch.tensor(NUMBERS["params"][name], dtype=DOUBLE)))

    def forward(self, x, t, c):
        return torch.tanh(x @ self.W1.T + self.b + t[:, None] * self.u + c) @ self.W2.T


def official(solver: str, steps: int = 20, how: str = "adjoint", **kwargs) -> dict[str, torch.Tensor]:
    """x_0, the loss and all gradients of the golden problem."""
    net = Tanh()
    made = AdjointSampler(net, LinearVP(0.1, 8.0), steps, solver, guidance_scale=1.0, **kwargs)
    x_T = torch.tensor(NUMBERS["params"]["x_T"], dtype=DOUBLE, requires_grad=True)
    c = torch.tensor(NUMBERS["params"]["c"], dtype=DOUBLE)[None].requires_grad_()
    x_0 = made(x_T, c) if how == "adjoint" else made.backprop(x_T, c)
    loss = 0.5 * (x_0 - torch.tensor(NUMBERS["target"], dtype=DOUBLE)).square().sum()
    loss.backward()
    grads = {name: getattr(net, name).grad for name in NAMES}
    return {"x_0": x_0.detach(), "loss": loss.detach(), "x_T": x_T.grad, "c": c.grad[0], **grads}


def expected(name: str) -> dict[str, torch.Tensor]:
    result = NUMBERS["results"][name]
    grads = result.get("grads") or {"x_T": result["grad_x_T"]}
    found = {**grads, "x_0": result["x_0"], "loss": result["loss"]}
    return {name: torch.tensor(value, dtype=DOUBLE) for name, value in found.items()}


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


# --- 4, 6: memory and calls ----------------------------------------------------------------------------------------


class Watched(nn.Module):
    """A wide network that counts its calls; ``saved`` counts what autograd holds, and of how many calls."""

    def __init__(self, width: int = 512) -> None:
        super().__init__()
        layers = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.Tanh())]
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), *layers, nn.Linear(width, 2))
        self.calls, self.graphs = 0, 0

    def forward(self, x, t, c):
        self.calls += 1
        self.graphs += torch.is_grad_enabled()
        return self.net(x)


class Ledger:
    """Bytes of saved activations and the network calls they belong to, as they are held and freed."""

    def __init__(self, net: Watched) -> None:
        self.net, self.held, self.peak, self.live = net, 0, 0, {}
        self.most_graphs = 0

    def pack(self, tensor):
        return _Held(self, tensor)

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args):
        self.hooks.__exit__(*args)


class _Held:
    def __init__(self, ledger: Ledger, tensor) -> None:
        self.ledger, self.tensor, self.call = ledger, tensor, ledger.net.graphs
        ledger.held += tensor.nbytes
        ledger.peak = max(ledger.peak, ledger.held)
        if not isinstance(tensor, nn.Parameter) and tensor.dim() == 2 and tensor.shape[1] == 512:  # an activation
            ledger.live[self.call] = ledger.live.get(self.call, 0) + 1
            ledger.most_graphs = max(ledger.most_graphs, len(ledger.live))
            self.counted = True

    def __del__(self) -> None:
        self.ledger.held -= self.tensor.nbytes
        if getattr(self, "counted", False):
            self.ledger.live[self.call] -= 1
            if not self.ledger.live[self.call]:
                del self.ledger.live[self.call]


def footprint(how: str, steps: int, **kwargs) -> Ledger:
    torch.manual_seed(0)
    net = Watched()
    for p in net.parameters():
        p.requires_grad_(False)  # the weights' own bytes are not the question
    made = AdjointSampler(net, SCHEDULE, steps, "euler", **kwargs)
    x_T = torch.randn(64, 2, requires_grad=True)
    gc.collect()
    with Ledger(net) as ledger:
        (made(x_T) if how == "adjoint" else made.backprop(x_T)).square().mean().backward()
    assert x_T.grad is not None
    return ledger


def test_must_04_memory_does_not_grow_with_the_steps():
    few, many = footprint("adjoint", 5), footprint("adjoint", 50)
    assert (few.most_graphs, many.most_graphs) == (1, 1)
    states = 51 * 64 * 2 * 4  # stored on purpose
    assert many.peak - states <= 1.3 * few.peak, (few.peak, many.peak)
    plain = [footprint("backprop", n).peak for n in (5, 50)]
    assert plain[1] >= 8 * plain[0]
    assert footprint("backprop", 5).most_graphs == 5
    recomputed = footprint("adjoint", 50, state="recompute")
    assert recomputed.peak < many.peak
    print(f"\nsaved bytes at 5 and 50 steps: adjoint {few.peak} {many.peak}, backpropagation {plain}")


@pytest.mark.parametrize(("solver", "stages"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_must_06_network_calls(solver, stages):
    net = Watched(8)
    x_T = torch.randn(3, 2, requires_grad=True)
    x_0 = AdjointSampler(net, SCHEDULE, 7, solver, backward_steps=14)(x_T)
    assert (net.calls, net.graphs) == (7 * stages, 0)
    x_0.sum().backward()
    assert (net.calls, net.graphs) == (21 * stages, 14 * stages)
    assert sum(stage_weights(solver)) == pytest.approx(1)


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


# --- the rest of the sampler ---------------------------------------------------------------------------------------


def test_guidance_goes_through_both_branches():
    torch.manual_seed(0)
    net = Small().double()
    x_T, c, null = (torch.randn(3, 4, dtype=DOUBLE, requires_grad=True) for _ in range(3))
    made = AdjointSampler(net, LinearVP(0.1, 8.0), 40, "rk4", guidance_scale=2.0)
    wanted = [x_T, c, null, *net.parameters()]
    adjoint = torch.autograd.grad(made(x_T, c, null).square().sum(), wanted)
    back = torch.autograd.grad(made.backprop(x_T, c, null).square().sum(), wanted)
    assert all(error(a, b) < 1e-4 for a, b in zip(adjoint, back))
    t = torch.tensor(0.5, dtype=DOUBLE)
    free, bound = (net(x_T, t.expand(3), part) for part in (null, c))
    torch.testing.assert_close(made.noise_at(x_T, t, c, null), free + 2 * (bound - free))
    only = torch.autograd.grad(made(x_T, c, null.detach()).square().sum(), c)[0]  # one half alone wants a gradient
    torch.testing.assert_close(only, adjoint[1])
    for scale, part in ((0.0, null), (1.0, c)):
        made = AdjointSampler(net, LinearVP(0.1, 8.0), 3, guidance_scale=scale)
        torch.testing.assert_close(made.noise_at(x_T, t, c, null), net(x_T, t.expand(3), part))
    with pytest.raises(ConfigurationError, match="guidance_scale"):
        AdjointSampler(net, LinearVP())(x_T, c)


def test_backward_grids_and_states():
    want = expected("converged")
    reference = {n: error(official("midpoint", 40)[n], want[n]) for n in ("x_T", "W2", "c")}
    for kwargs in ({"backward_steps": 80}, {"backward_steps": 20}, {"state": "recompute"},
                   {"state": "recompute", "backward_steps": 37}):  # fmt: skip
        found = official("midpoint", 40, **kwargs)
        assert all(error(found[n], want[n]) < 6 * reference[n] + 1e-4 for n in reference), kwargs
    fine = official("midpoint", 40, backward_steps=160)
    assert error(fine["W2"], want["W2"]) < error(official("midpoint", 40)["W2"], want["W2"])
    adams = official("explicit_adams", 200, "adjoint")
    assert error(adams["x_T"], want["x_T"]) < 1e-2
    for steps, backward_steps in ((30, 45), (30, 20)):
        with pytest.raises(ConfigurationError, match="backward_steps"):
            AdjointSampler(gaussian, SCHEDULE, steps, backward_steps=backward_steps)


@pytest.mark.parametrize("schedule", [SCHEDULE, CosineVP(), TableVP((1 - betas("linear", 1000)).cumprod(0))])
@pytest.mark.parametrize("skip_type", ["time_uniform", "logSNR", "time_quadratic"])
def test_grids_end_where_they_should(schedule, skip_type):
    times = time_grid(schedule, 10, skip_type, 0.98, 0.01)
    torch.testing.assert_close(times[[0, -1]], torch.tensor([0.98, 0.01], dtype=DOUBLE), atol=1e-9, rtol=0)
    assert (times.diff() < 0).all()
    rho = rho_grid(schedule, times)
    assert abs(float(rho[0])) < 1e-12
    assert (rho.diff() < 0).all()
    even = {"time_uniform": times, "logSNR": schedule.half_log_snr(times), "time_quadratic": times.sqrt()}[skip_type]
    assert even.diff().std() < 1e-4 * even.diff().abs().mean()


def test_predictions_mean_the_same_sample():
    """A network that says v or x_0 of the same Gaussian, and one that writes into its input."""

    def said(kind):
        def network(x, t, c):
            a, s = SCHEDULE.alpha(t)[:, None], SCHEDULE.sigma(t)[:, None]
            eps = gaussian(x, t)
            x0 = (x - s * eps) / a
            x.zero_()
            return {"epsilon": eps, "sample": x0, "v_prediction": a * eps - s * x0}[kind]

        return network

    x_T = torch.ones(2, 1, dtype=DOUBLE, requires_grad=True)
    found = []
    for kind in ("epsilon", "sample", "v_prediction"):
        x_0 = AdjointSampler(said(kind), SCHEDULE, 30, prediction=kind, denoise_to_zero=True)(x_T)
        found.append(torch.stack([x_0.detach(), torch.autograd.grad(x_0.sum(), x_T)[0]]))
    torch.testing.assert_close(found[1], found[0], atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(found[2], found[0], atol=1e-8, rtol=1e-6)
    mean = 0.25 * float(SCHEDULE.alpha(torch.tensor(1e-3, dtype=DOUBLE))) / 0.25  # E[x_0 | x_t] of a narrow noise
    assert float(found[0][0, 0]) == pytest.approx(true_ratio() * mean, rel=5e-3)


def test_half_precision_network_and_single_precision_state():
    torch.manual_seed(0)
    net = Small()
    x, c = (part.float() for part in batch())
    made = AdjointSampler(net, SCHEDULE, 10, guidance_scale=1.0)
    full = gradients(made, x, c)
    full = {name: gradient.clone() for name, gradient in full.items()}
    made.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_0 = made(x, c)
    assert x_0.dtype == torch.float32
    seen = []
    handle = net.net[0].register_forward_hook(lambda m, i, out: seen.append(out.dtype))
    x_0.square().mean().backward()  # outside of autocast, as Lightning does
    handle.remove()
    assert set(seen) == {torch.bfloat16}
    for name, p in made.named_parameters():
        assert p.grad.dtype == torch.float32
        assert error(p.grad, full[name]) < 0.1, name
    with torch.inference_mode():
        assert made(x, c).shape == x.shape


def test_what_is_not_finite_is_named_and_chance_is_noticed():
    x_T = torch.ones(2, 1, dtype=DOUBLE, requires_grad=True)
    made = AdjointSampler(gaussian, SCHEDULE, 5)
    with pytest.raises(RuntimeError, match="gradient of the loss"):
        (made(x_T) * math.inf).sum().backward()
    broken = AdjointSampler(lambda x, t, c: (x - x.detach()) / torch.where(t > 0.5, 1.0, 0.0)[:, None], SCHEDULE, 5)
    with pytest.raises(RuntimeError, match=r"backward step \d of 5"):
        broken(x_T).nan_to_num().sum().backward()
    noisy = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = noisy

        def forward(self, x, t, c):
            return self.net(x)

    with pytest.warns(UserWarning, match="Dropout"):
        AdjointSampler(Net().train(), SCHEDULE, 2)(torch.randn(2, 2))


def test_euler_is_ddim_and_a_scheduler_s_table_is_interpolated():
    from diffusers import DDIMScheduler, DDPMScheduler

    from effdl.tasks.tiny import tiny_unet

    unet = tiny_unet(8, 1, num_classes=3, down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"],
                     block_out_channels=[8], norm_num_groups=4)  # fmt: skip
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    stock = DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    stock.set_timesteps(9)
    x = noise
    with torch.no_grad():
        for t in range(999, 0, -111):
            x = stock.step(unet(x, t, labels).sample, t, x).prev_sample
        ours = AdjointSampler(unet, DDPMScheduler(), 9, "euler", guidance_scale=1.0)(noise, labels)
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigurationError, match="thresholding"):
        AdjointSampler(unet, DDPMScheduler(thresholding=True))
    with pytest.raises(ConfigurationError, match="t_start"):
        AdjointSampler(unet, CosineVP())


def test_a_callable_s_weights_are_named():
    w = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)
    x_T = torch.ones(2, 1, dtype=DOUBLE)
    AdjointSampler(lambda x, t, c: w * x, SCHEDULE, 5, parameters=(w,))(x_T).sum().backward()
    assert w.grad is not None
    end = adjoint_odeint(lambda s, y, a: a * y, torch.ones(1, dtype=DOUBLE),
                         torch.linspace(0, 1, 41, dtype=DOUBLE), w, method="rk4")  # fmt: skip
    torch.testing.assert_close(torch.autograd.grad(end.sum(), w)[0], w.exp(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("schedule", {"schedule": 3}), ("steps", {"steps": 0}), ("solver", {"solver": "dopri5"}),
        ("backward_steps", {"backward_steps": 0}), ("skip_type", {"skip_type": "karras"}), ("t_end", {"t_end": 0}),
        ("t_start", {"t_start": 1.5}), ("t_end", {"t_start": 0.5, "t_end": 0.5}), ("state", {"state": "kept"}),
        ("guidance_scale", {"guidance_scale": -1.0}), ("prediction", {"prediction": "score"}),
        ("denoise_to_zero", {"denoise_to_zero": 1}),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(name, kwargs):
    with pytest.raises(ConfigurationError, match=name):
        AdjointSampler(**{"network": gaussian, "schedule": SCHEDULE, **kwargs})

"""instaflow: closed forms, official numbers, pair tables, stages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from effdl.core.errors import ConfigurationError
from effdl.diffusion._flow import (
    euler,
    guided_velocity,
    interpolate,
    rectified_flow_loss,
    rk45,
    squared_error,
    straightness,
    time_points,
)
from tests.support import golden

GOLDEN = golden("instaflow")


def toy(name: str = "model"):
    """The golden file's network, ``v = W flatten(x) + b + c t``."""
    w, b, c = (torch.tensor(GOLDEN[name][key]) for key in ("W", "b", "c"))
    return lambda x, t: (x.flatten(1) @ w.T + b + c * t[:, None]).reshape(x.shape)


def gaussian_1rf(m: float, s: float):
    """v_1 for X1 ~ N(m, s^2), independent pairs."""
    return lambda x, t: m + (t * s**2 - (1 - t)) / (t**2 * s**2 + (1 - t) ** 2) * (x - t * m)


def gaussian_2rf(m: float, s: float):
    """v_2: the velocity of the straight lines x0 -> m + s x0."""
    return lambda x, t: m + (s - 1) * (x - t * m) / (1 - t + t * s)


class Counter:
    """A denoiser that counts its calls and rows."""

    def __init__(self, denoiser):
        self.denoiser, self.calls, self.rows = denoiser, 0, 0

    def __call__(self, x: Tensor, t: Tensor, *condition) -> Tensor:
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        return self.denoiser(x, t, *condition)


Z0, X1 = torch.tensor(GOLDEN["z0"]), torch.tensor(GOLDEN["x1"])


# --- must show (a): the Gaussian ---------------------------------------------------------------------------------


def test_must_a_golden_gaussian_velocities():
    case = GOLDEN["gaussian_1d"]
    x = torch.tensor(case["x"], dtype=torch.float64)
    for name, rule in (("v_1rf", gaussian_1rf), ("v_2rf", gaussian_2rf)):
        for t, expected in zip(case["t"], case[name]):
            torch.testing.assert_close(rule(case["mean"], case["std"])(x, t).tolist(), expected, atol=1e-5, rtol=1e-5)


def test_must_a_one_step_of_the_1rf_is_the_mean_and_of_the_2rf_is_exact():
    x0 = torch.tensor(GOLDEN["gaussian_1d"]["x"])
    assert torch.equal(euler(gaussian_1rf(1.5, 0.5), x0, 1), torch.full_like(x0, 1.5))
    torch.testing.assert_close(euler(gaussian_2rf(1.5, 0.5), x0, 1), 1.5 + 0.5 * x0, atol=1e-6, rtol=0)
    torch.testing.assert_close(euler(gaussian_2rf(1.5, 0.5), x0, 1).tolist(), GOLDEN["gaussian_1d"]["one_step_2rf"])


@pytest.mark.parametrize(("m", "s", "tolerance"), [(1.5, 0.5, 1e-3), (-1.0, 2.0, 4e-3)])
def test_must_a_many_steps_of_the_1rf_reach_the_ode_map(m, s, tolerance):
    x0 = torch.linspace(-2, 1.7, 9, dtype=torch.float64)
    error = {n: (euler(gaussian_1rf(m, s), x0, n) - (m + s * x0)).abs().max() for n in (1000, 2000)}
    assert error[2000] < tolerance
    assert 1.9 < error[1000] / error[2000] < 2.1  # first order: twice the steps, half the error


def test_must_a_straightness_is_the_golden_number():
    x0 = torch.special.ndtri((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)[:, None]
    x0 = x0 / x0.square().mean().sqrt()  # quantiles cut the tails: give them the exact second moment
    v1, v2 = (lambda x, t, rule=rule: rule(1.5, 0.5)(x, t[:, None]) for rule in (gaussian_1rf, gaussian_2rf))
    assert straightness(v1, x0, 400).item() == pytest.approx(GOLDEN["gaussian_1d"]["straightness_1rf"], rel=0.01)
    assert straightness(v2, x0, 400).item() < 1e-6
    assert straightness(v2, x0.float(), 400).item() < 1e-6


def test_straightness_is_the_distance_between_path_and_chord():
    """Welford's form against the definition, with a stored path."""
    net, steps, points, x = toy(), 7, [], Z0
    for i in range(steps):
        points.append(net(x, torch.full((3,), i / steps)))
        x = x + points[-1] / steps
    expected = torch.stack([((x - Z0) - v).square().sum((1, 2, 3)).mean() for v in points]).mean()
    torch.testing.assert_close(straightness(net, Z0, steps), expected)


# --- must show (b): official numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("key", GOLDEN["loss"])
def test_must_b_golden_losses(key):
    schedule, reduction = key.split("|")
    if schedule == "4":
        t = time_points((torch.tensor(GOLDEN["k4_index_draw"]) + 0.5) / 4, 4, GOLDEN["eps"])
    else:
        t = time_points(torch.tensor(GOLDEN["u_uniform"]), schedule, GOLDEN["eps"])
    loss = rectified_flow_loss(toy(), Z0, X1, t, reduction)
    torch.testing.assert_close(loss.item(), GOLDEN["loss"][key], atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", GOLDEN["euler_repo"])
def test_must_b_golden_euler(steps):
    expected = torch.tensor(GOLDEN["euler_repo"][steps])
    torch.testing.assert_close(euler(toy(), Z0, int(steps), GOLDEN["eps"]), expected, atol=1e-5, rtol=0)


def test_must_b_golden_rk45_forward_and_back():
    end = rk45(toy(), Z0, GOLDEN["eps"])
    torch.testing.assert_close(end, torch.tensor(GOLDEN["rk45_z0_to_x1"]), atol=1e-3, rtol=0)
    torch.testing.assert_close(rk45(toy(), end, GOLDEN["eps"], reverse=True), Z0, atol=1e-3, rtol=0)


@pytest.mark.parametrize("key", GOLDEN["instaflow_euler"])
def test_must_b_golden_instaflow_euler(key):
    steps, guidance = key.removeprefix("N=").split(",w=")
    nets = {0: toy("neg_model"), 1: toy()}

    def denoiser(x, t, c):
        return torch.where(c[:, None, None, None] == 1, nets[1](x, t), nets[0](x, t))

    one = torch.ones(3, dtype=torch.long)
    got = euler(guided_velocity(denoiser, one, 0 * one, float(guidance)), Z0, int(steps))
    torch.testing.assert_close(got, torch.tensor(GOLDEN["instaflow_euler"][key]), atol=1e-5, rtol=0)


# --- must show (e), (h): guidance and the number of network calls -------------------------------------------------


def test_must_e_guidance_one_is_the_conditional_branch_bit_for_bit():
    net = Counter(lambda x, t, c: toy()(x, t) * (1 + c[:, None, None, None]))
    condition, null, t = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3), torch.rand(3)
    alone = net.denoiser(Z0, t, condition)
    assert torch.equal(guided_velocity(net, condition, null, 1.0)(Z0, t), alone)
    assert (net.calls, net.rows) == (1, 3)
    guided = guided_velocity(net, condition, null, 1.5)(Z0, t)
    assert (net.calls, net.rows) == (2, 3 + 6)  # one call, doubled batch
    torch.testing.assert_close(guided, (1 + 1.5 * condition[:, None, None, None]) * toy()(Z0, t))


def test_guidance_takes_dict_conditions():
    condition = {"hidden": torch.ones(3, 2), "pooled": torch.ones(3)}
    null = {name: torch.zeros_like(value) for name, value in condition.items()}
    net = Counter(lambda x, t, c: x * (c["pooled"] + c["hidden"].sum(1))[:, None, None, None])
    torch.testing.assert_close(guided_velocity(net, condition, null, 2.0)(Z0, torch.rand(3)), 2 * 3 * Z0)
    assert net.rows == 6


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_must_h_the_sampler_calls_the_net_once_per_step(steps):
    net = Counter(lambda x, t, c: toy()(x, t))
    euler(guided_velocity(net, torch.ones(3), torch.zeros(3), 1.0), Z0, steps)
    assert (net.calls, net.rows) == (steps, 3 * steps)
    net = Counter(lambda x, t, c: toy()(x, t))
    euler(guided_velocity(net, torch.ones(3), torch.zeros(3), 1.5), Z0, steps)
    assert (net.calls, net.rows) == (steps, 2 * 3 * steps)


# --- arguments and precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("steps", lambda: euler(toy(), Z0, 0)),
        ("steps", lambda: euler(toy(), Z0, 1.5)),
        ("steps", lambda: straightness(toy(), Z0, 1)),
        ("guidance", lambda: guided_velocity(toy(), None, None, -0.1)),
        ("guidance", lambda: guided_velocity(toy(), None, None, 1.5)),
        ("times", lambda: time_points(torch.rand(2), "cosine")),
        ("times", lambda: time_points(torch.rand(2), 0)),
        ("times", lambda: time_points(torch.rand(2), 2.0)),
        ("eps", lambda: time_points(torch.rand(2), "uniform", 0.1)),
        ("eps", lambda: time_points(torch.rand(2), "uniform", -1e-3)),
        ("reduction", lambda: squared_error(Z0, X1, "sum")),
    ],
)
def test_bad_arguments_are_named(name, call):
    with pytest.raises(ConfigurationError, match=name):
        call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_fp32(dtype):
    x0, x1 = torch.full((2, 4), 0.0, dtype=dtype), torch.full((2, 4), 300.0, dtype=dtype)
    loss = squared_error(x0, x1)  # 300^2 overflows fp16
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(90000, rel=0.01)
    assert euler(lambda x, t: torch.full_like(x, 1e-3), x0, 1000).sub(1e-3).abs().max() < 1e-6


def test_interpolation_ends():
    assert torch.equal(interpolate(Z0, X1, torch.zeros(3)), Z0)
    assert torch.equal(interpolate(Z0, X1, torch.ones(3)), X1)

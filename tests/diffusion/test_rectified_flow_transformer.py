"""rectified-flow-transformer: densities, shift, grid, the two-stream block."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.attention import JointTransformerBlock
from scipy.stats import kstest

from effdl.core.errors import ConfigurationError
from effdl.core.random import generator
from effdl.diffusion._flow import interpolate, rectified_flow_loss
from effdl.diffusion.rectified_flow_transformer import (
    CosMap,
    LogitNormal,
    Mode,
    Uniform,
    add_qk_norm,
    integrate,
    log_snr,
    loss_weight,
    resolution_shift,
    shift_time,
    sigma_grid,
    timestep_sampler,
)
from tests.support import golden

GOLDEN = golden("rectified-flow-transformer")
NAMES = [
    "uniform", "logit_normal(0, 1)", "logit_normal(0.5, 0.6)", "mode(-0.9)", "mode(0.5)", "mode(1.5)", "mode(1.29)",
    "cosmap",
]  # fmt: skip


def f64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(ours: torch.Tensor, values, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    torch.testing.assert_close(ours.double(), f64(values), rtol=rtol, atol=atol)
    print("max error", (ours.double() - f64(values)).abs().max().item())


# --- densities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("convention", ["paper", "diffusers"])
def test_must_01_a_density_and_its_draws(name: str, convention: str):
    density = timestep_sampler(name, convention)
    edges = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    mass = density.pdf((edges[1:] + edges[:-1]) / 2) / 200_000
    assert mass.sum().item() == pytest.approx(1, abs=1e-3)
    numeric = np.concatenate([[0], mass.cumsum(0).numpy()])
    draws = density.sample(100_000, generator(0))
    assert draws.dtype == torch.float32
    assert draws.min() >= 0
    assert draws.max() <= 1
    assert kstest(draws.numpy(), lambda t: np.interp(t, edges.numpy(), numeric)).pvalue > 1e-3
    inner = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    close(density.cdf(inner), np.interp(inner, edges, numeric), atol=1e-5)
    close(density.cdf(density.icdf(inner)), inner.tolist(), atol=1e-6)
    assert density.pdf(torch.tensor([-0.1, 1.1])).tolist() == [0, 0]
    assert torch.equal(density.sample(5, generator(3)), density.sample(5, generator(3)))


def test_must_01_ranges():
    assert torch.equal(Mode(0.0).sample(1000, generator(0)), 1 - (1 - Uniform().sample(1000, generator(0))))
    assert LogitNormal().pdf(torch.tensor([0.0, 1.0])).tolist() == [0, 0]
    assert (Mode(0.5).pdf(torch.tensor([0.0, 1.0])) > 0).all()
    for scale in (-1.0, 1.7519):
        draws = Mode(scale).sample(100_000, generator(0))
        assert draws.min() >= 0
        assert draws.max() <= 1
    for bad in ("mode(1.76)", "mode(-1.01)", "logit_normal(0, 0)", "logit_normal(0, -1)", "logit_normal(nan)", "beta",
                "mode(1, 2)", "mode(x)", "mode)", 3):  # fmt: skip
        with pytest.raises(ConfigurationError, match="density"):
            timestep_sampler(bad)
    with pytest.raises(ConfigurationError, match="convention"):
        timestep_sampler("uniform", "sd3")


def test_must_02_golden_densities():
    case = GOLDEN["logit_normal"]
    for entry, times in zip(case["cases"], case["t_from_z"], strict=True):
        density = LogitNormal(entry["m"], entry["s"])
        close(density.pdf(f64(case["t"])), entry["pdf"])
        close(density.from_normal(f64(case["z"])), times)
    u = f64(GOLDEN["mode"]["u"])
    for entry in GOLDEN["mode"]["cases"]:
        density = Mode(entry["s"])
        close(density.map(u), entry["t"])
        close(density.map(u), entry["t_diffusers"], atol=1e-6)
        close(density.slope(u), entry["dt_du"], atol=1e-6)
        close(density.pdf(density.map(u)), entry["pdf_at_t"], rtol=2e-5)
        step = 1e-6
        numeric = (density.map(u + step) - density.map(u - step)) / (2 * step)
        close(density.slope(u), numeric.tolist(), atol=1e-6)
    case = GOLDEN["cosmap"]
    close(CosMap().icdf(f64(case["u"])), case["t"])
    close(CosMap().pdf(f64(case["t_grid"])), case["pdf"])
    close(loss_weight(f64(GOLDEN["loss_weight_eps_form"]["t"])), GOLDEN["loss_weight_eps_form"]["w_rf_uniform"])


def test_must_02_golden_shift_grid_and_rollout():
    case = GOLDEN["shift"]
    t = f64(case["t"])
    for entry in case["cases"]:
        close(shift_time(t, entry["alpha"]), entry["t_shifted"])
    for entry in case["mu_exponential"]:
        close(shift_time(t, math.exp(entry["mu"])), entry["t_shifted"])
    for name, entry in GOLDEN["scheduler"].items():
        shift, steps = name.removeprefix("shift=").split(",N=")
        ours = sigma_grid(int(steps), float(shift))
        close(ours, entry["sigmas"], rtol=0, atol=1e-6)
        close(1000 * ours[:-1], entry["timesteps"], rtol=0, atol=2e-4)
        stock = FlowMatchEulerDiscreteScheduler(shift=float(shift))
        stock.set_timesteps(int(steps))
        torch.testing.assert_close(ours, stock.sigmas, rtol=0, atol=1e-6)
    assert sigma_grid(1).tolist() == [1.0, 0.0]
    case = GOLDEN["euler_rollout"]
    a, path = f64(case["A"]), []

    def velocity(x, t):
        path.append(x)
        return x @ a.T + t[:, None]  # the rule counts t in thousandths

    end = integrate(velocity, f64(case["x_start"]), sigma_grid(4, 3.0))
    close(torch.stack([*path[1:], end]), case["trajectory"], rtol=1e-4, atol=1e-5)
    case = GOLDEN["interp"]
    close(interpolate(f64(case["x0"]), f64(case["eps"]), f64(case["sigma"])), case["z"], atol=1e-6)


def test_must_03_shift_identities():
    t = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    torch.testing.assert_close(shift_time(t, 1.0), t, rtol=0, atol=1e-15)
    torch.testing.assert_close(shift_time(shift_time(t, 2.0), 1.5), shift_time(t, 3.0), rtol=0, atol=1e-12)
    torch.testing.assert_close(log_snr(shift_time(t, 3.0)), log_snr(t) - 2 * math.log(3), rtol=0, atol=1e-9)
    assert shift_time(torch.tensor([0.0, 1.0]), 3.0).tolist() == [0.0, 1.0]
    assert torch.isfinite(log_snr(torch.tensor([0.0, 1.0]))).all()
    assert resolution_shift(1024**2, 256**2) == 4.0
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigurationError, match="alpha"):
            shift_time(t, bad)
        with pytest.raises(ConfigurationError, match="shift"):
            sigma_grid(4, bad)
    for bad in (0, 1.5):
        with pytest.raises(ConfigurationError, match="steps"):
            sigma_grid(bad)


@pytest.mark.parametrize("name", ["cosmap", "logit_normal(0, 1)", "logit_normal(0.5, 0.6)", "mode(1.29)"])
def test_must_04_drawing_equals_weighting(name: str):
    """E_{t~pi}[L(t)] = E_{t~U}[pi(t) L(t)] for the loss of a fixed linear network on N(m, s^2)."""
    m, s, a, b, c = 0.7, 0.5, -0.8, 0.4, 0.3

    def loss(t):
        mean = a * (1 - t) * m + b * t + c + m
        return mean**2 + s**2 * (a * (1 - t) + 1) ** 2 + (a * t - 1) ** 2

    middle = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    density = timestep_sampler(name)
    drawn, weighted = loss(density.icdf(middle)).mean(), (density.pdf(middle) * loss(middle)).mean()
    assert drawn.item() == pytest.approx(weighted.item(), abs=1e-4)
    assert abs(drawn.item() - loss(middle).mean().item()) > 1e-3  # and it is another loss
    torch.testing.assert_close(loss_weight(middle, density), middle / (1 - middle) * density.pdf(middle))
    g = generator(0)  # the closed form is the loss that training computes
    x0, eps = m + s * torch.randn(400_000, generator=g), torch.randn(400_000, generator=g)
    sampled = rectified_flow_loss(lambda z, t: a * z + b * t + c, x0, eps, torch.full((400_000,), 0.3))
    assert sampled.item() == pytest.approx(loss(0.3), abs=0.02)


def test_must_09_the_sign_of_diffusers():
    means = {c: timestep_sampler("logit_normal(1, 1)", c).sample(10_000, generator(0)).mean() for c in
             ("paper", "diffusers")}  # fmt: skip
    assert means["diffusers"] < 0.45
    assert means["paper"] > 0.55
    from diffusers.training_utils import compute_density_for_timestep_sampling

    u = compute_density_for_timestep_sampling("logit_normal", 100_000, 1.0, 1.0, generator=generator(0))
    scheduler = FlowMatchEulerDiscreteScheduler()
    theirs = scheduler.sigmas[(u * 1000).long()]  # what its scripts do with the draw
    ours = timestep_sampler("logit_normal(1, 1)", "diffusers")
    assert abs(ours.cdf(theirs).mean().item() - 0.5) < 5e-3


# --- the two-stream block ----------------------------------------------------------------------------------------


def block(**kwargs) -> tuple[JointTransformerBlock, dict[str, torch.Tensor]]:
    case = GOLDEN["mmdit_block"]
    made = JointTransformerBlock(case["dim"], case["heads"], case["head_dim"], **kwargs)
    return made, {name: torch.tensor(value) for name, value in case["state_dict"].items()}


def run_block(made: JointTransformerBlock, **changed) -> tuple[torch.Tensor, torch.Tensor]:
    names = ("image_tokens", "text_tokens", "temb")
    given = {name: torch.tensor(GOLDEN["mmdit_block"][name]) for name in names} | changed
    with torch.no_grad():
        text, image = made(given["image_tokens"], given["text_tokens"], given["temb"])
    return image, text


def test_must_05_golden_block():
    made, state = block()
    report = add_qk_norm(made)  # inserted, not built in
    assert list(made.state_dict()) == list(state) == list(block(qk_norm="rms_norm")[0].state_dict())
    assert report.delta == 4 * 4
    made.load_state_dict(state, strict=True)
    image, text = run_block(made)
    close(image, GOLDEN["mmdit_block"]["image_out"], rtol=0, atol=5e-5)
    close(text, GOLDEN["mmdit_block"]["text_out"], rtol=0, atol=5e-5)
    words = torch.tensor(GOLDEN["mmdit_block"]["text_tokens"])
    permuted = words.flip(1)
    assert words.shape[1] > 1
    again, _ = run_block(made, text_tokens=permuted)
    torch.testing.assert_close(again, image, rtol=0, atol=1e-5)  # text has no positions
    swapped = dict(state)
    for ours, theirs in (("to_q", "add_q_proj"), ("to_k", "add_k_proj"), ("to_v", "add_v_proj")):
        for kind in ("weight", "bias"):
            one, two = f"attn.{ours}.{kind}", f"attn.{theirs}.{kind}"
            swapped[one], swapped[two] = state[two], state[one]
    made.load_state_dict(swapped)
    assert (run_block(made)[0] - image).abs().max() > 0.01

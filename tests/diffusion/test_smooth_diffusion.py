"""smooth-diffusion: the mathematics against closed forms and official numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effdl.core.errors import ConfigurationError
from effdl.core.noise import add_noise, alpha_sigma, betas, convert
from effdl.diffusion._smooth_diffusion_variation import RunningVariation
from effdl.diffusion.smooth_diffusion import (
    denoiser_variations,
    interpolated_images,
    interpolation_std,
    noise_variations,
    path_distances,
    slerp,
    variation_penalty,
    weighted_direction,
)
from tests.diffusion import smooth_diffusion_ranks
from tests.support import golden, run_ranks

TABLE = torch.cumprod(1 - betas("linear", 1000), 0)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def batch():
    """Clean data, noise as a leaf, direction, times and the schedule's coefficients."""
    x0, eps, delta = (normal(5, 3, 4, 4, seed=seed) for seed in range(3))
    t = torch.tensor([0, 10, 400, 700, 999])
    return x0, eps.requires_grad_(), delta, t, *alpha_sigma(TABLE, t, x0)


def both_ways(network, x0, eps, delta, t, a, s, prediction="epsilon"):
    """r by the gradient of eps itself, and by that of the network's input."""
    x_t = add_noise(x0, eps, a, s)
    estimate = convert(network(x_t, t), x_t, a, s, prediction, "sample")
    by_noise = noise_variations(estimate, eps, weighted_direction(delta, s))
    x_in = x_t.detach().requires_grad_()
    by_input = denoiser_variations(x_in, network(x_in, t), t, TABLE, prediction, delta)
    assert torch.allclose(by_noise, by_input, atol=1e-12)
    return by_noise


def test_must_01_linear_denoiser(batch):
    *_, delta, _, a, s = batch
    weight = normal(48, 48, seed=9)
    got = both_ways(lambda x, t: (x.flatten(1) @ weight.T).view_as(x), *batch)
    y = weighted_direction(delta, s).flatten(1)
    ratio = (s / a).flatten(1)
    want = (ratio * (y - s.flatten(1) * (y @ weight))).norm(dim=1)
    assert torch.allclose(got, want, atol=1e-6, rtol=0)


def test_must_02_optimal_denoiser_of_gaussian_data(batch):
    *_, delta, t, a, s = batch
    table = (1 - TABLE).sqrt()
    got = both_ways(lambda x, t: x * table[t].view(-1, 1, 1, 1), *batch)
    y = weighted_direction(delta, s).flatten(1)
    assert torch.allclose(got, (a * s).flatten() * y.norm(dim=1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_other_predictions_are_converted(batch, prediction):
    x0, eps, delta, t, a, s = batch
    weight = normal(48, 48, seed=9)

    def says_epsilon(x, t):
        return (x.flatten(1) @ weight.T).view_as(x)

    def says_otherwise(x, t):
        return convert(says_epsilon(x, t), x, a, s, "epsilon", prediction)

    assert torch.allclose(both_ways(says_epsilon, *batch), both_ways(says_otherwise, *batch, prediction), atol=1e-8)


class Golden(nn.Module):
    """The official numbers' model."""

    def __init__(self, params: dict[str, list]) -> None:
        super().__init__()
        for name, value in params.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(value, dtype=torch.float64)))

    def forward(self, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        time = (t / 1000).view(-1, 1, 1, 1) * self.wt.view(1, -1, 1, 1)
        return torch.tanh(nn.functional.conv2d(x_t, self.w, self.b, padding=1) + time) + 0.5 * x_t


@pytest.mark.parametrize("by", ["noise", "input"])
def test_must_03_golden_parity(by):
    numbers = golden("smooth-diffusion")
    schedule = numbers["schedule"]
    table = torch.cumprod(1 - betas(schedule["kind"], schedule["T"], schedule["beta_start"], schedule["beta_end"]), 0)
    model, running, worst = Golden(numbers["params"]), RunningVariation(numbers["decay"]), 0.0
    for step in numbers["steps"]:
        wide = {k: torch.tensor(v, dtype=None if k == "timesteps" else torch.float64) for k, v in step.items()}
        t, eps = wide["timesteps"], wide["eps"].requires_grad_()
        a, s = alpha_sigma(table, t, eps)
        x_t = add_noise(wide["x0"], eps, a, s)
        x_t = x_t if by == "noise" else x_t.detach().requires_grad_()
        output = model(x_t, t)
        estimate = convert(output, x_t, a, s, "epsilon", "sample")
        if by == "noise":
            r = noise_variations(estimate, eps, weighted_direction(wide["delta_noise"], s))
        else:
            r = denoiser_variations(x_t, output, t, table, "epsilon", wide["delta_noise"])
        penalty, _ = running.penalty(r)
        mse = (output - wide["eps"]).square().mean()
        grads = torch.autograd.grad(mse + numbers["lambda_reg"] * penalty, list(model.parameters()))
        got = {"x0_hat": estimate, "variations": r, "penalty": penalty, "ema_after": running.mean, "mse": mse}
        got |= {f"grad_{name}": grad for (name, _), grad in zip(model.named_parameters(), grads)}
        for name, value in got.items():
            assert torch.allclose(value.double(), wide[name], atol=1e-5, rtol=1e-5), name
            worst = max(worst, (value - wide[name]).abs().max().item())
    print(f"golden, by {by}: max error {worst:.1e}")


def test_must_04_the_penalty_alone_reaches_the_parameters(batch):
    x0, eps, delta, t, a, s = batch
    network = nn.Conv2d(3, 3, 3, padding=1).double()
    bent = lambda x, t: torch.tanh(network(x))  # noqa: E731
    penalty, _ = variation_penalty(both_ways(bent, *batch), torch.zeros(()))
    penalty.backward()
    assert all(p.grad.abs().max() > 1e-8 for p in network.parameters())


def test_penalty_is_the_official_formula_with_the_gradient_through_the_new_mean():
    r, running = normal(6).abs().requires_grad_(), torch.tensor(0.7, dtype=torch.float64)
    penalty, after = variation_penalty(r, running, 0.3)
    a = running + 0.3 * (r.mean() - running)
    want = (r - a).square().mean()
    assert torch.allclose(penalty, want, atol=1e-14)
    assert torch.allclose(after, a)
    assert not after.requires_grad
    for got, expected in zip(torch.autograd.grad(penalty, r), torch.autograd.grad(want, r)):
        assert torch.allclose(got, expected, atol=1e-14)


def test_must_10_two_processes_equal_one_with_the_joined_batch(tmp_path):
    run_ranks("tests.diffusion.smooth_diffusion_ranks", tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    joined = smooth_diffusion_ranks.steps(slice(None))
    assert len(joined) == len(first) == 3
    for one, (mean_a, grad_a), (mean_b, grad_b) in zip(joined, first, second):
        assert mean_a == mean_b
        assert torch.allclose(mean_a, one[0], atol=1e-6, rtol=0)
        assert torch.allclose((grad_a + grad_b) / 2, one[1], atol=1e-6, rtol=0)


def test_a_batch_that_comes_again_counts_once():
    running = RunningVariation(0.5)
    r = normal(4).abs()
    running.penalty(r, (0, 3))
    once = running.mean
    running.penalty(r, (0, 3))
    assert running.mean == once
    running.penalty(r, (0, 4))
    assert running.mean != once


def test_a_network_that_ignores_its_input_is_named(batch):
    x0, eps, delta, t, a, s = batch
    network = nn.Conv2d(3, 3, 3, padding=1).double()
    x_t = add_noise(x0, eps, a, s).detach().requires_grad_()
    for output in (network(x_t.detach()), network(x_t).detach()):
        with pytest.raises(ConfigurationError, match="detaches its input"):
            denoiser_variations(x_t, output, t, TABLE, "epsilon", delta)


@pytest.mark.parametrize("shape", [(7,), (2, 5), (3, 4, 4), (2, 3, 4, 4)], ids=str)
def test_any_latent_shape_and_a_batch_of_one(shape):
    x_t = normal(1, *shape).requires_grad_()
    r = denoiser_variations(x_t, 0.5 * x_t.tanh(), torch.tensor([500]), TABLE, "epsilon", normal(1, *shape, seed=1))
    assert r.shape == (1,)
    penalty, after = variation_penalty(r, torch.zeros(()))
    assert torch.allclose(after, 0.01 * r.detach())
    assert torch.isfinite(penalty)


def test_half_precision_is_measured_in_fp32(batch):
    x0, eps, delta, t, a, s = (value.detach().bfloat16() if value.is_floating_point() else value for value in batch)
    x_t = add_noise(x0, eps, a, s).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        r = denoiser_variations(x_t, x_t.tanh(), t, TABLE.float(), "epsilon", delta)
    assert r.dtype == torch.float32
    assert torch.isfinite(r).all()


def test_slerp_keeps_the_norm_and_meets_its_ends():
    start, end = normal(4, 2, 3, 3), normal(4, 2, 3, 3, seed=1)
    start, end = (x / x.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for x in (start, end))
    path = slerp(start, end, torch.linspace(0, 1, 10, dtype=torch.float64))
    assert torch.allclose(path[:, 0], start, atol=1e-12)
    assert torch.allclose(path[:, -1], end, atol=1e-12)
    assert torch.allclose(path.flatten(2).norm(dim=2), torch.ones(4, 10, dtype=torch.float64))
    assert path_distances(path).std(dim=1).max() < 1e-12  # equal steps on the sphere


def test_istd_is_zero_for_even_steps_and_grows_with_a_jump():
    even = torch.linspace(0, 1, 10).view(1, 10, 1).expand(3, 10, 4)
    assert interpolation_std(even) < 1e-6
    jump = (torch.arange(10) >= 5).float().view(1, 10, 1).expand(3, 10, 4)
    distances = torch.tensor([0.0] * 8 + [2.0])
    assert interpolation_std(jump) == pytest.approx(distances.std(correction=0).item(), abs=1e-6)
    with pytest.raises(ConfigurationError, match="points"):
        interpolation_std(even[:, :2])


def test_interpolated_images_keep_a_pairs_condition():
    seen = []

    def generate(noise, pair):
        seen.append(pair)
        return noise * pair.view(-1, 1)

    images = interpolated_images(generate, normal(3, 5), normal(3, 5, seed=1), points=4)
    assert images.shape == (3, 4, 5)
    assert seen[0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.allclose(images[2, 0], 2 * normal(3, 5)[2])

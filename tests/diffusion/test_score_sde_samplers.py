"""score-sde: correctors, samplers and conditions, on Gaussians and mixtures with their exact scores."""

from __future__ import annotations

import math

import pytest
import torch

from effdl.diffusion.score_sde import (
    VE,
    VP,
    Known,
    ODESampler,
    PCSampler,
    SubVP,
    class_score,
    colourise,
    grey_basis,
    inpaint,
    langevin,
)
from tests.diffusion.score_sde_exact import gaussian, generator, mixture, mixture_logits

# --- must show 4 (seeds: tests/claims), 5: the corrector ----------------------------------------------------------


def test_must_05_langevin_keeps_what_it_should_leave_and_moves_back_what_was_shifted():
    sde, n = VP(), 60_000
    t = torch.full((n,), 0.4)
    covariance = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    score = gaussian(sde, 0.4, covariance)
    at_t = sde.scale(t[:1]).square() * covariance + sde.std(t[:1]).square() * torch.eye(2)
    draw, mean = generator(), 0.4 * sde.scale(t[:1])
    x = mean + torch.randn(n, 2, generator=draw) @ torch.linalg.cholesky(at_t).T
    for _ in range(50):
        x, _ = langevin(sde, score, x, t, torch.randn(x.shape, generator=draw), 0.05)
    assert float((x.mean(0) - mean).abs().max()) < 0.03
    assert float((x.T.cov() - at_t).abs().max() / at_t.max()) < 0.03

    score, t = gaussian(sde), t[:4000]
    spread = (sde.scale(t[:1]).square() * 0.36 + sde.std(t[:1]).square()).sqrt()
    x = mean + spread * (torch.randn(4000, 2, generator=draw) + 0.3)
    for _ in range(400):
        x, _ = langevin(sde, score, x, t, torch.randn(x.shape, generator=draw), 0.05)
    assert float(((x.mean(0) - mean) / spread).abs().max()) < 0.2 * 0.3 + 3 / math.sqrt(4000)


def test_a_corrector_without_a_step_size_says_so():
    sde = VE(steps=10)
    with pytest.raises(FloatingPointError, match="corrector"):
        PCSampler()(sde, lambda x, t: torch.zeros_like(x), (4, 2))
    for sampler in (PCSampler(corrector="none"), ODESampler()):
        with pytest.raises(FloatingPointError, match="NaN"):
            sampler(sde, lambda x, t: x / 0, (4, 2))


# --- samplers -----------------------------------------------------------------------------------------------------


SAMPLERS = {
    "reverse_diffusion": (VE(steps=200), PCSampler()),
    "euler_maruyama": (SubVP(steps=200), PCSampler("euler_maruyama")),
    "ancestral vp": (VP(steps=200), PCSampler("ancestral", "langevin")),
    "ancestral ve": (VE(steps=200), PCSampler("ancestral", "ald")),
    "probability flow": (VP(steps=800), PCSampler(probability_flow=True)),  # Euler: std 0.66 at N = 200, 0.63 at 400
    "ode, denoised": (SubVP(steps=200), ODESampler(denoise=True)),
}


@pytest.mark.parametrize("key", SAMPLERS)
def test_every_sampler_reaches_the_gaussian(key):
    sde, sampler = SAMPLERS[key]
    x = sampler(sde, gaussian(sde), (4000, 1, 2), generator())  # any shape
    assert x.shape == (4000, 1, 2)
    assert float((x.mean(0) - 0.4).abs().max()) < 0.05
    assert float((x.std(0) - 0.6).abs().max()) < 0.05
    assert torch.equal(x, sampler(sde, gaussian(sde), (4000, 1, 2), generator()))


def test_the_number_of_calls_and_the_order_of_updates():
    sde, seen = VE(steps=5), []

    def score(x, t):
        seen.append(float(t[0]))
        return -x

    PCSampler(corrector_steps=2)(sde, score, (2, 3))
    times = torch.linspace(1, 1e-5, 5).tolist()
    assert seen == pytest.approx([t for t in times for _ in range(3)])  # N (M + 1)
    for steps in (200, 1000):  # fp32 times do not fall under their own index
        t = torch.linspace(1, 1e-5, steps, dtype=torch.float64).float()
        assert VE(steps=steps).index(t).tolist() == list(range(steps))[::-1]


def test_a_row_solved_alone_does_not_depend_on_its_mates():
    sde, z = VP(), torch.randn(3, 2, generator=generator())
    score, alone = mixture(sde), ODESampler(1e-3, per_sample=True)
    assert torch.equal(alone(sde, score, z)[:1], alone(sde, score, z[:1]))
    together = ODESampler(1e-3)(sde, score, z)
    assert 0 < float((together[:1] - alone(sde, score, z[:1])).abs().max()) < 0.05


# --- must show 6, 7: conditions -----------------------------------------------------------------------------------


def test_must_06_inpainting_a_correlated_gaussian():
    sde, n = VP(steps=200), 2000
    score = gaussian(sde, 0.0, torch.tensor([[1.0, 0.9], [0.9, 1.0]]))
    data, mask = torch.tensor([[1.5, math.nan]]).expand(n, 2), torch.tensor([1, 0])
    x = inpaint(sde, score, data, mask, generator=generator())
    assert float((x[:, 0] - 1.5).abs().max()) <= float(sde.std(torch.tensor([1e-3])))
    assert abs(float(x[:, 1].mean()) - 1.35) < 0.1
    assert abs(float(x[:, 1].std()) - math.sqrt(1 - 0.81)) < 0.1
    lagging = inpaint(sde, score, data, mask, PCSampler(corrector="none"), generator=generator())
    assert float(lagging[:, 1].mean()) < 1.1


def test_linear_measurements_in_a_basis_and_colours():
    basis = grey_basis()
    torch.testing.assert_close(basis.T @ basis, torch.eye(3))
    assert float(basis[:, 0].std()) < 1e-6
    sde, n = VP(steps=100), 400
    covariance = 0.1 * torch.eye(3) + 0.9 * torch.ones(3, 3)  # bright or dark, hardly coloured
    pixels = gaussian(sde, 0.0, covariance)

    def score(x, t):  # every pixel on its own
        rows = x.permute(0, 2, 3, 1).reshape(-1, 3)
        return pixels(rows, t.repeat_interleave(4)).reshape(len(x), 2, 2, 3).permute(0, 3, 1, 2)

    grey = torch.linspace(-1, 1, 4).reshape(1, 1, 2, 2).expand(n, -1, -1, -1)
    x = colourise(sde, score, grey, generator=generator())
    assert x.shape == (n, 3, 2, 2)
    assert float((x.mean(1, keepdim=True) - grey).abs().max()) < 0.01
    assert abs(float((x - grey).std()) - math.sqrt(0.1 * 2 / 3)) < 0.03
    # all elements: a rotation of the plane by 45 degrees, whose first coordinate is known
    turn = torch.tensor([[1.0, -1.0], [1.0, 1.0]]) / math.sqrt(2)
    plane = gaussian(sde, 0.0, torch.tensor([[1.0, 0.9], [0.9, 1.0]]))
    y = inpaint(sde, plane, torch.ones(n, 2), torch.tensor([1, 0]), basis=turn, generator=generator())
    assert float((y.sum(1) - 2).abs().max()) < 0.01
    assert abs(float((y @ turn)[:, 1].std()) - math.sqrt(0.1)) < 0.05
    flat = Known(sde, torch.randn(2, 3, 2, 2), torch.ones(1), basis=torch.linalg.qr(torch.randn(12, 12))[0])
    torch.testing.assert_close(flat.from_coordinates(flat.data), flat.from_coordinates(flat.to_coordinates(
        flat.from_coordinates(flat.data))))  # fmt: skip


def test_must_07_class_conditional_sampling():
    sde, n = VP(steps=200), 1500
    score, classifier = mixture(sde), mixture_logits(sde)
    for label in (0, 1):
        labels = torch.full((n,), label)
        x = PCSampler()(sde, class_score(score, classifier, labels), (n, 2), generator())
        assert float(((x[:, 0] > 0) == label).float().mean()) >= 0.97
        assert abs(float(x[:, 0].mean()) - (4 * label - 2)) < 0.1
    free = PCSampler()(sde, score, (n, 2), generator())
    assert abs(float((free[:, 0] > 0).float().mean()) - 0.7) < 3 * math.sqrt(0.21 / n)
    x = torch.randn(4, 2)
    class_score(score, classifier, torch.zeros(4, dtype=torch.long))(x, torch.full((4,), 0.5))
    assert not x.requires_grad

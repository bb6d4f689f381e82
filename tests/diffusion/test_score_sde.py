"""score-sde: official numbers, closed forms on Gaussians and mixtures, samplers, conditions, likelihoods."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from effdl.core.errors import ConfigurationError
from effdl.core.noise import expand
from effdl.diffusion.score_sde import (
    VE,
    VP,
    Known,
    ODESampler,
    PCSampler,
    ScoreAdapter,
    SubVP,
    ancestral,
    class_score,
    colourise,
    dequantise,
    dequantised_offset,
    euler_maruyama,
    exact_divergence,
    grey_basis,
    hutchinson,
    inpaint,
    langevin,
    likelihood,
    reverse_diffusion,
    score_matching_loss,
    sde_of,
    solve_flow,
)
from tests.support import golden

GOLDEN = golden("score-sde")
X, Z, T, U, NOISE = (torch.tensor(GOLDEN[name]) for name in ("x", "z", "t", "u", "noise"))
MAKERS = {"vp": VP, "sub": SubVP, "ve": VE}
ERRORS: dict[str, float] = {}


def official(name: str):
    return MAKERS[name](**{{"N": "steps"}.get(k, k): v for k, v in GOLDEN["params"][name].items()})


def toy(x: Tensor, label: Tensor) -> Tensor:
    a, b, c = (GOLDEN["net"][key] for key in "abc")
    return a * x + b + c * expand(label, x) / 100


def near(got: Tensor | float, want, key: str = "", rtol: float = 1e-4) -> None:
    """Relative tolerance, against the largest number of the tensor where one is near zero."""
    got, want = torch.as_tensor(got).double(), torch.tensor(want, dtype=torch.float64)
    error = (got.reshape(want.shape) - want).abs() / want.abs().clamp(min=1e-3 * float(want.abs().max()) + 1e-12)
    ERRORS[key] = max(ERRORS.get(key, 0.0), float(error.max()))
    assert float(error.max()) < rtol, (key, float(error.max()))


def gaussian(sde, mean: Tensor | float = 0.4, covariance: Tensor | float = 0.36):
    """The exact score where the data are N(mean, covariance): a number for isotropic data, else a matrix."""

    def score(x: Tensor, t: Tensor) -> Tensor:
        scale, std = expand(sde.scale(t), x), expand(sde.std(t), x)
        if not isinstance(covariance, Tensor):
            return -(x - scale * mean) / (scale.square() * covariance + std.square())
        at_t = scale.square()[..., None] * covariance + std.square()[..., None] * torch.eye(len(covariance)).to(x)
        return -torch.linalg.solve(at_t, (x - scale * mean)[..., None])[..., 0]

    return score


def mixture_logits(sde, weights=(0.3, 0.7), std: float = 0.5):
    """log w_k + log N(x; scale mu_k, v) for modes (-2, 0) and (2, 0)."""
    modes = torch.tensor([[-2.0, 0.0], [2.0, 0.0]])

    def logits(x: Tensor, t: Tensor) -> Tensor:
        scale, v = sde.scale(t)[:, None, None], (sde.scale(t) * std).square() + sde.std(t).square()
        square = (x[:, None] - scale * modes).square().sum(2)
        return torch.tensor(weights).log() - 0.5 * square / v[:, None]

    return logits


def mixture(sde, **kwargs):
    logits = mixture_logits(sde, **kwargs)

    def score(x: Tensor, t: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            return torch.autograd.grad(logits(x, t).logsumexp(1).sum(), x)[0]

    return score


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- must show 1: official numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_must_01_golden_parity(name):
    case, sde = GOLDEN["sde"][name], official(name)
    mean, std = sde.marginal(X, T)
    near(mean, case["mean"], "mean")
    near(std, case["std"], "std")
    near(expand(sde.rate(T), X) * X, case["drift"], "drift")
    near(sde.diffusion(T), case["diffusion"], "diffusion")
    rate, g = sde.discrete(T)
    near(expand(rate, X) * X, case["disc_f"], "disc_f")
    near(g, case["disc_G"], "disc_G")
    near(sde.prior_log_density(X), case["prior_logp"], "prior_logp")

    score = ScoreAdapter(toy, sde)
    near(score(X, T), case["score"], "score")
    t = U * (1 - 1e-5) + 1e-5
    for weighting in (False, True):
        for mean_ in (True, False):
            loss = score_matching_loss(sde, score, X, t, Z, weighting, mean_)
            near(loss, case[f"loss_lw={weighting}_mean={mean_}"], "loss")
    steps = {
        "reverse_diffusion_pf=False": reverse_diffusion(sde, score, X, T, NOISE),
        "reverse_diffusion_pf=True": reverse_diffusion(sde, score, X, T, NOISE, ode=True),
        "euler_maruyama": euler_maruyama(sde, score, X, T, NOISE),
    }
    if name != "sub":  # the official code has neither for sub-VP
        steps["ancestral"] = ancestral(sde, score, X, T, NOISE)
        steps["langevin_snr0.16"] = langevin(sde, score, X, T, NOISE, 0.16)
    for key, (x, x_mean) in steps.items():
        near(x, case[key]["x"], key)
        near(x_mean, case[key]["x_mean"], key)
    print(name, {key: f"{value:.1e}" for key, value in ERRORS.items()})


def test_langevin_of_subvp_has_the_alphas_of_vp():
    vp, sub = official("vp"), official("sub")
    score = lambda x, t: -x  # noqa: E731
    assert torch.equal(langevin(vp, score, X, T, NOISE, 0.16)[0], langevin(sub, score, X, T, NOISE, 0.16)[0])


# --- must show 2, 8: the equations belong together ---------------------------------------------------------------


@pytest.mark.parametrize("sde", [VP(), SubVP(), VE()], ids=lambda sde: sde.name)
def test_must_02_mean_and_variance_follow_the_equation(sde):
    t, h = torch.linspace(0.05, 0.95, 19, dtype=torch.float64), 1e-6
    slope = lambda f: (f(t + h) - f(t - h)) / (2 * h)  # noqa: E731
    torch.testing.assert_close(slope(sde.scale), sde.rate(t) * sde.scale(t), atol=1e-4, rtol=1e-4)
    variance = lambda t: sde.std(t).square()  # noqa: E731
    expected = 2 * sde.rate(t) * variance(t) + sde.diffusion(t).square()
    torch.testing.assert_close(slope(variance), expected, atol=1e-4, rtol=1e-4)


def test_must_08_subvp_has_less_noise_than_vp():
    for dtype in (torch.float32, torch.float64):
        t = torch.linspace(0, 1, 1001, dtype=dtype)
        vp, sub = VP(), SubVP()
        assert torch.equal(vp.scale(t), sub.scale(t))
        assert bool((sub.std(t) <= vp.std(t)).all())
        apart = (vp.std(t) - sub.std(t)) > 1e-6
        assert not apart[0]
        assert bool(apart[1:].all())
    tiny = torch.tensor([1e-6, 1e-5])  # 1 - e^{2 L} is 0 here in fp32
    torch.testing.assert_close(SubVP().std(tiny).double(), SubVP().std(tiny.double()), rtol=1e-5, atol=0)


# --- must show 3: ODE and likelihood of a Gaussian ----------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_must_03_the_ode_maps_the_prior_to_the_data_and_back(name):
    sde = MAKERS[name]()
    z = torch.randn(4000, 2, generator=generator())
    z = sde.prior_std * (z - z.mean(0)) / z.std(0, correction=0)  # exact moments: no standard error is left
    score = gaussian(sde)
    x = ODESampler()(sde, score, z)
    bias = -0.4 * 0.6 / sde.prior_std if name == "ve" else 0.0  # the prior has no mean, p_1 has
    assert float((x.mean(0) - 0.4 - bias).abs().max()) < 0.01 * 0.6
    assert float((x.std(0, correction=0) - 0.6).abs().max()) < 0.01 * 0.6
    data = 0.4 + 0.6 * torch.randn(64, 3, generator=generator(1))
    code = solve_flow(sde, score, data, 1e-5, 1.0)
    assert float((solve_flow(sde, score, code, 1.0, 1e-5) - data).abs().max()) < 1e-3


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("divergence", ["rademacher", "exact"])
def test_must_03_golden_likelihood(name, divergence):
    case, sde, x = GOLDEN["likelihood"]["cases"][name], MAKERS[name](), torch.tensor(GOLDEN["likelihood_x"])
    found = likelihood(sde, gaussian(sde), x, divergence, generator=generator())
    closed = torch.tensor(case["bpd_from_true_density"])
    assert float((found.bits - closed).abs().max()) < 0.01
    near(found.bits, case["bpd_official"], "bpd")
    near(found.latent, case["latent"], "latent")
    torch.testing.assert_close(found.log_density, torch.tensor(case["true_log_density"]), atol=0.03, rtol=0)
    print(name, divergence, found.calls, f"{float((found.bits - closed).abs().max()):.1e}",
          {key: f"{ERRORS[key]:.1e}" for key in ("bpd", "latent")})  # fmt: skip


@pytest.mark.parametrize("divergence", ["rademacher", "gaussian"])
def test_must_03_hutchinson_is_unbiased(divergence):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.Tanh(), torch.nn.Linear(32, 6))
    x = torch.randn(1, 6, generator=generator())
    value, exact = exact_divergence(net, x)
    jacobian = torch.autograd.functional.jacobian(net, x)[0, :, 0]
    torch.testing.assert_close(exact[0], jacobian.trace())
    torch.testing.assert_close(value, net(x).detach())
    probe = torch.randn(20 * 2000, 6, generator=generator())
    probe = probe if divergence == "gaussian" else probe.sign()
    draws = hutchinson(net, x.expand(len(probe), -1), probe)[1]
    assert abs(float(draws.mean() - exact)) < 3 * float(draws.std() / math.sqrt(len(draws)))
    batches = draws.reshape(20, 2000)  # and no batch of 2000 is further off than one in a thousand is
    z = (batches.mean(1) - exact) / (batches.std(1) / math.sqrt(2000))
    assert float(z.abs().max()) < 3.3
    assert all(p.grad is None for p in net.parameters())


def test_likelihood_works_under_inference_mode_and_leaves_no_graph():
    sde, x = VP(), torch.randn(2, 3)
    with torch.inference_mode():
        inside = likelihood(sde, gaussian(sde), x.clone(), generator=generator())
    outside = likelihood(sde, gaussian(sde), x, generator=generator())
    assert torch.equal(inside.bits.clone(), outside.bits)
    assert not x.requires_grad
    assert not outside.bits.requires_grad


def test_the_ode_is_solved_in_full_precision_under_autocast():
    sde, net = VP(), torch.nn.Linear(2, 2)
    with torch.no_grad():
        net.weight.copy_(0.3 * torch.eye(2))
    score, x = ScoreAdapter(lambda x, label: net(x), sde), torch.randn(3, 2, generator=generator())
    want = likelihood(sde, score, x, "exact"), solve_flow(sde, score, x, 1e-5, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        got = likelihood(sde, score, x, "exact"), solve_flow(sde, score, x, 1e-5, 1.0)
        assert score(x, torch.ones(3)).dtype == torch.float32
    assert torch.equal(want[0].bits, got[0].bits)
    assert torch.equal(want[1], got[1])


def test_dequantised_data_and_a_warning_without():
    grey = torch.randint(16, (64, 64), generator=generator())
    images = grey / 15 * 2 - 1
    x = dequantise(images, 16)
    assert torch.equal(torch.floor((x + 1) / 2 * 16).long(), grey)
    assert (float(x.min()) >= -1, float(x.max()) < 1) == (True, True)
    assert (dequantised_offset(256), dequantised_offset(16)) == (7.0, 3.0)
    sde, loose = VP(), {"tolerance": 1e-2, "eps": 0.1}
    for quantised in (images, torch.zeros(2, 2, dtype=torch.long)):
        with pytest.warns(UserWarning, match="dequantise"):
            likelihood(sde, gaussian(sde), quantised, **loose)


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


# --- arguments ----------------------------------------------------------------------------------------------------


ONES, SCORE = torch.ones(2, 3, 2, 2), gaussian(VP())


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("sigma_min", lambda: VE(sigma_min=0)), ("sigma_max", lambda: VE(1.0, 1.0)),
        ("beta_min", lambda: VP(beta_min=-1)), ("beta_max", lambda: SubVP(5.0, 1.0)), ("steps", lambda: VE(steps=0)),
        ("sde", lambda: sde_of("edm")), ("sde", lambda: sde_of({"name": "vp", "sigma_min": 1.0})),
        ("eps", lambda: PCSampler(eps=0.0)), ("eps", lambda: ODESampler(eps=1.0)), ("snr", lambda: PCSampler(snr=0.0)),
        ("predictor", lambda: PCSampler("heun")), ("corrector", lambda: PCSampler(corrector="mala")),
        ("corrector_steps", lambda: PCSampler(corrector_steps=0)), ("tolerance", lambda: ODESampler(0.0)),
        ("ancestral", lambda: PCSampler("ancestral")(SubVP(), SCORE, (2, 2))),
        ("ancestral", lambda: PCSampler("ancestral", probability_flow=True)),
        ("predictor", lambda: PCSampler("none")(VP(), SCORE, (2, 2))),
        ("steps", lambda: PCSampler()(VP(steps=10), SCORE, (2, 2))),
        ("mask", lambda: inpaint(VP(), SCORE, ONES, torch.ones(2, 3, 4))),
        ("mask", lambda: inpaint(VP(), SCORE, ONES, 0.5 * ONES)),
        ("basis", lambda: Known(VP(), ONES, ONES, torch.ones(3, 3))),
        ("basis", lambda: Known(VP(), ONES, ONES, torch.eye(4))),
        ("sampler", lambda: inpaint(VP(), SCORE, ONES, ONES, ODESampler())),
        ("grey", lambda: colourise(VP(), SCORE, torch.ones(2, 2))),
        ("classifier", lambda: class_score(SCORE, lambda x: x, torch.zeros(2))),
        ("classifier", lambda: class_score(SCORE, torch.nn.Linear(2, 2), torch.zeros(2))),
        ("divergence", lambda: likelihood(VP(), SCORE, torch.randn(2, 2), "trace")),
        ("eps", lambda: likelihood(VP(), SCORE, torch.randn(2, 2), eps=0.0)),
        ("levels", lambda: dequantise(ONES, 1)), ("prediction", lambda: ScoreAdapter(toy, VP(), "v")),
        ("model", lambda: ScoreAdapter(3, VP())),
        ("model", lambda: ScoreAdapter(lambda x, t: x[:1], VP())(ONES, torch.ones(2))),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(name, call):
    with pytest.raises(ConfigurationError, match=name):
        call()


@pytest.mark.parametrize("sde", [VE(0.02, 10.0, 30), VP(0.2, 10.0, 30), SubVP(0.2, 10.0, 30)], ids=lambda s: s.name)
def test_an_equation_is_its_config(sde):
    again = sde_of(sde.config())
    assert type(again) is type(sde)
    assert again.config() == sde.config()
    assert sde.with_steps(7).config() == sde.config() | {"steps": 7}
    half = torch.randn(3, 2).bfloat16()
    mean, std = sde.marginal(half, torch.rand(3))
    assert (mean.dtype, std.dtype) == (torch.float32, torch.float32)

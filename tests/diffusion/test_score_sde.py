"""score-sde: official numbers, closed forms on Gaussians, likelihoods, bad arguments."""

from __future__ import annotations

import math

import pytest
import torch

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
    hutchinson,
    inpaint,
    langevin,
    likelihood,
    reverse_diffusion,
    score_matching_loss,
    sde_of,
    solve_flow,
)
from tests.diffusion.score_sde_exact import (
    ERRORS,
    GOLDEN,
    MAKERS,
    NOISE,
    T,
    U,
    X,
    Z,
    gaussian,
    generator,
    near,
    official,
    toy,
)

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

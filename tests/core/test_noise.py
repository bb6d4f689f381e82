"""Noise schedules, predictions and sampling loops, against diffusers and closed forms."""

import diffusers
import pytest
import torch

from effdl.core.errors import ConfigurationError
from effdl.core.noise import (
    PREDICTIONS,
    CosineVP,
    LinearVP,
    TableVP,
    add_noise,
    alpha_sigma,
    betas,
    convert,
    ddim_step,
    prediction_of,
)
from effdl.core.random import generator
from effdl.core.solvers import denoising_path, odeint, rk45, sample_loop

X0, EPS = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)).double().unbind()


@pytest.mark.parametrize(
    ("name", "theirs", "rates"),
    [
        ("linear", "linear", (1e-4, 0.02)),
        ("scaled_linear", "scaled_linear", (0.00085, 0.012)),
        ("cosine", "squaredcos_cap_v2", (1e-4, 0.02)),
    ],
)
def test_betas_are_those_of_diffusers(name, theirs, rates):
    scheduler = diffusers.DDPMScheduler(50, beta_schedule=theirs, beta_start=rates[0], beta_end=rates[1])
    torch.testing.assert_close(betas(name, 50, *rates).float(), scheduler.betas, rtol=2e-6, atol=0)


def test_vpsde_steps_are_those_of_the_continuous_schedule():
    steps = 7
    times = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    alpha_bar = (1 - betas("vpsde", steps, 0.1, 40.0)).cumprod(0)
    torch.testing.assert_close(alpha_bar, (2 * LinearVP(0.1, 40.0).log_alpha(times)).exp(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("steps", [1, 5, 1000])
def test_log_snr_falls_along_a_cosine_from_twenty_to_minus_twenty(steps):
    times = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    near = torch.tensor(-10.0, dtype=torch.float64).exp().atan()
    log_snr = -2 * ((torch.pi / 2 - 2 * near) * times + near).tan().log()  # arctan(e^10) = pi/2 - arctan(e^-10)
    steps_of = betas("logsnr", steps)
    assert ((steps_of > 0) & (steps_of < 1)).all()
    alpha_bar = (1 - steps_of).cumprod(0)
    torch.testing.assert_close(alpha_bar, log_snr.sigmoid(), rtol=1e-6, atol=1e-15)
    assert float((alpha_bar[-1] / (1 - alpha_bar[-1])).log()) == pytest.approx(-20, abs=1e-5)


@pytest.mark.parametrize("arguments", [("no", 5), ("linear", 0), ("linear", 5, 0.2, 0.1), ("vpsde", 5, -1.0, 1.0)])
def test_betas_refuse_bad_arguments(arguments):
    with pytest.raises(ConfigurationError):
        betas(*arguments)


@pytest.mark.parametrize("line", [False, True])
@pytest.mark.parametrize("source", PREDICTIONS)
@pytest.mark.parametrize("target", PREDICTIONS)
def test_every_prediction_becomes_every_other(source, target, line):
    a = torch.tensor([[0.9], [0.5], [0.2], [0.7]], dtype=torch.float64)
    s = 1 - a if line else (1 - a**2).sqrt()
    x_t = add_noise(X0, EPS, a, s)
    said = convert(prediction_of(X0, EPS, a, s, source), x_t, a, s, source, target)
    torch.testing.assert_close(said, prediction_of(X0, EPS, a, s, target), rtol=1e-10, atol=1e-10)


def test_v_and_noise_are_those_of_diffusers():
    scheduler, t = diffusers.DDPMScheduler(), torch.tensor([0, 10, 500, 999])
    a, s = alpha_sigma(scheduler.alphas_cumprod, t, X0)
    x0, eps = X0.float(), EPS.float()
    torch.testing.assert_close(add_noise(x0, eps, a, s), scheduler.add_noise(x0, eps, t))
    torch.testing.assert_close(prediction_of(x0, eps, a, s, "v_prediction"), scheduler.get_velocity(x0, eps, t))


def test_ddim_step_is_that_of_diffusers():
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    x_t, output = X0.float(), EPS.float()
    theirs = scheduler.step(output, 500, x_t).prev_sample
    (a_t, s_t), (a_e, s_e) = (alpha_sigma(scheduler.alphas_cumprod, torch.tensor(t)) for t in (500, 400))
    x0 = convert(output, x_t, a_t, s_t, "epsilon", "sample")
    torch.testing.assert_close(ddim_step(x0, x_t, a_t, s_t, a_e, s_e), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("schedule", [LinearVP(), CosineVP(), TableVP(diffusers.DDPMScheduler().alphas_cumprod)])
def test_continuous_schedules_and_their_inverses(schedule):
    t = torch.linspace(0.01, 0.95, 40, dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, torch.ones_like(t))
    half_log_snr = schedule.half_log_snr(t)
    torch.testing.assert_close(half_log_snr, (schedule.alpha(t) / schedule.sigma(t)).log())
    assert (half_log_snr.diff() < 0).all()
    torch.testing.assert_close(schedule.inverse(half_log_snr), t, rtol=1e-8, atol=1e-8)


def test_sigma_near_the_data_keeps_its_digits():
    t = torch.tensor([1e-7])
    torch.testing.assert_close(LinearVP().sigma(t), (0.1 * t).sqrt(), rtol=1e-4, atol=0)


def test_a_table_is_exact_at_its_own_points():
    table = diffusers.DDPMScheduler().alphas_cumprod
    schedule = TableVP(table)
    t = torch.tensor([1, 500, 1000]) / 1000
    torch.testing.assert_close(schedule.alpha(t) ** 2, table[[0, 499, 999]], rtol=1e-5, atol=0)
    torch.testing.assert_close(schedule.label(t), torch.tensor([0.0, 499.0, 999.0]))
    with pytest.raises(ConfigurationError, match="alphas_cumprod"):
        TableVP(table.flip(0))


@pytest.mark.parametrize("per_sample", [False, True])
def test_rk45_solves_and_returns(per_sample):
    x = torch.linspace(1, 2, 6).reshape(3, 2)
    end = rk45(lambda t, x: -t * x, x, 0.0, 1.0, 1e-7, per_sample)
    torch.testing.assert_close(end, x * torch.tensor(-0.5).exp(), rtol=1e-5, atol=0)
    torch.testing.assert_close(rk45(lambda t, x: -t * x, end, 1.0, 0.0, 1e-7), x, rtol=1e-5, atol=0)


def test_per_sample_solves_do_not_see_their_mates():
    slope = lambda t, x: (20 * x).sin() * 5  # noqa: E731
    x = torch.tensor([[0.1], [0.7]])
    alone = rk45(slope, x[:1], 0.0, 1.0, 1e-3)
    assert torch.equal(rk45(slope, x, 0.0, 1.0, 1e-3, per_sample=True)[:1], alone)
    assert not torch.equal(rk45(slope, x, 0.0, 1.0, 1e-3)[:1], alone)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_fixed_grid_solvers_have_their_order_and_a_gradient(method, order):
    x = torch.ones(1, dtype=torch.float64, requires_grad=True)
    errors = []
    for steps in (8, 16):
        grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        end = odeint(lambda t, x: t * x, x, grid, method)[-1]
        errors.append(abs(float(end.detach()) - torch.tensor(-0.5, dtype=torch.float64).exp().item()))
    assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.2)
    assert float(torch.autograd.grad(end.sum(), x)[0]) == pytest.approx(float(end.detach()), rel=1e-9)
    with pytest.raises(ConfigurationError, match="grid"):
        odeint(lambda t, x: x, x, torch.tensor([0.0, 1.0, 0.5]), method)
    with pytest.raises(ConfigurationError, match="grid"):
        odeint(lambda t, x: x, x, torch.tensor([0.0]), method)


def test_the_path_shows_every_call_of_the_network():
    seen = []

    def predict(x, t):
        seen.append((x.clone(), t.clone()))
        return x * 0.1

    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    visits = list(denoising_path(predict, x, diffusers.DDIMScheduler(), 5))
    assert len(visits) == len(seen) == 5
    for visit, (given, t) in zip(visits, seen):
        assert torch.equal(visit.x, given)
        assert t.shape == (3,)
        assert (t == visit.t).all()
    assert torch.equal(visits[0].after, visits[1].x)
    assert torch.equal(sample_loop(predict, x, diffusers.DDIMScheduler(), 5), visits[-1].after)


def test_stochastic_schedulers_draw_from_the_generator_alone():
    x = torch.zeros(2, 1, 2, 2)
    before = torch.get_rng_state()
    ends = [sample_loop(lambda x, t: x, x, diffusers.DDPMScheduler(), 3, generator(4)) for _ in "ab"]
    assert torch.equal(*ends)
    assert ends[0].abs().sum() > 0
    assert torch.equal(before, torch.get_rng_state())

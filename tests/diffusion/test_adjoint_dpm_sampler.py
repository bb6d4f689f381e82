"""adjoint-dpm: guidance, grids, predictions, precision, and what the sampler refuses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from effdl.core.errors import ConfigurationError
from effdl.core.noise import CosineVP, LinearVP, TableVP, betas
from effdl.diffusion._adjoint_dpm_ode import adjoint_odeint
from effdl.diffusion._adjoint_dpm_sampler import AdjointSampler, rho_grid, time_grid
from tests.diffusion.adjoint_dpm_problems import DOUBLE, SCHEDULE, error, expected, gaussian, official, true_ratio
from tests.diffusion.adjoint_dpm_ranks import Small, batch, gradients


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

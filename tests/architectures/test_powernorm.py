"""powernorm: what the paper and the official code say."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd.gradcheck import GradcheckError, gradcheck

from effdl.architectures.powernorm import PowerNorm, group_scale
from effdl.architectures.powernorm_models import FoldedNorm, fold_power_norm
from tests.architectures.powernorm_parts import double, tokens, trained
from tests.support import golden


def test_must_01_golden_parity():
    numbers = golden("powernorm")
    norm = PowerNorm(8, group_num=2, warmup_iters=numbers["warmup_iters"], backward_scale="batch").double()
    with torch.no_grad():
        norm.weight.copy_(double(numbers["weight"]))
        norm.bias.copy_(double(numbers["bias"]))
    worst = 0.0
    for step in numbers["steps"]:
        x = double(step["x"]).requires_grad_()
        mask = None if step["pad_mask"] is None else torch.tensor(step["pad_mask"]).T
        norm.zero_grad()
        y = norm(x, mask)
        y.backward(double(step["grad_out"]))
        got = {"y": y, "grad_x": x.grad, "grad_weight": norm.weight.grad, "grad_bias": norm.bias.grad}
        got |= {"running_phi_after": norm.running_phi, "ema_gz_after": norm.ema_gz}
        for key, value in got.items():
            worst = max(worst, float((value.detach() - double(step[key])).abs().max()))
            torch.testing.assert_close(value, double(step[key]), atol=1e-6, rtol=0, msg=key)
        assert norm.iters == step["iters_after"]
    y = norm.eval()(double(numbers["eval"]["x"]))
    torch.testing.assert_close(y, double(numbers["eval"]["y"]), atol=1e-6, rtol=0)
    print(f"golden: largest deviation {worst:.1e}")


@pytest.mark.parametrize("scale", ["running", "batch"])
def test_must_02_nu_identity(scale):
    norm = trained(backward_scale=scale, group_num=None)
    x, grad_y = tokens(5, 7, 8, seed=20), tokens(5, 7, 8, seed=21)
    nu, phi = (1 - norm.alpha_bwd) * norm.ema_gz, norm.running_phi.clone()
    norm(x).backward(grad_y)
    z, g = x / (phi + norm.eps).sqrt(), grad_y * norm.weight.detach()
    gamma, lam = z.square().mean((0, 1)), (g * z).mean((0, 1))
    expected = nu * (1 - (1 - norm.alpha_bwd) * gamma) + (1 - norm.alpha_bwd) * lam
    torch.testing.assert_close((1 - norm.alpha_bwd) * norm.ema_gz, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("scale", ["running", "batch"])
def test_backward_follows_the_paper_written_out(scale):
    norm = trained(backward_scale=scale)
    x, grad_y = tokens(5, 7, 8, seed=20).requires_grad_(), tokens(5, 7, 8, seed=21)
    nu, phi = (1 - norm.alpha_bwd) * norm.ema_gz, norm.running_phi.clone()
    scaled = group_scale(x, 2)
    z = (scaled / (phi + norm.eps).sqrt()).detach()
    divisor = phi if scale == "running" else scaled.detach().square().mean((0, 1))
    direct = (grad_y * norm.weight.detach() - nu * z) / (divisor + norm.eps).sqrt()
    (expected,) = torch.autograd.grad(scaled, x, direct)
    norm(x).backward(grad_y)
    torch.testing.assert_close(x.grad, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(norm.weight.grad, (grad_y * z).sum((0, 1)), atol=1e-12, rtol=0)
    torch.testing.assert_close(norm.bias.grad, grad_y.sum((0, 1)), atol=1e-12, rtol=0)


def test_must_03_batch_independence():
    norm, batch_norm = trained(), nn.BatchNorm1d(8).double()
    x = tokens(4, 6, 8, seed=30)
    loud = torch.cat((x[:1], 100 * x[1:]))
    y, y_loud = (copy.deepcopy(norm)(batch)[0] for batch in (x, loud))
    torch.testing.assert_close(y, y_loud, atol=1e-6, rtol=0)
    y, y_loud = (batch_norm(batch.flatten(0, 1))[:6] for batch in (x, loud))
    assert (y - y_loud).abs().max() > 0.1


def test_must_04_train_and_eval_agree_after_warmup():
    norm, x = trained(), tokens(4, 6, 8, seed=30)
    before = norm.eval()(x)
    torch.testing.assert_close(norm.train()(x), before, atol=1e-6, rtol=0)


def test_must_05_mean_stays():
    x = 5 + tokens(16, 32, 8)
    assert PowerNorm(8).double()(x).mean() > 0.5
    assert nn.BatchNorm1d(8).double()(x.flatten(0, 1)).mean().abs() < 1e-6


def test_must_06_first_gradient_treats_the_scale_as_a_constant():
    norm = PowerNorm(8, group_num=None, warmup_iters=10).double()
    x, grad_y = tokens(4, 6, 8).requires_grad_(), tokens(4, 6, 8, seed=1)
    norm(x).backward(grad_y)
    moment = x.square().mean((0, 1))
    (constant,) = torch.autograd.grad(x / (moment.detach() + norm.eps).sqrt(), x, grad_y)
    (plain,) = torch.autograd.grad(x / (moment + norm.eps).sqrt(), x, grad_y)
    torch.testing.assert_close(x.grad, constant, atol=1e-12, rtol=0)
    assert (x.grad - plain).abs().max() > 1e-3
    with pytest.raises(GradcheckError, match="Jacobian mismatch"):
        gradcheck(norm, (x,))


def test_must_07_stationary_fixed_point_and_step_change():
    norm, batches = PowerNorm(8, group_num=None, warmup_iters=20).double(), torch.Generator().manual_seed(3)
    for _ in range(200):
        norm(2 * torch.randn(1024, 8, generator=batches, dtype=torch.float64))
    torch.testing.assert_close(norm.running_phi, torch.full_like(norm.running_phi, 4), rtol=0.05, atol=0)

    norm, signs = PowerNorm(8, group_num=None, warmup_iters=0).double(), tokens(64, 8).sign()
    norm(signs)
    for step in range(1, 30):
        norm(2 * signs)
        torch.testing.assert_close(norm.running_phi, torch.full((8,), 4 - 3 * 0.9**step).double(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("group_num", [2, None])
def test_must_08_fold(group_num):
    norm = trained(group_num=group_num).float()
    model = nn.Sequential(norm, nn.Linear(8, 5)).eval()
    x = tokens(4, 6, 8, seed=30, dtype=torch.float32)
    folded = fold_power_norm(model, x)
    torch.testing.assert_close(folded(x), model(x), atol=1e-5, rtol=0)
    assert isinstance(folded[0], nn.Identity if group_num is None else FoldedNorm)
    assert not list(folded[0].parameters())
    assert isinstance(model[0], PowerNorm)

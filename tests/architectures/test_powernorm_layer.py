"""powernorm: the layer: modes, padding, checkpointing, precision, bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import gradcheck
from torch.utils.checkpoint import checkpoint

from effdl.architectures.powernorm import PowerNorm, power_norm
from effdl.core.errors import ConfigurationError
from tests.architectures.powernorm_parts import BUFFERS, tokens, trained


def test_statistics_update_by_the_card():
    norm, phi = PowerNorm(8, group_num=None, warmup_iters=4).double(), torch.ones(8).double()
    for t in range(1, 8):
        x = t * tokens(4, 6, 8, seed=t)
        s = x.square().mean((0, 1))
        norm(x)
        if t < 4:
            phi = phi * (t - 1) / t + s / t
        phi = 0.9 * phi + 0.1 * s
        torch.testing.assert_close(norm.running_phi, phi, atol=1e-12, rtol=0)


def test_vanilla_mode_has_the_exact_gradient_also_with_padding():
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1, 3:] = True
    norm = trained(mode="vanilla")
    assert gradcheck(norm, (tokens(4, 6, 8).requires_grad_(),))
    assert gradcheck(norm, (tokens(4, 6, 8).requires_grad_(), mask))
    assert norm.ema_gz.abs().max() == 0


def test_mask_backward_takes_padding_out_everywhere():
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1, 3:] = True
    norm = trained(mask_backward=True)
    alone = copy.deepcopy(norm)
    x, grad_y = tokens(4, 6, 8, seed=1).requires_grad_(), tokens(4, 6, 8, seed=2)
    norm(x, mask).backward(grad_y)
    packed = x.detach()[~mask].requires_grad_()
    alone(packed).backward(grad_y[~mask])
    torch.testing.assert_close(x.grad[~mask], packed.grad)
    assert not x.grad[mask].any()
    for name in ("weight", "bias"):
        torch.testing.assert_close(getattr(norm, name).grad, getattr(alone, name).grad)
    for name in BUFFERS:
        torch.testing.assert_close(getattr(norm, name), getattr(alone, name))


def test_eval_form_is_the_function():
    norm, x = trained().eval(), tokens(4, 6, 8)
    assert torch.equal(norm(x), power_norm(x, norm.running_phi, norm.weight, norm.bias, group_num=2))


def test_a_second_backward_moves_nothing_and_sees_the_same_nu():
    norm, x = trained(), tokens(4, 6, 8).requires_grad_()
    y = norm(x)
    (first,) = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)
    state = norm.ema_gz.clone()
    (second,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(first, second)
    assert torch.equal(norm.ema_gz, state)


class Block(nn.Module):
    """Calls its norm twice, as models with shared layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = PowerNorm(8, group_num=2, warmup_iters=2, alpha_fwd=0.6)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.norm(self.first(self.norm(x)).tanh()))


@pytest.mark.parametrize("fresh", [True, False], ids=["other data each step", "the same data each step"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_a_forward_once(reentrant, fresh):
    torch.manual_seed(0)
    plain = nn.ModuleList([Block(), Block()])
    again = copy.deepcopy(plain)
    for step in range(6):
        x, y = (tokens(4, 6, 8, seed=step * fresh, dtype=torch.float32).requires_grad_() for _ in range(2))
        out, out_again = x, y
        for block, block_again in zip(plain, again):
            out = block(out)
            out_again = checkpoint(block_again, out_again, use_reentrant=reentrant)
        out.square().sum().backward()
        out_again.square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    for value, value_again in zip(plain.state_dict().values(), again.state_dict().values()):
        torch.testing.assert_close(value, value_again)
    for parameter, parameter_again in zip(plain.parameters(), again.parameters()):
        torch.testing.assert_close(parameter.grad, parameter_again.grad)
    assert plain[0].norm.iters == again[0].norm.iters == 12


def test_half_precision_keeps_float32_state():
    norm = trained().float().bfloat16()
    assert norm.weight.dtype == torch.bfloat16
    assert norm.running_phi.dtype == norm.ema_gz.dtype == torch.float32
    x = tokens(4, 6, 8, dtype=torch.float32)
    y = norm(x.bfloat16().requires_grad_())
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert norm.weight.grad.dtype == torch.bfloat16
    assert norm.running_phi.dtype == torch.float32


def test_fp16_overflow_leaves_the_state_alone_and_the_scale_cancels():
    plain, scaled = trained(), trained()
    scaled.loss_scale = torch.tensor(1024.0, dtype=torch.float64)
    x, grad_y = tokens(4, 6, 8, seed=1), tokens(4, 6, 8, seed=2)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    plain(a).backward(grad_y)
    scaled(b).backward(1024 * grad_y)
    torch.testing.assert_close(1024 * a.grad, b.grad)
    torch.testing.assert_close(plain.ema_gz, scaled.ema_gz)
    scaled(x * float("inf")).backward(grad_y * float("inf"))
    torch.testing.assert_close(plain.ema_gz, scaled.ema_gz)
    assert scaled.running_phi.isfinite().all()


def test_lost_state_is_reported_with_the_layers_name():
    norm = PowerNorm(8)
    norm.name = "blocks.3.norm1"
    norm(torch.full((4, 8), float("nan")))
    for _ in range(PowerNorm._CHECK_EVERY - 2):
        norm(torch.ones(4, 8))
    with pytest.raises(FloatingPointError, match="blocks.3.norm1"):
        norm(torch.ones(4, 8))


def test_nu_clip_bounds_nu():
    norm = trained(nu_clip=0.01)
    assert (0.1 * norm.ema_gz).abs().max() <= 0.01 + 1e-12
    assert (0.1 * trained().ema_gz).abs().max() > 0.01


def test_official_shapes_load():
    norm, fresh = trained(), PowerNorm(8, group_num=2).double()
    state = norm.state_dict()
    state |= {"running_phi": state["running_phi"].view(1, 8, 1, 1), "ema_gz": state["ema_gz"].view(1, 8, 1, 1)}
    state["iters"] = state["iters"].view(1)
    fresh.load_state_dict(state)
    assert all(torch.equal(getattr(norm, name), getattr(fresh, name)) for name in BUFFERS)
    assert fresh.iters.shape == ()


def test_eval_before_training_warns_once():
    norm = PowerNorm(8).eval()
    with pytest.warns(UserWarning, match="before any training step"):
        norm(torch.ones(2, 8))
    norm(torch.ones(2, 8))


BAD = {
    "num_features": 0, "group_num": 3, "warmup_iters": -1, "alpha_fwd": 1.0, "alpha_bwd": 0.0, "eps": 0.0,
    "group_eps": -1.0, "backward_scale": "run", "mode": "plain", "nu_clip": 0.0,
}  # fmt: skip


@pytest.mark.parametrize("argument", BAD)
def test_bad_arguments_are_named(argument):
    with pytest.raises(ConfigurationError, match=argument):
        PowerNorm(**{"num_features": 8, argument: BAD[argument]})


def test_bad_inputs_are_named():
    norm = PowerNorm(8)
    with pytest.raises(ConfigurationError, match="x="):
        norm(torch.ones(2, 7))
    with pytest.raises(ConfigurationError, match="padding_mask"):
        norm(torch.ones(2, 3, 8), torch.zeros(3, 2, dtype=torch.bool))
    with pytest.raises(ConfigurationError, match="padding_mask"):
        norm(torch.ones(2, 3, 8), torch.ones(2, 3, dtype=torch.bool))
    assert norm.iters == 0

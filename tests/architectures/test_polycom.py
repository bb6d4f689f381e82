"""polycom: official numbers, identities, precision, arguments (checks 1-4, 6, 9, 10)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effdl.architectures.polycom import PolyNorm, PolyReLU, poly_norm, poly_relu
from effdl.architectures.polycom_models import matched_width, ungate
from effdl.core.errors import ConfigurationError
from tests.support import golden

CASES = golden("polycom")["cases"]
KINDS = {"PolyNorm": PolyNorm, "PolyReLU": PolyReLU}


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return ((value - reference).norm() / reference.norm()).item()


# -- 1: the official code's numbers


@pytest.mark.parametrize("checkpoint", [True, False])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['kind']}-{torch.tensor(c['x']).ndim}d")
def test_must_01_golden_parity(case, checkpoint):
    act = KINDS[case["kind"]](checkpoint=checkpoint).double()
    official = {name: torch.tensor(case[name], dtype=torch.float64) for name in ("weight", "bias")}
    act.load_state_dict(official, strict=True)
    x = torch.tensor(case["x"], dtype=torch.float64, requires_grad=True)
    y = act(x)
    y.backward(torch.tensor(case["grad_out"], dtype=torch.float64))
    got = {"y": y, "grad_x": x.grad, "grad_weight": act.weight.grad, "grad_bias": act.bias.grad}
    for name, value in got.items():
        reference = torch.tensor(case[name], dtype=torch.float64)
        torch.testing.assert_close(value, reference, rtol=1e-6, atol=1e-6 * reference.abs().max().item(), msg=name)


def test_must_01_reversed_weight_order_is_another_function():
    case = CASES[2]
    x, y = (torch.tensor(case[name], dtype=torch.float64) for name in ("x", "y"))
    weight, bias = (torch.tensor(case[name], dtype=torch.float64) for name in ("weight", "bias"))
    assert relative_error(poly_norm(x, weight.flip(0), bias), y) > 0.1


# -- 2: every ReLU network is a PolyReLU network


def test_must_02_relu_init_is_relu_to_the_bit():
    x = torch.cat([torch.randn(4096), 10.0 ** torch.arange(-30, 38), -(10.0 ** torch.arange(-30, 38))])
    for order in (1, 3, 8):
        with torch.no_grad():
            assert torch.equal(PolyReLU(order, init="relu")(x), torch.relu(x))
        assert torch.equal(PolyReLU(order, init="relu")(x).detach(), torch.relu(x))


def test_must_02_trained_relu_net_converts_without_loss_and_then_fits_better():
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    inputs, labels = torch.tensor(digits.data / 16).float(), torch.tensor(digits.target)

    def train(net: nn.Module, steps: int, lr: float) -> float:
        optimizer = torch.optim.Adam(net.parameters(), lr)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(inputs), labels)
            loss.backward()
            optimizer.step()
        return F.cross_entropy(net(inputs), labels).item()

    torch.manual_seed(0)
    relu = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    train(relu, 100, lr=1e-2)
    poly = nn.Sequential(nn.Linear(64, 16), PolyReLU(init="relu"), nn.Linear(16, 10))
    poly.load_state_dict(relu.state_dict(), strict=False)
    torch.testing.assert_close(poly(inputs), relu(inputs), rtol=0, atol=1e-6)
    assert train(poly, 100, lr=1e-3) < 0.9 * train(relu, 100, lr=1e-3)  # measured: half, on four seeds
    cube, square = poly[1].weight[0].item(), poly[1].weight[1].item()
    assert cube != 0
    assert square != 0


def test_squared_relu_is_a_special_case():
    x = torch.randn(100)
    y = poly_relu(x, torch.tensor([0.0, 1.0, 0.0]), torch.zeros(1))
    torch.testing.assert_close(y, torch.relu(x).square())


# -- 3, 4: the norm


def test_must_03_scale_free_odd_and_even_terms_and_unit_rms():
    x = torch.randn(5, 64, dtype=torch.float64)
    weight, zero = torch.randn(3, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    y = poly_norm(x, weight, zero, eps=1e-30)
    for scale in (1e-3, 7.0, 1e4):
        torch.testing.assert_close(poly_norm(scale * x, weight, zero, eps=1e-30), y, rtol=1e-5, atol=1e-5)
    flipped = poly_norm(-x, weight, zero, eps=1e-30)
    torch.testing.assert_close(flipped, poly_norm(x, weight * torch.tensor([-1, 1, -1]), zero, eps=1e-30))
    for p in range(3):
        one = F.one_hot(torch.tensor(p), 3).double()
        term = poly_norm(x, one, zero, eps=1e-30)
        torch.testing.assert_close(term.square().sum(-1), torch.full((5,), 64.0, dtype=torch.float64))


def test_must_04_l2_times_root_of_width_is_rms():
    x = torch.randn(3, 7, 48, dtype=torch.float64)
    weight, zero = torch.randn(3, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    l2, rms = (poly_norm(x, weight, zero, eps=1e-30, norm=norm) for norm in ("l2", "rms"))
    torch.testing.assert_close(l2 * math.sqrt(48), rms, rtol=1e-5, atol=1e-5)


def test_dim_one_is_the_channel_dimension():
    x, act = torch.randn(2, 16, 5, 5), PolyNorm()
    torch.testing.assert_close(PolyNorm(dim=1)(x), act(x.movedim(1, -1)).movedim(-1, 1))


# -- 6: parameters of a gated MLP


class SwiGLU(nn.Module):
    def __init__(self, d: int, f: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(d, f, bias=bias), nn.Linear(d, f, bias=bias)
        self.down_proj, self.act_fn = nn.Linear(f, d, bias=bias), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_must_06_swiglu_is_replaced_at_equal_parameters():
    gated = SwiGLU(256, 688)
    plain = ungate(gated, PolyNorm())
    assert plain.up_proj.out_features == plain.down_proj.in_features == 1032 == matched_width(688)
    assert matched_width(1024) == 1536  # the official MoE configuration
    assert abs(count(plain) - count(gated)) <= 0.005 * count(gated)
    assert "gate_proj.weight" not in plain.state_dict()
    assert plain(torch.randn(2, 9, 256)).shape == (2, 9, 256)
    torch.testing.assert_close(plain.up_proj.weight.std(), gated.up_proj.weight.std(), rtol=0.02, atol=0)
    assert torch.equal(ungate(gated, PolyNorm()).up_proj.weight, plain.up_proj.weight)  # own generator
    kept = ungate(gated, PolyReLU(), match_params=False)
    assert kept.up_proj is gated.up_proj
    assert count(kept) == 2 * 256 * 688 + 4


# -- 9, 10: precision and the zero row


@pytest.mark.parametrize("kind", [PolyNorm, PolyReLU])
def test_must_09_bf16_autocast_with_large_inputs(kind):
    torch.manual_seed(0)
    act, x = kind(), (torch.rand(64, 256) * 2 - 1) * 100
    grad = torch.randn(64, 256)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        leaf = x.detach().clone().to(dtype).requires_grad_()
        act.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            y = act(leaf)
        y.backward(grad.to(dtype))
        assert y.dtype is dtype
        results.append([t.float() for t in (y, leaf.grad, act.weight.grad, act.bias.grad)])
    for reference, value in zip(*results):
        assert value.isfinite().all()
        assert relative_error(value, reference) < 0.02


def test_must_09_fp16_norm_does_not_overflow():
    x = torch.linspace(-300, 300, 512).half().requires_grad_()  # x^2 alone overflows fp16
    y = PolyNorm()(x)
    y.sum().backward()
    assert y.dtype is torch.float16
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    assert relative_error(y.float(), PolyNorm()(x.float())) < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", ["rms", "l2"])
@pytest.mark.parametrize("checkpoint", [True, False])
def test_must_10_zero_row_gives_the_bias(norm, checkpoint, dtype):
    act = PolyNorm(norm=norm, checkpoint=checkpoint)
    nn.init.constant_(act.bias, 0.25)
    x = torch.zeros(3, 8, dtype=dtype, requires_grad=True)
    y = act(x)
    assert torch.equal(y, torch.full_like(y, 0.25))
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert act.weight.grad.isfinite().all()


# -- arguments


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: PolyReLU(order=0), "order"),
        (lambda: PolyNorm(order=9), "order"),
        (lambda: PolyNorm(eps=0.0), "eps"),
        (lambda: PolyNorm(norm="l1"), "norm"),
        (lambda: PolyNorm(init="relu"), "init"),
        (lambda: PolyReLU(init="zero"), "init"),
        (lambda: PolyNorm(dim=1.5), "dim"),
        (lambda: PolyReLU()(torch.arange(4)), "x"),
        (lambda: PolyNorm()(torch.zeros(3, 0)), "dim"),
        (lambda: PolyNorm(dim=2)(torch.zeros(3, 4)), "dim"),
        (lambda: poly_relu(torch.zeros(3), torch.ones(3, 1), torch.zeros(1)), "weight"),
        (lambda: poly_relu(torch.zeros(3), torch.ones(3), torch.zeros(3)), "bias"),
        (lambda: ungate(nn.Linear(2, 2), PolyNorm()), "mlp"),
    ],
)
def test_bad_arguments_are_named(make, name):
    with pytest.raises(ConfigurationError, match=f"^{name}="):
        make()

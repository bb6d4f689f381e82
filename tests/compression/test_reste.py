"""reste: the estimator, binary layers, bits and what runs on them, against the official numbers and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effdl.compression._reste_bits import (
    deploy_signs,
    fold_thresholds,
    signs_record,
    xnor_popcount_linear,
)
from effdl.compression._reste_relu import relus_before
from effdl.compression.reste import (
    Binary,
    binarize,
    binary_layers,
    binary_weight,
    estimating_error,
    gradient_stability,
    o_schedule,
    reste_sign,
    reste_slope,
    set_power,
)
from effdl.core.errors import ConfigurationError
from effdl.core.quantized import quantize_
from tests.support import check_quantized_artifact, golden

GOLDEN = golden("reste")
GRID = torch.tensor(GOLDEN["grid"])


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(relu_first: bool = False) -> nn.Module:
    torch.manual_seed(0)
    middle = [nn.BatchNorm2d(8), nn.ReLU()] if relu_first else [nn.ReLU(), nn.BatchNorm2d(8)]
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), *middle, nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8),
        nn.Flatten(), nn.Linear(8 * 36, 12), nn.BatchNorm1d(12), nn.Linear(12, 3),
    )  # fmt: skip


@pytest.mark.parametrize("o", [1, 1.5, 2, 3])
def test_must_01_golden_estimator(o):
    case = GOLDEN["per_o"][str(o)]
    z = GRID.clone().requires_grad_()
    out = reste_sign(z, o, zero_sign="zero")
    out.sum().backward()
    torch.testing.assert_close(out.detach(), torch.tensor(case["forward"]), atol=0, rtol=0)
    torch.testing.assert_close(z.grad, torch.tensor(case["grad_wrt_input"]), atol=1e-5, rtol=0)


def test_must_01_golden_convolution():
    case = GOLDEN["conv"]
    weight, x = torch.tensor(case["weight"]), torch.tensor(case["input"])
    layer = nn.Conv2d(x.shape[1], len(weight), weight.shape[2], padding=case["padding"], bias=False)
    layer.weight.data = weight.clone()
    binarize(layer_in := nn.Sequential(layer), ["0"], zero_sign="zero")
    set_power(layer_in, case["o"])
    x = x.clone().requires_grad_()
    out = layer(x)
    out.backward(torch.tensor(case["upstream"]))
    torch.testing.assert_close(out.detach(), torch.tensor(case["output"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(layer.weight.grad, torch.tensor(case["grad_weight"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.grad, torch.tensor(case["grad_input"]), atol=1e-5, rtol=0)
    assert weight.abs().mean().item() == pytest.approx(case["scaler"], abs=1e-4)


def test_must_01_the_slope_is_its_formula_and_never_infinite():
    z = draw(10_000, dtype=torch.float64)
    z[:3] = torch.tensor([0.0, -0.0, 1e-300])
    for o in (1.0, 1.3, 2.0, 3.0, 7.0, 10.0):
        expected = [
            0.0 if abs(v) > 1.5 else abs(v) ** ((1 - o) / o) / o if abs(v) > 0.1 else 0.1 ** ((1 - o) / o)
            for v in z.tolist()
        ]
        torch.testing.assert_close(reste_slope(z, o), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_must_02_closed_forms():
    z = draw(1000, dtype=torch.float64)
    assert torch.equal(reste_slope(z, 1.0), (z.abs() <= 1.5).double())
    grid = torch.linspace(-1.5, 1.5, 600_001, dtype=torch.float64)
    for o in (1.0, 1.5, 2.0, 3.0, 8.0):
        integral = torch.trapezoid(reste_slope(grid, o), grid).item()
        assert integral == pytest.approx(2 * 1.5 ** (1 / o), rel=1e-4)


def test_must_03_two_values_and_signs():
    weight = draw(4, 3, 3, 3)
    for scale, alpha in (("layer", weight.abs().mean().view(1)), ("channel", weight.abs().flatten(1).mean(1))):
        seen = binary_weight(weight, 2.0, Binary(scale=scale))
        torch.testing.assert_close(seen.abs().flatten(1).amax(1), alpha.expand(4))
        torch.testing.assert_close(seen.abs().flatten(1).amin(1), alpha.expand(4))
    assert torch.equal(reste_sign(torch.tensor([0.0, -0.0, -1e-9, 3.0])), torch.tensor([1.0, 1.0, -1.0, 1.0]))


@pytest.mark.parametrize("scale", ["layer", "channel"])
def test_must_04_the_scale_has_a_gradient(scale):
    """With the signs frozen the loss is smooth in W through alpha alone."""
    weight = draw(3, 5, dtype=torch.float64).requires_grad_()
    x, g = draw(7, 5, seed=1, dtype=torch.float64), draw(7, 3, seed=2, dtype=torch.float64)
    settings = Binary(activations=False, scale=scale)
    (F.linear(x, binary_weight(weight, 2.0, settings)) * g).sum().backward()
    full = weight.grad.clone()
    weight.grad = None
    (F.linear(x, binary_weight(weight, 2.0, settings._replace(detach_scale=True))) * g).sum().backward()
    through_scale = full - weight.grad
    inner = g.T @ x
    signs = weight.detach().sign()
    share = (inner * signs).sum() / 15 if scale == "layer" else (inner * signs).sum(1, keepdim=True) / 5
    torch.testing.assert_close(through_scale, signs * share)

    def loss(w):
        alpha = w.abs().mean() if scale == "layer" else w.abs().mean(1, keepdim=True)
        return (F.linear(x, alpha * signs) * g).sum()

    step = 1e-6 * torch.eye(15, dtype=torch.float64).view(15, 3, 5)
    w = weight.detach()
    numeric = torch.stack([(loss(w + d) - loss(w - d)) / 2e-6 for d in step]).view(3, 5)
    torch.testing.assert_close(through_scale, numeric, rtol=1e-6, atol=1e-8)


def test_must_05_a_higher_power_errs_less_and_shakes_more():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = torch.tensor(digits.images[:64] / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(digits.target[:64])
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32),
        nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    binarize(model, ["2", "4"])
    errors, stabilities = [], []
    for o in (1.0, 1.5, 2.0, 3.0, 5.0):
        set_power(model, o)
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        weights = [layer.weight for layer in binary_layers(model).values()]
        errors.append(sum(estimating_error(w.detach(), o) for w in weights).item())
        stabilities.append(sum(gradient_stability(w.grad) for w in weights).item())
    assert all(a > b for a, b in zip(errors, errors[1:])), errors
    assert all(a < b for a, b in zip(stabilities, stabilities[1:])), stabilities


def test_must_05_golden_indicators():
    case, conv = GOLDEN["indicators"], GOLDEN["conv"]
    error = estimating_error(torch.tensor(conv["weight"]), case["o_for_error"]).item()
    assert error == pytest.approx(case["estimating_error_l2"], abs=1e-5)
    stability = gradient_stability(torch.tensor(conv["grad_weight"])).item()
    assert stability == pytest.approx(case["gradient_stability_var_abs"], abs=1e-5)


def test_must_06_golden_schedule():
    case = GOLDEN["o_schedule"]
    got = [o_schedule(e, case["epochs"], case["o_end"]) for e in range(case["epochs"])]
    assert got == pytest.approx(case["o"], abs=1e-6)
    assert got[0] == 1.0
    assert o_schedule(3, 6, 3.0, "linear") == 2.0
    assert o_schedule(0, 6, 3.0, "constant") == 3.0


@pytest.mark.parametrize("scale", ["layer", "channel"])
def test_must_07_packed(tmp_path, scale):
    model = binarize(network(), scale=scale).eval()
    x = draw(4, 1, 6, 6)
    with torch.no_grad():
        expected = model(x)
    layers = binary_layers(model).items()
    chosen = {f"{name}.weight": signs_record(layer.weight.detach(), scale) for name, layer in layers}
    assert list(chosen) == ["3.weight", "6.weight"]
    for record in chosen.values():
        alphas = 1 if scale == "layer" else record.shape[0]
        assert record.payload_bytes == math.ceil(record.codes.numel() / 8) + 4 * alphas + 8  # two points: -1 and +1
    quantize_(model, chosen)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(deploy_signs(model)(x), expected, rtol=0, atol=1e-4)
    check_quantized_artifact(model, lambda: binarize(network(), scale=scale), (x,), tmp_path)


@pytest.mark.parametrize("inputs", [1, 8, 37, 64])
def test_must_07_xnor_popcount_is_the_product_of_signs(inputs):
    x, w = draw(5, inputs).sign(), draw(7, inputs, seed=1).sign()
    assert torch.equal(xnor_popcount_linear(x, w), (x @ w.T).int())


@pytest.mark.parametrize("pad", [0, -1, 1])
def test_must_07_signs_run_on_integers(pad):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 6, 3, 2, 1), nn.Flatten(), nn.Linear(54, 5), nn.Linear(5, 2))
    binarize(model, ["1", "3"], pad_value=pad)
    quantize_(model, {f"{n}.weight": signs_record(m.weight.detach()) for n, m in binary_layers(model).items()})
    fast = deploy_signs(model)
    x = draw(3, 1, 8, 8)
    with torch.profiler.profile() as profile, torch.no_grad():
        got = fast(x)
    assert "aten::_int_mm" in {event.key for event in profile.key_averages()}
    torch.testing.assert_close(got, model.eval()(x).detach(), rtol=1e-5, atol=1e-5)


def test_thresholds_replace_batch_norm_before_a_sign():
    norm = nn.BatchNorm2d(4).eval()
    norm.weight.data, norm.bias.data = torch.tensor([1.0, -2.0, 0.5, -0.1]), draw(4)
    norm.running_mean, norm.running_var = draw(4, seed=1), draw(4, seed=2).abs() + 0.1
    x = draw(2, 4, 5, 5, seed=3)
    value, rising = (t.view(1, -1, 1, 1) for t in fold_thresholds(norm))
    assert torch.equal(rising * (x - value) >= 0, norm(x) >= 0)
    norm.weight.data[1] = 0
    with pytest.raises(ConfigurationError, match="constant"):
        fold_thresholds(norm)


def test_must_09_a_relu_in_front_is_found():
    names = ["3", "6"]
    assert list(relus_before(network(relu_first=True), names)) == [("2", "3")]
    assert list(relus_before(network(), names)) == []

    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Conv2d(2, 2, 1) for _ in range(3))

        def forward(self, x):
            return self.c(F.max_pool2d(self.b(F.relu(self.a(x))), 1))

    assert [layer for _, layer in relus_before(Residual(), ["b", "c"])] == ["b"]


def test_gradients_of_gradients_are_refused_and_vmap_works():
    z = draw(5).requires_grad_()
    (first,) = torch.autograd.grad(reste_sign(z, 2.0).sum(), z, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()
    rows = draw(3, 4)
    slopes = torch.vmap(torch.func.grad(lambda row: reste_sign(row, 2.0).sum()))(rows)
    torch.testing.assert_close(slopes, reste_slope(rows, 2.0))


@pytest.mark.parametrize("shape", [(), (3, 1)])
def test_a_factor_in_the_same_node_gets_the_gradient_of_a_product(shape):
    z, g, alpha = draw(3, 4), draw(3, 4, seed=1), torch.full(shape, 0.7)
    fused = lambda z, alpha: (reste_sign(z, 2.0, alpha=alpha) * g).sum()  # noqa: E731
    product = lambda z, alpha: (alpha * reste_sign(z, 2.0) * g).sum()  # noqa: E731
    found, wanted = (torch.func.grad(f, argnums=(0, 1))(z, alpha) for f in (fused, product))
    torch.testing.assert_close(found, wanted)
    many = torch.vmap(torch.func.grad(fused, argnums=(0, 1)), in_dims=(0, None))(torch.stack([z, -z]), alpha)
    torch.testing.assert_close([part[0] for part in many], list(wanted))
    with torch.no_grad():
        assert torch.equal(reste_sign(z, 2.0, alpha=alpha), alpha * reste_sign(z, 2.0))


def test_signs_and_edges_of_the_slope_are_exact():
    zeros = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3.0, -torch.inf])
    assert reste_sign(zeros).tolist() == [1, 1, 1, -1, 1, -1]
    assert reste_sign(zeros, zero_sign="zero").tolist() == [0, 0, 1, -1, 1, -1]
    for kind in (torch.float32, torch.float64):
        edges = torch.tensor([0.0, 0.25, 1.5], dtype=kind)
        edges = torch.cat([edges, edges.nextafter(torch.tensor(9.0, dtype=kind))])
        for o in (1.0, 1 + 1e-7, 1.7, 10.0):
            power = (1 - o) / o
            flat, at_m, at_t = 0.25**power, 0.25**power / o, 1.5**power / o
            want = torch.tensor([flat, flat, at_t, flat, at_m, 0.0], dtype=kind)
            torch.testing.assert_close(reste_slope(edges, o, m=0.25), want, rtol=1e-6, atol=0)


def test_half_precision_computes_the_slope_in_float32():
    z = draw(100).bfloat16().requires_grad_()
    reste_sign(z, 3.0).sum().backward()
    assert z.grad.dtype == torch.bfloat16
    torch.testing.assert_close(z.grad.float(), reste_slope(z.detach().float(), 3.0), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"names": ["1"]}, "names"),
        ({"names": []}, "names"),
        ({"m": 2.0}, "m="),
        ({"t": 0}, "t="),
        ({"scale": "row"}, "scale"),
        ({"pad_value": 2}, "pad_value"),
    ],
)
def test_bad_arguments(kwargs, message):
    model = network()
    with pytest.raises(ConfigurationError, match=message):
        binarize(model, **kwargs)
    assert type(model[3]) is nn.Conv2d

"""nupes: its checks 1-6 and 9 on the functions. Check 7 is in tests/claims, 8 in test_nupes_callback."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import jacrev

from effdl.compression._nupes_learning import Learning, decode_relaxed, learn_layer, straight_through
from effdl.compression.nupes import (
    PowerErrors,
    as_int8,
    integer_dot,
    largest,
    power_codes,
    power_decode,
    power_quantize,
    power_records,
    search_exponents,
    top_code,
)
from effdl.core.deploy import UnsupportedBackendError, deploy
from effdl.core.errors import ConfigurationError
from effdl.core.quantized import quantize_
from effdl.core.quantizers import power_levels, symmetric
from tests.support import golden

GOLDEN = golden("nupes")
W = torch.tensor(GOLDEN["weight"], dtype=torch.float64)
LAYOUTS = {"per_tensor": "tensor", "per_row": "row"}
ONE = torch.ones(1, dtype=torch.float64)


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def differ(a, b):
    return float((torch.as_tensor(a, dtype=torch.float64) - torch.as_tensor(b, dtype=torch.float64)).abs().max())


def cases():
    for case in GOLDEN["cases"]:
        yield pytest.param(case, LAYOUTS[case["granularity"]], id=f"{case['bits']}-{case['granularity']}")


@pytest.mark.parametrize(("case", "layout"), list(cases()))
def test_must_01_golden_parity(case, layout):
    bits, scale = case["bits"], largest(W, layout)
    errors = PowerErrors(W, bits, layout)(torch.tensor([float(a) for a in case["error_l2_by_a"]]))
    assert torch.allclose(errors, torch.tensor(list(case["error_l2_by_a"].values())).double(), rtol=1e-5, atol=0)
    for a, want in case["error_l2_by_a"].items():  # the plain definition says the same
        codes = power_codes(W, bits, float(a), layout)
        assert float((W - power_decode(codes, scale, bits, float(a), layout)).norm()) == pytest.approx(want, rel=1e-5)
    codes = power_codes(W, bits, 0.5, layout)
    if "codes_at_a_0.5" in case:
        assert codes.tolist() == case["codes_at_a_0.5"]
    if "dequantized_at_a_0.5" in case:
        decoded = power_decode(codes, scale, bits, 0.5, layout)
        record = power_quantize(W, bits, 0.5, layout).dequantize()
        error = max(differ(decoded, case["dequantized_at_a_0.5"]), differ(record, case["dequantized_at_a_0.5"]))
        print(f"golden dequantised: {error:.1e}")
        assert error < 1e-6
    # the finest grid's minimum; the errors are compared, not the arg-min
    (a,), (least,) = search_exponents([W], bits, layout, step=5e-4)
    assert least <= case["error_at_a_star"] * (1 + 1e-5)
    at_star = PowerErrors(W, bits, layout)(torch.tensor([case["a_star_grid_5e-4"]], dtype=torch.float64))
    assert float(at_star) == pytest.approx(case["error_at_a_star"], rel=1e-5)


@pytest.mark.parametrize("layout", ["tensor", "row", "group:5"])
def test_must_01_exponent_1_is_the_uniform_quantiser(layout):
    for bits in range(2, 9):
        record, uniform = power_quantize(W, bits, 1.0, layout), symmetric(W, bits, layout)
        assert torch.equal(record.codes, uniform.codes)
        assert torch.equal(record.dequantize(), uniform.dequantize())
        assert torch.equal(power_codes(W, bits, 1.0, layout), uniform.codes)  # by the general formula too


def test_must_01_every_code_survives_decoding():
    for bits in range(2, 9):
        n = top_code(bits)
        codes = torch.arange(-n, n + 1)
        for a in [0.2, 0.3, 0.5, 0.75, 1.0, 1.25, 1.5]:
            decoded = power_decode(codes, 3 * ONE, bits, a, "tensor")
            assert torch.equal(power_codes(decoded, bits, a, "tensor").long(), codes)
            levels = power_levels(bits, torch.tensor([a]))[1:]  # core's table decodes the same
            assert differ(levels, decoded / 3) < 1e-6


def test_must_02_products_of_codes_decode_to_products_and_sums_do_not():
    n, a = 7, 0.37
    q = torch.arange(-n, n + 1)
    d1, d2 = power_decode(q, 2 * ONE, 4, a, "tensor"), power_decode(q, 3 * ONE, 4, a, "tensor")
    product = q[:, None] * q[None]
    assert differ(product.sign() * (product.abs().double() / n**2) ** (1 / a) * 6, d1[:, None] * d2[None]) < 1e-12

    dot = GOLDEN["dot_product"]
    x, w = torch.tensor(dot["codes_x"]), torch.tensor(dot["codes_w"])
    decoded = [power_decode(codes, ONE, 4, dot["a"], "tensor") for codes in (x, w)]
    right = dot["correct_decode_then_accumulate"]
    assert float(decoded[0] @ decoded[1]) == pytest.approx(right, abs=1e-7)
    layer = nn.Linear(6, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(decoded[1][None])
        quantize_(layer, {"weight": power_quantize(layer.weight, 4, dot["a"])})
        assert float(layer(decoded[0].float())) == pytest.approx(right, abs=1e-6)  # the layer decodes first
    toy = float((x * w).sum())
    wrong = math.copysign((abs(toy) / dot["n"] ** 2) ** (1 / dot["a"]), toy)
    assert wrong == pytest.approx(dot["wrong_accumulate_then_inverse_power"], abs=1e-7)
    assert abs(wrong - right) > 0.2


def test_must_03_integer_path_at_one_half():
    dot = GOLDEN["dot_product"]
    numerator = integer_dot(torch.tensor(dot["codes_x"]), torch.tensor(dot["codes_w"]), 2)
    assert int(numerator) == dot["correct_integer_numerator_sum_sign_times_square"]
    assert numerator.dtype == torch.int64
    assert int(numerator) / dot["correct_denominator"] == pytest.approx(dot["correct_decode_then_accumulate"], abs=1e-7)
    g = torch.Generator().manual_seed(0)
    for inverse, n in ((1, 127), (2, 127), (2, 7), (3, 7)):
        x, w = (torch.randint(-n, n + 1, (32, 500), generator=g) for _ in range(2))
        # integers up to 2^53 are exact in float64: the two sums agree to the bit
        floats = [c.sign() * c.double().abs() ** inverse for c in (x, w)]
        assert torch.equal(integer_dot(x, w, inverse).double(), (floats[0] * floats[1]).sum(-1))


def test_must_04_search_is_never_worse_than_uniform_nor_than_its_grid():
    grid = torch.arange(10, 121).double() / 100
    for case in GOLDEN["cases"]:
        layout, bits = LAYOUTS[case["granularity"]], case["bits"]
        _, (error,) = search_exponents([W], bits, layout)
        assert error <= float(PowerErrors(W, bits, layout)(grid).min()) + 1e-12
        assert error <= case["error_l2_by_a"]["1.0"]
        assert error <= case["error_at_a_star"] * 1.017  # 8 bits: several minima
    assert search_exponents([gaussian(30, 30)], 2, "tensor")[0][0] == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_must_04_gain_on_gaussian_and_none_on_uniform_weights(bits):
    for seed in range(3):
        weight = gaussian(64, 64, seed=seed)
        (a,), (error,) = search_exponents([weight], bits, "tensor")
        plain = float((weight - symmetric(weight, bits, "tensor").dequantize()).norm())
        assert error <= 0.9 * plain
        assert 0.6 <= a <= 0.8
        assert error == pytest.approx(
            float((weight - power_quantize(weight, bits, a, "tensor").dequantize()).norm()), rel=1e-4
        )
        flat = torch.rand(64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        assert search_exponents([flat], bits, "tensor")[0][0] == pytest.approx(1.0, abs=0.1)


def test_must_04_one_exponent_for_the_network_minimises_the_sum():
    weights = [gaussian(8, 30), torch.rand(6, 50, generator=torch.Generator().manual_seed(1)) * 2 - 1]
    exponents, errors = search_exponents(weights, 4, share=True)
    assert exponents[0] == exponents[1]
    grid = torch.arange(10, 121).double() / 100
    assert sum(errors) <= float(sum(PowerErrors(w, 4)(grid) for w in weights).min()) + 1e-9
    assert len(set(search_exponents(weights, 4)[0])) == 2


def test_must_05_gradients_golden():
    want, layout = GOLDEN["gradients"], "tensor"
    bits, a, scale = want["bits"], torch.tensor(want["a"], dtype=torch.float64), largest(W, "tensor")
    codes = power_codes(W, bits, want["a"], layout)
    assert codes.tolist() == want["codes"]
    to_a = jacrev(lambda a: power_decode(codes, scale, bits, a, layout))(a)
    through = jacrev(lambda a: straight_through(W, bits, a, layout))(a)
    weight = W.clone().requires_grad_()
    (to_w,) = torch.autograd.grad(straight_through(weight, bits, a, layout, scale).sum(), weight)
    errors = {
        name: differ(got, want[name])
        for name, got in (
            ("dWhat_da_codes_fixed", to_a),
            ("dWhat_da_straight_through", through),
            ("dWhat_dW_straight_through_scale_fixed", to_w),
        )
    }
    print("golden gradients:", errors)
    assert max(errors.values()) < 2e-6
    v = codes.double().requires_grad_()
    (slope,) = torch.autograd.grad(decode_relaxed(v, scale, bits, a, layout).sum(), v)
    n = top_code(bits)
    at = lambda q: power_decode(q, scale, bits, a, layout)  # noqa: E731
    q = codes.double()
    secant = torch.where(
        q == n, at(q) - at(q - 1), torch.where(q == -n, at(q + 1) - at(q), (at(q + 1) - at(q - 1)) / 2)
    )
    assert differ(slope, secant) < 1e-12
    assert float(slope.min()) > 0  # zero codes move


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_must_05_gradients_are_finite_everywhere(bits, dtype):
    weight = torch.cat([torch.zeros(3), torch.tensor([1e-30, -1e-6, 0.02, 0.5, -1.0, 1.0])]).to(dtype)
    for value in (0.3, 0.5, 1.0, 1.5):
        a = torch.tensor(value, requires_grad=True)
        w = weight.clone().requires_grad_()
        v = torch.linspace(-top_code(bits), top_code(bits), 9, requires_grad=True)
        out = straight_through(w, bits, a, "tensor").sum() + decode_relaxed(v, torch.ones(1), bits, a, "tensor").sum()
        for gradient in torch.autograd.grad(out, (a, w, v)):
            assert torch.isfinite(gradient).all()
        assert torch.isfinite(power_quantize(weight, bits, value, "tensor").dequantize()).all()


def test_must_06_learning_searches_the_whole_code_space():
    want = GOLDEN["whole_code_space"]
    x, w = torch.tensor(want["X"]), torch.tensor([want["w"]])
    record = power_quantize(w, want["bits"], want["a"], "tensor")
    assert record.codes[0].tolist() == want["round_to_nearest_codes"]
    run = lambda weight, inputs: inputs @ weight.T  # noqa: E731
    mse = lambda r: float((run(r.dequantize(), x) - run(w, x)).square().mean())  # noqa: E731
    assert mse(record) == pytest.approx(want["round_to_nearest_mse"], rel=1e-4)
    learned = learn_layer(w, record, run, x, run(w, x), Learning(iterations=200))
    assert learned.codes[0].tolist() == want["global_best_codes"]
    assert mse(learned) <= 1.05 * want["global_best_mse"]
    assert mse(learned) < 0.3 * want["best_up_or_down_mse"]


@pytest.mark.parametrize("layout", ["row", "tensor", "group:16"])
def test_must_09_size_and_distinct_values(layout):
    for bits in (2, 3, 4, 8):
        record = power_quantize(gaussian(64, 1024), bits, 0.6, layout)
        scales = 4 * record.scale.numel() if layout == "group:16" else 0  # a scale for 16 weights is 2 bits a weight
        assert record.payload_bytes <= (bits / 32 + 0.03) * 4 * record.codes.numel() + scales
        rows = record.dequantize().view(len(record.scale), -1)
        assert max(row.unique().numel() for row in rows) <= 2 * top_code(bits) + 1


def test_int8_takes_uniform_records_or_codebooks_put_on_a_grid():
    model = nn.Sequential(nn.Linear(32, 32))
    records = power_records({"0.weight": model[0].weight}, 4, 0.5)
    uniform, error = as_int8(records["0.weight"])
    assert 0 < error < 0.01
    quantize_(model, records)
    with pytest.raises(UnsupportedBackendError, match="power exponent"):
        deploy(model, "torch-int8")
    plain = nn.Sequential(nn.Linear(32, 32))
    plain[0].bias.data.copy_(model[0].bias.data)
    quantize_(plain, {"0.weight": uniform})
    x = gaussian(4, 32)
    assert torch.allclose(deploy(plain, "torch-int8")(x), model(x), atol=0.1)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: power_quantize(W, 1), "bits"),
        (lambda: power_quantize(W, 9), "bits"),
        (lambda: power_quantize(W, 4, 0), "exponent"),
        (lambda: power_quantize(W, 4, 0.5, "column"), "layout"),
        (lambda: power_records({"layer4.weight": W.clone().fill_(float("nan"))}), r"layer4\.weight"),
        (lambda: integer_dot(torch.ones(2), torch.ones(2), 4), "inverse"),
    ],
)
def test_bad_arguments_of_the_functions(make, match):
    with pytest.raises(ConfigurationError, match=match):
        make()

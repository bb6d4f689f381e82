"""core/quantizers, core/quantized and core/deploy: packing, records, layers of codes, artifacts, integer kernels."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effdl.core.deploy import UnsupportedBackendError, deploy, observe
from effdl.core.errors import ConfigurationError
from effdl.core.quantized import dequantize_, is_quantized, load_quantized, payload, quantize_, quantized_weights
from effdl.core.quantizers import (
    QuantizedWeight,
    affine,
    group_count,
    grouped,
    half_precision,
    pack,
    packed_bytes,
    power_levels,
    round_ste,
    symmetric,
    ungrouped,
    unpack,
)
from tests.support import check_quantized_artifact


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2, groups=2),
        nn.Flatten(), nn.Linear(16 * 9, 64), nn.ReLU(), nn.Linear(64, 16),
    )  # fmt: skip


def records(model: nn.Module, bits: int = 8, layout: str = "row", quantizer=symmetric) -> dict[str, QuantizedWeight]:
    return {n: quantizer(p.detach(), bits, layout) for n, p in model.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("numel", [1, 7, 8, 13, 64])
def test_packing_is_lossless_and_wastes_nothing(bits, numel):
    g = torch.Generator().manual_seed(bits)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (numel,), generator=g).to(torch.int8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_bytes(numel, bits) == -(-numel * bits // 8)
    assert torch.equal(unpack(packed, bits, (numel,)), codes)


def test_packing_puts_the_first_code_lowest():
    assert pack(torch.tensor([-8, 7, -7], dtype=torch.int8), 4).tolist() == [0xF0, 0x01]
    with pytest.raises(ConfigurationError, match="4 bits"):
        pack(torch.tensor([8], dtype=torch.int8), 4)


@pytest.mark.parametrize(
    ("layout", "groups"), [("tensor", 1), ("row", 6), ("group:8", 6 * 5), ("bucket:64", 4), ("bucket:300", 1)]
)
def test_groups_cover_the_weight(layout, groups):
    weight = draw(6, 4, 3, 3)
    rows = grouped(weight, layout)
    assert rows.shape[0] == group_count(weight.shape, layout) == groups
    assert torch.equal(ungrouped(rows, weight.shape, layout), weight)


@pytest.mark.parametrize("layout", ["tensor", "row", "group:8", "bucket:64"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_uniform_quantisers_err_by_half_a_step_at_most(bits, layout):
    weight = draw(6, 4, 3, 3)
    for record in (symmetric(weight, bits, layout), affine(weight, bits, layout)):
        error = grouped(record.dequantize() - weight, layout).abs()
        assert bool((error <= record.scale[:, None] * 0.5 + 1e-6).all())
        again = (symmetric if record.offset is None else affine)(record.dequantize(), bits, layout)
        torch.testing.assert_close(again.dequantize(), record.dequantize(), rtol=0, atol=1e-6)
    low = grouped(weight, layout).amin(1)
    torch.testing.assert_close(grouped(affine(weight, bits, layout).dequantize(), layout).amin(1), low)


def test_a_group_of_zeros_stays_zero():
    assert symmetric(torch.zeros(2, 3), 4).dequantize().eq(0).all()
    assert affine(torch.full((2, 3), 0.7), 4).dequantize().sub(0.7).abs().max() < 1e-6
    with pytest.raises(ConfigurationError, match="NaN"):
        symmetric(torch.tensor([[float("nan"), 1.0]]), 4)


def test_codebooks_and_exponents_decode():
    codes = torch.tensor([[-2, -1], [0, 1]], dtype=torch.int8)
    book = torch.tensor([-3.0, -1.0, 0.5, 2.0])
    scale = torch.tensor([1.0, 10.0])
    assert QuantizedWeight(codes, 2, scale, codebook=book).dequantize().tolist() == [[-3, -1], [5, 20]]
    own = QuantizedWeight(codes, 2, scale, codebook=torch.stack([book, -book])).dequantize()
    assert own.tolist() == [[-3, -1], [-5, -20]]
    levels = power_levels(4, torch.tensor(0.5))
    expected = [-1.0, *[(c / abs(c) if c else 0) * (abs(c) / 7) ** 2 for c in range(-7, 8)]]
    torch.testing.assert_close(levels, torch.tensor(expected))


def test_round_ste():
    x = torch.tensor([0.4, 0.6, 2.5], requires_grad=True)
    round_ste(x).backward(torch.tensor([1.0, 2.0, 3.0]))
    assert round_ste(x).tolist() == [0.0, 1.0, 2.0]
    assert x.grad.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(("bits", "layout", "quantizer"), [(8, "row", symmetric), (3, "bucket:64", affine)])
def test_the_artifact_holds_codes_and_opens_anywhere(tmp_path, bits, layout, quantizer):
    model = make_network()
    expected = copy.deepcopy(model)
    chosen = records(model, bits, layout, quantizer)
    for name, record in chosen.items():
        expected.get_parameter(name).data = record.dequantize()
    quantize_(model, chosen)
    x = draw(4, 3, 8, 8)
    torch.testing.assert_close(model.eval()(x), expected.eval()(x), rtol=0, atol=0)
    check_quantized_artifact(model, make_network, (x,), tmp_path)


def test_recurrent_embedding_and_tied_layers():
    lstm = nn.LSTM(8, 8)
    chosen = records(lstm, 4)
    quantize_(lstm, chosen)
    x = draw(5, 2, 8)
    expected = lstm(x)[0]
    other = copy.deepcopy(lstm)
    dequantize_(lstm)
    assert type(lstm) is nn.LSTM
    torch.testing.assert_close(lstm(x)[0], expected, rtol=0, atol=0)
    torch.testing.assert_close(other(x)[0], expected, rtol=0, atol=0)  # a copy keeps its codes
    tied = nn.ModuleDict({"embed": nn.Embedding(10, 8), "head": nn.Linear(8, 10, bias=False)})
    tied["head"].weight = tied["embed"].weight
    quantize_(tied, records(tied, 4))
    assert list(tied.state_dict()) == ["embed.weight_codes", "embed.weight_scale"]
    assert payload(tied)["weights"] == 80
    assert torch.equal(tied["head"].weight, tied["embed"].weight)
    dequantize_(tied)
    assert tied["head"].weight is tied["embed"].weight


def test_half_precision_beside_codes(tmp_path):
    model = make_network()
    chosen = records(model, 4)
    chosen["5.weight"] = half_precision(model[5].weight.detach())
    assert chosen["5.weight"].bits_per_weight == pytest.approx(16, abs=0.01)
    quantize_(model, chosen)
    check_quantized_artifact(model, make_network, (draw(4, 3, 8, 8),), tmp_path)
    assert torch.equal(model[5].weight, chosen["5.weight"].codes.float())
    layer = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    quantize_(layer, {"0.weight": symmetric(layer[0].weight.detach(), 8), "1.weight": half_precision(layer[1].weight)})
    fast = deploy(layer, "torch-int8")
    assert type(fast[0]).__name__ == "Int8Layer"
    assert is_quantized(fast[1])


def test_a_layer_with_its_own_forward_is_no_stock_layer():
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(2 * x)

    model = nn.Sequential(Doubled(8, 4))
    quantize_(model, records(model))
    with pytest.raises(UnsupportedBackendError, match="forward of its own"):
        deploy(model, "torch-int8")


def test_errors_before_anything_changes(tmp_path):
    model = make_network()
    good = records(model)
    with pytest.raises(ConfigurationError, match=r"5\.wieght"):
        quantize_(model, {**good, "5.wieght": good["5.weight"]})
    with pytest.raises(ConfigurationError, match="shape"):
        quantize_(model, {"0.weight": good["3.weight"]})
    assert not quantized_weights(model)
    assert type(model[0]) is nn.Conv2d
    with pytest.raises(ConfigurationError, match=r"quantization\.json"):
        load_quantized(model, tmp_path)


def test_int8_kernels_run_and_agree():
    model = make_network().eval()
    quantize_(model, records(model))
    x = draw(16, 3, 8, 8)
    fast = deploy(model, "torch-int8", activations=observe(model, [x[:8], (x[8:],)]))
    with torch.profiler.profile() as profile, torch.no_grad():
        got, expected = fast(x), model(x)
    names = [event.key for event in profile.key_averages()]
    assert {"quantized::conv2d", "quantized::linear"} <= set(names)
    assert (got - expected).abs().max() < 0.06 * expected.abs().max()  # four layers of 8-bit activations
    assert is_quantized(model[0])  # the model itself is as it was


@pytest.mark.parametrize("low", [-1.0, 0.0])
@pytest.mark.parametrize("padding", [0, 1])
def test_one_int8_layer_errs_by_the_steps_of_its_activations(low, padding):
    conv = nn.Sequential(nn.Conv2d(8, 16, 3, padding=padding))
    quantize_(conv, records(conv))
    x = torch.rand(4, 8, 8, 8, generator=torch.Generator().manual_seed(0)) * (1 - low) + low
    (fixed,) = observe(conv, [x]).values()
    with torch.no_grad():
        got, expected = deploy(conv, "torch-int8", activations={"0": fixed})(x), conv(x)
    step = fixed.input_scale / 2 * conv[0].weight.abs().sum((1, 2, 3)).max() + fixed.output_scale
    assert (got - expected).abs().max() <= step


def test_linear_layers_measure_their_input_themselves():
    linear = nn.Sequential(nn.Linear(32, 16))
    quantize_(linear, records(linear))
    x = draw(4, 32)
    with torch.profiler.profile() as profile, torch.no_grad():
        got, expected = deploy(linear, "torch-int8")(x), linear(x)
    assert "quantized::linear_dynamic" in {event.key for event in profile.key_averages()}
    assert (got - expected).abs().max() < 0.02 * expected.abs().max()
    conv = make_network()
    quantize_(conv, records(conv))
    with pytest.raises(UnsupportedBackendError, match=r"0: .*observe"):
        deploy(conv, "torch-int8")


def test_int4_and_torchao_kernels():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    x = draw(5, 128)
    four, eight = copy.deepcopy(model), copy.deepcopy(model)
    quantize_(four, records(four, 4, "group:32", affine))
    quantize_(eight, records(eight))
    with torch.no_grad(), torch.profiler.profile() as profile:
        low, high = deploy(four, "torch-int4")(x), deploy(eight, "torchao")(x)
    assert "aten::_weight_int4pack_mm_for_cpu" in {event.key for event in profile.key_averages()}
    with torch.no_grad():
        assert (low - four(x)).abs().max() < 0.02 * four(x).abs().max()  # bfloat16
        torch.testing.assert_close(high, eight(x), rtol=1e-4, atol=1e-5)
    assert sum(b.nbytes for n, b in deploy(four, "torch-int4").named_buffers() if n.endswith("weight")) == 64 * 80


@pytest.mark.parametrize(
    ("backend", "make", "message"),
    [
        ("torch-int8", lambda w: affine(w, 8), "offset"),
        ("torch-int8", lambda w: symmetric(w, 8, "group:32"), "group:32"),
        ("torch-int8", lambda w: QuantizedWeight(symmetric(w, 4).codes, 4, torch.ones(64), codebook=draw(16)), "book"),
        ("torch-int4", lambda w: symmetric(w, 8, "group:32"), "8 bits"),
        ("torchao", lambda w: symmetric(w, 8, "group:32"), "symmetric"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(backend, make, message):
    model = nn.ModuleDict({"lin": nn.Linear(128, 64)})
    quantize_(model, {"lin.weight": make(model["lin"].weight.detach())})
    with pytest.raises(UnsupportedBackendError, match=rf"lin\b.*{message}"):
        deploy(model, backend)
    assert is_quantized(deploy(model, backend, exclude="l*")["lin"])


def test_deploy_refuses_other_layers_and_plain_models():
    model = nn.Sequential(nn.Embedding(8, 4))
    with pytest.raises(ConfigurationError, match="no quantised layer"):
        deploy(model, "dense")
    quantize_(model, records(model))
    with pytest.raises(UnsupportedBackendError, match="Embedding"):
        deploy(model, "torch-int8")
    dense = deploy(model, "dense")
    assert type(dense[0]) is nn.Embedding
    index = torch.tensor([1, 2])
    assert torch.equal(dense(index), deploy(model, "lut")(index))
    assert torch.equal(dense(index), F.embedding(index, quantized_weights(model)["0.weight"].dequantize()))

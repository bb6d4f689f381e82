"""core/input_quantizers and core/static_int8: the record, its place beside codes, and the kernels that use it."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from effdl.core.deploy import UnsupportedBackendError, deploy
from effdl.core.errors import ConfigurationError
from effdl.core.export import export_onnx, onnx_outputs
from effdl.core.input_quantizers import QuantizedInput, input_of
from effdl.core.quantized import dequantize_, load_quantized, quantize_, quantized_inputs
from effdl.core.quantizers import affine, symmetric
from tests.support import check_quantized_artifact


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 16, 3, stride=2, groups=4, dilation=2, padding=2),
        nn.Flatten(), nn.Linear(256, 24), nn.SiLU(), nn.Linear(24, 5),
    )  # fmt: skip


def ranges(bits: int = 8) -> dict[str, QuantizedInput]:
    two = QuantizedInput.joined([QuantizedInput.of_range(-3, 3, bits), QuantizedInput.of_range(-2, 4, bits)], (3, 5))
    return {
        "0": two, "2": QuantizedInput.of_range(-0.3, 2.0, bits), "4": QuantizedInput.of_range(-1, 1, bits),
        "6": QuantizedInput.of_range(0, 0.7, bits),
    }  # fmt: skip


def quantised(bits: int = 8) -> nn.Module:
    model = network()
    weights = {n: symmetric(p.detach(), 8) for n, p in model.named_parameters() if p.dim() > 1}
    quantize_(model, weights, ranges(bits))
    return model.eval()


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.0, 2.0), (-2.0, 0.0), (0.5, 1.5), (0.0, 0.0)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_range_has_its_levels_and_a_zero(low, high, bits):
    record = QuantizedInput.of_range(low, high, bits)
    x = torch.linspace(low, high, 301)
    seen = record.apply(x, -1)
    assert seen.unique().numel() <= 2**bits
    assert (seen - x).abs().max() <= record.scale * 0.5 * (1 + 1e-4) + record.scale  # the zero point is rounded
    assert record.apply(torch.zeros(1), -1) == 0
    assert record.apply(torch.tensor([1e9]), -1) == record.high
    codes = record.encode(x, -1)
    assert codes.dtype == torch.uint8
    torch.testing.assert_close((codes.float() - record.zero_point) * record.scale, seen)
    assert record.apply(x.bfloat16(), -1).dtype == torch.bfloat16


def test_runs_of_channels_have_ranges_of_their_own():
    record = ranges()["0"]
    x = draw(2, 8, 4, 4) * 3
    left, right = record.parts()
    expected = torch.cat([left.apply(x[:, :3]), right.apply(x[:, 3:])], 1)
    assert torch.equal(record.apply(x), expected)
    narrow = record.reduced(7)
    assert narrow.bits == 7
    torch.testing.assert_close(narrow.high, record.high, rtol=0.03, atol=0)


def test_the_layer_sees_its_input_through_the_record():
    model, plain = quantised(), network().eval()
    for name, layer in plain.named_children():
        if hasattr(layer, "weight"):
            layer.weight.data = model.get_submodule(name).weight.detach()
    x = expected = draw(3, 8, 8, 8)
    for name, layer in plain.named_children():
        record = ranges().get(name)
        if record is not None:
            expected = record.apply(expected, 1 if expected.dim() == 4 else -1)
        expected = layer(expected)
    assert torch.equal(model(x), expected)
    twin = copy.deepcopy(model)
    assert type(dequantize_(model)[0]) is nn.Conv2d
    assert not quantized_inputs(model)
    assert torch.equal(twin(x), expected)
    assert torch.equal(torch.compile(twin, backend="eager", fullgraph=True)(x), expected)


def test_the_artifact_brings_its_ranges_back(tmp_path):
    model, x = quantised(), draw(4, 8, 8, 8)
    check_quantized_artifact(model, network, (x,), tmp_path)
    told = json.loads((tmp_path / "artifact" / "quantization.json").read_text())
    assert told["inputs"]["0"] == {"bits": 8, "channels": [3, 5]}
    again = load_quantized(network(), tmp_path / "artifact")
    for name, record in quantized_inputs(again).items():
        assert torch.equal(record.scale, ranges()[name].scale)
        assert torch.equal(record.zero_point, ranges()[name].zero_point)
    (onnx,) = onnx_outputs(export_onnx(model, (x,), tmp_path / "model.onnx"), (x,))
    torch.testing.assert_close(onnx, model(x), rtol=0, atol=1e-4)
    told["inputs"]["5"] = told["inputs"]["4"]
    (tmp_path / "artifact" / "quantization.json").write_text(json.dumps(told))
    with pytest.raises(ConfigurationError, match="input_scale"):
        load_quantized(network(), tmp_path / "artifact")


@pytest.mark.parametrize("bits", [5, 8])
def test_integer_kernels_compute_what_the_layer_does(bits):
    model, x = quantised(bits), draw(16, 8, 8, 8)
    fast = deploy(model, "torch-int8")
    with torch.no_grad(), torch.profiler.profile() as profile:
        got = fast(x)
    assert {"onednn::qconv2d_pointwise", "quantized::linear_with_input_q_dq_qweight_dq_output_fp32"} <= {
        event.key for event in profile.key_averages()
    }
    assert (got - model(x)).norm() < 2e-3 * model(x).norm()  # a code may differ where a value lies on a tie
    assert torch.equal(copy.deepcopy(fast)(x), got)
    assert fast.bfloat16()[4](x.flatten(1)[:, :256].bfloat16()).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused_before_anything_changes():
    model, whole = network(), QuantizedInput.of_range(-1, 1)
    codes = {"4.weight": symmetric(model[4].weight.detach(), 8)}
    for inputs, message in [
        ({"9": whole}, "no layer"), ({"3": whole}, "linear layers"), ({"0": whole}, "float"),
        ({"4": ranges()["0"]}, "256"),
    ]:  # fmt: skip
        with pytest.raises(ConfigurationError, match=message):
            quantize_(model, codes, inputs)
        assert type(model[4]) is nn.Linear
    for bad in (
        {"bits": 9}, {"scale": torch.zeros(1)}, {"zero_point": torch.tensor([256])}, {"channels": (2, 3)},
        {"scale": torch.tensor([float("nan")])},
    ):  # fmt: skip
        with pytest.raises(ConfigurationError):
            QuantizedInput(**{"scale": torch.ones(1), "zero_point": torch.zeros(1), **bad})
    quantize_(model, {"4.weight": affine(model[4].weight.detach(), 8)}, {"4": whole})
    with pytest.raises(UnsupportedBackendError, match="offset"):
        deploy(model, "torch-int8")
    model = quantised()
    with pytest.raises(UnsupportedBackendError, match="input range"):
        deploy(model, "torchao", exclude=["0", "2"])
    assert input_of(deploy(model, "torch-int8", exclude="4")[4]) is not None

"""core/qdq and core/attention_matmuls: what an ONNX file of a quantised network holds, and attention's two products."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn import functional

from effdl.core.attention_matmuls import QuantizedMatmuls, attend, attentions, watch_matmuls
from effdl.core.deploy import deploy, observe
from effdl.core.errors import ConfigurationError
from effdl.core.export import export_onnx, onnx_outputs, save_model
from effdl.core.input_quantizers import QuantizedInput
from effdl.core.quantized import dequantize_, load_quantized, quantize_, quantized_inputs
from effdl.core.quantizers import symmetric
from tests.core.test_input_quantizers import draw, quantised, ranges
from tests.products import matmul_levels

onnx = pytest.importorskip("onnx")
INT8, UINT8 = onnx.TensorProto.INT8, onnx.TensorProto.UINT8


def graph_of(path):
    """Operators by name of their first input, and the graph."""
    graph = onnx.load(path).graph
    return [node.op_type for node in graph.node], graph


def fused(path, folder):
    """Operators after onnxruntime has fused what it can."""
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(folder / "fused.onnx"), 3
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return graph_of(folder / "fused.onnx")[0]


@pytest.mark.parametrize("bits", [5, 8])
def test_fixed_inputs_are_written_as_quantize_and_dequantize(bits, tmp_path):
    model, x = quantised(bits), draw(6, 8, 8, 8)
    path = export_onnx(model, (x[:4],), tmp_path / "m.onnx")
    kinds, graph = graph_of(path)
    assert kinds.count("QuantizeLinear") == 5  # four layers, of which the first reads two parts
    assert "Round" not in kinds
    assert not any(node.metadata_props for node in graph.node)
    stored = {i.name: (i.data_type, list(i.dims)) for i in graph.initializer}
    assert stored["0.weight_codes"] == (INT8, [16, 8, 3, 3])
    assert stored["4.weight_codes"] == (INT8, [256, 24])
    float_sizes = {tuple(dims) for kind, dims in stored.values() if kind == onnx.TensorProto.FLOAT}
    assert not any(len(dims) > 1 and dims[0] * dims[1] > 100 for dims in float_sizes)  # no float weight
    last = [node for node in graph.node if node.op_type in ("Conv", "MatMul")]
    makers = {output: node.op_type for node in graph.node for output in node.output}
    for node in last[1:]:  # the first one reads both parts side by side
        weight = "DequantizeLinear"
        assert makers[node.input[1]] == weight
        assert makers[node.input[0]] in (weight, "Unsqueeze", "Reshape")
    (got,) = onnx_outputs(path, (x,))  # another batch than the example's
    want = model(x).detach()
    step = float(quantised(bits)[6].weight.abs().amax() * ranges(bits)["6"].scale)
    assert (got - want).abs().max() <= 1.01 * step  # one code of the last layer's input
    assert (got - want).norm() <= 0.02 * want.norm()
    print(f"ONNX at {bits} bits: relative L2 {float((got - want).norm() / want.norm()):.1e}")


def test_onnxruntime_fuses_linear_layers_and_with_output_ranges_convolutions(tmp_path):
    model, x = quantised(), draw(4, 8, 8, 8)
    plain = fused(export_onnx(model, (x,), tmp_path / "m.onnx"), tmp_path)
    assert plain.count("MatMulIntegerToFloat") == 2
    path = export_onnx(model, (x,), tmp_path / "o.onnx", activations=observe(model, [x], 8))
    assert graph_of(path)[0].count("QuantizeLinear") == 7
    assert fused(path, tmp_path).count("QLinearConv") >= 1
    (got,) = onnx_outputs(path, (x,))
    want = model(x).detach()
    assert 0 < (got - want).norm() <= 0.02 * want.norm()


def test_what_has_no_such_form_still_exports_and_the_model_stays(tmp_path):
    model, x = quantised(), draw(4, 8, 8, 8)
    half = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 4))
    first, second = (half[i].weight.detach() for i in (0, 2))
    codes = {"0.weight": symmetric(first, 4, "group:8"), "2.weight": symmetric(second, 8)}
    quantize_(half, codes, {"0": QuantizedInput.of_range(-1, 1), "2": QuantizedInput.of_range(0, 2)})
    rows, before = draw(4, 16), {name: value.clone() for name, value in model.state_dict().items()}
    kinds, graph = graph_of(export_onnx(half.eval(), (rows,), tmp_path / "half.onnx"))
    assert kinds.count("QuantizeLinear") == 1
    assert not [i.name for i in graph.initializer if i.data_type == 1 and list(i.dims) == [16, 16]]  # packed, as before
    torch.testing.assert_close(onnx_outputs(tmp_path / "half.onnx", (rows,))[0], half(rows).detach(), atol=1e-5, rtol=0)
    export_onnx(model, (x,), tmp_path / "m.onnx")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(quantized_inputs(model)) == 4


# ---- attention ---------------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Self-attention and cross-attention of diffusers, with a mask."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.own = Attention(16, heads=2, dim_head=8)
        self.other = Attention(16, cross_attention_dim=12, heads=2, dim_head=8)

    def forward(self, x, context):
        return self.other(x + self.own(x), encoder_hidden_states=context)


def operands(bits=8):
    each = [QuantizedInput.of_range(*ends, bits) for ends in ((-2, 2), (-2, 2), (0, 1), (-1.5, 1.5))]
    return {name: QuantizedMatmuls.of(each) for name in ("own", "other")}


def pair(bits=8):
    model = Pair()
    weights = {n: symmetric(p.detach(), 8) for n, p in model.named_parameters() if p.dim() == 2}
    quantize_(model, weights, operands(bits))
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": "bool"}, {"attn_mask": "add"}, {"enable_gqa": True}],
)
def test_two_products_are_the_attention_of_torch(options):
    q, k, v = draw(2, 4, 5, 8), draw(2, 4, 5, 8, seed=1), draw(2, 4, 5, 8, seed=2)
    if "attn_mask" in options:
        mask = draw(2, 1, 5, 5, seed=3)
        own = torch.eye(5, dtype=torch.bool)  # no row without any key
        options = {"attn_mask": (mask > -1) | own if options["attn_mask"] == "bool" else mask}
    if "enable_gqa" in options:
        k, v = k[:, :2], v[:, :2]
    want = functional.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(attend(lambda i, x: x, q, k, v, **options), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_no_more_than_two_to_the_bits_values_enter_a_product(bits):
    model, plain = pair(bits), pair(bits)
    for attention in attentions(plain).values():
        assert type(attention).__name__ == "QuantizedAttention"
    x, context = draw(8, 24, 16), draw(8, 7, 12, seed=1)
    with matmul_levels() as watch, torch.no_grad():
        model(x, context)
    assert len(watch.seen) == 4  # two products in each of two modules
    assert all(count <= 2**bits for counts in watch.seen for count in counts)
    dequantize_(plain)
    assert {type(m) for m in attentions(plain).values()} == {Attention}
    with matmul_levels() as watch, torch.no_grad():
        plain(x, context)
    assert not watch.seen  # torch's own attention again
    seen = []
    handle = watch_matmuls(plain.own, lambda i, x: seen.append(i) or x)
    with torch.no_grad():
        plain(x, context)
    handle.remove()
    assert seen == [0, 1, 3, 2]
    assert "forward" not in plain.own.__dict__


def test_products_are_saved_copied_compiled_and_deployed(tmp_path):
    model, x, context = pair(), draw(4, 24, 16), draw(4, 7, 12, seed=1)
    want = model(x, context).detach()
    assert save_model(model, tmp_path / "codes") == "quantized"
    told = json.loads((tmp_path / "codes" / "quantization.json").read_text())["inputs"]
    assert told == {name: {"bits": 8, "channels": [], "site": "matmuls"} for name in ("own", "other")}
    again = load_quantized(Pair(), tmp_path / "codes").eval()
    assert torch.equal(again(x, context), want)
    assert torch.equal(copy.deepcopy(model)(x, context), want)
    compiled = torch.compile(copy.deepcopy(model), backend="eager")(x, context).detach()
    torch.testing.assert_close(compiled, want, rtol=0, atol=1e-6)
    program = torch.export.export(model, (x, context)).module()(x, context)
    torch.testing.assert_close(program, want, rtol=0, atol=1e-6)
    fast = deploy(model, "torch-int8")
    assert (fast(x, context) - want).norm() < 0.05 * want.norm()  # linear layers measure their inputs on every call
    path = export_onnx(model, (x, context), tmp_path / "m.onnx")
    assert graph_of(path)[0].count("QuantizeLinear") == 8
    (got,) = onnx_outputs(path, (x, context))
    assert (got - want).norm() <= 0.02 * want.norm()


def test_what_is_no_attention_is_refused_before_anything_changes():
    model = Pair()
    codes = {"own.to_q.weight": symmetric(model.own.to_q.weight.detach(), 8)}
    record = operands()["own"]
    with pytest.raises(ConfigurationError, match="no attention"):
        quantize_(model, codes, {"own": record, "own.to_q": record})
    assert type(model.own) is Attention
    assert type(model.own.to_q) is nn.Linear
    with pytest.raises(ConfigurationError, match="scale"):
        QuantizedMatmuls(torch.ones(1), torch.zeros(1, dtype=torch.int32))


def test_an_output_has_one_range_and_no_kernel():
    model = nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 8)).eval()
    codes = {f"{i}.weight": symmetric(model[i].weight.detach(), 8) for i in (0, 2)}
    given = QuantizedInput.of_range(-1, 1, 4)
    record = QuantizedInput(given.scale, given.zero_point, 4, site="output")
    with pytest.raises(ConfigurationError, match="one range"):
        quantize_(model, codes, {"0": QuantizedInput.joined([record, record], (4, 4))})
    with pytest.raises(ConfigurationError, match="site"):
        QuantizedInput(given.scale, given.zero_point, 4, site="inside")
    quantize_(model, codes, {"0": record})
    seen = {}
    model[0].register_forward_hook(lambda m, args, out: seen.update(given=args[0].unique(), answered=out.unique()))
    model(draw(64, 8))
    assert seen["given"].numel() > 16 >= seen["answered"].numel()
    with pytest.raises(ConfigurationError, match="output"):
        deploy(model, "torch-int8")

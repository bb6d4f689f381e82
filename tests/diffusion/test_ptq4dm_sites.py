"""ptq4dm: operands of attention's products, outputs in the place of inputs, and the network as an ONNX file."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.attention_processor import Attention, AttnProcessor

from effdl.core.attention_matmuls import attentions
from effdl.core.deploy import UnsupportedBackendError, deploy
from effdl.core.errors import ConfigurationError
from effdl.core.export import export_onnx, onnx_outputs, save_model
from effdl.core.quantized import is_quantized, load_quantized, quantized_inputs
from effdl.diffusion.ptq4dm import Settings, calibrate, quantize_unet
from effdl.tasks.tiny import tiny_condition_unet, tiny_unet
from tests.diffusion.ptq4dm_parts import SCHEDULERS, gaussian, small
from tests.products import matmul_levels

TIMES = torch.tensor([5, 100, 400, 900])


def unet():
    return tiny_unet(8, 1, block_out_channels=(16, 32)).eval()


@pytest.mark.parametrize("bits", [(8, 8), (8, 5)])
def test_operands_of_attention_are_quantised_and_saved(bits, tmp_path):
    net, fp = unet(), unet()
    x = gaussian(4, 1, 8, 8)
    found = quantize_unet(net, SCHEDULERS["ddim"](), small(quantize_matmul=True, bits=bits))
    names = set(attentions(fp))
    assert len(names) == 4
    assert names == found.inputs.keys() - found.weights.keys()
    assert all(found.inputs[name].scale.shape == (4,) for name in names)
    assert all(int(found.inputs[name].zero_point[2]) == 0 for name in names)  # probabilities have no sign
    with matmul_levels() as watch, torch.no_grad():
        want = net(x, TIMES).sample
    assert len(watch.seen) == 8
    assert all(count <= 2 ** bits[1] for counts in watch.seen for count in counts)
    save_model(net, tmp_path)
    again = load_quantized(unet(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(x, TIMES).sample, want)
        assert torch.equal(copy.deepcopy(net)(x, TIMES).sample, want)
    without = unet()
    quantize_unet(without, SCHEDULERS["ddim"](), small(bits=bits))
    with torch.no_grad():
        assert not torch.equal(without(x, TIMES).sample, want)
    assert {type(module) for module in attentions(without).values()} == {Attention}


def test_text_attention_and_sequential_order():
    net, how = tiny_condition_unet(8), small(quantize_matmul=True, num_samples=8, batch_size=8)
    text = {"encoder_hidden_states": gaussian(3, 4, 32)}
    found = quantize_unet(net, SCHEDULERS["dpm-solver"](), how, text)
    assert "mid_block.attentions.0.transformer_blocks.0.attn2" in found.inputs  # cross-attention
    plain = unet()
    for sequential in (False, True):
        how = small(quantize_matmul=True, sequential=sequential, num_samples=8, batch_size=8, steps=2, candidates=10)
        found = calibrate(plain, SCHEDULERS["ddim"](), how, {"conv_in": plain.conv_in})
        assert found.inputs.keys() == {"conv_in", *attentions(plain)}


def test_a_failure_leaves_attention_as_it_was():
    net, ddim = unet(), SCHEDULERS["ddim"]()
    how = small(quantize_matmul=True)
    with pytest.raises(ConfigurationError, match="quantize_matmul"):
        quantize_unet(tiny_unet(8, 1, add_attention=False, down_block_types=("DownBlock2D",),
                                up_block_types=("UpBlock2D",), block_out_channels=(16,)), ddim, how)  # fmt: skip
    for module in attentions(net).values():
        module.set_processor(AttnProcessor())
    with pytest.raises(ConfigurationError, match="set_processor"):
        quantize_unet(net, ddim, how)
    net.conv_out.bias.data.fill_(float("nan"))
    net.mid_block.resnets[1].conv1.bias.data.fill_(float("nan"))
    with pytest.raises(ConfigurationError, match="time step"):
        quantize_unet(net, ddim, small(quantize_matmul=True, calibration="noise"))
    for module in attentions(net).values():
        assert type(module) is Attention
        assert "forward" not in module.__dict__
    assert not quantized_inputs(net)
    assert not any(is_quantized(module) for module in net.modules())
    for bad in ({"quantize_matmul": 1}, {"site": "middle"}, {"site": "output", "split_shortcut": True}):
        with pytest.raises(ConfigurationError, match=next(iter(bad))[:4]):
            Settings(**bad)


@pytest.mark.parametrize("site", ["input", "output"])
def test_outputs_are_quantised_before_the_normalisation_and_the_next_layer_reads_floats(site, tmp_path):
    net, x, t = unet(), gaussian(32, 1, 8, 8), torch.arange(32) * 30
    found = quantize_unet(net, SCHEDULERS["ddim"](), small(site=site, bits=(8, 6)))
    names = list(found.weights)
    read, answered = {}, {}
    for name in names:
        layer = net.get_submodule(name)
        base = type(layer)._effdl_base

        def spy(self, given, *args, _name=name, _run=base.forward):
            read[_name] = given.unique().numel()
            return _run(self, given, *args)

        type(layer)._effdl_base = type("Spied", (base,), {"forward": spy})
        layer.register_forward_hook(lambda module, args, out, name=name: answered.update({name: out.unique().numel()}))
    with torch.no_grad():
        want = net(x, t).sample
    levels = {name: 2**record.bits for name, record in found.inputs.items()}
    convolutions = [n for n in names[1:-1] if n.endswith(("conv1", "conv2"))]  # behind GroupNorm and SiLU
    assert len(convolutions) > 8
    if site == "input":
        assert found.inputs.keys() == set(names)
        assert all(read[name] <= levels[name] for name in names)
        assert all(answered[name] > levels[name] for name in convolutions)
        return
    assert found.inputs.keys() == set(names[:-1])  # the network's answer stays float
    assert all(answered[name] <= levels[name] for name in names[:-1])
    assert not [(name, read[name]) for name in convolutions if read[name] <= levels[name]]
    assert answered["conv_out"] > 64
    save_model(net, tmp_path)
    again = load_quantized(unet(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(x, t).sample, want)
    with pytest.raises(UnsupportedBackendError, match="output is rounded"):
        deploy(again, "torch-int8")


def test_rounding_is_learnt_and_orders_hold_with_outputs_too():
    plain = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (16,)}
    net = tiny_unet(8, 1, add_attention=False, **plain)
    how = small(site="output", bits=(3, 8), num_samples=8, batch_size=8, steps=2, candidates=10, sequential=True)
    near = calibrate(net, SCHEDULERS["ddim"](), how)
    how = small(site="output", bits=(3, 8), num_samples=8, batch_size=8, steps=2, candidates=10, adaround=True,
                iterations=20)  # fmt: skip
    learned = calibrate(net, SCHEDULERS["ddim"](), how)
    assert all(record.site == "output" for record in (*near.inputs.values(), *learned.inputs.values()))
    assert near.weights.keys() == learned.weights.keys()


def test_must_06_the_onnx_file_holds_integers(tmp_path):
    onnx = pytest.importorskip("onnx")
    fp = tiny_unet(16, 1, block_out_channels=(32, 64)).eval()
    net, x = copy.deepcopy(fp), gaussian(4, 1, 16, 16)
    found = quantize_unet(net, DDIMScheduler(clip_sample=False), small(candidates=100))
    path = export_onnx(net, (x, TIMES), tmp_path / "int8.onnx")
    graph = onnx.load(path).graph
    makers = {output: node for node in graph.node for output in node.output}
    products = [node for node in graph.node if node.op_type in ("Conv", "MatMul")]
    codes = [i for i in graph.initializer if i.data_type == onnx.TensorProto.INT8 and len(i.dims) > 1]
    assert len(codes) == len(found.weights)
    layers = [node for node in products if makers[node.input[1]].op_type == "DequantizeLinear"]
    assert len(layers) == len(found.weights)
    for node in layers:
        source = makers[node.input[0]]
        source = makers[source.input[0]] if source.op_type in ("Unsqueeze", "Reshape") else source
        assert source.op_type == "DequantizeLinear"
        assert makers[source.input[0]].op_type == "QuantizeLinear"
    floats = [list(i.dims) for i in graph.initializer if i.data_type == onnx.TensorProto.FLOAT]
    shapes = [list(layer.weight.shape) for layer in map(fp.get_submodule, found.weights)]
    assert not [dims for dims in floats if dims in shapes or dims[::-1] in shapes]
    ratio = path.stat().st_size / sum(4 * parameter.numel() for parameter in fp.parameters())
    (got,) = onnx_outputs(path, (x, TIMES))
    with torch.no_grad():
        want = net(x, TIMES).sample
    error = float((got - want).norm() / want.norm())
    print(f"ONNX: {ratio:.3f} of the float parameters, relative L2 {error:.1e} of the simulated network")
    assert ratio < 0.33  # 0.7 M parameters: the graph itself is a sixth of the file
    assert error < 0.02

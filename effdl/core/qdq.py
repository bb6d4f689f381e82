"""Quantised layers as ONNX says them: integer codes in the file, QuantizeLinear and DequantizeLinear around operators.

A layer that takes its input in a fixed range, with uniform symmetric codes of 8 bits or fewer, is written as::

    QuantizeLinear -> DequantizeLinear -> Conv / MatMul <- DequantizeLinear <- int8 codes

the form that runtimes fuse into integer kernels; the same holds for the products of an attention module with quantised
operands. Codes of fewer bits take a byte each here. What has no such form (codebooks, powers, groups, offsets, layers
whose input is float, or whose output is rounded instead) decodes in the graph, from packed codes.

onnxruntime's CPU computes a linear layer with integers as it stands, a convolution only where its output is quantised
as well: where the next operator is another quantised layer, or where ``activations`` gives the output a range.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from effdl.core.attention_matmuls import Operands, matmuls_of, remove_matmuls
from effdl.core.input_quantizers import QuantizedInput, channel_dim, input_of, takes_input
from effdl.core.quantized import record_of


def as_qdq(model: nn.Module, activations: Mapping[str, Any] | None = None) -> nn.Module:
    """A copy for ``torch.onnx.export`` (and nothing else: its operators compute nothing in torch).

    Args:
        model: with quantised layers; left as it is.
        activations: ranges by layer name, as ``core.deploy.observe`` measures them: the input's, of layers without one
            of their own, and the output's, of convolutions.
    """
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if matmuls_of(module) is not None:
            _rewrite_attention(module)
        elif fits(module):
            measured = (activations or {}).get(name)
            fixed = input_of(module)
            if fixed is None and measured is not None:
                fixed = _record(measured.input_scale, measured.input_zero)
            if fixed is not None:
                conv = measured is not None and isinstance(module, nn.modules.conv._ConvNd)
                _rewrite(module, fixed, _record(measured.output_scale, measured.output_zero) if conv else None)
    return twin


def fits(layer: nn.Module) -> bool:
    """Whether the layer's weight is what DequantizeLinear says: ``code * scale``, a scale per row or per tensor."""
    if not takes_input(layer) or list(layer.__dict__.get("_effdl_quantized", ())) != ["weight"]:
        return False
    record, fixed = record_of(layer), input_of(layer)
    plain = record.uniform and record.offset is None and record.layout in ("row", "tensor")
    return plain and (fixed is None or (fixed.site == "input" and fixed.exponent is None))


def _record(scale: float, zero: int) -> QuantizedInput:
    return QuantizedInput(torch.tensor([scale]), torch.tensor([zero], dtype=torch.int32))


def _rewrite(layer: nn.Module, fixed: QuantizedInput, output: QuantizedInput | None) -> None:
    record, base = record_of(layer), type(layer)._effdl_base
    for key in [key for key in layer._buffers if key.startswith(("weight_", "input_"))]:
        del layer._buffers[key]
    del layer.__dict__["_effdl_quantized"]
    layer.__dict__.pop("_effdl_input", None)
    stock = base.forward is nn.Linear.forward  # a Gemm of a transposed weight is not fused, a MatMul is
    scale = record.scale.float()
    scale = scale.reshape(()) if record.layout == "tensor" else scale
    layer.register_buffer("weight_codes", (record.codes.t() if stock else record.codes).contiguous())
    layer.register_buffer("weight_scale", scale)
    layer.register_buffer("weight_zero_point", torch.zeros_like(scale, dtype=torch.int8))
    _register(layer, "input", fixed)
    if output is not None:
        _register(layer, "output", output)
    weight = property(lambda self: _decoded(self, 1).t() if stock else _decoded(self, 0))
    body = {"_effdl_base": base, "weight": weight, "forward": _linear if stock else _general}
    layer.__class__ = type(f"Qdq{base.__name__}", (base,), body)


def _register(module: nn.Module, prefix: str, record: QuantizedInput) -> None:
    """Scales and zero points as buffers, what they hold as numbers: a trace cannot read tensors."""
    for i in range(record.count()):
        module.register_buffer(f"{prefix}_scale_{i}", record.scale[i].detach().float().clone())
        module.register_buffer(f"{prefix}_zero_point_{i}", record.zero_point[i].to(torch.uint8))
    ends = list(zip(record.low.tolist(), record.high.tolist()))
    module.__dict__[f"_effdl_qdq_{prefix}"] = (tuple(record.channels), ends if record.bits < 8 else None)


def _rewrite_attention(attention: nn.Module) -> None:
    record = matmuls_of(attention)
    remove_matmuls(attention)
    _register(attention, "matmul", record)
    base = type(attention)  # stock again

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with Operands(lambda i, x: _pair(self, "matmul", i, x)):
            return base.forward(self, *args, **kwargs)

    attention.__class__ = type(f"Qdq{base.__name__}", (base,), {"forward": forward})


# ---- in the graph ------------------------------------------------------------------------------------------------


def _symbolic(operator: str, inputs: tuple[Tensor, ...], dtype: torch.dtype, axis: int | None = None) -> Tensor:
    attributes = {} if axis is None else {"axis": axis}
    return torch.onnx.ops.symbolic(operator, inputs, attributes, dtype=dtype, shape=inputs[0].shape, version=13)


def _pair(module: nn.Module, prefix: str, i: int, x: Tensor) -> Tensor:
    """``x`` to codes and back."""
    scale, zero = (getattr(module, f"{prefix}_{key}_{i}") for key in ("scale", "zero_point"))
    _, ends = module.__dict__[f"_effdl_qdq_{prefix}"]
    dtype, x = x.dtype, x.float()
    if ends is not None:  # the operator clips at 8 bits
        x = x.clamp(*ends[i])
    codes = _symbolic("QuantizeLinear", (x, scale, zero), torch.uint8)
    return _symbolic("DequantizeLinear", (codes, scale, zero), torch.float32).to(dtype)


def _seen(layer: nn.Module, x: Tensor) -> Tensor:
    channels, _ = layer.__dict__["_effdl_qdq_input"]
    if not channels:
        return _pair(layer, "input", 0, x)
    dim, ends = channel_dim(layer), list(accumulate(channels))
    pieces = [x.narrow(dim, end - width, width) for width, end in zip(channels, ends)]
    return torch.cat([_pair(layer, "input", i, piece) for i, piece in enumerate(pieces)], dim)


def _decoded(layer: nn.Module, axis: int) -> Tensor:
    inputs = (layer.weight_codes, layer.weight_scale, layer.weight_zero_point)
    return _symbolic("DequantizeLinear", inputs, torch.float32, axis if layer.weight_scale.dim() else None)


def _linear(self: nn.Module, input: Tensor) -> Tensor:
    x = _seen(self, input)
    x = x[None] if x.dim() == 2 else x  # of two dimensions, or with a flat bias, onnxruntime makes a float Gemm
    out = torch.matmul(x, _decoded(self, 1))
    out = out if self.bias is None else out + self.bias[None, None]
    return out.reshape(*input.shape[:-1], out.shape[-1]).to(input.dtype)


def _general(self: nn.Module, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    out = type(self)._effdl_base.forward(self, _seen(self, input), *args, **kwargs)
    return _pair(self, "output", 0, out) if "_effdl_qdq_output" in self.__dict__ else out

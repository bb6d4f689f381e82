"""Quantised layers through kernels that compute with integers, where torch or torchao has one for this machine.

============== ================================== =======================================================
backend        layers and records                 computes
============== ================================== =======================================================
"lut"          all                                decodes on every call: small, exact, not faster
"dense"        all                                decodes once: float speed and float size
"torch-int8"   Linear, Conv2d; uniform, no        8-bit activations times codes, summed in int32; layers whose input
               offset, "row" or "tensor"          is quantised in that range (:mod:`effdl.core.static_int8`), others
                                                  by ``torch.ops.quantized``: convolutions need ``activations``
"torch-int4"   Linear; uniform, 4 bits, groups of bfloat16 activations times 4-bit codes
               32, 64, 128 or 256 inputs          (``aten._weight_int4pack_mm``)
"torchao"      Linear; uniform, no offset,        float or 8-bit activations times int8 codes
               "row" or "tensor"                  (``torchao.quantization.Int8Tensor``)
============== ================================== =======================================================

No backend falls back to float arithmetic: a quantised layer that it does not fit is an error, unless it is excluded.
No stock CPU kernel exists for 1-bit (XNOR) layers, for 2, 3, 5, 6 and 7 bits, or for power-of-code products: there a
file is smaller, and its codes run through int8.

Example::

    model = load_quantized(model, folder)
    fast = deploy(model, "torch-int8", exclude="embed*", activations=observe(model, batches))
    fast(images)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effdl.core.capture import evaluating
from effdl.core.errors import ConfigurationError, check_choice, require
from effdl.core.input_quantizers import input_of
from effdl.core.quantized import dequantize_, is_quantized, quantized_weights, record_of
from effdl.core.quantizers import HALF, QuantizedWeight
from effdl.core.static_int8 import static_int8

BACKENDS = ("lut", "dense", "torch-int8", "torch-int4", "torchao")
INT4_GROUPS = (32, 64, 128, 256)


class UnsupportedBackendError(ConfigurationError):
    """No kernel of this backend fits a quantised layer; the message names it."""


class Range(NamedTuple):
    """Calibrated activations of a layer: 8-bit scale and zero point (0 .. 255) of its input and of its output."""

    input_scale: float
    input_zero: int
    output_scale: float
    output_zero: int


def deploy(
    model: nn.Module,
    backend: str,
    exclude: str | list[str] | None = None,
    activations: Mapping[str, Range] | None = None,
) -> nn.Module:
    """A copy of a quantised model for inference; the model itself is left as it is.

    Args:
        model: with quantised layers (:mod:`effdl.core.quantized`); float layers stay float.
        backend: one of the table above.
        exclude: names (globs) of quantised layers that keep decoding their weights.
        activations: of "torch-int8", layers whose activations have a fixed range, as :func:`observe` measures it. A
            convolution must have one (torch's ``conv2d_dynamic`` was tried and computes wrong sums); a linear layer
            without one measures its input on every call. A layer that quantises its input has its range already.

    Raises:
        UnsupportedBackendError: a layer does not fit the backend.
        ConfigurationError: unknown backend, or nothing in the model is quantised.
    """
    check_choice("backend", backend, BACKENDS)
    if not quantized_weights(model):
        raise ConfigurationError(f"{type(model).__name__} has no quantised layer to deploy.")
    patterns = [exclude] if isinstance(exclude, str) else list(exclude or ())
    result = copy.deepcopy(model).eval().requires_grad_(False)
    if backend == "dense":
        return dequantize_(result)  # inputs are taken as they come
    if backend == "lut":
        return result
    chosen = {
        name: layer
        for name, layer in result.named_modules()
        if _holds_codes(layer) and not any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    make = {"torch-int8": _int8, "torch-int4": _int4, "torchao": _torchao}[backend]
    made = {name: make(name, layer, (activations or {}).get(name)) for name, layer in chosen.items()}
    for name, layer in made.items():
        parent, _, child = name.rpartition(".")
        if not name:
            return layer
        result.get_submodule(parent)._modules[child] = layer
    return result


def _holds_codes(layer: nn.Module) -> bool:
    """Half-precision weights stay what they are: there is nothing to compute with integers."""
    names = layer.__dict__.get("_effdl_quantized", {})
    return any(record_of(layer, name).bits != HALF for name in names)


def _fitting(name: str, layer: nn.Module, backend: str, kinds: tuple[type, ...]) -> QuantizedWeight:
    """The record of a layer's weight, if integer arithmetic can use it."""
    if not isinstance(layer, kinds) or not is_quantized(layer):
        allowed = " and ".join(kind.__name__ for kind in kinds)
        base = type(layer).__name__.removeprefix("Quantized")
        raise UnsupportedBackendError(
            f"{name} ({base}): {backend} runs {allowed} only. exclude={name!r} keeps it decoding, or use 'lut'."
        )
    stock = next(kind for kind in kinds if isinstance(layer, kind))
    if type(layer)._effdl_base.forward is not stock.forward:
        raise UnsupportedBackendError(f"{name}: its class has a forward of its own, which {backend} would not run.")
    record = record_of(layer)
    fixed = input_of(layer)
    if not record.uniform or (fixed is not None and fixed.exponent is not None):
        points = "a codebook" if record.codebook is not None else "a power exponent"
        raise UnsupportedBackendError(f"{name}: its levels are {points}; {backend} needs uniform ones. Use 'lut'.")
    if fixed is not None and fixed.site == "output":
        raise UnsupportedBackendError(f"{name}: {backend} takes integers in; this layer's output is rounded instead.")
    if backend != "torch-int8" and fixed is not None:
        raise UnsupportedBackendError(f"{name}: {backend} has no fixed input range, which this layer has.")
    return record


def _symmetric(name: str, record: QuantizedWeight, backend: str) -> Tensor:
    """float32 [out] scales of a weight whose code 0 means 0."""
    if record.offset is not None or record.layout not in ("row", "tensor"):
        offset = "" if record.offset is None else " with an offset"
        raise UnsupportedBackendError(
            f"{name}: layout {record.layout!r}{offset}; {backend} needs symmetric scales per row or per tensor."
        )
    return record.scale.float().expand(record.shape[0]).contiguous()


@torch.no_grad()
def observe(model: nn.Module, batches: Iterable[Any], bits: int | None = None) -> dict[str, Range]:
    """Ranges (smallest to largest value, 0 included) of every Linear and Conv2d over some batches, in eval mode.

    Args:
        model: called with each batch (a tensor, or a tuple of arguments).
        batches: what it is called with.
        bits: of the activations, 8; fewer where the machine's kernels saturate (default: found out).
    """
    levels = 2 ** (bits or (8 if _has_vnni() else 7)) - 1
    seen: dict[str, list[Tensor]] = {}

    def note(name: str, x: Tensor, y: Tensor) -> None:
        now = torch.stack([-x.amin(), x.amax(), -y.amin(), y.amax()]).float().clamp(min=0)
        seen[name] = torch.maximum(seen[name], now) if name in seen else now

    layers = {name: m for name, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    hooks = [
        layer.register_forward_hook(lambda module, args, y, name=name: note(name, args[0], y))
        for name, layer in layers.items()
    ]
    try:
        with evaluating(model):
            for batch in batches:
                model(*batch) if isinstance(batch, tuple) else model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    ends_of = {name: ends.tolist() for name, ends in seen.items()}
    return {name: Range(*_affine(*ends[:2], levels), *_affine(*ends[2:], levels)) for name, ends in ends_of.items()}


def _affine(below: float, above: float, levels: int) -> tuple[float, int]:
    """Scale and zero point of [-below, above] in 0 .. levels."""
    scale = max(below + above, 1e-8) / levels
    return scale, round(below / scale)


# ---- torch.ops.quantized -----------------------------------------------------------------------------------------


class Int8Layer(nn.Module):
    """A linear or convolutional layer on ``torch.ops.quantized``; float32 in, float32 out.

    Args:
        packed: of ``linear_prepack`` or ``conv2d_prepack``.
        kind: ``"linear"`` or ``"conv2d"``.
        activations: fixed ranges; ``None``, of a linear layer: the input's is measured on every call.
    """

    def __init__(self, packed: Any, kind: str, activations: Range | None = None) -> None:
        super().__init__()
        self.packed, self.kind, self.activations = packed, kind, activations
        self.reduce_range = not _has_vnni()

    def forward(self, x: Tensor) -> Tensor:
        ops, fixed = torch.ops.quantized, self.activations
        if fixed is None:
            return ops.linear_dynamic(x, self.packed, self.reduce_range)
        codes = torch.quantize_per_tensor(x, fixed.input_scale, fixed.input_zero, torch.quint8)
        run = ops.linear if self.kind == "linear" else ops.conv2d
        return run(codes, self.packed, fixed.output_scale, fixed.output_zero).dequantize()

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Layer:
        return Int8Layer(self.packed, self.kind, self.activations)  # packed weights are immutable

    def extra_repr(self) -> str:
        return f"{self.kind}, activations={self.activations or 'dynamic'}"


def _has_vnni() -> bool:
    """Without these instructions 8-bit sums saturate at 16 bits: activations then take 7."""
    asks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("vnni", "avx512_vnni"))
    return any(ask is not None and ask() for ask in asks)


def _int8(name: str, layer: nn.Module, activations: Range | None) -> nn.Module:
    record = _fitting(name, layer, "torch-int8", (nn.Linear, nn.Conv2d))
    scale = _symmetric(name, record, "torch-int8")
    bias = None if layer.bias is None else layer.bias.detach().float()
    geometry = None
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            pads = layer.padding_mode
            raise UnsupportedBackendError(f"{name}: torch-int8 pads with zeros, by numbers; not {pads!r}.")
        geometry = (list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups)
    fixed = input_of(layer)
    if fixed is not None:
        if fixed.channels and getattr(layer, "groups", 1) != 1:
            raise UnsupportedBackendError(f"{name}: torch-int8 does not cut the input of a grouped convolution.")
        return static_int8(record.codes, scale, bias, fixed if _has_vnni() else fixed.reduced(7), geometry)
    zeros = torch.zeros(record.shape[0], dtype=torch.long)
    weight = torch._make_per_channel_quantized_tensor(record.codes.contiguous(), scale.double(), zeros, 0)
    if geometry is None:
        return Int8Layer(torch.ops.quantized.linear_prepack(weight, bias), "linear", activations)
    if activations is None:
        raise UnsupportedBackendError(f"{name}: torch-int8 convolutions need activations=observe(model, batches).")
    return Int8Layer(torch.ops.quantized.conv2d_prepack(weight, bias, *geometry), "conv2d", activations)


# ---- 4-bit matrix products ---------------------------------------------------------------------------------------


class Int4Linear(nn.Module):
    """``aten._weight_int4pack_mm``: float in and out, bfloat16 inside.

    Args:
        record: 4-bit uniform codes whose groups are runs of ``size`` inputs of one output.
        size: inputs of a group.
        bias: float [out] or ``None``.
    """

    def __init__(self, record: QuantizedWeight, size: int, bias: Tensor | None) -> None:
        super().__init__()
        self.size, self.out_features = size, record.shape[0]
        # the kernel's form is w = (q - 8) scale + zero, q in 0..15
        stored = record.codes.to(torch.int32) + 8
        self.register_buffer("weight", torch.ops.aten._convert_weight_to_int4pack_for_cpu(stored.contiguous(), 1))
        offset = torch.zeros_like(record.scale) if record.offset is None else record.offset
        tables = torch.stack([record.scale, offset], dim=-1).view(self.out_features, -1, 2)
        self.register_buffer("scales", tables.transpose(0, 1).contiguous().to(torch.bfloat16))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, self.size, self.scales).to(x.dtype)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias


def _int4(name: str, layer: nn.Module, activations: Range | None) -> Int4Linear:
    record = _fitting(name, layer, "torch-int4", (nn.Linear,))
    inputs = record.shape[1]
    size = inputs if record.layout == "row" else int(record.layout.partition(":")[2] or 0)
    if record.bits != 4 or size not in INT4_GROUPS or inputs % size:
        raise UnsupportedBackendError(
            f"{name}: {record.bits} bits in layout {record.layout!r} with {inputs} inputs; torch-int4 needs 4 bits in "
            f"groups of {INT4_GROUPS} that divide the inputs."
        )
    if record.shape[0] % 16:
        raise UnsupportedBackendError(f"{name}: torch-int4 needs a multiple of 16 outputs, got {record.shape[0]}.")
    return Int4Linear(record, size, None if layer.bias is None else layer.bias.detach())


# ---- torchao -----------------------------------------------------------------------------------------------------


def _torchao(name: str, layer: nn.Module, activations: Range | None) -> nn.Linear:
    tensors = require("torchao.quantization", "torchao")
    record = _fitting(name, layer, "torchao", (nn.Linear,))
    scale = _symmetric(name, record, "torchao")
    weight = tensors.Int8Tensor(record.codes, scale[:, None], [1, record.shape[1]], torch.float32)
    linear = nn.Linear(record.shape[1], record.shape[0], bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = layer.bias
    return linear.eval()

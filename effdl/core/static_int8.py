"""Linear layers and convolutions whose input has a fixed range, on torch's integer kernels: float in, float out.

The input becomes uint8 codes once, the products are summed in int32 and only then scaled: the result is what the layer
computes in float from the same codes, up to the rounding of float32. (The kernels for convolutions are oneDNN's, those
that ``torch.compile`` gives to a quantised program; ``torch.ops.quantized.conv2d`` would round its output to 8 bits.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effdl.core.input_quantizers import QuantizedInput


class StaticInt8Layer(nn.Module):
    """One integer product.

    Args:
        codes: int8 weight, of a linear layer [O, I] or a convolution [O, I / groups, h, w].
        scale: float32 [O].
        bias: float32 [O] or ``None``.
        fixed: the input's range, one part.
        geometry: stride, padding, dilation and groups of a convolution; ``None``: a linear layer.
    """

    def __init__(
        self, codes: Tensor, scale: Tensor, bias: Tensor | None, fixed: QuantizedInput, geometry: tuple | None
    ) -> None:
        super().__init__()
        self.input_scale, self.input_zero = float(fixed.scale), int(fixed.zero_point)
        # the kernels clip at 8 bits; narrower codes are clipped before
        self.clip = None if fixed.bits == 8 else (float(fixed.low), float(fixed.high))
        self.geometry, self.scale, self.bias = geometry, scale, bias
        self.zeros = torch.zeros(len(scale), dtype=torch.int32)
        if geometry is None:
            zeros = torch.zeros(len(scale), dtype=torch.long)
            weight = torch._make_per_channel_quantized_tensor(codes.contiguous(), scale.double(), zeros, 0)
            self.packed = torch.ops.quantized.linear_prepack(weight, bias)
        else:
            fixed_input = (self.input_scale, self.input_zero)
            self.packed = torch.ops.onednn.qconv_prepack(codes.contiguous(), scale, *fixed_input, *geometry, None)

    def forward(self, x: Tensor) -> Tensor:
        dtype, x = x.dtype, x.float()
        if self.clip is not None:
            x = x.clamp(*self.clip)
        if self.geometry is None:
            run = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
            return run(x, self.input_scale, self.input_zero, self.packed).to(dtype)
        codes = torch.quantize_per_tensor(x, self.input_scale, self.input_zero, torch.quint8).int_repr()
        fixed = (codes, self.input_scale, self.input_zero)
        weight = (self.packed, self.scale, self.zeros, self.bias)
        out = torch.ops.onednn.qconv2d_pointwise(
            *fixed, *weight, *self.geometry, 1.0, 0, torch.float32, "none", [], ""
        )
        return out.to(dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> StaticInt8Layer:
        return self  # nothing in it changes

    def extra_repr(self) -> str:
        kind = "linear" if self.geometry is None else "conv2d"
        return f"{kind}, input_scale={self.input_scale:.3g}, input_zero={self.input_zero}"


class SplitInt8Layer(nn.Module):
    """A product over runs of input channels, each in a range of its own, summed in float."""

    def __init__(self, parts: list[StaticInt8Layer], channels: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.parts, self.channels, self.dim = nn.ModuleList(parts), list(channels), dim

    def forward(self, x: Tensor) -> Tensor:
        return sum(part(piece) for part, piece in zip(self.parts, x.split(self.channels, self.dim)))


def static_int8(
    codes: Tensor, scale: Tensor, bias: Tensor | None, fixed: QuantizedInput, geometry: tuple | None
) -> nn.Module:
    """The module for given codes, scales [O] and input range; ``geometry`` as :class:`StaticInt8Layer` takes it."""
    if not fixed.channels:
        return StaticInt8Layer(codes, scale, bias, fixed, geometry)
    runs = list(zip(codes.split(list(fixed.channels), 1), fixed.parts()))
    made = [StaticInt8Layer(part, scale, bias if i == 0 else None, r, geometry) for i, (part, r) in enumerate(runs)]
    return SplitInt8Layer(made, fixed.channels, -1 if geometry is None else 1)

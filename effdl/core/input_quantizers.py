"""One record for every quantised input: the fixed range in which a layer takes its activations.

An input is seen through::

    q = clamp(round(x / scale) + zero_point, 0, 2^b - 1)        x ~ scale (q - zero_point)

with one scale and zero point for the whole tensor, or one for each of a few runs of channels (the halves of a skip
concatenation). Unsigned codes are what integer kernels take as activations beside signed weights; a tensor without
negative values has zero point 0 and twice the resolution. The record stands beside a layer's codes
(``core.quantized.quantize_(model, records, inputs)``), in ``quantization.json`` and in the file; the layer quantises
what it is given, and ``core.deploy``'s integer kernels take the range from it.

Example::

    record = QuantizedInput.of_range(-1.0, 3.0, bits=8)
    record.apply(x)                         # what the layer's kernel sees
    record.encode(x)                        # uint8 codes
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effdl.core.errors import ConfigurationError, check, check_integer, check_number

SMALLEST_SCALE = 1e-8
_BUFFERS = ("input_scale", "input_zero_point")


@dataclass(frozen=True)
class QuantizedInput:
    """The range of a layer's input.

    Args:
        scale: float32 [parts], positive.
        zero_point: int32 [parts], the code of 0, in 0 .. 2^b - 1.
        bits: b, 2 to 8.
        channels: of each part, in order, where there is more than one.

    Raises:
        ConfigurationError: a value out of range, or not one scale and zero point for each part.
    """

    scale: Tensor
    zero_point: Tensor
    bits: int = 8
    channels: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_integer("bits", self.bits, 2, 8)
        parts = (max(len(self.channels), 1),)
        fits = self.scale.shape == parts and self.zero_point.shape == parts
        check(fits, "scale", tuple(self.scale.shape), f"as scale and as zero_point {parts[0]} entries")
        positive = bool((self.scale > 0).all() & torch.isfinite(self.scale).all())
        check(positive, "scale", self.scale.tolist(), "finite positive numbers")
        inside = bool(((self.zero_point >= 0) & (self.zero_point < 2**self.bits)).all())
        check(inside, "zero_point", self.zero_point.tolist(), f"codes in 0 .. {2**self.bits - 1}")

    @classmethod
    def of_range(cls, low: float, high: float, bits: int = 8) -> QuantizedInput:
        """Both ends are levels up to the rounding of the zero point; 0 always is one."""
        check_number("high", high, low, float("inf"))
        low, high, levels = min(low, 0.0), max(high, 0.0), 2**bits - 1
        scale = max((high - low) / levels, SMALLEST_SCALE)
        zero = torch.tensor([min(max(round(-low / scale), 0), levels)], dtype=torch.int32)
        return cls(torch.tensor([scale], dtype=torch.float32), zero, bits)

    @classmethod
    def joined(cls, records: list[QuantizedInput], channels: tuple[int, ...]) -> QuantizedInput:
        """One record of several runs of channels, of equal bits."""
        scale = torch.cat([record.scale for record in records])
        zero = torch.cat([record.zero_point for record in records])
        return cls(scale, zero, records[0].bits, tuple(channels))

    def parts(self) -> list[QuantizedInput]:
        """A record for each run of channels."""
        pairs = zip(self.scale.split(1), self.zero_point.split(1))
        return [QuantizedInput(scale, zero, self.bits) for scale, zero in pairs]

    @property
    def low(self) -> Tensor:
        """The smallest level of each part."""
        return -self.zero_point * self.scale

    @property
    def high(self) -> Tensor:
        """The largest level of each part."""
        return (2**self.bits - 1 - self.zero_point) * self.scale

    def encode(self, x: Tensor, dim: int = 1) -> Tensor:
        """uint8 codes of ``x``, whose channels are dimension ``dim``."""
        cut = _cut(x, self.scale, self.zero_point, self.channels, dim)
        return torch.cat([_codes(*part, self.bits) for part in cut], dim).to(torch.uint8)

    def apply(self, x: Tensor, dim: int = 1) -> Tensor:
        """``x`` rounded to the levels, in its own dtype; computed in float32."""
        return _seen(x, self.scale, self.zero_point, self.bits, self.channels, dim)

    def reduced(self, bits: int) -> QuantizedInput:
        """The same range with fewer bits, for kernels whose sums would saturate."""
        if bits >= self.bits:
            return self
        ratio = (2**self.bits - 1) / (2**bits - 1)
        zero = (self.zero_point / ratio).round().to(torch.int32)
        return QuantizedInput(self.scale * ratio, zero, bits, self.channels)


def _cut(
    x: Tensor, scale: Tensor, zero: Tensor, channels: tuple[int, ...], dim: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    pieces = x.float().split(list(channels), dim) if channels else [x.float()]
    return list(zip(pieces, scale.float().split(1), zero.float().split(1)))


def _codes(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    return ((x / scale).round() + zero).clamp(0, 2**bits - 1)


def _seen(x: Tensor, scale: Tensor, zero: Tensor, bits: int, channels: tuple[int, ...], dim: int) -> Tensor:
    seen = [(_codes(*part, bits) - part[2]) * part[1] for part in _cut(x, scale, zero, channels, dim)]
    return (seen[0] if len(seen) == 1 else torch.cat(seen, dim)).to(x.dtype)


# ---- on a layer --------------------------------------------------------------------------------------------------


class InputSpec(NamedTuple):
    """What the buffers of a quantised input do not tell."""

    bits: int
    channels: tuple[int, ...]


def takes_input(layer: nn.Module) -> bool:
    """Whether a layer's first argument can be quantised: linear layers and convolutions."""
    return isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)) or type(layer).__name__.endswith("Conv1D")


def channel_dim(layer: nn.Module) -> int:
    """Where the input's channels are."""
    return 1 if isinstance(layer, nn.modules.conv._ConvNd) else -1


def check_input(name: str, layer: nn.Module, record: QuantizedInput) -> None:
    """Raise unless the layer can take this record."""
    if not takes_input(layer):
        raise ConfigurationError(f"{name} ({type(layer).__name__}): inputs of linear layers and convolutions only.")
    width = getattr(layer, "in_channels", getattr(layer, "in_features", getattr(layer, "nx", None)))
    if record.channels and sum(record.channels) != width:
        raise ConfigurationError(f"{name} has {width} input channels, the parts of its range {record.channels}.")


def install_input(layer: nn.Module, record: QuantizedInput) -> None:
    """The layer (already of a swapped class, ``core.quantized``) takes its input through the record from now on."""
    device = next((buffer.device for buffer in layer.buffers()), None)
    for key, tensor in zip(_BUFFERS, (record.scale, record.zero_point)):
        layer.register_buffer(key, tensor.to(device))
    layer.__dict__["_effdl_input"] = InputSpec(record.bits, tuple(record.channels))
    type(layer).forward = _forward


def remove_input(layer: nn.Module) -> None:
    """The layer takes its input as it comes."""
    layer.__dict__.pop("_effdl_input", None)
    for key in _BUFFERS:
        layer._buffers.pop(key, None)


def input_of(layer: nn.Module) -> QuantizedInput | None:
    """The record of a layer's input, if it is quantised."""
    spec: InputSpec | None = layer.__dict__.get("_effdl_input")
    if spec is None:
        return None
    return QuantizedInput(*(layer._buffers[key] for key in _BUFFERS), spec.bits, spec.channels)


def _forward(self: nn.Module, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    spec: InputSpec | None = self.__dict__.get("_effdl_input")
    if spec is not None:  # a copy, which shares the class, may have none
        scale, zero = (self._buffers[key] for key in _BUFFERS)
        input = _seen(input, scale, zero, *spec, channel_dim(self))
    return type(self)._effdl_base.forward(self, input, *args, **kwargs)

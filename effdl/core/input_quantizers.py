"""One record for every quantised input: the fixed range in which a layer takes its activations.

An input is seen through::

    q = clamp(round(x / scale) + zero_point, 0, 2^b - 1)        x ~ scale (q - zero_point)

with one scale and zero point for the whole tensor, or one for each of a few runs of channels (the halves of a skip
concatenation). Unsigned codes are what integer kernels take as activations beside signed weights; a tensor without
negative values has zero point 0 and twice the resolution. With an exponent a the levels are not uniform (NUPES)::

    c = round(n sign(x) (|x| / scale)^a),  n = 2^b - 1 - zero_point        q = c + zero_point, |c| <= n
    x ~ scale sign(c) (|c| / n)^(1/a)                                      scale is the largest |x|

The record stands beside a layer's codes (``core.quantized.quantize_(model, records, inputs)``), in
``quantization.json`` and in the file; the layer quantises what it is given, and ``core.deploy``'s integer kernels take
the range from it. A record of ``site="output"`` rounds what the layer answers instead: for comparison with methods that
do, since integer kernels want the input.

Example::

    record = QuantizedInput.of_range(-1.0, 3.0, bits=8)
    record.apply(x)                         # what the layer's kernel sees
    record.encode(x)                        # uint8 codes
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effdl.core.errors import ConfigurationError, check, check_choice, check_integer, check_number

SMALLEST_SCALE = 1e-8
SITES = ("input", "output")
_BUFFERS = ("input_scale", "input_zero_point", "input_exponent")
_TINY = 1e-30  # a base of a power that never decides anything: behind torch.where


@dataclass(frozen=True)
class QuantizedInput:
    """The range of a layer's input.

    Args:
        scale: float32 [parts], positive.
        zero_point: int32 [parts], the code of 0, in 0 .. 2^b - 1.
        bits: b, 2 to 8.
        channels: of each part, in order, where there is more than one.
        site: ``"input"``, or ``"output"``: what the layer answers.
        exponent: a > 0, float32 [parts]; the zero point is 0 or 2^(b-1) then. ``None``: uniform levels.

    Raises:
        ConfigurationError: a value out of range, or not one scale and zero point for each part.
    """

    scale: Tensor
    zero_point: Tensor
    bits: int = 8
    channels: tuple[int, ...] = ()
    site: str = "input"
    exponent: Tensor | None = None

    def __post_init__(self) -> None:
        check_integer("bits", self.bits, 2, 8)
        check_choice("site", self.site, SITES)
        parts = (self.count(),)
        fits = self.scale.shape == parts and self.zero_point.shape == parts
        check(fits, "scale", tuple(self.scale.shape), f"as scale and as zero_point {parts[0]} entries")
        positive = bool((self.scale > 0).all() & torch.isfinite(self.scale).all())
        check(positive, "scale", self.scale.tolist(), "finite positive numbers")
        inside = bool(((self.zero_point >= 0) & (self.zero_point < 2**self.bits)).all())
        check(inside, "zero_point", self.zero_point.tolist(), f"codes in 0 .. {2**self.bits - 1}")
        if self.exponent is not None:
            power, half = self.exponent, 2 ** (self.bits - 1)
            good = power.shape == parts and bool((power > 0).all() & torch.isfinite(power).all())
            check(good, "exponent", power.tolist(), f"{parts[0]} finite positive numbers")
            middle = bool(((self.zero_point == 0) | (self.zero_point == half)).all())
            check(middle, "zero_point", self.zero_point.tolist(), f"0 or {half} beside an exponent")

    def count(self) -> int:
        """Scales, and zero points."""
        return max(len(self.channels), 1)

    @classmethod
    def of_range(cls, low: float, high: float, bits: int = 8) -> QuantizedInput:
        """Both ends are levels up to the rounding of the zero point; 0 always is one."""
        check_number("high", high, low, float("inf"))
        low, high, levels = min(low, 0.0), max(high, 0.0), 2**bits - 1
        scale = max((high - low) / levels, SMALLEST_SCALE)
        zero = torch.tensor([min(max(round(-low / scale), 0), levels)], dtype=torch.int32)
        return cls(torch.tensor([scale], dtype=torch.float32), zero, bits)

    @classmethod
    def of_power(cls, largest: float, exponent: float, bits: int = 8, signed: bool = True) -> QuantizedInput:
        """Power codes of [-largest, largest], or of [0, largest]; exponent 1 gives the record of uniform ones."""
        zero = torch.tensor([2 ** (bits - 1) if signed else 0], dtype=torch.int32)
        if exponent == 1:
            top = 2**bits - 1 - int(zero)
            return cls(torch.tensor([max(largest / top, SMALLEST_SCALE)]), zero, bits)
        return cls(torch.tensor([max(largest, SMALLEST_SCALE)]), zero, bits, exponent=torch.tensor([float(exponent)]))

    @classmethod
    def joined(cls, records: list[QuantizedInput], channels: tuple[int, ...]) -> QuantizedInput:
        """One record of several runs of channels, of equal bits."""
        scale = torch.cat([record.scale for record in records])
        zero = torch.cat([record.zero_point for record in records])
        powers = [record.exponent for record in records if record.exponent is not None]
        power = torch.cat(powers) if powers else None
        return cls(scale, zero, records[0].bits, tuple(channels), records[0].site, power)

    def parts(self) -> list[QuantizedInput]:
        """A record for each run of channels."""
        powers = [None] * len(self.scale) if self.exponent is None else self.exponent.split(1)
        each = zip(self.scale.split(1), self.zero_point.split(1), powers)
        return [QuantizedInput(scale, zero, self.bits, exponent=power) for scale, zero, power in each]

    @property
    def low(self) -> Tensor:
        """The smallest level of each part."""
        return -self.scale * (self.zero_point if self.exponent is None else self.zero_point.clamp(max=1))

    @property
    def high(self) -> Tensor:
        """The largest level of each part."""
        return (2**self.bits - 1 - self.zero_point) * self.scale if self.exponent is None else self.scale.clone()

    def encode(self, x: Tensor, dim: int = 1) -> Tensor:
        """uint8 codes of ``x``, whose channels are dimension ``dim``."""
        cut = _cut(x, self.scale, self.zero_point, self.exponent, self.channels, dim)
        return torch.cat([_codes(*part, self.bits) for part in cut], dim).to(torch.uint8)

    def apply(self, x: Tensor, dim: int = 1) -> Tensor:
        """``x`` rounded to the levels, in its own dtype; computed in float32."""
        return _seen(x, self.scale, self.zero_point, self.exponent, self.bits, self.channels, dim)

    def reduced(self, bits: int) -> QuantizedInput:
        """The same range with fewer bits, for kernels (of uniform levels) whose sums would saturate."""
        if bits >= self.bits:
            return self
        ratio = (2**self.bits - 1) / (2**bits - 1)
        zero = (self.zero_point / ratio).round().to(torch.int32)
        return QuantizedInput(self.scale * ratio, zero, bits, self.channels)

    def to(self, device: torch.device | str) -> QuantizedInput:
        power = None if self.exponent is None else self.exponent.to(device)
        return replace(self, scale=self.scale.to(device), zero_point=self.zero_point.to(device), exponent=power)


def _cut(
    x: Tensor, scale: Tensor, zero: Tensor, power: Tensor | None, channels: tuple[int, ...], dim: int
) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    pieces = x.float().split(list(channels), dim) if channels else [x.float()]
    powers = [None] * len(pieces) if power is None else power.float().split(1)
    return list(zip(pieces, scale.float().split(1), zero.float().split(1), powers))


def _codes(x: Tensor, scale: Tensor, zero: Tensor, power: Tensor | None, bits: int) -> Tensor:
    top = 2**bits - 1
    if power is None:
        return ((x / scale).round() + zero).clamp(0, top)
    share = (x.abs() / scale).clamp(min=_TINY, max=1.0)
    return (torch.where(x == 0, 0.0, x.sign() * (top - zero) * share**power).round() + zero).clamp(min=0)


def _levels(codes: Tensor, scale: Tensor, zero: Tensor, power: Tensor | None, bits: int) -> Tensor:
    signed = codes - zero
    if power is None:
        return signed * scale
    share = (signed.abs() / (2**bits - 1 - zero)).clamp(min=_TINY)
    return torch.where(signed == 0, 0.0, signed.sign() * scale * share ** (1 / power))


def _seen(
    x: Tensor, scale: Tensor, zero: Tensor, power: Tensor | None, bits: int, channels: tuple[int, ...], dim: int
) -> Tensor:
    cut = _cut(x, scale, zero, power, channels, dim)
    seen = [_levels(_codes(*part, bits), *part[1:], bits) for part in cut]
    return (seen[0] if len(seen) == 1 else torch.cat(seen, dim)).to(x.dtype)


# ---- on a layer --------------------------------------------------------------------------------------------------


class InputSpec(NamedTuple):
    """What the buffers of a quantised input do not tell."""

    bits: int
    channels: tuple[int, ...]
    site: str = "input"


def takes_input(layer: nn.Module) -> bool:
    """Whether a layer's first argument can be quantised: linear layers and convolutions."""
    return isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)) or type(layer).__name__.endswith("Conv1D")


def channel_dim(layer: nn.Module) -> int:
    """Where the input's channels are."""
    return 1 if isinstance(layer, nn.modules.conv._ConvNd) else -1


def check_input(name: str, layer: nn.Module, record: QuantizedInput) -> None:
    """Raise unless the layer can take this record."""
    if record.count() != max(len(record.channels), 1):
        raise ConfigurationError(f"{name}: {type(record).__name__} is of attention modules.")
    if not takes_input(layer):
        raise ConfigurationError(f"{name} ({type(layer).__name__}): inputs of linear layers and convolutions only.")
    if record.site == "output" and record.channels:
        raise ConfigurationError(f"{name}: an output has one range.")
    width = getattr(layer, "in_channels", getattr(layer, "in_features", getattr(layer, "nx", None)))
    if record.channels and sum(record.channels) != width:
        raise ConfigurationError(f"{name} has {width} input channels, the parts of its range {record.channels}.")


def install_input(layer: nn.Module, record: QuantizedInput) -> None:
    """The layer (already of a swapped class, ``core.quantized``) takes its input through the record from now on."""
    device = next((buffer.device for buffer in layer.buffers()), None)
    for key, tensor in zip(_BUFFERS, (record.scale, record.zero_point, record.exponent)):
        if tensor is not None:
            layer.register_buffer(key, tensor.to(device))
    layer.__dict__["_effdl_input"] = InputSpec(record.bits, tuple(record.channels), record.site)
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
    scale, zero, power = (layer._buffers.get(key) for key in _BUFFERS)
    return QuantizedInput(scale, zero, *spec, power)


def _forward(self: nn.Module, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    spec: InputSpec | None = self.__dict__.get("_effdl_input")
    run = type(self)._effdl_base.forward
    if spec is None:  # a copy, which shares the class, may have none
        return run(self, input, *args, **kwargs)
    tables = [self._buffers.get(key) for key in _BUFFERS]
    round_off = lambda x: _seen(x, *tables, spec.bits, spec.channels, channel_dim(self))  # noqa: E731
    if spec.site == "output":
        return round_off(run(self, input, *args, **kwargs))
    return run(self, round_off(input), *args, **kwargs)


@contextmanager
def taking(records: Mapping[nn.Module, QuantizedInput]) -> Iterator[None]:
    """Inside, these layers take their inputs through their records; nothing is installed."""

    def quantise(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        dim = channel_dim(layer)
        if args:
            return (records[layer].apply(args[0], dim), *args[1:]), kwargs
        (name, value), *rest = kwargs.items()
        return args, {name: records[layer].apply(value, dim), **dict(rest)}

    with ExitStack() as hooks:
        for layer in records:
            hooks.callback(layer.register_forward_pre_hook(quantise, with_kwargs=True).remove)
        yield

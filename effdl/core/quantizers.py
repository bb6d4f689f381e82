"""One record for every quantised weight, its packing into bits, and the uniform quantisers.

A weight is cut into groups that share a scale::

    w = scale * level(code) + offset

``layout`` says which entries are a group:

=========== =================================================== ================
layout      group                                               number of groups
=========== =================================================== ================
"tensor"    all entries                                         1
"row"       one output channel (first dimension)                O
"group:K"   K consecutive inputs of one output channel          O * ceil(I / K)
"bucket:K"  K consecutive entries of the flattened weight       ceil(N / K)
=========== =================================================== ================

Codes are signed, ``-2^(b-1) <= code < 2^(b-1)``, kept as int8. ``level(code)`` is the code itself; or, with a
``codebook`` of 2^b points, ``codebook[code + 2^(b-1)]``; or, with an ``exponent`` a,
``sign(code) * (|code| / n)^(1/a)``, n = 2^(b-1) - 1. With 16 bits the "codes" are half-precision numbers: what a
network of mixed widths leaves unquantised.

Example::

    record = symmetric(layer.weight, bits=4, layout="row")
    record.dequantize()                     # float32, the layer's shape
    record.bits_per_weight                  # 4 + 32 * groups / N
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from effdl.core.errors import ConfigurationError, check_integer

HALF = 16


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight as codes.

    Args:
        codes: int8, the shape of the weight; float16 or bfloat16 with 16 bits.
        bits: b, 1 to 8, or 16.
        scale: float32 [groups].
        offset: float32 [groups], or ``None`` for 0.
        codebook: float32 [2^b], or [groups, 2^b] for points of each group's own; ``None`` for uniform levels.
        exponent: the power a > 0 of NUPES, a float32 tensor of one entry; excludes a codebook.
        layout: which entries share a scale.
    """

    codes: Tensor
    bits: int
    scale: Tensor
    offset: Tensor | None = None
    codebook: Tensor | None = None
    exponent: Tensor | None = None
    layout: str = "row"

    def __post_init__(self) -> None:
        if self.bits != HALF:
            check_integer("bits", self.bits, 1, 8)
        groups = group_count(self.codes.shape, self.layout)
        for name in ("scale", "offset"):
            value = getattr(self, name)
            if value is not None and value.shape != (groups,):
                raise ConfigurationError(
                    f"{name} of shape {tuple(value.shape)} for {groups} groups of layout {self.layout!r}"
                )
        allowed = (torch.float16, torch.bfloat16) if self.bits == HALF else (torch.int8,)
        if self.codes.dtype not in allowed:
            raise ConfigurationError(f"codes of dtype {self.codes.dtype} with {self.bits} bits: expected {allowed}")
        if self.codebook is not None and self.exponent is not None:
            raise ConfigurationError("codebook and exponent exclude each other")

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def uniform(self) -> bool:
        """Whether the levels are the codes themselves, as integer kernels want them."""
        return self.bits != HALF and self.codebook is None and self.exponent is None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the network computes with."""
        return decode(self.codes, self.bits, self.layout, self.scale, self.offset, self.codebook, self.exponent).to(
            dtype
        )

    def tables(self) -> dict[str, Tensor]:
        """What is stored beside the codes."""
        named = {name: getattr(self, name) for name in ("scale", "offset", "codebook", "exponent")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def payload_bytes(self) -> int:
        """Bytes of the packed codes and their tables."""
        return packed_bytes(self.codes.numel(), self.bits) + sum(t.nbytes for t in self.tables().values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.payload_bytes / self.codes.numel()

    def to(self, device: torch.device | str) -> QuantizedWeight:
        return replace(self, codes=self.codes.to(device), **{k: v.to(device) for k, v in self.tables().items()})


# ---- bits --------------------------------------------------------------------------------------------------------


def packed_bytes(numel: int, bits: int) -> int:
    """Bytes that :func:`pack` needs: widths that do not divide 8 are a stream of bits, so that nothing is wasted."""
    return math.ceil(numel * bits / 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Signed codes of ``bits`` bits as a stream of bits in bytes, lowest bit first, zero-padded at the end.

    Args:
        codes: int8 of any shape, within ``[-2^(b-1), 2^(b-1) - 1]``.

    Returns:
        uint8 [ceil(N b / 8)]; half-precision numbers [N] as they are.

    Raises:
        ConfigurationError: a code outside the range.
    """
    if bits == HALF:
        return codes.reshape(-1)
    check_integer("bits", bits, 1, 8)
    half = 2 ** (bits - 1)
    if codes.numel() and (int(codes.min()) < -half or int(codes.max()) >= half):
        raise ConfigurationError(f"codes outside [{-half}, {half - 1}] do not fit {bits} bits")
    stored = (codes.reshape(-1).to(torch.int16) + half).to(torch.uint8)
    stream = ((stored[:, None] >> torch.arange(bits, device=codes.device)) & 1).reshape(-1)
    stream = torch.nn.functional.pad(stream, (0, -stream.numel() % 8)).view(-1, 8)
    return (stream << torch.arange(8, device=codes.device)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: int, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The codes that :func:`pack` stored, int8 of ``shape``. Made of elementwise operations: exports and compiles."""
    if bits == HALF:
        return packed.view(shape)
    numel = math.prod(shape)
    half = 2 ** (bits - 1)
    if bits == 8:
        return (packed.to(torch.int16) - half).to(torch.int8).view(shape)
    # division instead of shifts: ONNX shifts unsigned integers only
    wide = packed.to(torch.int32)[:, None]
    step = bits if 8 % bits == 0 else 1  # whole codes in a byte, or a stream of bits
    parts = (wide // 2 ** torch.arange(0, 8, step, device=packed.device, dtype=torch.int32)) % 2**step
    if step == bits:
        codes = parts.reshape(-1)[:numel]
    else:
        powers = 2 ** torch.arange(bits, device=packed.device, dtype=torch.int32)
        codes = (parts.reshape(-1)[: numel * bits].view(numel, bits) * powers).sum(1)
    return (codes - half).to(torch.int8).view(shape)


# ---- groups ------------------------------------------------------------------------------------------------------


def _group_size(layout: str) -> int:
    kind, _, size = layout.partition(":")
    if kind not in ("group", "bucket") or not size.isdigit() or int(size) < 1:
        raise ConfigurationError(
            f"layout={layout!r} is not valid: expected 'tensor', 'row', 'group:K' or 'bucket:K', K >= 1."
        )
    return int(size)


def group_count(shape: torch.Size | tuple[int, ...], layout: str) -> int:
    """Number of groups of a weight of this shape."""
    if layout == "tensor":
        return 1
    if layout == "row":
        return shape[0]
    size = _group_size(layout)
    if layout.startswith("group"):
        return shape[0] * math.ceil(math.prod(shape[1:]) / size)
    return math.ceil(math.prod(shape) / size)


def grouped(weight: Tensor, layout: str) -> Tensor:
    """The weight as [groups, size]; incomplete groups are filled up with their last value, which moves no extremum."""
    if layout == "tensor":
        return weight.reshape(1, -1)
    if layout == "row":
        return weight.reshape(weight.shape[0], -1)
    size = _group_size(layout)
    lines = weight.reshape(weight.shape[0], -1) if layout.startswith("group") else weight.reshape(1, -1)
    missing = -lines.shape[1] % size
    if missing:
        lines = torch.cat([lines, lines[:, -1:].expand(-1, missing)], dim=1)
    return lines.reshape(-1, size)


def ungrouped(groups: Tensor, shape: torch.Size | tuple[int, ...], layout: str) -> Tensor:
    """Inverse of :func:`grouped`: the padding is dropped."""
    if layout in ("tensor", "row"):
        return groups.reshape(shape)
    lines = shape[0] if layout.startswith("group") else 1
    return groups.reshape(lines, -1)[:, : math.prod(shape) // lines].reshape(shape)


def decode(
    codes: Tensor,
    bits: int,
    layout: str,
    scale: Tensor,
    offset: Tensor | None = None,
    codebook: Tensor | None = None,
    exponent: Tensor | None = None,
) -> Tensor:
    """``scale * level(code) + offset`` in float32; see :class:`QuantizedWeight`."""
    half = 2 ** (bits - 1)
    rows = grouped(codes, layout)
    if codebook is not None:
        index = rows.long() + half
        levels = codebook[index] if codebook.dim() == 1 else codebook.gather(1, index)
    elif exponent is not None:
        levels = power_levels(bits, exponent).to(scale.dtype)[rows.long() + half]
    else:
        levels = rows.to(scale.dtype)
    values = levels * scale[:, None]
    if offset is not None:
        values = values + offset[:, None]
    return ungrouped(values, codes.shape, layout)


def power_levels(bits: int, exponent: Tensor) -> Tensor:
    """``sign(c) (|c| / n)^(1/a)`` for the codes -2^(b-1) .. 2^(b-1) - 1, in float32; the lowest code decodes as -n."""
    n = max(2 ** (bits - 1) - 1, 1)
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), device=exponent.device, dtype=torch.float32)
    ratio = (codes.abs() / n).clamp(max=1.0)
    return torch.where(codes == 0, 0.0, codes.sign() * ratio.clamp(min=1e-12) ** (1 / exponent.float().reshape(())))


# ---- the uniform quantisers --------------------------------------------------------------------------------------


def check_finite(weight: Tensor, name: str = "weight") -> None:
    """Raise for NaN or infinite entries, naming the weight."""
    if not bool(torch.isfinite(weight).all()):
        raise ConfigurationError(f"{name} has NaN or infinite entries and cannot be quantised.")


@torch.no_grad()
def symmetric(weight: Tensor, bits: int, layout: str = "row", scale: Tensor | None = None) -> QuantizedWeight:
    """``code = round(w / scale)`` in [-n, n], n = 2^(b-1) - 1; scale = max|w| / n of each group unless given.

    A group of zeros has scale 1 and codes 0. Ties round to even, as ``torch.round`` does.

    Raises:
        ConfigurationError: fewer than 2 bits (there is no symmetric 1-bit code with a zero), NaN or infinite weights.
    """
    check_integer("bits", bits, 2, 8)
    check_finite(weight)
    rows = grouped(weight.float(), layout)
    n = 2 ** (bits - 1) - 1
    if scale is None:
        largest = rows.abs().amax(1)
        scale = torch.where(largest > 0, largest / n, 1.0)
    codes = (rows / scale[:, None]).round().clamp(-n, n).to(torch.int8)
    return QuantizedWeight(ungrouped(codes, weight.shape, layout).contiguous(), bits, scale, layout=layout)


@torch.no_grad()
def affine(weight: Tensor, bits: int, layout: str = "row") -> QuantizedWeight:
    """Between each group's minimum and maximum, both of which are levels: 2^b - 1 steps of equal size."""
    check_integer("bits", bits, 1, 8)
    check_finite(weight)
    rows = grouped(weight.float(), layout)
    low, high = rows.amin(1), rows.amax(1)
    steps, half = 2**bits - 1, 2 ** (bits - 1)
    scale = torch.where(high - low > 1e-10, (high - low) / steps, 1.0 / steps)
    codes = ((rows - low[:, None]) / scale[:, None]).round().clamp(0, steps)
    codes = (codes - half).to(torch.int8)
    codes = ungrouped(codes, weight.shape, layout).contiguous()
    return QuantizedWeight(codes, bits, scale, low + half * scale, layout=layout)


@torch.no_grad()
def half_precision(weight: Tensor, dtype: torch.dtype = torch.float16) -> QuantizedWeight:
    """16 bits a weight: no codes, and half of float32's bytes."""
    check_finite(weight)
    return QuantizedWeight(weight.to(dtype), HALF, torch.ones(1, device=weight.device), layout="tensor")


def round_ste(x: Tensor) -> Tensor:
    """``round`` forward (ties to even), identity backward."""
    return x + (x.round() - x).detach()

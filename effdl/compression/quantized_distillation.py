"""quantized-distillation: Model compression via distillation and quantization (Polino, Pascanu & Alistarh, ICLR 2018,
arXiv 1802.05668).

A weight is flattened and cut into buckets. With beta the minimum and alpha the range of a bucket (1 where that is below
1e-10), v^ = (v - beta) / alpha lies in [0, 1]; a quantiser moves v^ to one of s points, and alpha q^ + beta goes back:

    uniform          q^ = round(v^ (s - 1)) / (s - 1),  s = 2^b              (section 2.2)
    differentiable   q^ = p_j,  j = argmin_j |v^ - p_j|, of learned points p  (section 4)

(a) Quantized distillation trains through the uniform quantiser, whose gradient is taken to be one, under a teacher.
(b) Differentiable quantization learns p for weights that stay as they are: dL/dp_j = sum_{i at j} alpha dL/dQ(v)_i.

Only weights are quantised, never activations.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from effdl.core.distill import Reduction, temperature_kl
from effdl.core.errors import check, check_choice, check_integer, check_number
from effdl.core.quantizers import QuantizedWeight, check_finite, grouped, ungrouped

#: Entries of a bucket; ``None``: the whole tensor; ``"row"``: one output channel.
BucketSize = int | Literal["row"] | None
Gradient = Literal["ste", "truncated", "exact_scale"]
GRADIENTS = ("ste", "truncated", "exact_scale")
_FLAT = 1e-10  # a range below it counts as none


def layout_of(bucket_size: BucketSize) -> str:
    """The record's name (``core.quantizers``) of buckets of this size.

    Raises:
        ConfigurationError: neither an integer >= 2, ``None`` nor ``"row"``.
    """
    if bucket_size is None:
        return "tensor"
    if bucket_size == "row":
        return "row"
    check(not isinstance(bucket_size, str), "bucket_size", bucket_size, "an integer >= 2, None or 'row'")
    check_integer("bucket_size", bucket_size, 2, fix="None makes the whole tensor one bucket.")
    return f"bucket:{bucket_size}"


class Buckets(NamedTuple):
    """A weight in buckets: ``scaled`` v^ [B, k] in [0, 1], ``alpha`` [B] > 0 and ``beta`` [B], in the weight's unit."""

    scaled: Tensor
    alpha: Tensor
    beta: Tensor


def scale_down(weight: Tensor, layout: str) -> Buckets:
    """Buckets of a weight; an incomplete one is filled up with the last value, which moves neither of its ends."""
    rows = grouped(_wide(weight), layout)
    beta, high = rows.min(1).values, rows.max(1).values
    alpha = torch.where(high - beta < _FLAT, torch.ones_like(beta), high - beta)
    return Buckets((rows - beta[:, None]) / alpha[:, None], alpha, beta)


# ---- the uniform quantiser ---------------------------------------------------------------------------------------


def uniform(
    weight: Tensor,
    bits: int,
    layout: str = "bucket:256",
    symmetric: bool = False,
    generator: torch.Generator | None = None,
) -> QuantizedWeight:
    """Codes of the uniform quantiser; ties round to even.

    Args:
        weight: any shape, floating.
        bits: b, 1 to 8 (2 to 8 if symmetric).
        layout: of the buckets, :func:`layout_of`.
        symmetric: levels -n .. n times max|v| / n, n = 2^(b-1) - 1, as integer kernels want them, in place of levels
            from the bucket's minimum to its maximum. Zero is a level then.
        generator: rounds up with the probability of the fraction, so that the mean is kept (the paper's stochastic
            variant).

    Raises:
        ConfigurationError: bits out of range, NaN or infinite weights.

    Example::

        record = uniform(layer.weight, bits=4)
    """
    check_bits(bits, symmetric)
    check_finite(weight)
    with torch.no_grad():
        x, scale, offset = _levels(grouped(_wide(weight), layout), bits, symmetric)
        if generator is None:
            codes = x.round()
        else:
            codes = x.floor() + (torch.rand(x.shape, generator=generator, device=x.device) < x - x.floor())
        codes = ungrouped((codes - _shift(bits, symmetric)).to(torch.int8), weight.shape, layout).contiguous()
    return QuantizedWeight(codes, bits, scale[:, 0], None if offset is None else offset[:, 0], layout=layout)


def fake_quantize(
    weight: Tensor, bits: int, layout: str = "bucket:256", gradient: Gradient = "ste", symmetric: bool = False
) -> Tensor:
    """Q(w) with the gradient that trains w: bit for bit what :func:`uniform` decodes to.

    Args:
        weight: the full-precision master.
        bits, layout, symmetric: as in :func:`uniform`.
        gradient: ``"ste"``, the identity; ``"truncated"``, w is clamped to [-1, 1], no gradient outside;
            ``"exact_scale"``, through all but the rounding: g + (e_argmax - e_argmin) sum_j g_j (q^_j - v^_j).

    Returns:
        The shape and dtype of ``weight``; computed in float32 at least.
    """
    if gradient == "truncated":
        weight = weight.clamp(-1, 1)
    rows = grouped(_wide(weight), layout)
    with torch.set_grad_enabled(torch.is_grad_enabled() and gradient == "exact_scale"):
        x, scale, offset = _levels(rows, bits, symmetric)
        nearest = x + (x.round() - x).detach()
        through = (nearest - _shift(bits, symmetric)) * scale + (0 if offset is None else offset)
    with torch.no_grad():
        exact = (x.round() - _shift(bits, symmetric)) * scale
        exact = exact if offset is None else exact + offset
    through = through if gradient == "exact_scale" else rows
    # the exact levels in value, the surrogate in gradient
    return ungrouped(exact + (through - through.detach()), weight.shape, layout).to(weight.dtype)


def check_bits(bits: int, symmetric: bool = False) -> None:
    """Raise ConfigurationError unless ``bits`` is an integer in 1..8 (2..8 if symmetric: one code must be zero)."""
    check_integer("bits", bits, 2 if symmetric else 1, 8)


def _levels(rows: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Levels before rounding [B, k], and w = (level - shift) * scale [B, 1] + offset [B, 1]."""
    if symmetric:
        largest = rows.abs().max(1, keepdim=True).values
        scale = torch.where(largest > 0, largest, torch.ones_like(largest)) / (2 ** (bits - 1) - 1)
        return rows / scale, scale, None
    low, high = rows.min(1, keepdim=True).values, rows.max(1, keepdim=True).values
    alpha = torch.where(high - low < _FLAT, torch.ones_like(low), high - low)
    scale = alpha / (2**bits - 1)
    return (rows - low) / alpha * (2**bits - 1), scale, low + _shift(bits, symmetric) * scale


def _shift(bits: int, symmetric: bool) -> int:
    """Codes are signed: level 0 of the affine form is code -2^(b-1)."""
    return 0 if symmetric else 2 ** (bits - 1)


def _wide(weight: Tensor) -> Tensor:
    return weight if weight.dtype == torch.float64 else weight.float()


# ---- learned points ----------------------------------------------------------------------------------------------


def check_points(points: Tensor) -> None:
    """Raise ConfigurationError unless points are 1-D, two at least and sorted."""
    shape = tuple(points.shape)
    check(points.dim() == 1 and points.numel() >= 2, "points", f"of shape {shape}", "a 1-D tensor of two or more")
    check(bool((points[1:] >= points[:-1]).all()), "points", points.tolist(), "an ascending order")


def nearest_points(scaled: Tensor, points: Tensor) -> Tensor:
    """Index (int64) of the nearest of the sorted ``points`` [s] for each entry; the upper one in the middle of two."""
    middles = (points[1:] + points[:-1]) / 2
    return torch.bucketize(scaled, middles, right=True)


def quantize_to_points(weight: Tensor, points: Tensor, layout: str = "bucket:256") -> Tensor:
    """Q(v) = alpha p_j + beta, differentiable in ``points``: each gathers alpha dL/dQ(v)_i of its members.

    Args:
        weight: v, frozen: no gradient goes there.
        points: p [s], sorted, of the scaled space [0, 1].
        layout: of the buckets.
    """
    with torch.no_grad():
        buckets = scale_down(weight.detach(), layout)
        index = nearest_points(buckets.scaled, points)
    rows = points[index] * buckets.alpha[:, None] + buckets.beta[:, None]
    return ungrouped(rows, weight.shape, layout).to(weight.dtype)


@torch.no_grad()
def points_record(weight: Tensor, points: Tensor, layout: str = "bucket:256") -> QuantizedWeight:
    """Codes, codebook and buckets of :func:`quantize_to_points`; ceil(log2 s) bits a weight.

    Raises:
        ConfigurationError: points that are unsorted or not 1-D, more than 256, NaN or infinite weights.
    """
    check_points(points)
    check_finite(weight)
    bits = math.ceil(math.log2(points.numel()))
    check(bits <= 8, "points", points.numel(), "at most 256 points")
    buckets = scale_down(weight, layout)
    codes = (nearest_points(buckets.scaled, points) - 2 ** (bits - 1)).to(torch.int8)
    codebook = torch.cat([points, points[-1:].expand(2**bits - points.numel())])  # unused entries of the last power
    codes = ungrouped(codes, weight.shape, layout).contiguous()
    return QuantizedWeight(codes, bits, buckets.alpha, buckets.beta, codebook.contiguous(), layout=layout)


@torch.no_grad()
def initial_points(
    weight: Tensor, count: int, layout: str = "bucket:256", init: Literal["quantile", "uniform"] = "quantile"
) -> Tensor:
    """Where the points start: percentiles of v^ (without padding) at 0 .. 100 %, so that all are used, or equal steps.

    Returns:
        [s] for s = ``count``, sorted, in [0, 1]; float32, or float64 for such a weight.
    """
    check_integer("points", count, 2, 256)
    check_choice("init", init, ("quantile", "uniform"))
    check_finite(weight)
    at = torch.linspace(0, 1, count, dtype=torch.float64, device=weight.device)
    if init == "uniform":
        return at.to(_wide(weight).dtype)
    values = ungrouped(scale_down(weight, layout).scaled, weight.shape, layout).flatten().double().sort().values
    place = at * (values.numel() - 1)  # not torch.quantile, which refuses 16 million entries
    below = place.floor().long()
    above = (below + 1).clamp(max=values.numel() - 1)
    return torch.lerp(values[below], values[above], place - below).to(_wide(weight).dtype)


def assign_points(gradient_norms: Sequence[float], points: int) -> list[int]:
    """How many points each tensor gets when ``points`` each are to be shared: half for all, the rest by gradient.

    A tensor keeps ``points // 2``; what remains of ``len(gradient_norms) * points`` is shared in proportion to
    ||g_i||_2, rounded, 256 at most; what is then too many is taken from the largest, too few given to the smallest.

    Raises:
        ConfigurationError: fewer than 4 points (each tensor keeps two at least), or norms without a sum.
    """
    check_integer("points", points, 4, 256, fix="A tensor keeps half of them, and needs two.")
    total, kept = sum(gradient_norms), points // 2
    check(math.isfinite(total) and total > 0, "gradient_norms", list(gradient_norms), "norms with a positive sum")
    count = len(gradient_norms)
    shares = [min(256, kept + round(norm / total * count * (points - kept))) for norm in gradient_norms]
    while (excess := sum(shares) - count * points) != 0:
        place = shares.index(max(shares) if excess > 0 else min(shares))
        shares[place] -= 1 if excess > 0 else -1
    return shares


# ---- what it costs to store, and what trains it ------------------------------------------------------------------


def huffman_bits(frequencies: Iterable[int]) -> float:
    """Mean code length [bits] of a Huffman code over symbols of these frequencies; 1 where there is a single symbol."""
    heap = [int(count) for count in frequencies if count > 0]
    check(len(heap) > 0, "frequencies", heap, "at least one positive count")
    total, length = sum(heap), 0
    if len(heap) == 1:
        return 1.0
    heapq.heapify(heap)
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        length += merged  # all leaves below move one level down
        heapq.heappush(heap, merged)
    return length / total


def level_frequencies(records: Iterable[QuantizedWeight]) -> list[int]:
    """How often each level 0 .. 2^b - 1 occurs, pooled over all tensors."""
    counts = torch.zeros(256, dtype=torch.int64)
    for record in records:
        levels = record.codes.flatten().long().cpu() + 2 ** (record.bits - 1)
        counts += torch.bincount(levels, minlength=256)
    return counts.tolist()


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    task_loss: Tensor,
    temperature: float = 2.0,
    teacher_weight: float = 0.7,
    reduction: Reduction = "batchmean",
) -> Tensor:
    """w_t T^2 KL(softmax(z_t / T) || softmax(z_s / T)) + (1 - w_t) task loss.

    Args:
        student, teacher: logits (..., C).
        task_loss: usually the cross-entropy with the labels, 0-d.
        temperature: T > 0; 2 in the official code.
        teacher_weight: w_t in [0, 1].
        reduction: ``"batchmean"`` is Hinton's; ``"element_mean"``, the official code's, is C times weaker.
    """
    check_number("teacher_weight", teacher_weight, 0, 1)
    soft = temperature_kl(student, teacher, temperature, reduction)
    return teacher_weight * soft + (1 - teacher_weight) * task_loss

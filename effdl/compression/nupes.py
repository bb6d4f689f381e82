"""nupes: NUPES, non-uniform post-training quantization via power exponent search (Yvinec et al., arXiv 2308.05600).

Power functions are the continuous automorphisms of the positive reals under multiplication, so they are the natural
non-uniform code: with n = 2^(b-1) - 1 and M the largest |W| of a group,

    q = Q_a(W) = round(n sign(W) (|W| / M)^a),   -n <= q <= n
    D_a(q) = sign(q) (|q| / n)^(1/a) M

a = 1 is the uniform symmetric quantiser, a < 1 puts more points near zero. (xy)^a = x^a y^a: the product of two codes
decodes to the product of the decoded values. *Addition does not commute with the code*: a sum of products of codes
that is decoded once, at its end, is another function. So weights are decoded (a table of 2^b entries) before an
ordinary matrix product, or, where 1/a is an integer, products are raised to it in integers before they are summed
(:func:`integer_dot`).

The exponent is searched without data (:func:`search_exponents`, PowerQuant's objective); codes and exponent may also
be learned from a few batches (:mod:`effdl.compression._nupes_network`), and inputs coded alike (``_nupes_inputs``).
With 2 bits the codes are -1, 0, 1 and the exponent moves a threshold only: nothing is gained without learning.

Example::

    from effdl.compression.nupes import power_quantize, search_exponents

    (a,), error = search_exponents([layer.weight], bits=4)
    record = power_quantize(layer.weight, bits=4, exponent=a)      # a core QuantizedWeight
    record.dequantize()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from effdl.core.errors import check, check_integer, check_number
from effdl.core.quantizers import QuantizedWeight, check_finite, grouped, symmetric, ungrouped

LOW, HIGH, STEP = 0.1, 1.2, 0.01
_TINY = 1e-30  # a base of a power that never decides anything: behind torch.where


def top_code(bits: int) -> int:
    """n, the largest code: 2^(b-1) - 1."""
    check_integer("bits", bits, 2, 8, "There is no symmetric code of fewer than 2 bits with a zero.")
    return 2 ** (bits - 1) - 1


def check_layout(layout: str, argument: str = "layout") -> None:
    """Raise unless it is ``"row"``, ``"tensor"`` or ``"group:K"``."""
    kind, _, size = str(layout).partition(":")
    fits = layout in ("row", "tensor") or (kind == "group" and size.isdigit() and int(size) > 0)
    check(fits, argument, layout, "'row', 'tensor' or 'group:K' with K >= 1")


def largest(weight: Tensor, layout: str = "row") -> Tensor:
    """M [groups]: the largest magnitude of each group, 1 for a group of zeros. float32, or float64 of such a weight."""
    found = grouped(_wide(weight), layout).abs().amax(1)
    return torch.where(found > 0, found, 1.0)


def power_codes(
    weight: Tensor, bits: int, exponent: float | Tensor, layout: str = "row", scale: Tensor | None = None
) -> Tensor:
    """Q_a: int8 codes in [-n, n], the shape of the weight.

    Args:
        weight: any float dtype; computed in float32, or in float64 where it is.
        bits: b, 2 to 8.
        exponent: a > 0.
        layout: which entries share M.
        scale: M [groups]; default :func:`largest`.
    """
    rows = grouped(_wide(weight), layout)
    ratio = rows.abs() / (largest(weight, layout) if scale is None else scale)[:, None]
    codes = (rows.sign() * top_code(bits) * _power(ratio, exponent)).round()
    limit = top_code(bits)
    return ungrouped(codes.clamp(-limit, limit).to(torch.int8), weight.shape, layout).contiguous()


def power_decode(codes: Tensor, scale: Tensor, bits: int, exponent: float | Tensor, layout: str = "row") -> Tensor:
    """D_a in the dtype of ``scale`` [groups]; codes are integers, or floats of integer value, of any shape.

    Differentiable in the exponent; the slope there is 0 at q = 0 and q = +-n, never NaN.
    """
    rows = grouped(codes.to(scale.dtype), layout)
    levels = rows.sign() * _power(rows.abs() / top_code(bits), 1 / exponent)
    return ungrouped(levels * scale[:, None], codes.shape, layout)


@torch.no_grad()
def power_quantize(weight: Tensor, bits: int, exponent: float = 1.0, layout: str = "row") -> QuantizedWeight:
    """A weight as power codes.

    Args:
        weight: any shape and float dtype (bf16 is computed in float32).
        bits: b, 2 to 8.
        exponent: a > 0; 1 gives the very record of the uniform quantiser, which integer kernels take.
        layout: ``"row"`` (one M per output channel, the first dimension), ``"tensor"`` or ``"group:K"``.

    Returns:
        codes in [-n, n]; ``scale`` is M and ``exponent`` is a. A row of zeros has M = 1 and codes 0.

    Raises:
        ConfigurationError: bits, exponent or layout out of range, NaN or infinite weights.

    Example::

        record = power_quantize(torch.randn(8, 16), bits=4, exponent=0.5)
    """
    top_code(bits)
    check_number("exponent", exponent, 0, 10, closed="(]")
    check_layout(layout)
    check_finite(weight)
    if exponent == 1:
        return symmetric(weight, bits, layout)
    scale = largest(weight, layout)
    codes = power_codes(weight, bits, exponent, layout, scale)
    stored = torch.tensor([exponent], dtype=torch.float32, device=weight.device)
    return QuantizedWeight(codes, bits, scale.float(), exponent=stored, layout=layout)


def power_records(
    weights: Mapping[str, Tensor],
    bits: int = 4,
    exponent: float | str = "layer",
    layout: str = "row",
    first_last_bits: int | None = None,
) -> dict[str, QuantizedWeight]:
    """The whole data-free stage for the weights of a network; hand the result to ``core.quantized.quantize_``.

    Args:
        weights: by parameter name, in the network's order.
        bits: b.
        exponent: ``"layer"`` or ``"network"``, which one is searched for, or a number.
        layout: which entries share M.
        first_last_bits: of the first and the last weight where they differ.

    Example::

        weights = {w.name: w.data for w in select_weights(network)}
        quantize_(network, power_records(weights, bits=4))
    """
    for name, weight in weights.items():
        check_finite(weight, name)
    each = [bits] * len(weights)
    if first_last_bits is not None:
        each[0] = each[-1] = first_last_bits
    exponents: list[float] = [exponent] * len(weights)  # type: ignore[list-item]
    if isinstance(exponent, str):
        exponents, _ = search_exponents(list(weights.values()), each, layout, share=exponent == "network")
    made = zip(weights.items(), each, exponents)
    return {name: power_quantize(weight, b, a, layout) for (name, weight), b, a in made}


def integer_dot(codes_x: Tensor, codes_w: Tensor, inverse: int) -> Tensor:
    """sum_j sign(q_x q_w) |q_x q_w|^(1/a) in int64 over the last dimension, for 1/a = ``inverse`` in {1, 2, 3}.

    The sum of the decoded products is this integer times M_x M_w / (n_x n_w)^(1/a): one float product per output. At
    a = 1/2 and 8-bit codes 3.5e10 of the largest products fit.
    """
    check_integer("inverse", inverse, 1, 3, "Only a = 1, 1/2, 1/3 decode in integers.")
    product = codes_x.long() * codes_w.long()
    return (product.sign() * product.abs() ** inverse).sum(-1)


def as_int8(record: QuantizedWeight) -> tuple[QuantizedWeight, float]:
    """A power-coded weight for int8 kernels: each of its 2^b points moved to the nearest of 255 uniform ones.

    Returns:
        the uniform 8-bit record (its file is 8 bits per weight, not b), and the L2 distance between the two weights
        relative to the norm of the first.
    """
    decoded = record.dequantize()
    uniform = symmetric(decoded, 8, record.layout)
    norm = decoded.double().norm().clamp(min=_TINY)
    return uniform, float((decoded.double() - uniform.dequantize().double()).norm() / norm)


def _wide(weight: Tensor) -> Tensor:
    return weight if weight.dtype == torch.float64 else weight.float()


def _power(base: Tensor, exponent: float | Tensor) -> Tensor:
    """base^exponent of base >= 0, and 0 with gradient 0 at 0."""
    positive = base > 0
    return torch.where(positive, torch.where(positive, base, 1.0).clamp(min=_TINY) ** exponent, 0.0)


# ---- the search --------------------------------------------------------------------------------------------------


class PowerErrors:
    """||W - D_a(Q_a(W))||_2 of one weight for many exponents at once, exactly.

    The entries are sorted by |W| / M once; those that share a code are then an interval, whose squared error follows
    from running sums of M^2, M |W| and |W|^2: an exponent costs n look-ups instead of a pass over the weight.

    Args:
        weight: any shape; 0.2 s and 32 bytes per entry are spent here.
        bits, layout: of the quantiser.
    """

    def __init__(self, weight: Tensor, bits: int, layout: str = "row") -> None:
        wide = _wide(weight.detach())
        wide = wide.cpu() if wide.device.type == "mps" else wide  # no float64 there
        scale = ungrouped(largest(wide, layout)[:, None].expand_as(grouped(wide, layout)), wide.shape, layout)
        self._sort(wide.abs().flatten(), scale.flatten(), top_code(bits))

    @classmethod
    def of_values(cls, sizes: Tensor, counts: Tensor, scale: float, n: int) -> PowerErrors:
        """Of magnitudes [K] that occur ``counts`` [K] times, in codes up to ``n``; above ``scale`` they are clipped."""
        made = cls.__new__(cls)
        made._sort(sizes, torch.full_like(sizes, scale), n, counts)
        return made

    def _sort(self, sizes: Tensor, scale: Tensor, n: int, counts: Tensor | None = None) -> None:
        self.n = n
        self.ratio, order = (sizes / scale).sort()
        m, w = scale[order].double(), sizes[order].double()
        each = 1.0 if counts is None else counts[order].double()
        start = m.new_zeros(1)
        self.sums = torch.stack([torch.cat([start, (s * each).cumsum(0)]) for s in (m * m, m * w, w * w)])

    def __call__(self, exponents: Tensor) -> Tensor:
        """float64 [K] on the CPU for exponents [K]."""
        inverse = 1 / exponents.to(self.ratio.device, torch.float64)[:, None]
        codes = torch.arange(self.n + 1, device=self.ratio.device, dtype=torch.float64)
        levels = (codes / self.n) ** inverse
        borders = ((codes[1:] - 0.5) / self.n) ** inverse
        cut = torch.searchsorted(self.ratio, borders.to(self.ratio.dtype))
        begin = torch.nn.functional.pad(cut, (1, 0))
        end = torch.nn.functional.pad(cut, (0, 1), value=self.ratio.numel())
        s0, s1 = (self.sums[:2, end] - self.sums[:2, begin]).unbind()
        squared = self.sums[2, -1] + (levels * (levels * s0 - 2 * s1)).sum(-1)
        return squared.clamp(min=0).sqrt().cpu()


def search_exponents(
    weights: Sequence[Tensor],
    bits: int | Sequence[int],
    layout: str = "row",
    share: bool = False,
    low: float = LOW,
    high: float = HIGH,
    step: float = STEP,
) -> tuple[list[float], list[float]]:
    """The data-free stage: a* = argmin_a sum_layers ||W - D_a(Q_a(W))||_2, over a grid, then by golden sections.

    The objective is nearly convex around one minimum but piecewise (several minima at 8 bits), hence the grid; the
    best point that was evaluated is returned, a = 1 among them, so never one worse than uniform.

    Args:
        weights: of the layers.
        bits: b, of all or of each.
        layout: which entries share M. The error is that of the whole tensor.
        share: one exponent for all layers (PowerQuant), else one each.
        low, high, step: of the grid.

    Returns:
        the exponent of each layer, and its error ||W - D_a(Q_a(W))||_2.

    Raises:
        ConfigurationError: see :func:`power_quantize`.

    Example::

        exponents, errors = search_exponents([first.weight, second.weight], bits=4, share=True)
    """
    check_number("low", low, 0, high, closed="()")
    check_layout(layout)
    each = [bits] * len(weights) if isinstance(bits, int) else list(bits)
    check(len(each) == len(weights), "bits", bits, f"one number, or one for each of {len(weights)} weights")
    for weight in weights:
        check_finite(weight)
    spreads = [PowerErrors(weight, b, layout) for weight, b in zip(weights, each)] if share else []
    shared = minimum(lambda a: sum(spread(a) for spread in spreads), low, high, step) if share else None
    exponents, errors = [], []
    for i, (weight, b) in enumerate(zip(weights, each)):
        spread = spreads[i] if share else PowerErrors(weight, b, layout)
        exponents.append(minimum(spread, low, high, step) if shared is None else shared)
        errors.append(float(spread(torch.tensor(exponents[-1:]).double())))
    return exponents, errors


def minimum(objective: Callable[[Tensor], Tensor], low: float = LOW, high: float = HIGH, step: float = STEP) -> float:
    """The best of all points evaluated: the grid, 1, and a golden-section search around the best of them."""
    points = torch.tensor([*(low + step * i for i in range(round((high - low) / step) + 1)), 1.0], dtype=torch.float64)
    values = objective(points)
    at = int(values.argmin())
    best, least = float(points[at]), float(values[at])
    low, high = max(best - step, float(points.min())), min(best + step, float(points.max()))
    shrink = (math.sqrt(5) - 1) / 2
    for _ in range(20):
        inner = torch.tensor([high - shrink * (high - low), low + shrink * (high - low)], dtype=torch.float64)
        left, right = objective(inner).tolist()
        low, high = (low, float(inner[1])) if left < right else (float(inner[0]), high)
        if min(left, right) < least:
            best, least = float(inner[int(right < left)]), min(left, right)
    return best

"""hessian-mixed-precision: which weights may go to how few bits, ordered by sensitivity *and* by how errors add up.

Quantising the set Q of units by delta_i = Q_b(W_i) - W_i raises a loss, to second order around its minimum, by::

    sum over i in Q of S_ii  +  sum over i < j in Q of Omega_ij
    S_ii     = 1/2 h_i,  h_i = (tr H_ii / n_i) ||delta_i||^2        or measured: L({i}) - L(0)
    Omega_ij = delta_i' H_ij delta_j                                or measured: L({i,j}) - L({i}) - L({j}) + L(0)

A greedy order appends the unit that raises this sum least; bisection finds the longest prefix of the order that keeps a
metric above its target, for 8 bits and then, among those units, for 4 (arXiv 2306.04879; the search: 2302.01382).

Example::

    order = augmented_order(0.5 * scores, interactions)
    found = bisect(len(order), lambda k: metric_of(order[:k]) >= 0.99 * metric_of([]))
    to_8_bits, stay = order[: found.prefix], order[found.prefix :]
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from effdl.core.errors import ConfigurationError, check
from effdl.core.hessian import HessianOperator
from effdl.core.input_quantizers import QuantizedInput
from effdl.core.quantized import quantize_
from effdl.core.quantizers import QuantizedWeight, half_precision, symmetric

BASELINE = 16
ORDERS = ("augmented", "row_sum", "hessian", "qe", "random")

#: A set of units, by index -> losses of the calibration batches with exactly these quantised, float64 [batches].
LossOf = Callable[[frozenset[int]], Tensor]


# ---- sensitivity -----------------------------------------------------------------------------------------------------


def hessian_scores(mean_traces: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    """``h_i = max(t_i, 0) ||delta_i||^2``, float64 [N]; t_i = tr(H_ii) / n_i. HAWQ-V2's ranking."""
    errors = torch.stack([delta.double().square().sum().cpu() for delta in deltas])
    return mean_traces.double().clamp(min=0) * errors


def relative_errors(weights: Sequence[Tensor], deltas: Sequence[Tensor]) -> Tensor:
    """``||delta_i||^2 / ||W_i||^2``, the ranking that knows no loss; float64 [N]."""
    pairs = [(d.double().square().sum(), w.double().square().sum()) for d, w in zip(deltas, weights)]
    return torch.stack([error / norm.clamp(min=1e-30) for error, norm in pairs]).cpu()


def hvp_interactions(
    operator: HessianOperator, deltas: Sequence[Tensor], units: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """``(1/2 delta_i' H_ii delta_i, delta_i' H_ij delta_j)`` from one Hessian-vector product per unit.

    Args:
        operator: with one parameter per unit.
        deltas: of all its parameters.
        units: N of them, by index; default all.

    Returns:
        float64 [N] and a symmetric float64 [N, N] with zero diagonal.
    """
    units = list(range(len(deltas)) if units is None else units)
    flat = {j: deltas[j].flatten().to(operator.dtype) for j in units}
    sizes = [delta.numel() for delta in deltas]
    rows = []
    for i in units:
        parts = [flat[j] if j == i else delta.new_zeros(n) for j, (delta, n) in enumerate(zip(deltas, sizes))]
        product = operator(torch.cat(parts).to(operator.dtype)).split(sizes)
        rows.append(torch.stack([(product[j].double() * flat[j].double()).sum() for j in units]))
    omega = torch.stack(rows).cpu()
    omega = (omega + omega.T) / 2
    diagonal = omega.diagonal() / 2
    return diagonal, omega - torch.diag(omega.diagonal())


class Interactions(NamedTuple):
    """What was measured: ``single`` [N], ``omega`` [N, N] and its standard error, all float64."""

    single: Tensor
    omega: Tensor
    error: Tensor


def measured_interactions(loss_of: LossOf, pairs: Iterable[tuple[int, int]], count: int) -> Interactions:
    """Single increases and pairwise interactions from losses, ``1 + N + len(pairs)`` evaluations.

    The standard error comes from the two halves of the calibration batches; what does not stand out of it is set to 0.
    """
    none = loss_of(frozenset()).double()
    alone = [loss_of(frozenset({i})).double() - none for i in range(count)]
    omega, error = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, count, dtype=torch.float64)
    for i, j in pairs:
        terms = loss_of(frozenset({i, j})).double() - none - alone[i] - alone[j]
        half = len(terms) // 2
        spread = (terms[:half].mean() - terms[half:].mean()).abs() / 2 if half else terms.new_zeros(())
        value = terms.mean()
        omega[i, j] = omega[j, i] = torch.where(value.abs() < spread, 0.0, value)
        error[i, j] = error[j, i] = spread
    return Interactions(torch.stack([a.mean() for a in alone]), omega, error)


def pairs_of(count: int, window: int | None = None) -> list[tuple[int, int]]:
    """All pairs i < j, or those at most ``window`` apart in the network's order."""
    return [(i, j) for i in range(count) for j in range(i + 1, count) if window is None or j - i <= window]


# ---- orders ----------------------------------------------------------------------------------------------------------


def augmented_order(diagonal: Tensor, omega: Tensor) -> list[int]:
    """Greedy: next comes the unit whose addition raises the predicted loss least; ties by index."""
    return [index for index, _ in _greedy(diagonal, omega)]


def marginals(diagonal: Tensor, omega: Tensor) -> list[float]:
    """What each step of :func:`augmented_order` adds to the predicted loss."""
    return [value for _, value in _greedy(diagonal, omega)]


def _greedy(diagonal: Tensor, omega: Tensor) -> list[tuple[int, float]]:
    cost, taken = diagonal.double().clone(), []
    for _ in range(len(cost)):
        k = int(cost.argmin())
        taken.append((k, float(cost[k])))
        cost += omega[:, k]
        cost[[index for index, _ in taken]] = math.inf
    return taken


def row_sum_order(scores: Tensor, omega: Tensor) -> list[int]:
    """Static and cheaper, and worse: by ``1/2 h_k + 1/2 sum_j Omega_kj``."""
    return (scores / 2 + omega.sum(1) / 2).argsort(stable=True).tolist()


def predicted_increase(chosen: Iterable[int], diagonal: Tensor, omega: Tensor) -> float:
    """``sum S_ii + sum_{i<j} Omega_ij`` over a set."""
    rows = list(chosen)
    return float(diagonal[rows].sum() + omega[rows][:, rows].triu(1).sum()) if rows else 0.0


# ---- the search ------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """The longest prefix that is good enough, and the evaluations: ``(prefix, good)``."""

    prefix: int
    trace: list[tuple[int, bool]]


def bisect(count: int, good: Callable[[int], bool]) -> Found:
    """Largest k with ``good(k)``, assuming that it is good below and bad above; at most ceil(log2(count + 1)) calls."""
    low, high, trace = 0, count, []
    while low < high:
        middle = (low + high + 1) // 2
        trace.append((middle, good(middle)))
        low, high = (middle, high) if trace[-1][1] else (low, middle - 1)
    return Found(low, trace)


def greedy_units(order: Sequence[int], good: Callable[[list[int]], bool]) -> tuple[list[int], int]:
    """Try each unit of the order, keep it if good: (what was kept, evaluations). O(N), and no prefix."""
    kept: list[int] = []
    for unit in order:
        if good([*kept, unit]):
            kept.append(unit)
    return kept, len(order)


@dataclass
class Search:
    """A finished search.

    ``bits``: unit to bits; ``log``: one dict per evaluation (bits, prefix, metric, good, seconds); ``orders``: per
    width; ``baseline``: the float network's metric.
    """

    bits: list[int]
    log: list[dict[str, float]]
    orders: dict[int, list[int]]
    baseline: float
    target: float


def search(
    count: int,
    widths: Sequence[int],
    order_for: Callable[[int, list[int]], list[int]],
    metric_of: Callable[[list[int] | None], float],
    target_ratio: float,
    mode: str = "max",
    method: str = "bisection",
    verify: bool = True,
) -> Search:
    """Bits per unit: from :data:`BASELINE` down, the longest good prefix of each width's order.

    Args:
        count: N units.
        widths: candidates, descending, e.g. (8, 4).
        order_for: ``(bits, candidates) -> candidates in the order in which they go to these bits``.
        metric_of: bits per unit -> metric of the network; ``None``: of the float network.
        target_ratio: r in (0, 1]: the target is ``r metric_float``, with ``mode="min"`` ``metric_float / r``.
        mode: whether more (``"max"``) or less is better.
        method: ``"bisection"`` or ``"greedy"``.
        verify: measure the configuration of each width once more, and step back until it is good.

    Raises:
        ConfigurationError: the metric is negative or no number, or 16 bits miss the target.
    """
    bits, log, orders = [BASELINE] * count, [], {}
    baseline = _measured(metric_of, None)
    target = target_ratio * baseline if mode == "max" else baseline / target_ratio

    def trial(width: int, units: Sequence[int]) -> bool:
        chosen, began = set(units), time.perf_counter()
        value = _measured(metric_of, [width if i in chosen else b for i, b in enumerate(bits)])
        good = value >= target if mode == "max" else value <= target
        log.append({"bits": width, "prefix": len(chosen), "metric": value, "good": good})
        log[-1]["seconds"] = time.perf_counter() - began
        return good

    if not trial(BASELINE, range(count)):
        reached = f"{BASELINE} bits reach {log[-1]['metric']:g}, not {target:g}"
        raise ConfigurationError(f"target_ratio={target_ratio} is out of reach: {reached}.")
    for width, previous in zip(widths, [BASELINE, *widths]):
        order = orders[width] = order_for(width, [i for i, b in enumerate(bits) if b == previous])
        if method == "greedy":
            chosen, _ = greedy_units(order, lambda units, w=width: trial(w, units))
        else:
            chosen = list(order[: bisect(len(order), lambda k, w=width, o=order: trial(w, o[:k])).prefix])
        while verify and chosen and not trial(width, chosen):
            chosen.pop()
        bits = [width if i in set(chosen) else b for i, b in enumerate(bits)]
    return Search(bits, log, orders, baseline, target)


def _measured(metric_of: Callable[[list[int] | None], float], bits: list[int] | None) -> float:
    value = float(metric_of(bits))
    check(math.isfinite(value) and value >= 0, "metric", value, "a number >= 0, of which a share can be asked")
    return value


# ---- applying it -----------------------------------------------------------------------------------------------------


def quantise(weight: Tensor, bits: int, granularity: str = "row") -> QuantizedWeight:
    """One unit at its width: symmetric codes, or half precision at :data:`BASELINE`; it decodes in the weight's dtype.

    Half precision is float16; bfloat16 where the weight is, or beyond float16's range.
    """
    if bits == BASELINE:
        wide = weight.dtype == torch.bfloat16 or bool(weight.abs().amax() > torch.finfo(torch.float16).max)
        record = half_precision(weight, torch.bfloat16 if wide else torch.float16)
    else:
        record = symmetric(weight, bits, granularity)
    return replace(record, scale=record.scale.to(weight.dtype))


def apply_bit_map(
    network: nn.Module,
    bit_map: Mapping[str, int],
    granularity: str = "row",
    inputs: Mapping[str, QuantizedInput] | None = None,
) -> nn.Module:
    """A report's ``bit_map`` on a float network with weights of these names, in place; no search. ``inputs``: ranges of
    its layers' inputs, where these were units too (the callback's ``inputs``, or ``core.quantized.quantized_inputs``).

    Raises:
        ConfigurationError: a name that is no weight of the network (a report's are a LightningModule's).

    Example::

        told = json.loads(Path("report.json").read_text())["methods"]["hessian-mixed-precision"]
        apply_bit_map(module, told["bit_map"])
    """
    known = dict(network.named_parameters())
    unknown = sorted(set(bit_map) - set(known))
    check(not unknown, "bit_map", unknown, "names of the network's weights")
    records = {name: quantise(known[name].detach(), bits, granularity) for name, bits in bit_map.items()}
    quantize_(network, records, dict(inputs or {}))
    return network

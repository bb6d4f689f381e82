"""Ranges for quantised inputs: what enters each layer over a few batches, and which range rounds it best.

No activation is kept: a first pass over the batches finds the extremes of each layer's input, a second one counts how
often its values occur (:func:`input_histograms`). From these counts comes every range that a method wants.

Example::

    seen = input_histograms({"0": model[0]}, lambda: [model(batch) for batch in batches])
    record, error = seen["0"].uniform(bits=8, clip="mse")     # a QuantizedInput, and mean (x - x_q)^2
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effdl.core.capture import first_tensor
from effdl.core.distributed import all_gather_rows, all_reduce_sum
from effdl.core.errors import ConfigurationError, check, check_choice, check_number
from effdl.core.input_quantizers import SMALLEST_SCALE, QuantizedInput, takes_input

BINS = 2**16  # of a histogram: 256 in each step of the widest 8-bit range
CANDIDATES = 100  # thresholds of a search, evenly spaced up to the largest value


# ---- one range of one tensor -------------------------------------------------------------------------------------


class Found(NamedTuple):
    """A range. ``delta`` (step), ``theta`` (threshold) and ``error`` (mean |x - x_q|^p): [] or [channels];
    ``zero_point`` the code of 0, ``side`` which values the grid holds."""

    delta: Tensor
    zero_point: int
    theta: Tensor
    error: Tensor
    side: str


def side_of(low: float, high: float) -> str:
    """``"positive"``, ``"negative"`` or ``"signed"``: what a tensor between these extremes needs levels for."""
    return "positive" if low >= 0 else "negative" if high <= 0 else "signed"


def grid(theta: Tensor, side: str, bits: int) -> tuple[Tensor, int]:
    """Step and zero point of 2^b levels over [-theta, theta], [0, theta] or [-theta, 0]."""
    levels = 2**bits - 1
    zero = {"signed": 2 ** (bits - 1), "positive": 0, "negative": levels}[side]
    return (theta * ((2 if side == "signed" else 1) / levels)).clamp(min=SMALLEST_SCALE), zero


def rounded(x: Tensor, delta: Tensor | float, zero_point: int, bits: int) -> Tensor:
    """``x_q = (clamp(round(x / delta) + z, 0, 2^b - 1) - z) delta``; ties to even."""
    return (x / delta).round_().clamp_(-zero_point, 2**bits - 1 - zero_point).mul_(delta)


def candidate_errors(
    rows: Tensor,
    largest: Tensor,
    side: str,
    bits: int,
    p: float,
    candidates: int,
    counts: Tensor | None = None,
    among: set[int] | None = None,
) -> Tensor:
    """Sums of |x - x_q|^p over each row, for theta = largest i / candidates, i = 1 .. candidates.

    Args:
        rows: [C, n], float32 or float64.
        largest: max |x| of each row, [C]; of more batches than this one, where there are more.
        counts: how often each column counts, float64 [n]; default once.
        among: the i that are asked for; infinity is said of others. Default all.

    Returns:
        float64 [candidates, C].
    """
    errors = []
    for i in range(1, candidates + 1):
        if among is not None and i not in among:
            errors.append(torch.full_like(largest, float("inf"), dtype=torch.float64))
            continue
        delta, zero = grid(largest * (i / candidates), side, bits)
        difference = rounded(rows, delta[:, None], zero, bits).sub_(rows).abs_().pow_(p)
        summed = difference.sum(1, dtype=torch.float64) if counts is None else difference.double() @ counts
        errors.append(summed)
    return torch.stack(errors)


def best_candidate(errors: Tensor, largest: Tensor, side: str, bits: int, count: int) -> Found:
    """The smallest of ``errors`` [candidates, C], the first of equal ones; ``count`` entries were summed in each."""
    best = errors.min(0).values
    index = (errors == best).to(torch.int8).argmax(0)
    theta = largest * ((index + 1) / len(errors)).to(largest.dtype)
    delta, zero = grid(theta, side, bits)
    return Found(delta, zero, theta, best / max(count, 1), side)


# ---- what enters a layer -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InputHistogram:
    """How often the values of one layer's input occurred, over all batches and processes.

    Args:
        low, high: the smallest and the largest of them.
        counts: float64 [:data:`BINS`], of equal bins from ``low`` to ``high``.
    """

    low: float
    high: float
    counts: Tensor

    def values(self) -> tuple[Tensor, Tensor]:
        """The middles of the bins that hold something and how many entries each holds, float64 [K] both."""
        filled = torch.nonzero(self.counts)[:, 0].double()
        return self.low + (filled + 0.5) * ((self.high - self.low) / BINS), self.counts[filled.long()]

    def mean_square(self) -> float:
        """E x^2."""
        values, counts = self.values()
        return float((values.square() * counts).sum() / counts.sum())

    def largest(self, percentile: float = 100.0) -> float:
        """max |x|, or the magnitude that so many per cent of the entries do not exceed; positive."""
        most = max(-self.low, self.high)
        if percentile < 100:
            values, counts = self.values()
            size, order = values.abs().sort()
            reached = counts[order].cumsum(0) >= percentile / 100 * counts.sum()
            most = min(most, float(size[reached.to(torch.int8).argmax()]))
        return max(most, SMALLEST_SCALE)

    def uniform(self, bits: int, clip: str = "max") -> tuple[QuantizedInput, float]:
        """A symmetric range ([0, theta] where no value is negative), and mean (x - x_q)^2 in it.

        Args:
            bits: b, 2 to 8.
            clip: ``"max"``: theta = max |x|; ``"mse"``: the one of :data:`CANDIDATES` with the smallest error.
        """
        check_choice("clip", clip, ("max", "mse"))
        values, counts = self.values()
        shares = [1.0] if clip == "max" else [i / CANDIDATES for i in range(1, CANDIDATES + 1)]
        records = [QuantizedInput.of_power(share * self.largest(), 1.0, bits, self.low < 0) for share in shares]
        errors = []
        for record in records:
            difference = rounded(values, float(record.scale), int(record.zero_point), bits).sub_(values)
            errors.append(difference.square_() @ counts)
        least = torch.stack(errors).min(0)
        return records[int(least.indices)].to(values.device), float(least.values / counts.sum())


def layers_reading(network: nn.Module, parameters: Iterable[nn.Parameter]) -> dict[str, nn.Module]:
    """The linear layers and convolutions that multiply their input by one of these weights; all of a tied one."""
    known = {id(parameter) for parameter in parameters}
    layers = {name: module for name, module in network.named_modules() if takes_input(module)}
    return {name: module for name, module in layers.items() if id(module._parameters.get("weight")) in known}


def check_percentile(argument: str, value: float) -> None:
    """Raise unless it is a share of the entries, in per cent, that leaves most of them alone."""
    check_number(argument, value, 50, 100, closed="(]")


@torch.no_grad()
def input_histograms(layers: Mapping[str, nn.Module], run: Callable[[], Any]) -> dict[str, InputHistogram]:
    """What enters each layer.

    Args:
        layers: by name; of a call the first tensor counts.
        run: shows the network all batches; called twice. Under distributed training each process has its own.

    Raises:
        ConfigurationError: a layer that is never called, or whose input has NaN or infinite entries; by name.
    """
    ends: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}

    def extremes(name: str, x: Tensor) -> None:
        if not x.numel():  # an expert without tokens
            return
        now = torch.stack(torch.aminmax(x.float())).double() * ends[name].new_tensor([-1, 1])
        ends[name] = torch.maximum(ends[name].to(x.device), now)  # NaN stays

    def tally(name: str, x: Tensor) -> None:
        for part in x.float().flatten().split(2**24):  # it counts in float32
            counts[name] = counts[name].to(x.device) + torch.histc(part, BINS, *bounds[name]).double()

    for name, layer in layers.items():
        device = next((tensor.device for tensor in layer.parameters()), torch.device("cpu"))
        ends[name] = torch.full((2,), -float("inf"), dtype=torch.float64, device=device)
        counts[name] = torch.zeros(BINS, dtype=torch.float64, device=device)
    _show(layers, run, extremes)
    bounds = {name: _bounds(name, all_gather_rows(pair[None]).amax(0).tolist()) for name, pair in ends.items()}
    _show(layers, run, tally)
    all_reduce_sum(*counts.values())
    return {name: InputHistogram(*bounds[name], counts[name]) for name in layers}


def _bounds(name: str, ends: list[float]) -> tuple[float, float]:
    if ends[1] == -float("inf"):
        raise ConfigurationError(
            f"exclude: the network never calls {name} (attention of torch.nn reads its weights directly): there is no "
            "input to quantise. Exclude it, or use layers that are called."
        )
    finite = all(abs(end) < float("inf") for end in ends)  # of NaN too
    check(finite, f"the input of {name}", ends, "finite", "It has NaN or infinite entries.")
    return -ends[0], max(ends[1], -ends[0] + 1e-30)  # of constants


def _show(layers: Mapping[str, nn.Module], run: Callable[[], Any], see: Callable[[str, Tensor], None]) -> None:
    """``see(name, x)`` for each input of each layer during ``run()``."""

    def hook(name: str) -> Callable[..., None]:
        return lambda _layer, args, kwargs: see(name, first_tensor((args, kwargs)).detach())

    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(hook(name), with_kwargs=True).remove)
        run()

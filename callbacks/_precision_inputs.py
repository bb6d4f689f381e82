"""The activations of the units of mixed precision: their ranges, and what rounding them does to the order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effdl.compression._precision_inputs import UnitLayer
from effdl.compression.hessian_mixed_precision import BASELINE
from effdl.core.input_quantizers import QuantizedInput
from effdl.core.input_ranges import input_histograms, layers_reading


class UnitInputs:
    """What enters the layers of the units, in ranges that the float network's activations fixed.

    Args:
        network: whose layers, in float.
        parameters: the weight of each unit.
        prefix: of the network's names in the LightningModule.
        clip: of the ranges, ``"max"`` or ``"mse"``.
        run: shows the network the calibration batches.
    """

    def __init__(
        self, network: nn.Module, parameters: Sequence[Tensor], prefix: str, clip: str, run: Callable[[], Any]
    ) -> None:
        read = [layers_reading(network, [weight]) for weight in parameters]
        found = [(unit, name, layer) for unit, layers in enumerate(read) for name, layer in layers.items()]
        self.places = [UnitLayer(unit, layer) for unit, _, layer in found]
        self.names = [f"{prefix}{name}" for _, name, _ in found]
        self.clip, self.units = clip, len(parameters)
        self.seen = list(input_histograms(dict(zip(self.names, (layer for *_, layer in found))), run).values())
        self.kept: dict[int, list[tuple[QuantizedInput, float]]] = {}

    def ranges(self, width: int) -> list[tuple[QuantizedInput, float]]:
        """Of each layer, with the mean squared error of its inputs."""
        if width not in self.kept:
            self.kept[width] = [seen.uniform(width, self.clip) for seen in self.seen]
        return self.kept[width]

    def at(self, bits: Sequence[int | None]) -> list[QuantizedInput | None]:
        """A record for each layer; ``None`` where its unit keeps 16 bits or floats."""
        widths = [bits[place.unit] for place in self.places]
        float_like = (None, BASELINE)
        return [None if b in float_like else self.ranges(b)[k][0] for k, b in enumerate(widths)]

    def taken(self, bits: Sequence[int | None]) -> dict[nn.Module, QuantizedInput]:
        """For ``core.input_quantizers.taking``."""
        return {place.layer: record for place, record in zip(self.places, self.at(bits)) if record is not None}

    def records(self, bits: Sequence[int]) -> dict[str, QuantizedInput]:
        """By layer name."""
        return {name: record for name, record in zip(self.names, self.at(bits)) if record is not None}

    def scores(self, width: int, traces: Tensor) -> Tensor:
        """``max(tr(H_ee), 0) E (x - x_q)^2`` of each unit, for traces [layers]; float64 [N]."""
        return self._summed(t.clamp(min=0) * error for t, (_, error) in zip(traces, self.ranges(width)))

    def relative(self, width: int) -> Tensor:
        """``E (x - x_q)^2 / E x^2`` of each unit, float64 [N]."""
        ranges = zip(self.ranges(width), self.seen)
        return self._summed(torch.tensor(error / max(seen.mean_square(), 1e-30)) for (_, error), seen in ranges)

    def _summed(self, each: Any) -> Tensor:
        total = torch.zeros(self.units, dtype=torch.float64)
        for place, value in zip(self.places, each):
            total[place.unit] += value.double()
        return total

    def rows(self, bits: Sequence[int]) -> dict[str, dict[str, float]]:
        """For the report."""
        told = {}
        for k, (name, record) in enumerate(zip(self.names, self.at(bits))):
            if record is not None:
                error = self.ranges(record.bits)[k][1] / max(self.seen[k].mean_square(), 1e-30)
                ends = {"low": float(record.low), "high": float(record.high)}
                told[name] = {"bits": record.bits, **ends, "error": error**0.5}
        return told

    def widths(self, bits: Sequence[int]) -> list[int]:
        """Bits of the activations that enter each unit: 16 where none are quantised."""
        quantised = {place.unit for place in self.places}
        return [b if i in quantised else BASELINE for i, b in enumerate(bits)]

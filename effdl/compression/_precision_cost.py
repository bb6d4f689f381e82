"""hessian-mixed-precision: what a choice of bits is modelled to cost. A model of a machine, and no measurement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: Cost of a multiply-add with a weight of so many bits, in that of a 16-bit one: where kernels of all widths exist ...
COMPUTE = {16: 1.0, 8: 0.5, 4: 0.25}
#: ... and on CPUs: there is none for 4-bit convolutions, whose codes, exact in 8 bits, run as these.
CPU_COMPUTE = {16: 1.0, 8: 0.5}


@dataclass(frozen=True)
class LatencyModel:
    """A modelled time of one example, in units of a 16-bit multiply-add: no measurement, and not to be called one.

    Per unit ``max(macs * compute[bits], bytes / bandwidth)`` (a roofline).

    Args:
        macs: multiply-adds of each unit.
        weights: entries of each unit.
        compute: bits to the cost of a multiply-add, :data:`COMPUTE`; bits without an entry run as the next larger one.
        bandwidth: bytes in the time of one 16-bit multiply-add.
        table: ``{(unit, bits): cost}`` measured by the user; wins.
    """

    macs: Sequence[float]
    weights: Sequence[int]
    compute: Mapping[int, float] | None = None
    bandwidth: float = math.inf
    table: Mapping[tuple[int, int], float] | None = None

    def unit(self, index: int, bits: int) -> float:
        """The cost of one unit."""
        if self.table is not None and (index, bits) in self.table:
            return self.table[index, bits]
        costs = self.compute or COMPUTE
        runs = costs[min(width for width in costs if width >= bits)]
        return max(self.macs[index] * runs, self.weights[index] * bits / 8 / self.bandwidth)

    def __call__(self, bits: Sequence[int]) -> float:
        return sum(self.unit(index, b) for index, b in enumerate(bits))


def bit_operations(macs: Sequence[float], bits: Sequence[int], activation_bits: int | Sequence[int] = 16) -> float:
    """BOPs: multiply-adds times bits of the weight times bits of the activation."""
    inputs = [activation_bits] * len(bits) if isinstance(activation_bits, int) else activation_bits
    return sum(m * b * a for m, b, a in zip(macs, bits, inputs))

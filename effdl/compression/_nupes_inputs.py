"""nupes: what enters a layer, in power codes too (the W/A mode).

The operator is the weights', in the range [-M, M], or with all codes on one side where no input is negative::

    q = round(n sign(x) (|x| / M)^a),   n = 2^(b-1) - 1 and |q| <= n,   or n = 2^b - 1 and 0 <= q <= n

M is fixed by calibration: the largest |x|, or a percentile of it, above which inputs are clipped. The exponent
minimises the squared error over the histogram of the inputs, or is the weights', so that products of codes decode at
once.

Example::

    seen = input_histograms(layers, lambda: [network(batch) for batch in batches])     # core.input_ranges
    records = {name: power_input(histogram, bits=8) for name, histogram in seen.items()}
    quantize_(network, power_records(weights, bits=4), records)
"""

from __future__ import annotations

from effdl.compression.nupes import PowerErrors, minimum
from effdl.core.input_quantizers import QuantizedInput
from effdl.core.input_ranges import InputHistogram, check_percentile


def top_input_code(seen: InputHistogram, bits: int) -> int:
    """n: 2^b - 1 where no input is negative, else 2^(b-1) - 1."""
    return 2**bits - 1 if seen.low >= 0 else 2 ** (bits - 1) - 1


def power_input(
    seen: InputHistogram, bits: int = 8, exponent: float | None = None, percentile: float = 100.0
) -> QuantizedInput:
    """The record of one layer's input.

    Args:
        seen: what entered the layer over the calibration batches.
        bits: b, 2 to 8.
        exponent: a > 0; ``None``: the one of least squared error, never worse than 1. With 1 the record is uniform.
        percentile: of the magnitudes, in (50, 100]: M. 100 is the largest.

    Raises:
        ConfigurationError: bits or percentile out of range.
    """
    check_percentile("percentile", percentile)
    largest = seen.largest(percentile)
    if exponent is None:
        exponent = minimum(_errors(seen, bits, largest))
    return QuantizedInput.of_power(largest, exponent, bits, seen.low < 0).to(seen.counts.device)


def input_error(seen: InputHistogram, record: QuantizedInput) -> float:
    """sqrt(E (x - x_q)^2 / E x^2) of inputs like those of the calibration."""
    values, counts = seen.values()
    squared = (record.apply(values.float(), -1).double() - values).square()
    return float((squared * counts).sum() / counts.sum() / max(seen.mean_square(), 1e-30)) ** 0.5


def _errors(seen: InputHistogram, bits: int, largest: float) -> PowerErrors:
    values, counts = seen.values()
    return PowerErrors.of_values(values.abs(), counts, largest, top_input_code(seen, bits))


def uniform_input(seen: InputHistogram, record: QuantizedInput) -> QuantizedInput:
    """The uniform codes of the same range: what a record is compared with."""
    largest = float(record.high) if record.exponent is None else float(record.scale)
    return QuantizedInput.of_power(largest, 1.0, record.bits, seen.low < 0).to(record.scale.device)

"""nupes on a Trainer: when a trained network's weights, and inputs, become power codes, and what is told of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from effdl.callbacks._calibrated_quantizer import CalibratedQuantizer
from effdl.callbacks._quantized_network import network_prefix
from effdl.callbacks._quantized_report import plain_copy
from effdl.compression._nupes_inputs import input_error, power_input, uniform_input
from effdl.compression._nupes_learning import Learning
from effdl.compression._nupes_network import learn_network
from effdl.compression.nupes import check_layout, power_codes, power_quantize, power_records, top_code
from effdl.core.blockwise import call_model
from effdl.core.contract import ContractExample
from effdl.core.errors import check, check_integer, check_number
from effdl.core.export import product
from effdl.core.input_quantizers import QuantizedInput
from effdl.core.input_ranges import check_percentile, input_histograms, layers_reading
from effdl.core.paper import Paper
from effdl.core.quantized import quantize_, quantized_weights
from effdl.core.quantizers import QuantizedWeight
from effdl.core.select import Targets, check_targets, select_weights


class NUPESCallback(CalibratedQuantizer):
    """Quantises a trained network's weights non-uniformly: codes of |W|^a, with the exponent a searched for (NUPES).

    At the end of training, or without a fit under ``trainer.validate(model, loader)``, each selected weight becomes
    ``bits``-bit codes, one scale per group and one exponent; no float weight remains. Without learning and without
    activations no data is looked at; it takes a fraction of a second per million weights. ``learn_codes`` and
    ``learn_exponent`` fit each layer's outputs on the calibration batches: seconds per layer, and what 2 bits need
    (there the exponent alone gains nothing).

    It attaches to any network with Linear, convolution, Embedding, recurrent or HF ``Conv1D`` layers; learned are the
    codes of linear layers and convolutions. With ``bits=(4, 8)`` these quantise their inputs too, in ranges that the
    float network's activations tell; the finished network and its artifact do so from then on. Biases and
    normalisations stay as they are; BatchNorm runs with its statistics.

    The artifact is smaller, and *not faster by itself*: no kernel multiplies power codes. It is decoded by table
    (``core.deploy``: ``"lut"`` on every call, ``"dense"`` once, which takes inputs as they come); layers whose
    exponents are 1 fit the int8 kernels, weights after ``compression.nupes.as_int8``. At 4 bits compare with NF4
    (bitsandbytes) and GPTQ/AWQ, which have kernels; what is promised here is a smaller L2 error of weights and inputs
    than uniform codes have, not a higher accuracy.

    Args:
        bits: b of the weights, 2 to 8; or of weights and activations, such as ``(4, 8)``.
        exponent: ``"layer"``: searched for each layer, and for each input; ``"network"``: one for all (PowerQuant), and
            for the inputs; or a number in (0, 1.5], such as 0.5, whose products decode in integers
            (``compression.nupes.integer_dot``), or 1: uniform.
        granularity: which weights share a scale: ``"row"`` (output channel, the first dimension), ``"tensor"``,
            ``"group:K"`` (K consecutive inputs).
        learn_codes: fit the codes to the layers' outputs, each over its whole range.
        learn_exponent: fit the exponents too; alone, codes stay the rounded ones.
        iterations: Adam steps per layer when something is learned.
        first_last_bits: bits of the first and the last selected layer (and of their inputs) where they differ (8 is
            usual at 2 or 3 bits).
        activation_percentile: of the inputs' magnitudes, in (50, 100]: where their range ends. 100 is the largest.
        calibration_batches: batches of the training data to learn from, and to find ranges; 256 to 1,024 examples are
            usual.
        targets, exclude: layers by name glob or type; default all with a weight matrix.

    Raises:
        ConfigurationError: an argument out of range; nothing matched; NaN or infinite weights or activations, by name;
            with activations a layer that the network never calls. The network is as it was then.

    Logs nothing; :meth:`report` holds exponents, errors, ranges and the reopened artifact's accuracy.

    Example::

        from effdl.callbacks import NUPESCallback

        nupes = NUPESCallback(bits=2, learn_codes=True)
        Trainer(callbacks=[nupes]).fit(module, data)
        print(nupes.report()["bits_per_weight"])
    """

    paper = Paper(
        slug="nupes",
        title="NUPES: Non-Uniform Post-Training Quantization via Power Exponent Search",
        authors=("Yvinec, Edouard", "Dapogny, Arnaud", "Bailly, Kevin"),
        year=2023,
        arxiv="2308.05600",
    )

    def __init__(
        self,
        bits: int | tuple[int, int] = 4,
        exponent: float | Literal["layer", "network"] = "layer",
        granularity: str = "row",
        learn_codes: bool = False,
        learn_exponent: bool = False,
        iterations: int = 1000,
        first_last_bits: int | None = None,
        activation_percentile: float = 100.0,
        calibration_batches: int = 8,
        targets: Targets = None,
        exclude: Targets = None,
    ) -> None:
        pair = tuple(bits) if isinstance(bits, (tuple, list)) else (bits,)
        check(len(pair) in (1, 2), "bits", bits, "a number of bits, or two: of weights and of activations")
        for width in pair:
            top_code(width)
        if exponent not in ("layer", "network"):
            number = isinstance(exponent, (int, float))
            check(number, "exponent", exponent, "'layer', 'network' or a number in (0, 1.5]")
            check_number("exponent", exponent, 0, 1.5, closed="(]")
        check_layout(granularity, "granularity")
        check(isinstance(learn_codes, bool), "learn_codes", learn_codes, "True or False")
        check(isinstance(learn_exponent, bool), "learn_exponent", learn_exponent, "True or False")
        check_integer("iterations", iterations, 1)
        if first_last_bits is not None:
            check_integer("first_last_bits", first_last_bits, 2, 8)
        check_percentile("activation_percentile", activation_percentile)
        self.check_calibration("end", calibration_batches)
        check_targets("targets", targets)
        check_targets("exclude", exclude)
        self.bits, self.exponent, self.granularity = pair if len(pair) == 2 else bits, exponent, granularity
        self.activation_percentile = activation_percentile
        self._weight_bits, self._input_bits = (*pair, None)[:2]
        self.learn_codes, self.learn_exponent, self.iterations = learn_codes, learn_exponent, iterations
        self.first_last_bits, self.targets, self.exclude = first_last_bits, targets, exclude
        self._begin()

    def _begin(self) -> None:
        super()._begin()
        self.layers: dict[str, dict[str, float]] = {}
        self.inputs: dict[str, QuantizedInput] = {}
        self._input_rows: dict[str, dict[str, float]] = {}

    def _batches(self, trainer: Any, pl_module: Any, train: bool) -> list[Any]:
        if not self.learn_codes and not self.learn_exponent and self._input_bits is None:
            return []
        return super()._batches(trainer, pl_module, train)

    def _records(self, trainer: Any, pl_module: Any, batches: list[Any]) -> dict[str, QuantizedWeight]:
        weights = {name: weight.data for name, weight in self.weights.items()}
        records = power_records(weights, self._weight_bits, self.exponent, self.granularity, self.first_last_bits)
        batches = [trainer.precision_plugin.convert_input(batch) for batch in batches]
        network, taken = product(pl_module), {}

        def forward(_network: nn.Module, batch: Any) -> Any:
            with trainer.precision_plugin.forward_context():
                return call_model(network, batch)

        if self._input_bits is not None:
            taken = self._find_ranges(pl_module, records, lambda: [forward(network, batch) for batch in batches])
        if self.learn_codes or self.learn_exponent:
            how = Learning(self.learn_codes, self.learn_exponent, self.iterations)
            records = learn_network(pl_module, records, batches, how, forward, taken)
        for name, record in records.items():
            self._tell(name, record)
        return {name: replace(r, scale=r.scale.to(weights[name].dtype)) for name, r in records.items()}

    def _find_ranges(
        self, pl_module: Any, records: dict[str, QuantizedWeight], run: Callable[[], Any]
    ) -> dict[nn.Module, QuantizedInput]:
        """``self.inputs``, from what the float network's layers are given; by layer."""
        network, prefix = product(pl_module), network_prefix(pl_module)
        weights = [weight.parameter for weight in self.weights.values()]
        layers = {f"{prefix}{name}": layer for name, layer in layers_reading(network, weights).items()}
        of = {id(weight): name for weight, name in zip(weights, self.weights)}
        edges = (next(iter(records)), next(reversed(records))) if self.first_last_bits is not None else ()
        for name, seen in input_histograms(layers, run).items():
            weight = of[id(layers[name].weight)]
            bits = self.first_last_bits if weight in edges else self._input_bits
            exponent = None if self.exponent == "layer" else exponent_of(records[weight])
            record = power_input(seen, bits, exponent, self.activation_percentile)
            self.inputs[name] = record
            self._input_rows[name] = {
                "bits": bits,
                "exponent": 1.0 if record.exponent is None else float(record.exponent),
                "low": float(record.low),
                "high": float(record.high),
                "error": input_error(seen, record),
                "uniform_error": input_error(seen, uniform_input(seen, record)),
            }
        return {layers[name]: record for name, record in self.inputs.items()}

    def _inputs(self) -> dict[str, QuantizedInput]:
        return self.inputs

    def _tell(self, name: str, record: QuantizedWeight) -> None:
        weight = self.weights[name].data.float()
        norm = weight.norm().clamp(min=1e-30)
        uniform = power_quantize(weight, record.bits, 1.0, self.granularity).dequantize()
        a = exponent_of(record)
        row = {
            "exponent": a,
            "error": float((weight - record.dequantize()).norm() / norm),
            "uniform_error": float((weight - uniform).norm() / norm),
        }
        if self.learn_codes:
            rounded = power_codes(weight, record.bits, a, self.granularity)
            row["moved"] = float((rounded != record.codes).float().mean())
        self.layers[name] = row

    def report(self) -> dict[str, Any]:
        """As every quantiser's; per layer the exponent, the relative L2 error and the uniform quantiser's; ``inputs``:
        the same of each input, by layer, with its range.

        Raises:
            ConfigurationError: nothing was quantised yet.
        """
        told = super().report()
        # of a LightningModule's names the network's part
        for name, row in self.layers.items():
            key = next((k for k in told["layers"] if name == k or name.endswith(f".{k}")), name)
            told["layers"].setdefault(key, {}).update(row)
        return {**told, "inputs": self._input_rows} if self._input_rows else told

    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite."""
        return ContractExample(
            kwargs={"bits": 6, "learn_codes": False},
            finished=_finished,
            bad={
                "bits": [1, 9, 2.5, True, (4,) * 3, (4, 1), ()],
                "exponent": [0, -0.5, 1.6, float("nan"), "channel"],
                "granularity": ["column", "group:0", "bucket:8", 3],
                "learn_codes": "yes",
                "learn_exponent": 1,
                "iterations": [0, 1.5],
                "first_last_bits": [1, 9],
                "activation_percentile": [50, 100.1, "max", float("nan")],
                "calibration_batches": [0, 2.5],
                "targets": ["no.such.layer", 3],
                "exclude": "no.such.layer",
            },
            second={"bits": 3},
        )


def exponent_of(record: QuantizedWeight) -> float:
    """a; 1 of a uniform record."""
    return 1.0 if record.exponent is None else float(record.exponent)


def _finished(pl_module: Any) -> nn.Module:
    """The network with its codes; made once more where the module is as a checkpoint has it."""
    network = product(pl_module)
    if not quantized_weights(network):
        network = plain_copy(network)
        quantize_(network, power_records({w.name: w.data for w in select_weights(network)}, bits=6))
    return network

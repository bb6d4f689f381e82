"""hessian-mixed-precision on a Trainer: real bit-widths per layer, as few as an accuracy target allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from effdl.callbacks._calibrated_quantizer import CalibratedQuantizer
from effdl.callbacks._precision_units import Units
from effdl.callbacks._quantized_report import plain_copy
from effdl.compression._precision_cost import CPU_COMPUTE, LatencyModel, bit_operations
from effdl.compression.hessian_mixed_precision import BASELINE, ORDERS, Search, apply_bit_map
from effdl.compression.nupes import check_layout
from effdl.core.contract import ContractExample
from effdl.core.errors import check, check_choice, check_integer, check_number
from effdl.core.export import product
from effdl.core.input_quantizers import QuantizedInput
from effdl.core.paper import Paper
from effdl.core.quantized import quantized_weights
from effdl.core.quantizers import QuantizedWeight
from effdl.core.random import preserved_rng
from effdl.core.select import Targets, check_targets, select_weights

Metric = Callable[[nn.Module, list[Any]], float]


class MixedPrecisionPTQCallback(CalibratedQuantizer):
    """Gives each layer of a trained network 16, 8 or 4 bits, so that a metric stays within a share of the float one's.

    Layers are ordered by how a loss reacts to their quantisation, and by how their errors add up or cancel; bisection
    finds, for 8 bits and then for 4, how many may go, in about log2(N) evaluations each. At the end of training, or
    alone under ``trainer.validate(model, loader)``. The order knows no accuracy; the search measures it.

    A unit is a layer's weight; with ``activations=True`` also what enters the layer, at the same bits, in one range
    that the float network fixed: search, finished network and artifact then compute with both, and
    ``core.deploy.deploy(network, "torch-int8")`` runs 8-bit layers (and narrower ones, whose codes fit) on integers. At
    16 bits activations stay as they are.

    Cost: ``probes`` Hessian-vector products and, with all pairs, N (N + 1) / 2 losses over the calibration batches for
    each width; ``pairs="hvp"`` takes N products instead. A copy of the network in float32 is searched. It fails where
    the loss is flat: at 100 % training accuracy use ``loss="kl"``. Operations marked ``once_differentiable`` hide their
    part of the Hessian silently: take ``diagonal="measured"`` with ``pairs="all"`` there. BatchNorm is not folded.

    Args:
        bits: candidates, descending, each 2 to 8.
        target_ratio: r in (0, 1]: the metric must reach r times the float network's (``mode="min"``: its 1/r).
        metric: ``(network, validation batches) -> number``; ``None``: the share of right classes.
        mode: ``"max"``, or ``"min"`` for a metric like perplexity.
        order: ``"augmented"``, or what it is compared with: ``"row_sum"``, ``"hessian"``, ``"qe"`` (the relative error
            of the weights), ``"random"``.
        pairs: ``"all"``, ``"hvp"``, ``"neighbours"`` (at most two apart), or ``"auto"``: all up to 40 layers, else hvp.
        diagonal: ``"hessian"`` or ``"measured"``.
        loss: ``"task"`` (cross-entropy of the labels) or ``"kl"`` (to the float network's outputs; no labels needed).
        method: ``"bisection"`` or ``"greedy"`` (tries every layer: N evaluations a width).
        verify: measure what was found once more, and step back until it reaches the target.
        activations: whether a unit is its activations too; linear layers and convolutions have some.
        activation_range: ``"mse"``: of least squared error over the calibration batches, for each width; ``"max"``: up
            to the largest magnitude. Symmetric, or from 0 where no activation is negative.
        granularity: which weights share a scale: ``"row"``, ``"tensor"``, ``"group:K"`` (K = 32 ... for 4-bit kernels).
        probes: Rademacher vectors of Hutchinson's traces.
        calibration_batches: batches of the training data for the losses.
        validation_batches: batches of the validation data for the metric, held in memory; ``None``: all.
        seed: of the probes and the random order.
        targets, exclude: layers by name glob or type; default all with a weight matrix.

    Raises:
        ConfigurationError: an argument outside its range; fewer than two layers; labels missing; a metric that is
            negative or no number; a target that 16 bits miss; no second derivatives; activations that are not finite,
            or of a layer that the network never calls. The network is as it was then.

    Logs nothing; :meth:`report` holds bits, ranges, traces with standard errors, interactions, orders and every
    evaluation.

    Example::

        from effdl.callbacks import MixedPrecisionPTQCallback

        mixed = MixedPrecisionPTQCallback(target_ratio=0.99)
        Trainer(callbacks=[mixed]).validate(module, data)
        print(mixed.bit_map)                                   # {"model.conv1.weight": 8, ...}
    """

    paper = Paper(
        slug="hessian-mixed-precision",
        title="Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision Post-Training Quantization",
        authors=("Schaefer, Clemens JS", "Lambert-Shirzad, Navid", "Zhang, Xiaofan", "Chou, Chiachen", "Jablin, Tom",
                 "Li, Jian", "Guo, Elfie", "Stanton, Caitlin", "Joshi, Siddharth", "Wang, Yu Emma"),
        year=2023,
        arxiv="2306.04879",
    )  # fmt: skip

    def __init__(
        self,
        bits: tuple[int, ...] = (8, 4),
        target_ratio: float = 0.99,
        metric: Metric | None = None,
        mode: Literal["max", "min"] = "max",
        order: Literal["augmented", "row_sum", "hessian", "qe", "random"] = "augmented",
        pairs: Literal["auto", "all", "neighbours", "hvp"] = "auto",
        diagonal: Literal["hessian", "measured"] = "hessian",
        loss: Literal["task", "kl"] = "task",
        method: Literal["bisection", "greedy"] = "bisection",
        verify: bool = True,
        activations: bool = False,
        activation_range: Literal["mse", "max"] = "mse",
        granularity: str = "row",
        probes: int = 64,
        calibration_batches: int = 8,
        validation_batches: int | None = None,
        seed: int = 0,
        targets: Targets = None,
        exclude: Targets = None,
    ) -> None:
        widths = tuple(bits) if isinstance(bits, (tuple, list)) else ()
        falling = bool(widths) and all(a > b for a, b in zip(widths, widths[1:]))
        valid = falling and all(isinstance(b, int) and not isinstance(b, bool) and 2 <= b <= 8 for b in widths)
        check(valid, "bits", bits, "a descending tuple of integers from 8 to 2, such as (8, 4)")
        check_number("target_ratio", target_ratio, 0, 1, closed="(]")
        check(metric is None or callable(metric), "metric", metric, "a function (network, batches) -> number, or None")
        check_choice("mode", mode, ("max", "min"))
        check(mode == "max" or metric is not None, "mode", mode, "'max' for the share of right classes")
        check_choice("order", order, ORDERS)
        check_choice("pairs", pairs, ("auto", "all", "neighbours", "hvp"))
        check_choice("diagonal", diagonal, ("hessian", "measured"))
        check_choice("loss", loss, ("task", "kl"))
        check_choice("method", method, ("bisection", "greedy"))
        check(isinstance(verify, bool), "verify", verify, "True or False")
        check(isinstance(activations, bool), "activations", activations, "True or False")
        check_choice("activation_range", activation_range, ("mse", "max"))
        check_layout(granularity, "granularity")
        check_integer("probes", probes, 1)
        if validation_batches is not None:
            check_integer("validation_batches", validation_batches, 1)
        check_integer("seed", seed, 0)
        self.check_calibration("end", calibration_batches)
        check_targets("targets", targets)
        check_targets("exclude", exclude)
        self.bits, self.target_ratio, self.metric, self.mode = widths, target_ratio, metric, mode
        self.order, self.pairs, self.diagonal, self.loss = order, pairs, diagonal, loss
        self.activations, self.activation_range = activations, activation_range
        self.method, self.verify, self.granularity, self.probes = method, verify, granularity, probes
        self.validation_batches, self.seed = validation_batches, seed
        self.targets, self.exclude = targets, exclude
        self._begin()

    def _begin(self) -> None:
        super()._begin()
        self.found: Search | None = None
        self.inputs: dict[str, QuantizedInput] = {}
        self._told: dict[str, Any] = {}

    @property
    def bit_map(self) -> dict[str, int]:
        """Weight to bits; empty before the search. ``compression.hessian_mixed_precision.apply_bit_map`` takes it."""
        return dict(zip(self.weights, self.found.bits)) if self.found else {}

    # ---- the search ------------------------------------------------------------------------------------------

    def _batches(self, trainer: Any, pl_module: Any, train: bool) -> list[Any]:
        if not train and self.order not in ("qe", "random"):
            rank_zero_warn("The order and the metric come from the same data, which flatters the metric: fit instead.")
        return super()._batches(trainer, pl_module, train)

    def _records(self, trainer: Any, pl_module: Any, batches: list[Any]) -> dict[str, QuantizedWeight]:
        check(len(self.weights) > 1, "targets", self.targets, "two layers or more to choose between")
        with preserved_rng():  # iterating the validation loader draws a seed
            units = Units(self, trainer, pl_module, batches)
            units.analyse()
            self.found = units.search()
        bits = self.found.bits
        self._told = {**units.told, "sizes": [weight.numel() for weight in units.floats], "widths": BASELINE}
        if units.inputs is not None:
            self.inputs = {n: record.to(pl_module.device) for n, record in units.inputs.records(bits).items()}
            self._told |= {"inputs": units.inputs.rows(bits), "widths": units.inputs.widths(bits)}
        return units.records(bits)

    def _inputs(self) -> dict[str, QuantizedInput]:
        return self.inputs

    def report(self) -> dict[str, Any]:
        """As every quantiser's; with the bits of each layer, the search's evaluations and the modelled cost.

        Raises:
            ConfigurationError: nothing was searched yet.
        """
        told, found, names = super().report(), self.found, list(self.weights)
        rows = {"bits": found.bits}
        if "traces" in self._told:
            rows |= {"mean_trace": self._told["traces"], "trace_error": self._told["trace_errors"]}
        for i, name in enumerate(names):
            key = next((k for k in told["layers"] if name == k or name.endswith(f".{k}")), name)
            told["layers"].setdefault(key, {}).update({column: values[i] for column, values in rows.items()})
        details = {
            "baseline": found.baseline,
            "target": found.target,
            "evaluations": found.log,
            "orders": {str(width): [names[i] for i in order] for width, order in found.orders.items()},
            "interactions": self._told["interactions"],
            **{column: dict(zip(names, values)) for column, values in rows.items() if column != "bits"},
        }
        if "input_traces" in self._told:
            details["input_traces"] = self._told["input_traces"]
        ranges = {"inputs": self._told["inputs"]} if self.activations else {}
        return {**told, **ranges, **self._costs(), "bit_map": self.bit_map, "search": details}

    def _costs(self) -> dict[str, float]:
        """Modelled, of one example, as a share of 16 bits throughout: where all kernels exist, and on a CPU."""
        bits, macs, sizes = self.found.bits, self._told["macs"], self._told["sizes"]
        half = [BASELINE] * len(bits)
        models = {"": LatencyModel(macs, sizes), "_cpu": LatencyModel(macs, sizes, CPU_COMPUTE)}
        shares = {f"modelled_cost{name}": model(bits) / model(half) for name, model in models.items()}
        return {**shares, "bit_operations": bit_operations(macs, bits, self._told["widths"])}

    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite."""
        return ContractExample(
            kwargs={"bits": (8,), "target_ratio": 0.01, "probes": 2, "calibration_batches": 2, "loss": "kl"},
            finished=_finished,
            bad={
                "bits": [(4, 8), (16, 8), (), 8, (8, 1)],
                "target_ratio": [0, 1.5, float("nan")],
                "metric": "accuracy",
                "mode": "best",
                "order": "greedy",
                "pairs": "some",
                "diagonal": "exact",
                "loss": "mse",
                "method": "grid",
                "verify": "yes",
                "activations": 8,
                "activation_range": "median",
                "granularity": ["column", "group:0"],
                "probes": [0, 1.5],
                "calibration_batches": [0, 2.5],
                "validation_batches": [0, "all"],
                "seed": [-1, 0.5],
                "targets": ["no.such.layer", 3],
                "exclude": "no.such.layer",
            },
            second={"bits": (4,)},
        )


def _finished(pl_module: Any) -> nn.Module:
    """The network with its codes; made once more, all at 8 bits, where the module is as a checkpoint has it."""
    network = product(pl_module)
    if not quantized_weights(network):
        network = plain_copy(network)
        apply_bit_map(network, {weight.name: 8 for weight in select_weights(network)})
    return network

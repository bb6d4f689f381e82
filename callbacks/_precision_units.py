"""The layers of a network as units of mixed precision: their losses, their order, the metric of a choice of bits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from effdl.callbacks._precision_inputs import UnitInputs
from effdl.callbacks._quantized_network import network_prefix
from effdl.callbacks._quantized_report import plain_copy
from effdl.compression._precision_inputs import InputHessian
from effdl.compression.hessian_mixed_precision import (
    Search,
    augmented_order,
    hessian_scores,
    hvp_interactions,
    measured_interactions,
    pairs_of,
    quantise,
    relative_errors,
    row_sum_order,
    search,
)
from effdl.core.batch import unpack
from effdl.core.calibrate import to_device
from effdl.core.distill import ask, network_inputs, soft_kl
from effdl.core.distributed import all_reduce_mean, all_reduce_sum
from effdl.core.errors import ConfigurationError, check
from effdl.core.export import product
from effdl.core.factorize import multiply_adds
from effdl.core.hessian import HessianOperator, block_traces
from effdl.core.input_quantizers import taking
from effdl.core.quantizers import QuantizedWeight
from effdl.core.random import generator
from effdl.core.report import first_example

if TYPE_CHECKING:
    from effdl.callbacks.hessian_mixed_precision import MixedPrecisionPTQCallback

FEW = 40  # units up to which all pairs are measured
NEAR = 2  # how far apart neighbours may be


class Units:
    """The layers of one network as units to quantise.

    All of it happens on a copy in float32 at least: an analysis under bf16 would be of rounding errors, and the user's
    network is as it was whatever happens.
    """

    def __init__(self, callback: MixedPrecisionPTQCallback, trainer: Any, pl_module: Any, batches: list[Any]) -> None:
        self.callback, self.names = callback, list(callback.weights)
        self.weights = [weight.data for weight in callback.weights.values()]
        network = product(pl_module)
        names = {id(p): name for name, p in network.named_parameters()}
        wide = any(p.dtype == torch.float64 for p in network.parameters())
        self.dtype = torch.float64 if wide else torch.float32
        self.network = plain_copy(network).to(pl_module.device, self.dtype).eval().requires_grad_(False)
        inside = [names.get(id(weight.parameter)) for weight in callback.weights.values()]
        # of the module but not of its network: no loss depends on it
        apart = [w.to(self.dtype, copy=True) for w in self.weights]
        self.parameters = [self.network.get_parameter(n) if n else w for n, w in zip(inside, apart)]
        self.floats = [p.detach().clone() for p in self.parameters]
        self.layers = [name.rpartition(".")[0] if name else None for name in inside]
        self.batches = [self._widened(batch) for batch in batches]
        self.validation = [self._widened(batch) for batch in _validation_batches(trainer, pl_module, callback, batches)]
        self.kept: dict[int, list[QuantizedWeight]] = {}
        self.told: dict[str, Any] = {"interactions": {}, "macs": self._macs()}
        self.soft: list[Tensor] = []
        self.inputs: UnitInputs | None = None
        if callback.activations:
            run = lambda: [self._logits(batch) for batch in self.batches]  # noqa: E731
            given = (network_prefix(pl_module), callback.activation_range, run)
            self.inputs = UnitInputs(self.network, self.parameters, *given)

    def _widened(self, batch: Any) -> Any:
        floating = lambda x: isinstance(x, Tensor) and x.is_floating_point()  # noqa: E731
        return tree_map(lambda x: x.to(self.dtype) if floating(x) else x, batch)

    def _macs(self) -> list[float]:
        """Multiply-adds of each weight's layer for one example; its entries where that cannot be counted."""
        inputs = first_example(network_inputs(self.batches[0]))
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
        counted = multiply_adds(self.network, args, kwargs)
        return [float(counted.get(layer, w.numel())) for layer, w in zip(self.layers, self.weights)]

    # ---- quantised weights -----------------------------------------------------------------------------------

    def quantised(self, bits: int) -> list[QuantizedWeight]:
        """Every unit at these bits."""
        if bits not in self.kept:
            self.kept[bits] = [quantise(weight, bits, self.callback.granularity) for weight in self.weights]
        return self.kept[bits]

    def records(self, bits: list[int]) -> dict[str, QuantizedWeight]:
        return {name: self.quantised(b)[i] for i, (name, b) in enumerate(zip(self.names, bits))}

    def deltas(self, bits: int) -> list[Tensor]:
        return [r.dequantize(self.dtype) - w for r, w in zip(self.quantised(bits), self.floats)]

    @contextmanager
    def wearing(self, bits: list[int | None]) -> Iterator[None]:
        """The network with some units quantised (``None``: float), their inputs with them where these count."""
        changed = [i for i, width in enumerate(bits) if width is not None]
        with torch.no_grad():
            try:
                for i in changed:
                    self.parameters[i].copy_(self.quantised(bits[i])[i].dequantize(self.dtype))
                with taking({} if self.inputs is None else self.inputs.taken(bits)):
                    yield
            finally:
                for i in changed:
                    self.parameters[i].copy_(self.floats[i])

    # ---- losses ----------------------------------------------------------------------------------------------

    def _logits(self, batch: Any) -> Tensor:
        return ask(self.network, network_inputs(batch))

    def _loss(self, index: int) -> Tensor:
        logits, labels = self._logits(self.batches[index]), unpack(self.batches[index]).labels
        if self.callback.loss == "kl":
            return soft_kl(logits, self.soft[index])
        good = isinstance(labels, Tensor) and labels.shape == logits.shape[:-1]
        check(good, "loss", "task", "'kl' where batches hold no class labels")
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten())

    def losses(self, bits: list[int | None]) -> Tensor:
        """Of each calibration batch, the mean over ranks; float64 on the CPU."""
        with self.wearing(bits):
            found = torch.stack([self._loss(i).double() for i in range(len(self.batches))])
        all_reduce_mean(found)
        return found.cpu()

    # ---- sensitivity -----------------------------------------------------------------------------------------

    def analyse(self) -> None:
        """What every width's order needs: the targets of the loss, and the traces of the Hessian's blocks."""
        c = self.callback
        if c.order in ("qe", "random"):
            return
        if c.loss == "kl":
            self.soft = [self._logits(batch).softmax(-1) for batch in self.batches]
        elif float(self.losses([None] * len(self.names)).mean()) < 1e-3:
            rank_zero_warn("The calibration loss is all but zero, and so is its Hessian: loss='kl' tells layers apart.")
        if c.order == "augmented" and c.diagonal == "measured" and self._how() != "hvp":
            return
        for parameter in self.parameters:
            parameter.requires_grad_()
        self.operator = HessianOperator(self._loss, self.parameters, list(range(len(self.batches))), reduce=_mean)
        try:
            estimates = block_traces(self.operator, c.probes, generator(c.seed))
        except RuntimeError as error:
            raise ConfigurationError(
                "diagonal='hessian' needs a network with second derivatives; this one's fail: "
                f"{str(error).splitlines()[0]} Use diagonal='measured' with pairs='all'."
            ) from error
        sizes = torch.tensor([p.numel() for p in self.parameters], dtype=torch.float64)
        self.traces = estimates.mean(0) / sizes
        spread = estimates.std(0, correction=min(1, c.probes - 1)) / c.probes**0.5 / sizes
        self.told |= {"traces": self.traces.tolist(), "trace_errors": spread.tolist()}
        if self.inputs is not None:
            loss_at, everywhere = self._loss, list(range(len(self.batches)))
            self.joint = InputHessian(loss_at, self.parameters, self.inputs.places, everywhere)
            self.input_traces = self.joint.traces(c.probes, generator(c.seed + 1)).mean(0)
            self.told["input_traces"] = dict(zip(self.inputs.names, self.input_traces.tolist()))

    def _how(self) -> str:
        few = len(self.names) <= FEW
        return self.callback.pairs if self.callback.pairs != "auto" else "all" if few else "hvp"

    def _interactions(self, width: int, units: list[int]) -> tuple[Tensor, Tensor]:
        """Single increases [n] and Omega [n, n] of these units, all at this width."""
        how = self._how()
        if how == "hvp":
            if self.inputs is None:
                single, omega = hvp_interactions(self.operator, self.deltas(width), units)
            else:
                ranges = [record for record, _ in self.inputs.ranges(width)]
                single, omega = self.joint.interactions(self.deltas(width), ranges, units)
            error = torch.zeros_like(omega)
        else:

            def loss_of(chosen: frozenset[int]) -> Tensor:
                worn = {units[k] for k in chosen}
                return self.losses([width if i in worn else None for i in range(len(self.names))])

            pairs = pairs_of(len(units), None if how == "all" else NEAR)
            single, omega, error = measured_interactions(loss_of, pairs, len(units))
        named = {"units": [self.names[i] for i in units], "values": omega.tolist(), "errors": error.tolist()}
        self.told["interactions"][str(width)] = named
        return single, omega

    def ordered(self, width: int, candidates: list[int]) -> list[int]:
        """The candidates, the one that may go to these bits first in front."""
        how, local = self.callback.order, list(range(len(candidates)))
        if how == "random":
            local = torch.randperm(len(candidates), generator=generator(self.callback.seed)).tolist()
        elif how == "qe":
            chosen = [[tensors[i] for i in candidates] for tensors in (self.floats, self.deltas(width))]
            errors = relative_errors(*chosen)
            if self.inputs is not None:
                errors = errors + self.inputs.relative(width)[candidates]
            local = errors.argsort(stable=True).tolist()
        elif len(candidates) > 1:
            local = self._by_loss(how, width, candidates)
        return [candidates[i] for i in local]

    def _by_loss(self, how: str, width: int, candidates: list[int]) -> list[int]:
        measured = how == "augmented" and self.callback.diagonal == "measured"
        if how != "hessian":
            single, omega = self._interactions(width, candidates)
        if measured:
            return augmented_order(single, omega)
        scores = hessian_scores(self.traces[candidates], [self.deltas(width)[i] for i in candidates])
        if self.inputs is not None:
            scores = scores + self.inputs.scores(width, self.input_traces)[candidates]
        if how == "hessian":
            return scores.argsort(stable=True).tolist()
        return augmented_order(scores / 2, omega) if how == "augmented" else row_sum_order(scores, omega)

    # ---- the metric ------------------------------------------------------------------------------------------

    def metric_of(self, bits: list[int] | None) -> float:
        """Of the network with these bits, the mean over ranks; ``None``: of the float network."""
        with self.wearing([None] * len(self.names) if bits is None else list(bits)):
            if self.callback.metric is None:
                return _accuracy(self.network, self.validation)
            value = torch.tensor(float(self.callback.metric(self.network, self.validation)), dtype=torch.float64)
        value = value.to(self.floats[0].device)
        all_reduce_mean(value)
        return float(value)

    def search(self) -> Search:
        c = self.callback
        return search(len(self.names), c.bits, self.ordered, self.metric_of, c.target_ratio, c.mode, c.method, c.verify)


def _mean(product: Tensor) -> Tensor:
    all_reduce_mean(product)
    return product


def _accuracy(network: nn.Module, batches: list[Any]) -> float:
    counts = None
    for batch in batches:
        labels, logits = unpack(batch).labels, ask(network, network_inputs(batch))
        good = isinstance(labels, Tensor) and labels.shape == logits.shape[:-1]
        check(good, "metric", None, "a function where validation batches hold no class labels")
        now = torch.stack([(logits.argmax(-1) == labels).sum(), torch.tensor(labels.numel(), device=labels.device)])
        counts = now if counts is None else counts + now
    all_reduce_sum(counts)
    return float(counts[0] / counts[1])


def _validation_batches(
    trainer: Any, pl_module: Any, callback: MixedPrecisionPTQCallback, calibration: list[Any]
) -> list[Any]:
    """Those of the first validation loader; without one the calibration batches."""
    loader = trainer.val_dataloaders
    if isinstance(loader, dict):
        loader = list(loader.values())
    loader = loader[0] if isinstance(loader, (list, tuple)) and loader else loader
    limits = trainer.num_val_batches
    limit = limits[0] if isinstance(limits, (list, tuple)) and limits else limits
    if loader is None or not limit:
        rank_zero_warn("The search has no validation data: it measures the metric on the calibration batches.")
        return calibration
    most = min(callback.validation_batches or float("inf"), limit)
    chosen = itertools.islice(loader, None if most == float("inf") else int(most))
    return [to_device(batch, pl_module.device) for batch in chosen]

"""trained-rank-pruning on a Trainer: when weights are cut, when the sub-gradient is added, when layers are split."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from effdl.callbacks._low_rank import LowRankCallback
from effdl.compression.trained_rank_pruning import FINAL, PAPER, check_numbers, decompose, select_layers
from effdl.compression.trained_rank_pruning import truncate as cut_of
from effdl.core.contract import ContractExample
from effdl.core.distributed import broadcast
from effdl.core.errors import check, check_integer
from effdl.core.export import product
from effdl.core.factorize import dense_weight, join, join_before_load, max_rank, oriented, refuse_tied
from effdl.core.schedules import Point, check_point, resolve_point
from effdl.core.select import Targets, Weight, check_targets, refuse_sharded
from effdl.core.steps import wrap
from effdl.core.surgery import refuse_after_weight_averaging, when_built

AVERAGES = ("WeightAveraging", "StochasticWeightAveraging")


class TrainedRankPruningCallback(LowRankCallback):
    """Cuts weights to low rank every few steps while they train, and splits layers into two small ones at the end.

    Between the cuts training is the user's own: W stays one tensor, its rank is free. Checkpoints are those of the
    plain dense model. After training the module holds the smaller model of stock layers (``effdl export`` and
    ``trainer.validate(module, ckpt_path=...)`` with this callback split a checkpoint likewise); a later ``fit`` of the
    same callback joins them first. The paper trains with SGD, momentum and weight decay; Adam works, its moments are
    not cut. An average (``WeightAveraging``, SWA) is not of low rank and is cut once more before the split. Layers
    pruned by masks become dense factors. With several optimizers the steps of the first one count. A network without
    normalisation that is cut from its first step may never learn: give it ``start="5ep"``.

    Cost of a cut: while a layer's rank is high, a symmetric eigenproblem and a few matrix products, 0.01 s at 256
    channels, 0.04 s at 512 on one CPU core. From an eighth of the full rank on (where real training is after some
    twenty cuts) it starts from the last cut's singular vectors and takes a quarter of that: ``core.subspace``. They
    are small, and saved.

    Args:
        scheme: how a convolution is read and split: ``"channel"`` (k x k to r channels, then 1 x 1), ``"spatial"``
            (k x 1, then 1 x k), ``"decouple"`` (1 x 1, then depth-wise). Linear and 1 x 1 layers: always ``"channel"``.
        keep_energy: e in (0, 1), the share of the squared singular values that a cut keeps.
        every: m, optimizer steps from one cut to the next (20 in the paper, 5 in the released scripts).
        start, stop: the first cut, and the point after which there is none; ``None``: to the end.
        nuclear_weight: lambda >= 0 of the nuclear norm's sub-gradient, added where W is cut; ``None``: off.
        nuclear_every_step: add it at every step: m times the weight, and the cost.
        final_criterion: what is kept at the end: ``(rule, number)`` with rule ``"value"`` (singular values not below),
            ``"energy"``, ``"energy_plain"`` or ``"linear"``; default ``("value", 0.05)``, for decouple
            ``("energy", 0.85)``.
        decompose: split the layers at the end of training; ``False``: leave the dense low-rank weights.
        calibration_batches: take BatchNorm statistics anew from so many training batches after the split; 0: keep them.
        targets, exclude: layers by name glob or type; default every Linear, HF ``Conv1D`` and convolution with at least
            8 rows and columns, but for the first convolution and the last Linear. A warning names grouped convolutions
            and layers with a forward of their own, which stay dense.

    Raises:
        ConfigurationError: an argument outside its range; nothing matched; a selected weight is tied or sharded; a
            fraction of a run of unknown length; ``ckpt_path`` of a run with other arguments.
        RuntimeError: NaN or infinity in a weight when it is cut, naming the layer.

    Logs ``trained-rank-pruning/rank``, the mean share of the full rank that a cut kept.

    Example::

        from effdl.callbacks import TrainedRankPruningCallback

        trp = TrainedRankPruningCallback(keep_energy=0.9, every=5)
        Trainer(callbacks=[trp]).fit(module, data)
        print(trp.ranks)                       # {"model.conv2": 6, ...}: core.factorize.factorize(module, trp.ranks)
    """

    paper = PAPER

    def __init__(
        self,
        scheme: Literal["channel", "spatial", "decouple"] = "channel",
        keep_energy: float = 0.9,
        every: Point = 5,
        start: Point = 0,
        stop: Point | None = None,
        nuclear_weight: float | None = 3e-4,
        nuclear_every_step: bool = False,
        final_criterion: tuple[str, float] | None = None,
        decompose: bool = True,
        calibration_batches: int = 0,
        targets: Targets = None,
        exclude: Targets = None,
    ) -> None:
        check_numbers(scheme, keep_energy, nuclear_weight, final_criterion)
        check_point("every", every, positive=True)
        check_point("start", start)
        check_point("stop", 0 if stop is None else stop)
        for name, flag in (("nuclear_every_step", nuclear_every_step), ("decompose", decompose)):
            check(isinstance(flag, bool), name, flag, "True or False")
        check_integer("calibration_batches", calibration_batches, 0)
        check_targets("targets", targets)
        check_targets("exclude", exclude)
        self.scheme, self.keep_energy = scheme, keep_energy
        self.every, self.start, self.stop = every, start, stop
        self.nuclear_weight, self.nuclear_every_step = nuclear_weight, nuclear_every_step
        self.final_criterion, self.decompose = final_criterion, decompose
        self.calibration_batches, self.targets, self.exclude = calibration_batches, targets, exclude
        self.rows: dict[str, dict[str, Any]] = {}
        self.layers: dict[str, nn.Module] = {}
        self._begin()

    def _begin(self) -> None:
        super()._begin()
        self.points: dict[str, int | None] | None = None
        self._ranks: dict[str, Tensor] = {}
        self._bases: dict[str, Tensor] = {}
        self._directions: dict[str, Tensor] = {}
        self._unlogged: dict[str, Tensor] = {}

    def attach(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            saved = self.state_dict() if trainer.global_step else None  # a Trainer that goes on
            self._begin()
            self._saved = saved
            if join(pl_module, self.ranks):
                refuse_after_weight_averaging(trainer, self)
            self.rows = {}
            self.keep(when_built(pl_module, lambda: self._select(pl_module)))
            self.keep(self.same_arguments_on_resume(trainer, pl_module))
            self._then_finish(trainer, pl_module)
        else:
            self._saved = None
            # a checkpoint of training is dense
            self.keep(wrap(pl_module, "on_load_checkpoint", join_before_load(pl_module, lambda: self.ranks)))

    def _select(self, pl_module: Any) -> None:
        self.layers = select_layers(pl_module, self.scheme, self.targets, self.exclude)
        if self.decompose:
            refuse_tied(pl_module, self.layers)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self._saved is not None:
            self.step, self.points = self._saved["step"], self._saved["points"]
            self._ranks = {name: torch.tensor(rank) for name, rank in self._saved["ranks"].items()}
            self._bases = dict(self._saved["bases"])
        for name, layer in self.layers.items():  # a strategy may have sharded or flattened them by now
            refuse_sharded(Weight(f"{name}.weight", layer, "weight"))
            check(layer.weight.dim() > 1, "strategy", type(trainer.strategy).__name__, "one of whole weights, like ddp")
        self._count_steps(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.points is None:
            start = resolve_point("start", self.start, trainer)
            stop = None if self.stop is None else resolve_point("stop", self.stop, trainer)
            check(stop is None or start <= stop, "stop", self.stop, f"a point not before start={self.start!r}")
            every = resolve_point("every", self.every, trainer, interval=True)
            self.points = {"start": start, "stop": stop, "every": every}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self._fresh:  # a later micro-batch of the same optimizer step
            return
        self._fresh = False
        start, stop, every = (self.points[name] for name in ("start", "stop", "every"))
        within = start <= self.step and (stop is None or self.step <= stop)
        if within and (self.step - start) % every == 0:
            self._cut(write=True)
        elif within and self.nuclear_every_step and self.nuclear_weight:
            self._cut(write=False)

    @torch.no_grad()
    def _cut(self, *, write: bool) -> None:
        """W <- T(W) in place (``write``), and G for this optimizer step."""
        for name, layer in self.layers.items():
            weight = dense_weight(layer)
            cut = cut_of(weight, self.scheme, ("energy", self.keep_energy), name, self._bases.pop(name, None))
            if cut.basis is not None:
                self._bases[name] = cut.basis
            new, direction = (part.to(weight.dtype).contiguous() for part in (cut.weight, cut.subgradient))
            broadcast(new, direction)  # devices may disagree in the last bit
            if write:
                weight.copy_(new)
                self._ranks[name] = cut.rank.double().mean()
            if self.nuclear_weight:
                self._directions[name] = direction
        if write:
            full = {name: max_rank(dense_weight(layer).shape, self.scheme) for name, layer in self.layers.items()}
            shares = [rank / full[name] for name, rank in self._ranks.items()]
            self._unlogged = {f"{self.slug}/rank": torch.stack(shares).mean()}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        mine = _parameters(optimizer)
        for name, direction in self._directions.items():
            layer = self.layers[name]
            if id(layer.weight) in mine and layer.weight.grad is not None:
                oriented(layer, layer.weight.grad).add_(direction, alpha=self.nuclear_weight)

    def _after_step(self, trainer: Any, optimizer: Any) -> None:
        mine = _parameters(optimizer)  # a step that the fp16 scaler skips keeps its sub-gradient
        self._directions = {n: g for n, g in self._directions.items() if id(self.layers[n].weight) not in mine}
        super()._after_step(trainer, optimizer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        unlogged, self._unlogged = self._unlogged, {}
        if unlogged:
            pl_module.log_dict(unlogged)

    def _finish(self, trainer: Any, pl_module: Any) -> None:
        if not self.decompose:
            return
        if any(c.__name__ in AVERAGES for other in trainer.callbacks for c in type(other).__mro__):
            self._cut(write=True)
            self._directions = {}
        super()._finish(trainer, pl_module)

    def _split(self, trainer: Any, pl_module: Any, *, train: bool) -> None:
        if not self.decompose:
            return
        if not train:
            self._select(pl_module)
        criterion = self.final_criterion or FINAL[self.scheme]
        _, self.rows = decompose(pl_module, self.layers, self.scheme, criterion, inplace=True)
        self.layers, self._network = {}, product(pl_module)
        self._recalibrate(trainer, pl_module, train=train)

    def finalize(self, model: nn.Module) -> nn.Module:
        """A copy of a trained model with its layers split, without a Trainer; ``rows`` tells of each layer."""
        layers = select_layers(model, self.scheme, self.targets, self.exclude)
        self._network, self.rows = decompose(model, layers, self.scheme, self.final_criterion or FINAL[self.scheme])
        return self._network

    def state_dict(self) -> dict[str, Any]:
        ranks = {name: float(rank) for name, rank in self._ranks.items()}
        return {"step": self.step, "points": self.points, "ranks": ranks, "bases": self._bases}

    def matched(self, module: Any) -> list[str]:
        """Names of the layers that will be cut."""
        return list(self.layers)

    def report(self) -> dict[str, Any]:
        """Rank, weights and multiply-adds of each layer, and the dense network beside the split one; after a fit."""
        if self.rows or not self._ranks:
            return {"scheme": self.scheme, **super().report()}
        layers = {name: {"rank": float(rank)} for name, rank in self._ranks.items()}
        return {"scheme": self.scheme, "curves": [f"{self.slug}/rank"], "layers": layers}

    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite. Nothing is split there: what is finished must equal its last checkpoint."""
        return ContractExample(
            kwargs={"every": 2, "final_criterion": ("linear", 1.0)},
            bad={
                "scheme": "chanel",
                "keep_energy": [0, 1.0, float("nan")],
                "every": [0, -3],
                "start": [-1, 1.5, "3 parsecs"],
                "stop": [-1, 1.5],
                "nuclear_weight": [-1e-3, "much"],
                "nuclear_every_step": "yes",
                "decompose": "no",
                "final_criterion": ["value", ("value", 0), ("energy", 1), ("median", 0.5)],
                "calibration_batches": -1,
                "targets": ["no.such.layer", 3],
                "exclude": "no.such.layer",
            },
        )


def _parameters(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}

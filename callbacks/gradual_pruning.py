"""gradual-pruning on a Trainer: when masks are computed, applied, saved and reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor

from effdl.callbacks import _mask_report
from effdl.callbacks._masked import MaskedCallback
from effdl.compression.gradual_pruning import (
    Granularity,
    SparsitySchedule,
    check_patterns,
    check_sparsity,
    divisible,
    layer_shares,
    magnitude_masks,
)
from effdl.core.contract import ContractExample
from effdl.core.distributed import check_equal_on_ranks
from effdl.core.errors import check, check_choice, check_integer, check_number
from effdl.core.masks import MaskStore
from effdl.core.paper import Paper
from effdl.core.reweight import reweight_everywhere
from effdl.core.schedules import Point, check_point, resolve_point
from effdl.core.select import Targets, check_targets, select_weights


class PruningCallback(MaskedCallback):
    """Prunes the chosen weights by magnitude along a cubic ramp while they train (Zhu & Gupta 2017, eq. 1).

    In place, behind each optimizer step: the module's parameters, names and checkpoints stay its own, with exact zeros.
    Works with any optimizer and precision, accumulation, DDP, ``torch.compile`` and ``WeightAveraging``; a resumed run
    ends in the same bits. Cost: below 3 % of a step. It needs training left after ``stop`` to heal, at a learning rate
    that has not yet decayed. With several optimizers (manual optimisation) the steps of the first one count.

    Args:
        sparsity: final share of zeros s_f in each tensor, in [0, 1); ``None`` only for N:M.
        initial_sparsity: s_i, jumped to at ``start``.
        start: t0. Pruning from the first step suits a pretrained model; from scratch give it a few epochs.
        stop: t_end; the last update is the last multiple of ``every`` not after it.
        every: dt between updates.
        power: p of the ramp.
        granularity: ``"unstructured"``, ``"channel"`` (output channels or rows), ``"N:M"`` (of M consecutive input
            weights the N smallest, once, at ``stop``), ``"HxW"`` (blocks of 2-D weights).
        scope: ``"local"``: each tensor to ``sparsity``; ``"global"``: one threshold over all.
        pooling: score of a block, ``"avg"`` or ``"max"`` of its magnitudes.
        layer_sparsity: final sparsity of weights by name pattern, e.g. ``{"*fc.weight": 0.5}``; local scope.
        retain: keep the raw weights behind the mask, so that a pruned one can return (the 2017 TensorFlow package);
            ``False`` overwrites them with zeros (its successor).
        targets, exclude: layers by name glob or type; default every Linear, convolution, Embedding, attention and
            recurrent layer, HF ``Conv1D``. One-dimensional tensors are never pruned.
        min_numel: smaller tensors stay dense.

    Raises:
        ConfigurationError: an argument outside its range; nothing matched; ``optimizer`` objects without step hooks;
            a fraction of a run of unknown length; ``ckpt_path`` of a run that pruned with other arguments.
        RuntimeError: NaN or infinity in a weight when it is ranked.

    Logs ``gradual-pruning/sparsity`` (measured) and ``gradual-pruning/target`` at each update.

    Example::

        from effdl.callbacks import PruningCallback

        pruning = PruningCallback(sparsity=0.9, start="2ep", stop=0.75, every=50, exclude="fc")
        Trainer(callbacks=[pruning]).fit(module, data)
        print(pruning.report()["layers"])
    """

    paper = Paper(
        slug="gradual-pruning",
        title="To prune, or not to prune: exploring the efficacy of pruning for model compression",
        authors=("Zhu, Michael", "Gupta, Suyog"),
        year=2017,
        arxiv="1710.01878",
    )

    def __init__(
        self,
        sparsity: float | None = None,
        initial_sparsity: float = 0.0,
        start: Point = 0,
        stop: Point = 0.75,
        every: Point = 100,
        power: float = 3.0,
        granularity: str = "unstructured",
        scope: Literal["local", "global"] = "local",
        pooling: Literal["avg", "max"] = "avg",
        layer_sparsity: dict[str, float] | None = None,
        retain: bool = False,
        targets: Targets = None,
        exclude: Targets = None,
        min_numel: int = 2,
    ) -> None:
        self.unit = Granularity.parse(granularity)
        check_sparsity(sparsity, initial_sparsity, self.unit, layer_sparsity)
        for name, point in (("start", start), ("stop", stop)):
            check_point(name, point)
        check_point("every", every, positive=True)
        check_number("power", power, 0, 100, closed="(]")
        check_choice("scope", scope, ("local", "global"))
        free = granularity == "unstructured" and not layer_sparsity
        check(scope == "local" or free, "scope", scope, "'local' unless unstructured, without layer_sparsity")
        check_choice("pooling", pooling, ("avg", "max"))
        check(isinstance(retain, bool), "retain", retain, "True or False")
        check_targets("targets", targets)
        check_targets("exclude", exclude)
        check_integer("min_numel", min_numel, 1)
        self.sparsity, self.initial_sparsity, self.power = sparsity, initial_sparsity, power
        self.start, self.stop, self.every = start, stop, every
        self.granularity, self.scope, self.pooling = granularity, scope, pooling
        self.layer_sparsity, self.retain = layer_sparsity, retain
        self.targets, self.exclude, self.min_numel = targets, exclude, min_numel
        self._begin()

    # ---- attaching -------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        super()._begin()
        self._first_rate = 0.0
        self.schedule: SparsitySchedule | None = None

    def _select(self, pl_module: Any) -> None:
        weights = select_weights(pl_module, self.targets, self.exclude, self.min_numel)
        if self.unit.kind == "n:m":
            weights = divisible(weights, self.unit.sizes[1])
        check_patterns(self.layer_sparsity, weights)
        self.store = MaskStore(weights)
        if self.retain:
            for weight in weights:
                self.keep(reweight_everywhere(pl_module, weight.parameter, self._see_through(weight.name)))

    def _see_through(self, name: str) -> Callable[[Tensor], Tensor]:
        store = self.store  # a closure: a deep copy of the module must not copy the callback
        return lambda raw: store.masked(name, raw)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.schedule is None:
            self.schedule = self._resolve(trainer)
        self._project()
        if self.step == 0 and self.schedule.is_update(0):
            self._update(trainer)

    def _resolve(self, trainer: Any) -> SparsitySchedule:
        begin = resolve_point("start", self.start, trainer)
        end = resolve_point("stop", self.stop, trainer)
        every = resolve_point("every", self.every, trainer, interval=True)
        check(end >= begin, "stop", self.stop, f"a point not before start={self.start!r} (step {end} < {begin})")
        if self.unit.kind == "n:m":  # a ramp over groups has no meaning: once, at the end
            return SparsitySchedule(0.0, self.unit.n_m_sparsity or 0.0, end, 0, every)
        every = min(every, max(1, end - begin))  # a run shorter than one interval still prunes twice
        updates = (end - begin) // every
        return SparsitySchedule(self.initial_sparsity, self.sparsity or 0.0, begin, updates, every, self.power)

    # ---- one step --------------------------------------------------------------------------------------------

    def _after_own_step(self, trainer: Any) -> None:
        if self.schedule.is_update(self.step):
            self._update(trainer)

    def _update(self, trainer: Any) -> None:
        """Masks from the current weights; weights and momentum under them are zeroed."""
        weights = list(self.store.weights.values())
        check_equal_on_ranks((w.data for w in weights), "a weight to be pruned")
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        if self.step == self.schedule.begin:
            self._first_rate = rate
            _mask_report.warn_of_frozen(self.store)
        shares = layer_shares(weights, self.schedule, self.step, self.layer_sparsity)
        form = {"granularity": self.granularity, "scope": self.scope, "pooling": self.pooling}
        self._set_masks(trainer, magnitude_masks(weights, shares, **form))
        self._unlogged[f"{self.slug}/target"] = self.schedule.sparsity(self.step)
        if self.step == self.schedule.end:
            _mask_report.warn_of_spent_rate(self._first_rate, rate)

    # ---- the dense model, warnings, state ----------------------------------------------------------------------

    def _is_dense(self) -> bool:
        ramp = self.schedule
        return ramp is not None and self.step <= ramp.begin and ramp.initial == 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.step == self.schedule.begin and self._is_dense():
            self._measure_dense(trainer, pl_module)

    def _then_finish(self, call_next: Callable, *args: Any) -> None:
        super()._then_finish(call_next, *args)
        if self.schedule is not None:
            reached, ramp = float(self.store.sparsity()), self.schedule
            _mask_report.warn_of_early_end(self.step, ramp.end, reached, ramp.final)

    def state_dict(self) -> dict[str, Any]:
        schedule = dict(vars(self.schedule)) if self.schedule else None
        return {**super().state_dict(), "schedule": schedule, "first_rate": self._first_rate}

    def _restore(self, saved: dict[str, Any]) -> None:
        super()._restore(saved)
        self._first_rate = saved["first_rate"]
        self.schedule = SparsitySchedule(**saved["schedule"]) if saved["schedule"] else None

    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite."""
        return ContractExample(
            kwargs={"sparsity": 0.8, "start": 2, "stop": 12, "every": 2},
            bad={
                "sparsity": [1.0, -0.1, float("nan"), None],
                "initial_sparsity": [0.95, -1.0],
                "start": [-1, 1.5, "3 parsecs"],
                "stop": [-1, 1.5],
                "every": [0, -3],
                "power": [0, float("nan")],
                "granularity": ["2:2", "blocks"],
                "scope": "everywhere",
                "pooling": "median",
                "layer_sparsity": {"*": 1.5},
                "retain": "yes",
                "targets": ["no.such.layer", 3],
                "exclude": "no.such.layer",
                "min_numel": 0,
            },
        )

"""A run under masks: what every callback that holds weights at zero does the same, whatever chooses its masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from effdl.callbacks import _mask_report
from effdl.callbacks._base import MethodCallback
from effdl.core.checkpoint import fold_checkpoints
from effdl.core.errors import ConfigurationError
from effdl.core.export import product
from effdl.core.masks import MaskStore
from effdl.core.report import ForwardProbe, measure
from effdl.core.steps import after_optimizer_step, wrap
from effdl.core.surgery import when_built


class MaskedCallback(MethodCallback):
    """Base of the callbacks that hold weights at zero while the rest trains.

    A subclass fills ``store`` in :meth:`_select`, says in :meth:`_is_dense` whether nothing is pruned yet, hands new
    masks to :meth:`_set_masks`, and acts between two optimizer steps in :meth:`_after_own_step`. Masked weights lose
    their gradient before clipping and are zeroed behind each optimizer step, in averaged weights, in every checkpoint
    and at the end of training. ``step`` counts the steps of the first optimizer.
    """

    #: Raw weights stay behind the masks; the subclass lets the module see through them.
    retain: bool = False
    store: MaskStore | None = None
    _saved: dict[str, Any] | None = None
    #: The network before channels were taken out of it, where that was done.
    _full: Any = None

    def _begin(self) -> None:
        """The state of a new run; the constructor ends with it."""
        self.step = 0
        self.dense: dict[str, Any] = {}
        self._unlogged: dict[str, float] = {}
        self._probe: ForwardProbe | None = None

    def _select(self, pl_module: Any) -> None:
        """Make ``self.store`` over the weights to prune."""
        raise NotImplementedError

    def _is_dense(self) -> bool:
        """Whether nothing has been pruned so far."""
        raise NotImplementedError

    def _after_own_step(self, trainer: Any) -> None:
        """Behind each step of the first optimizer: ``step`` has counted it, masks are applied."""

    # ---- attaching -------------------------------------------------------------------------------------------

    def attach(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            # a Trainer that goes on (fit called again) goes on with its masks
            self._saved = self.state_dict() if trainer.global_step else None
            self._begin()
            self.keep(when_built(pl_module, lambda: self._select(pl_module)))
            self.keep(fold_checkpoints(pl_module, self.state_key, self._fold, lambda state, kept: state.update(kept)))
            self.keep(self.same_arguments_on_resume(trainer, pl_module))
            # the module's hooks run after all callbacks', so after WeightAveraging or SWA put a dense average in
            self.keep(wrap(pl_module, "on_train_epoch_start", self._then_remask))
            self.keep(wrap(pl_module, "on_validation_epoch_start", self._then_remask))
            self.keep(wrap(pl_module, "on_train_end", self._then_finish))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self._saved is not None:
            self._restore(self._saved)
        self.keep(after_optimizer_step(trainer, lambda opt: self._after_step(trainer, opt), type(self).__name__))

    # ---- masks -----------------------------------------------------------------------------------------------

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        # before clipping: norms and second moments must see live weights only
        self.store.apply_to_gradients_()

    def _after_step(self, trainer: Any, optimizer: Any) -> None:
        # masked weights have no gradient and no momentum, but a foreign optimizer or callback may still move them
        self._project()
        if optimizer is trainer.optimizers[0]:
            self.step += 1
            self._after_own_step(trainer)

    def _set_masks(self, trainer: Any, masks: dict[str, Tensor]) -> None:
        """Zero weights and momentum under new masks; the sparsity this makes is logged with the next batch's end."""
        for name, mask in masks.items():
            self.store.set(name, mask)
        self._project()
        if not self.retain:
            for optimizer in trainer.optimizers:
                self.store.apply_to_moments_(optimizer)
        self._unlogged[f"{self.slug}/sparsity"] = float(self.store.sparsity(masked=self.retain))

    def _project(self) -> None:
        if not self.retain:
            self.store.apply_()

    def _then_remask(self, call_next: Callable, *args: Any) -> None:
        call_next(*args)
        self._project()

    def _then_finish(self, call_next: Callable, *args: Any) -> None:
        call_next(*args)
        self.store.apply_()  # with retain too: the finished model holds zeros

    # ---- the dense model, to compare with --------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        model = product(pl_module)
        if self._probe is None and model is not pl_module:
            self._probe = ForwardProbe(model)
            self.keep(self._probe)

    def _measure_dense(self, trainer: Any, pl_module: Any) -> None:
        """Once, while every weight still lives: what the finished model is compared with."""
        if "parameters" not in self.dense and trainer.is_global_zero:
            self.dense |= measure(product(pl_module))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if self._unlogged:
            pl_module.log_dict(self._unlogged)
            self._unlogged = {}

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking and self._is_dense():
            seen = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith(self.slug)}
            self.dense["metrics"] = {k: v for k, v in seen.items() if "val" in k} or seen

    # ---- state and report ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "masks": self.store.state() if self.store else {}, "dense": dict(self.dense)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict

    def _restore(self, saved: dict[str, Any]) -> None:
        self.step, self.dense = saved["step"], dict(saved["dense"])
        self.store.load_state(saved["masks"])

    def _fold(self, state: dict[str, Any]) -> dict[str, Any]:
        raw = self.store.apply_to_state(state) if self.store else {}
        return {key: value.clone() for key, value in raw.items()} if self.retain else {}

    def matched(self, module: Any) -> list[str]:
        """Names of the weights that will be pruned."""
        return list(self.store.weights) if self.store else []

    def report(self) -> dict[str, Any]:
        """Counted sparsity per weight and in all, the paper's storage accounting, dense and pruned model, latency.

        Raises:
            ConfigurationError: before any fit.
        """
        if self.store is None:
            raise ConfigurationError("report() needs a fit: nothing was pruned yet.")
        curves = [f"{self.slug}/sparsity", *sorted(self.dense.get("metrics", {}))]
        columns = _mask_report.columns(self.dense, self._probe, self._full)
        return {"steps": self.step, "curves": curves, **_mask_report.pruning_report(self.store), **columns}

"""What callbacks do the same that leave factors where layers were: the last cut, its metrics, its report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from effdl.callbacks import _rank_report
from effdl.callbacks._base import MethodCallback
from effdl.core.calibrate import calibration_batches as batches_of
from effdl.core.calibrate import recalibrate_batchnorm
from effdl.core.errors import ConfigurationError
from effdl.core.export import product
from effdl.core.factorize import factors_of
from effdl.core.report import ForwardProbe
from effdl.core.revalidate import validate_again
from effdl.core.steps import after_optimizer_step, wrap


class LowRankCallback(MethodCallback):
    """Base of the callbacks whose finished network has fewer weights than the one that was trained.

    A subclass implements :meth:`_split`, which fills ``rows``; its constructor ends with :meth:`_begin`, its ``attach``
    for a fit with :meth:`_then_finish`. ``step`` counts the steps of the first optimizer; ``_fresh``: no micro-batch of
    the next one was seen.
    """

    calibration_batches: int
    rows: dict[str, dict[str, Any]]

    def _begin(self) -> None:
        """The state of a new run."""
        self.step, self._fresh = 0, True
        self._saved: dict[str, Any] | None = None
        self._metrics: dict[str, dict[str, float]] = {}
        self._probe: ForwardProbe | None = None
        self._network: nn.Module | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        others = [c for c in trainer.callbacks if isinstance(c, LowRankCallback) and type(c) is not type(self)]
        if others:
            raise ConfigurationError(
                f"{type(self).__name__} beside {type(others[0]).__name__}: both split the same layers. Use one of them."
            )
        super().setup(trainer, pl_module, stage)

    def _split(self, trainer: Any, pl_module: Any, *, train: bool) -> None:
        """Put the finished layers in, and fill ``rows``.

        ``train``: in a fit that ends; else a checkpoint of training was loaded to be validated.
        """
        raise NotImplementedError

    @property
    def ranks(self) -> dict[str, int]:
        """Layer to rank of the layers that are factors; empty before the end of training."""
        return factors_of(self.rows)

    # ---- while it trains -------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        model = product(pl_module)
        if self._probe is None and model is not pl_module:
            self._probe = ForwardProbe(model)
            self.keep(self._probe)

    def _count_steps(self, trainer: Any) -> None:
        """Call in ``on_fit_start``: :meth:`_after_step` runs behind each optimizer step."""
        self.keep(after_optimizer_step(trainer, lambda opt: self._after_step(trainer, opt), type(self).__name__))

    def _after_step(self, trainer: Any, optimizer: Any) -> None:
        if optimizer is trainer.optimizers[0]:
            self.step += 1
            self._fresh = True

    def _attached(self, trainer: Any) -> bool:
        """The learning-rate finder's trial run validates and ends too, but without callbacks."""
        return any(other is self for other in trainer.callbacks)

    # ---- the end ---------------------------------------------------------------------------------------------

    def _then_finish(self, trainer: Any, pl_module: Any) -> None:
        """Split at the end: the module's hooks run after all callbacks', so after an average was put in."""

        def end(call_next: Callable[[], None]) -> None:
            call_next()
            if self._attached(trainer):
                self._finish(trainer, pl_module)

        self.keep(wrap(pl_module, "on_train_end", end))

    def _finish(self, trainer: Any, pl_module: Any) -> None:
        self._metrics["before"] = _rank_report.validation_metrics(trainer, self.slug)
        self._split(trainer, pl_module, train=True)
        self._metrics["after"] = validate_again(trainer)

    def _recalibrate(self, trainer: Any, pl_module: Any, *, train: bool = True, seed: int | None = None) -> None:
        """BatchNorm statistics anew, where the network has some."""
        network = product(pl_module)
        if self.calibration_batches and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules()):
            batches = batches_of(trainer, pl_module, self.calibration_batches, train=train, seed=seed)
            recalibrate_batchnorm(network, batches)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        # validated alone, a checkpoint of a run with this method becomes what the end would have made of it
        alone = str(getattr(trainer.state.fn, "value", trainer.state.fn)) == "validate"
        if alone and self._saved is not None:
            with torch.inference_mode(False):
                self._split(trainer, pl_module, train=False)
            self._saved = None

    # ---- state and report ------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict

    def report(self) -> dict[str, Any]:
        """Rank, weights and multiply-adds of each layer, and the dense network beside the finished one; after a fit."""
        if not self.rows:
            raise ConfigurationError("report() needs a finished fit: no layer was cut yet.")
        inputs = self._probe.inputs if self._probe else None
        told = _rank_report.columns(self.rows, self._metrics, self._network, inputs)
        return {"curves": [f"{self.slug}/rank", *self._metrics.get("before", {})], **told}

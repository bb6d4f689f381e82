"""Post-training quantisers: which weights, when, and what stands in their place."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from effdl.callbacks._calibrated import CalibratedCallback
from effdl.callbacks._quantized_network import install, thaw
from effdl.callbacks._quantized_report import Finished, plain_copy, quantization_report
from effdl.core.errors import ConfigurationError, check
from effdl.core.export import product
from effdl.core.input_quantizers import QuantizedInput
from effdl.core.quantized import quantized_weights
from effdl.core.quantizers import QuantizedWeight
from effdl.core.report import ForwardProbe
from effdl.core.select import Targets, Weight, select_weights
from effdl.core.steps import wrap
from effdl.core.surgery import when_built


class CalibratedQuantizer(CalibratedCallback):
    """Base of the callbacks that quantise a trained network at the end of a fit, or alone under ``validate``.

    A subclass stores ``targets`` and ``exclude``, ends its constructor with :meth:`_begin`, and overrides
    :meth:`_records`. Another fit goes on from what the codes decode to.
    """

    targets: Targets
    exclude: Targets
    quantises = True

    def _begin(self) -> None:
        self.weights: dict[str, Weight] = {}
        self.seconds = 0.0
        self.finished: Finished | None = None
        self._probe: ForwardProbe | None = None

    def _records(self, trainer: Any, pl_module: Any, batches: list[Any]) -> dict[str, QuantizedWeight]:
        """A record for each of ``self.weights``; the network is as it was when this returns."""
        raise NotImplementedError

    def _inputs(self) -> dict[str, QuantizedInput]:
        """Fixed ranges of inputs, by layer name in the LightningModule; asked for after :meth:`_records`."""
        return {}

    # ---- attaching -------------------------------------------------------------------------------------------

    def attach(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            load = lambda call_next, checkpoint: _load(pl_module, call_next, checkpoint)  # noqa: E731
            self.keep(wrap(pl_module, "on_load_checkpoint", load))
        if stage == "fit" or (stage == "validate" and not self.done):
            self._begin()
            if stage == "fit":
                thaw(pl_module)
            if not quantized_weights(pl_module):  # else a checkpoint may bring the float weights
                self.keep(when_built(pl_module, lambda: self._select(trainer, pl_module)))

    def _choose(self, pl_module: Any) -> list[Weight]:
        """The weights to quantise."""
        return select_weights(pl_module, self.targets, self.exclude)

    def _select(self, trainer: Any, pl_module: Any) -> None:
        weights = {weight.name: weight for weight in self._choose(pl_module)}
        for other in trainer.callbacks:
            if other is not self and getattr(other, "quantises", False):
                twice = sorted(weights.keys() & other.weights.keys())
                check(not twice, "targets", self.targets, f"layers of its own: another callback quantises {twice}")
        self.weights = weights

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._probe is None:
            self._probe = ForwardProbe(product(pl_module))
            self.keep(self._probe)

    # ---- acting ----------------------------------------------------------------------------------------------

    def calibrate(self, trainer: Any, pl_module: Any, batches: list[Any]) -> None:
        """Codes in the place of the weights."""
        if not self.weights:  # the network held codes in setup: they are what is validated, unless a checkpoint came
            if quantized_weights(pl_module):
                return
            self._select(trainer, pl_module)
        taken = sorted(n for n, w in self.weights.items() if w.module._parameters.get(w.attribute) is None)
        check(not taken, "targets", self.targets, f"layers of its own: another callback has quantised {taken}")
        began = time.perf_counter()
        records = self._records(trainer, pl_module, batches)
        self.seconds = time.perf_counter() - began
        self.finished = Finished.of(trainer, pl_module, self._probe, plain_copy(product(pl_module)), "float")
        install(pl_module, records, self._inputs())

    # ---- report ----------------------------------------------------------------------------------------------

    def matched(self, module: Any) -> list[str]:
        """Names of the weights that will be quantised."""
        return list(self.weights)

    def report(self) -> dict[str, Any]:
        """Bits per weight, file bytes, seconds; the accuracy and the latency of the artifact, reopened from its file.

        Raises:
            ConfigurationError: nothing was quantised yet.
        """
        if self.finished is None:
            raise ConfigurationError("report() needs a finished fit: nothing was quantised yet.")
        told = quantization_report(self.finished)
        millions = told["quantised_weights"] / 1e6
        return {**told, "seconds": self.seconds, "seconds_per_million": self.seconds / max(millions, 1e-9)}


def _load(pl_module: Any, call_next: Callable, checkpoint: dict[str, Any]) -> None:
    """A checkpoint is of the float network."""
    thaw(pl_module)
    call_next(checkpoint)

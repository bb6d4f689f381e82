"""sam's diagnostics on a Trainer: when sharpness is measured, logged and written down."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effdl.callbacks._base import MethodCallback
from effdl.core.batch import logits_of, unpack
from effdl.core.calibrate import calibration_batches
from effdl.core.capture import undisturbed
from effdl.core.contract import ContractExample
from effdl.core.distributed import rank
from effdl.core.errors import ConfigurationError, check, check_integer
from effdl.core.random import preserved_rng
from effdl.core.report import write_report
from effdl.core.schedules import Point, check_point, resolve_point
from effdl.core.select import WEIGHTED, Targets, check_targets, select_modules
from effdl.core.surgery import when_built
from effdl.training.sam import PAPER
from effdl.training.sharpness import is_activation, measure_sharpness


class SharpnessCallback(MethodCallback):
    """Measures how sharp the loss is while it trains: Hessian eigenvalues, trace, active neurons, norms.

    At the end of validation (of the epoch where there is none), on the same first batches of the training data each
    time, in evaluation mode, on the trainable parameters. Without it the run would end in the same bits.
    Under ``trainer.validate(model, loader)`` alone it measures once, on the validation data.

    Cost: about 50 Hessian-vector products for the network and for each block, each some three steps' worth of time on
    the probe batches. An eigenvalue near the end of training means little where the training loss has gone to zero
    (the Hessian of the cross-entropy vanishes with it): compare runs at equal loss, or under label noise or smoothing.

    Args:
        every: between measurements; ``"1ep"``: after every epoch.
        calibration_batches: batches of the probe set.
        targets: layers or blocks whose own diagonal block of the Hessian is measured, e.g. ``"blocks.0"``; ``None``:
            the first, the middle and the last layer with weights.
        trace_samples: Hutchinson samples for the trace, one product each; 0: none.
        max_iterations: Lanczos steps at most, per spectrum.
        loss: ``(module, batch) -> mean loss``; ``None``: cross-entropy of ``module(inputs)`` and the labels.

    Raises:
        ConfigurationError: an argument out of range, a pattern that matches nothing; before the first step: no
            labels for the cross-entropy.

    Logs ``sam/lambda_max``, ``sam/lambda_min``, ``sam/trace``, ``sam/probe_loss``, ``sam/weight_norm``, and per block
    or activation ``sam/lambda_max/NAME``, ``sam/active_fraction/NAME``, ``sam/activation_norm/NAME``. Writes all rows
    to ``sharpness.json`` in the run's folder where there is a logger.

    Example::

        from effdl.callbacks import SharpnessCallback

        sharpness = SharpnessCallback(every="5ep", targets=["patch_embed", "blocks.0", "blocks.11"])
        Trainer(callbacks=[sharpness]).fit(module, data)
        print(sharpness.rows[-1]["lambda_max"])
    """

    paper = PAPER

    def __init__(
        self,
        every: Point = "1ep",
        calibration_batches: int = 4,
        targets: Targets = None,
        trace_samples: int = 10,
        max_iterations: int = 100,
        loss: Callable[[Any, Any], Tensor] | None = None,
    ) -> None:
        check_point("every", every, positive=True)
        check_integer("calibration_batches", calibration_batches, 1)
        check_targets("targets", targets)
        check_integer("trace_samples", trace_samples, 0)
        check_integer("max_iterations", max_iterations, 1)
        check(loss is None or callable(loss), "loss", loss, "a function (module, batch) -> loss, or None")
        self.every, self.calibration_batches, self.targets = every, calibration_batches, targets
        self.trace_samples, self.max_iterations, self.loss = trace_samples, max_iterations, loss
        self.rows: list[dict[str, float]] = []
        self._interval: int | None = None
        self._fitting = False

    def attach(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage not in ("fit", "validate"):
            return
        self._fitting = stage == "fit"
        if self._fitting and trainer.global_step == 0:
            self.rows, self._interval = [], None
        if self.targets is not None:
            self.keep(when_built(pl_module, lambda: select_modules(pl_module, self.targets)))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._interval = self._interval or resolve_point("every", self.every, trainer, interval=True)
        with _analysis(pl_module):  # a loss that does not fit is told now, not after an epoch
            self._probe_loss(pl_module, *calibration_batches(trainer, pl_module, 1))

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not self._fitting or (not trainer.sanity_checking and self._due(trainer)):
            self._measure(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if not (trainer.enable_validation and any(trainer.num_val_batches)) and self._due(trainer):
            self._measure(trainer, pl_module)

    def _due(self, trainer: Any) -> bool:
        return trainer.global_step - (self.rows[-1]["step"] if self.rows else 0) >= self._interval

    def _measure(self, trainer: Any, pl_module: Any) -> None:
        blocks = self._blocks(pl_module)
        layers = {name: module for name, module in pl_module.named_modules() if is_activation(module)}
        if self.targets is not None:  # a Linear in front of a functional activation
            layers |= {name: module for name, module in blocks.items() if isinstance(module, nn.Linear)}
        with _analysis(pl_module):
            batches = calibration_batches(trainer, pl_module, self.calibration_batches, train=self._fitting)
            batches = [trainer.precision_plugin.convert_input(batch) for batch in batches]
            loss = partial(self._probe_loss, pl_module)
            values = measure_sharpness(
                pl_module, loss, batches, blocks, layers, self.trace_samples, self.max_iterations
            )
        pl_module.log_dict({f"{self.slug}/{name}": value for name, value in values.items()}, sync_dist=True)
        self.rows.append({"step": trainer.global_step, "epoch": trainer.current_epoch, **values})
        folder = trainer.log_dir if trainer.loggers else None  # asks every rank
        if folder is not None and rank() == 0:
            write_report(Path(folder) / "sharpness.json", {"rows": self.rows})

    def _blocks(self, pl_module: Any) -> dict[str, nn.Module]:
        if self.targets is not None:
            found = select_modules(pl_module, self.targets)
        else:
            weighted = select_modules(pl_module, default=WEIGHTED)
            names = list(weighted)
            found = {name: weighted[name] for name in (names[0], names[len(names) // 2], names[-1])}
        return {n: m for n, m in found.items() if any(p.requires_grad for p in m.parameters())}

    def _probe_loss(self, pl_module: Any, batch: Any) -> Tensor:
        value = (self.loss or _cross_entropy)(pl_module, batch)
        fits = isinstance(value, Tensor) and value.dim() == 0
        check(fits, "loss", self.loss, "a function that returns a 0-d tensor")
        return value

    def report(self) -> dict[str, Any]:
        """All rows; of the last one the network's numbers and a table of its layers."""
        last = self.rows[-1] if self.rows else {}
        layers: dict[str, dict[str, float]] = {}
        for key, value in last.items():
            quantity, _, layer = key.partition("/")
            if layer:
                layers.setdefault(layer, {})[quantity] = value
        return {**{k: v for k, v in last.items() if "/" not in k}, "layers": layers, "rows": self.rows}

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "interval": self._interval}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self._interval = list(state_dict["rows"]), state_dict["interval"]

    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite."""
        return ContractExample(
            kwargs={"calibration_batches": 2, "trace_samples": 1, "max_iterations": 5},
            bad={
                "every": [0, "often", 1.5],
                "calibration_batches": 0,
                "targets": ["no.such.layer", 3],
                "trace_samples": -1,
                "max_iterations": 0,
                "loss": ["cross_entropy", lambda module, batch: 1.0],
            },
            second={"trace_samples": 0},
        )


@contextlib.contextmanager
def _analysis(pl_module: Any) -> Iterator[None]:
    """Evaluation mode and gradients; eager, since compiled graphs have no double backward; no trace afterwards."""
    with preserved_rng(), undisturbed(pl_module), torch.compiler.set_stance("force_eager"):
        yield


def _cross_entropy(pl_module: Any, batch: Any) -> Tensor:
    inputs, labels, _ = unpack(batch)
    logits = logits_of(pl_module(inputs))
    if labels is None or logits is None:
        raise ConfigurationError("loss=None is the cross-entropy, and the batch has no labels: pass loss=function.")
    if logits.dim() == 3 and logits.shape[:-1] == labels.shape:  # one class per token
        logits, labels = logits.flatten(0, 1), labels.flatten()
    return F.cross_entropy(logits, labels)

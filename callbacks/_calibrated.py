"""What post-training methods share: when they act, on which batches, and that they act whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from effdl.callbacks._base import MethodCallback
from effdl.core.calibrate import calibration_batches
from effdl.core.capture import evaluating
from effdl.core.errors import check_choice, check_integer
from effdl.core.steps import wrap


class CalibratedCallback(MethodCallback):
    """Base of the methods that look at a few batches and then change the network once.

    It acts at the end of training (``when="end"``), at the beginning of a fit that fine-tunes what it made
    (``when="start"``; not again on resume), and, without a fit, under ``trainer.validate(model, loader)``: then before
    the first batch, so that the validation scores the changed network. Batches come from the training data where the
    run has any, else from the loader that is validated. ``test`` and ``predict`` leave the network as it is.

    A subclass overrides :meth:`calibrate` and calls :meth:`check_calibration` in its constructor, which stores
    ``when`` and ``calibration_batches``. If :meth:`calibrate` raises, all parameters and buffers are put back;
    layers must be replaced only after the last thing that can fail.
    """

    when: str
    calibration_batches: int
    done = False
    _ending = False

    def check_calibration(self, when: str, calibration_batches: int) -> None:
        """Check and store the two shared arguments."""
        check_choice("when", when, ("end", "start"))
        check_integer("calibration_batches", calibration_batches, 1)
        self.when, self.calibration_batches = when, calibration_batches

    def calibrate(self, trainer: Any, pl_module: Any, batches: list[Any]) -> None:
        """Change the network, in place. Called in eval mode, outside inference mode and without gradients; under DDP
        on every rank with its own batches: what is computed from them is all-reduced before it decides anything.
        """
        raise NotImplementedError

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self.done = False
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and self.when == "end":
            self._ending = False
            # after all callbacks and the module's own hook: averages are put in, masks applied, checkpoints written
            self.keep(wrap(trainer.strategy, "on_train_end", lambda *args: self._then_act(trainer, pl_module, *args)))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        # lr_find ends its own training behind the callbacks' back: the network must stay as it is then
        self._ending = True

    def _then_act(self, trainer: Any, pl_module: Any, call_next: Callable, *args: Any) -> None:
        call_next(*args)
        if self._ending:
            self._act(trainer, pl_module, train=True)
            self._after_acting(trainer, pl_module)

    def _after_acting(self, trainer: Any, pl_module: Any) -> None:
        """At the end of a fit, once the network is changed."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self.when == "start" and not self.done:
            trainer.fit_loop.setup_data()  # idempotent; the loaders are not there yet
            self._act(trainer, pl_module, train=True)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if _alone(trainer) and not self.done:
            self._act(trainer, pl_module, train=False)

    def _act(self, trainer: Any, pl_module: Any, *, train: bool) -> None:
        with evaluating(pl_module), torch.inference_mode(False), torch.no_grad():
            batches = self._batches(trainer, pl_module, train)
            before = {name: tensor.clone() for name, tensor in _tensors(pl_module).items()}
            try:
                self.calibrate(trainer, pl_module, batches)
            except BaseException:
                now = _tensors(pl_module)
                for name in before.keys() & now.keys():
                    now[name].copy_(before[name])
                raise
        self.done = True

    def _batches(self, trainer: Any, pl_module: Any, train: bool) -> list[Any]:
        return calibration_batches(trainer, pl_module, self.calibration_batches, train=train)

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.done = bool(state_dict["done"])


def _alone(trainer: Any) -> bool:
    """Under ``trainer.validate``, not a validation inside a fit."""
    return str(getattr(trainer.state.fn, "value", trainer.state.fn)) == "validate"


def _tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: tensor.data for name, tensor in named.items()}

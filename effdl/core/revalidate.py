"""The finished model's metrics, where a method changes the network after the last validation of a run."""

from __future__ import annotations

from typing import Any


def validate_again(trainer: Any) -> dict[str, float]:
    """The validation loop once more, inside a fit, seen by no logger and no other callback.

    For ``on_train_end``, after the network was changed: what the module logs in its own ``validation_step`` becomes
    ``trainer.callback_metrics``, and so the finished model's row of a report, but no checkpoint and no row of
    ``metrics.csv``. Call it on every rank. Without validation data (or ``limit_val_batches=0``) nothing happens.

    Returns:
        The logged metrics by name.

    Example::

        after = validate_again(trainer)      # {"val/loss": 0.11, "val/accuracy": 0.97}
    """
    if not trainer.enable_validation:
        return {}
    loop = trainer.fit_loop.epoch_loop.val_loop
    callbacks, loggers, stage = trainer.callbacks, trainer.loggers, trainer.state.stage
    first = trainer._logger_connector._first_loop_iter
    trainer.callbacks, trainer.loggers = [], []
    trainer.validating = True  # picks the results that self.log writes to
    try:
        outputs = loop.run()
    finally:
        trainer.callbacks, trainer.loggers, trainer.state.stage = callbacks, loggers, stage
        trainer._logger_connector._first_loop_iter = first
    return {name: float(value) for output in outputs for name, value in output.items()}

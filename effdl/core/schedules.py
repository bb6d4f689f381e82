"""Points in training: ``int`` optimizer steps, ``float`` in [0, 1] a fraction of the run, ``"3ep"`` epochs."""

from __future__ import annotations

import math
import re
from typing import Any

from effdl.core.errors import ConfigurationError, check

Point = int | float | str
_EPOCHS = re.compile(r"(\d+(?:\.\d+)?)\s*ep")
_VALID = "an int >= 0 (optimizer steps), a float in [0, 1] (fraction of the run) or a string like '3ep' (epochs)"


def check_point(argument: str, value: Any, *, positive: bool = False) -> None:
    """Raise unless ``value`` is a legal point in training (``positive``: later than zero, for intervals)."""
    valid = _VALID.replace(">= 0", "> 0").replace("[0,", "(0,") if positive else _VALID
    low = 0 if not positive else 1e-12
    if isinstance(value, bool):
        legal = False
    elif isinstance(value, int):
        legal = value >= low
    elif isinstance(value, float):
        legal = low <= value <= 1
    else:
        found = _EPOCHS.fullmatch(value) if isinstance(value, str) else None
        legal = found is not None and float(found[1]) >= low
    check(legal, argument, value, valid)


def total_steps(trainer: Any) -> float:
    """Optimizer steps of the whole run, ``inf`` where the length is unknown (no length, no ``max_steps``)."""
    steps = trainer.estimated_stepping_batches
    return math.inf if steps < 0 else float(steps)


def steps_per_epoch(trainer: Any) -> float:
    """Optimizer steps of one epoch, ``inf`` for a loader without length."""
    batches = trainer.num_training_batches
    if batches in (0, math.inf):
        epochs = trainer.max_epochs or -1
        return total_steps(trainer) / epochs if epochs > 0 else math.inf
    return math.ceil(batches / trainer.accumulate_grad_batches)


def resolve_point(argument: str, value: Point, trainer: Any, *, interval: bool = False) -> int:
    """A point in training as a whole number of optimizer steps (``interval``: at least 1).

    Call it in ``on_train_start``, once; save the result, and let the saved one win on resume.

    Raises:
        ConfigurationError: a fraction or epochs of a run whose length is unknown.
    """
    if isinstance(value, int):
        steps: float = value
    elif isinstance(value, float):
        steps = value * total_steps(trainer)
    else:
        steps = float(_EPOCHS.fullmatch(value)[1]) * steps_per_epoch(trainer)  # type: ignore[index]
    if not math.isfinite(steps):
        raise ConfigurationError(
            f"{argument}={value!r} needs a run of known length: set max_steps, or give {argument} in optimizer steps."
        )
    return max(1, round(steps)) if interval else round(steps)

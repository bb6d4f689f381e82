"""Rounds of a progressive distillation: when the student becomes the teacher, and what a checkpoint holds of it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from effdl.core.errors import ConfigurationError, check
from effdl.core.teacher import Frozen


def length_of_a_round(trainer: Any, rounds: int) -> int:
    """Optimizer steps of one of ``rounds`` equal shares of the run.

    Raises:
        ConfigurationError: a run without an end, with more than one round.
    """
    total = trainer.estimated_stepping_batches
    if rounds > 1 and total == float("inf"):
        raise ConfigurationError("rounds are shares of the run, which has no end: set max_steps or max_epochs.")
    return int(total) // rounds if rounds > 1 else 0


def catch_up(module: Any) -> None:
    """Promote the student as often as the optimizer steps done so far ask for."""
    if not module.round_steps:
        return
    while module.round < min(module.rounds - 1, module.trainer.global_step // module.round_steps):
        promote(module, averaged(module))


def averaged(module: Any) -> nn.Module:
    """The student's moving average where a ``WeightAveraging`` callback holds one, else the student."""
    for callback in module.trainer.callbacks:
        if (average := getattr(callback, "_average_model", None)) is not None:
            return average.module.model
    return module.model


def promote(module: Any, network: nn.Module) -> None:
    """A frozen copy of ``network`` teaches from now on, and the student goes on with half as many calls."""
    module.teacher = Frozen(copy.deepcopy(network))
    module.round += 1
    module.update_buffers()


def saved_state(module: Any) -> dict[str, Any]:
    """What a checkpoint must hold: the round, and the weights of a teacher that exists nowhere else."""
    state = {"stage": module.stage, "round": module.round, "round_steps": module.round_steps}
    if module.round > 0:
        state["teacher"] = {name: value.detach().clone() for name, value in module.teacher.module.state_dict().items()}
    return state


def restore(module: Any, state: Mapping[str, Any]) -> None:
    """The inverse of :func:`saved_state`."""
    check(state["stage"] == module.stage, "stage", module.stage, f"{state['stage']!r}, the stage of the checkpoint")
    check(state["round"] < module.rounds, "rounds", module.rounds, f"more than {state['round']}, as in the checkpoint")
    module.round, module.round_steps = state["round"], state["round_steps"]
    if "teacher" in state:
        network = copy.deepcopy(module.model)
        network.load_state_dict(state["teacher"])
        module.teacher = Frozen(network)
    module.update_buffers()

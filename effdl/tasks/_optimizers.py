"""What the stock tasks return from ``configure_optimizers``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from effdl.core.errors import check

_PER_STEP = ("OneCycleLR", "CyclicLR", "CosineAnnealingWarmRestarts", "LambdaLR")


def optimizer_and_scheduler(
    module: nn.Module, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None
) -> Any:
    """What ``configure_optimizers`` returns for injected callables; frozen parameters are left out.

    Raises:
        ConfigurationError: an optimizer or a scheduler instead of what makes one; no parameter to train.
    """
    maker = "a callable that makes one, such as functools.partial(torch.optim.{}) or a class"
    check(callable(optimizer), "optimizer", type(optimizer).__name__, maker.format("SGD, lr=0.1"))
    trained = [p for p in module.parameters() if p.requires_grad]
    check(bool(trained), "optimizer", optimizer, "a parameter to train", "All parameters are frozen.")
    made = optimizer(trained)
    if scheduler is None:
        return made
    check(callable(scheduler), "scheduler", type(scheduler).__name__, maker.format("lr_scheduler.StepLR, step_size=1"))
    schedule = scheduler(made)
    if isinstance(schedule, ReduceLROnPlateau) and not hasattr(schedule, "monitor"):
        schedule.monitor = "val/loss"  # torch's own has none; Lightning's carries the user's
    monitor = {"monitor": schedule.monitor} if hasattr(schedule, "monitor") else {}
    interval = "step" if type(schedule).__name__ in _PER_STEP else "epoch"
    return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": interval, **monitor}}

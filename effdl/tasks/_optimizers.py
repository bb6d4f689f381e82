"""What the stock tasks return from ``configure_optimizers``."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import nn

_PER_STEP = ("OneCycleLR", "CosineAnnealingWarmRestarts", "LambdaLR")


def optimizer_and_scheduler(
    module: nn.Module, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None
) -> Any:
    """What ``configure_optimizers`` returns for injected callables; frozen parameters are left out."""
    made = optimizer([p for p in module.parameters() if p.requires_grad])
    if scheduler is None:
        return made
    schedule = scheduler(made)
    monitor = {"monitor": schedule.monitor} if hasattr(schedule, "monitor") else {}
    interval = "step" if type(schedule).__name__ in _PER_STEP else "epoch"
    return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": interval, **monitor}}

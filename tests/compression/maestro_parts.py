"""What the tests of maestro's callback share: a network, data, a short run."""

from __future__ import annotations

from torch import nn

from effdl.callbacks import MaestroCallback
from tests.compression.image_parts import Foreign, data, fit
from tests.support import QUIET

__all__ = ["QUIET", "Net", "data", "fit", "maestro"]


class Net(Foreign):
    """A foreign module with BatchNorm."""

    def __init__(self, model=None, lr=0.05):
        super().__init__(lambda: model or nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3),
        ), lr)  # fmt: skip


def maestro(**kwargs):
    """Ranks fall in every epoch."""
    return MaestroCallback(**{"lasso_weight": 1e-3, "threshold": 0.5, "relative": True, **kwargs})

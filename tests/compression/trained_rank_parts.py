"""trained-rank-pruning: what both of its test files use."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from effdl.callbacks import TrainedRankPruningCallback
from tests.compression.image_parts import Foreign, close, data, fit, tensor
from tests.support import QUIET, golden

__all__ = ["CUT", "GOLDEN", "ONE", "QUIET", "Net", "Scripted", "close", "data", "fit", "share", "tensor", "trp"]

GOLDEN = golden("trained-rank-pruning")


class Net(Foreign):
    """A foreign module: two convolutions to cut, between a first one and a head that stay."""

    def __init__(self, conv=lambda: nn.Conv2d(16, 16, 3, padding=1)):
        super().__init__(lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), conv(), nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(144, 3),
        ))  # fmt: skip


CUT = ["model.3", "model.5"]


def trp(**kwargs):
    return TrainedRankPruningCallback(**{"keep_energy": 0.7, "every": 3, **kwargs})


def share(rank, full):
    """The criterion that keeps exactly this rank."""
    return "linear", (rank + 0.5) / full if rank < full else 1.0


class Scripted(LightningModule):
    """loss = <weight, gradient>, plain SGD."""

    def __init__(self, weight, gradient, lr):
        super().__init__()
        self.layer = nn.Conv2d(*weight.shape[1::-1], 3, bias=False)
        self.layer.weight = nn.Parameter(weight.clone())
        self.gradient, self.lr, self.seen = gradient, lr, []

    def training_step(self, batch, batch_idx):
        return (self.layer.weight * self.gradient).sum()

    def configure_gradient_clipping(self, optimizer, **kwargs):
        self.seen.append(self.layer.weight.grad.clone())
        super().configure_gradient_clipping(optimizer, **kwargs)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


ONE = DataLoader([torch.zeros(1)], batch_size=None)

"""A small LightningModule that has never heard of effdl, its data and a quiet Trainer, for the quantisers' tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from tests.support import BARE


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(LightningModule):
    """Four layers on images (1, 6, 6), three classes; ``extra`` modules stand before the last ReLU."""

    def __init__(self, network=None, extra=()):
        super().__init__()
        torch.manual_seed(0)
        self.model = network or nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(96, 24), *extra, nn.ReLU(), nn.Linear(24, 3),
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/accuracy", (self.model(x).argmax(-1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 5e-3)


def data(batches=6, size=16, seed=1, distance=1.0):
    y = torch.randint(0, 3, (batches, size), generator=torch.Generator().manual_seed(seed))
    x = gaussian(batches, size, 1, 6, 6, seed=seed) + distance * y.view(batches, size, 1, 1, 1)
    return DataLoader(list(zip(x, y)), batch_size=None)


def trainer(*callbacks, **kwargs):
    return Trainer(callbacks=list(callbacks), **{"max_epochs": 2, **BARE, **kwargs})

"""What the tests of gradual-pruning share: a network, data, a short run."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from tests.support import quiet_fit


class Net(LightningModule):
    """A foreign module: two linear layers, any optimizer."""

    def __init__(self, optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), network=None):
        super().__init__()
        torch.manual_seed(0)
        self.model = network or nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 3))
        self.make = optimizer

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val/accuracy", (self.model(x).argmax(-1) == y).float().mean())

    def configure_optimizers(self):
        return self.make(self.parameters())


def data(batches=8, size=6, width=12):
    g = torch.Generator().manual_seed(1)
    rows = [(torch.randn(size, width, generator=g), torch.randint(0, 3, (size,), generator=g)) for _ in range(batches)]
    return DataLoader(rows, batch_size=None)


def fit(module, callbacks, epochs=3, **kwargs):
    return quiet_fit(module, data(), *callbacks, max_epochs=epochs, **kwargs)


def zeros(module):
    return {n: int((p == 0).sum()) for n, p in module.named_parameters() if p.dim() > 1}

"""What the tests of elr on a Trainer share: a foreign module, noisy examples, a short run."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import TensorDataset

from effdl import ELRLossMixin
from effdl.data.indexed import IndexedDataset
from effdl.data.loading import ResumableLoader
from tests.support import quiet_fit

N, CLASSES = 24, 3


class Foreign(LightningModule):
    """Has never heard of effdl: BatchNorm, Dropout, a loss of its own."""

    def __init__(self, width: int = 16, smoothing: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, CLASSES)
        )
        self.smoothing = smoothing

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1], label_smoothing=self.smoothing)

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class Mine(ELRLossMixin, Foreign):
    """A foreign class with the mixin in."""


def examples(n=N, noise=True):
    g = torch.Generator().manual_seed(1)
    y = torch.randint(0, CLASSES, (n,), generator=g)
    x = torch.randn(n, 6, generator=g) + nn.functional.one_hot(y, 6) * 2.0
    return TensorDataset(x, (y + (torch.rand(n, generator=g) < 0.3)) % CLASSES if noise else y)


def loader(dataset=None, batch_size=4):
    return ResumableLoader(dataset or IndexedDataset(examples()), batch_size=batch_size, shuffle=True, seed=3)


def fit(module, data=None, epochs=2, callbacks=(), **kwargs):
    torch.manual_seed(5)
    return quiet_fit(module, data or loader(), *callbacks, max_epochs=epochs, **kwargs)


def same(a, b, atol=0.0):
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values()):
        assert torch.allclose(p.float(), q.float(), atol=atol, rtol=0), name


def without_dropout(module):
    module.net[3] = nn.Identity()
    return module


def without_batchnorm(module):
    module.net[1], module.net[3] = nn.Identity(), nn.Identity()
    return module

"""What the tests of SAMCallback share: a foreign module, a short run, and the same run in plain torch (slug: sam)."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from effdl.training.sam import sam_step
from tests.support import quiet_fit


class Net(LightningModule):
    """A foreign module; ``batches`` of 6 examples with 5 features in 3 classes."""

    def __init__(self, network=None, optimizer=None):
        super().__init__()
        torch.manual_seed(0)
        self.model = network or nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 3))
        self.make = optimizer or (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=5e-4))
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.losses.append(loss.item())
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return self.make(self.parameters())


def batches(count=4, size=6, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 5, generator=g), torch.randint(3, (size,), generator=g)) for _ in range(count)]


def fit(module, *callbacks, data=None, epochs=1, **kwargs):
    options = {"max_epochs": epochs, "num_sanity_val_steps": 0, **kwargs}
    return quiet_fit(module, DataLoader(data or batches(), batch_size=None), *callbacks, **options)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def by_hand(module, data, rho=0.05, adaptive=False, micro_batches=1):
    """The same run in plain torch."""
    optimizer = module.configure_optimizers()
    for i in range(0, len(data), micro_batches):

        def closure(group=data[i : i + micro_batches]):
            optimizer.zero_grad()
            total = sum(F.cross_entropy(module.model(x), y) / micro_batches for x, y in group)
            total.backward()
            return total

        sam_step(module.parameters(), closure, optimizer, rho, adaptive)
    return module


def normalised():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


def scaled(init_scale=1024.0):
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=init_scale))

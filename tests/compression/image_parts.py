"""What the tests of methods that factorise layers share: golden numbers, a foreign classifier, images, a run."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from tests.support import quiet_fit


def tensor(value):
    return torch.tensor(value, dtype=torch.float32)


def close(name, a, b, atol=1e-5):
    """Prints the largest difference (``-s`` shows it), and compares."""
    b = tensor(b) if isinstance(b, list) else b
    print(f"golden {name}: {float((a - b).abs().max()):.1e}")
    return torch.allclose(a, b, atol=atol, rtol=0)


class Foreign(LightningModule):
    """Has never heard of effdl: images (3, 8, 8), three classes; ``make`` builds the network under a fixed seed."""

    def __init__(self, make, lr=0.05):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.lr = make(), lr

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val/accuracy", (self.model(batch[0]).argmax(-1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


def data(batches=8):
    g = torch.Generator().manual_seed(1)
    rows = [(torch.randn(6, 3, 8, 8, generator=g), torch.randint(0, 3, (6,), generator=g)) for _ in range(batches)]
    return DataLoader(rows, batch_size=None)


def fit(module, *callbacks, loader=None, **kwargs):
    options = {"max_epochs": 2, "num_sanity_val_steps": 0, **kwargs}
    return quiet_fit(module, data() if loader is None else loader, *callbacks, **options)

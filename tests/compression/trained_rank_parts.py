"""trained-rank-pruning: what both of its test files use."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from effdl.callbacks import TrainedRankPruningCallback
from tests.support import golden

GOLDEN = golden("trained-rank-pruning")
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def tensor(value):
    return torch.tensor(value, dtype=torch.float32)


class Net(LightningModule):
    """A foreign module: two convolutions to cut, between a first one and a head that stay."""

    def __init__(self, conv=lambda: nn.Conv2d(16, 16, 3, padding=1)):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), conv(), nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(144, 3),
        )  # fmt: skip
        self.lr = 0.05

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val/accuracy", (self.model(batch[0]).argmax(-1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


CUT = ["model.3", "model.5"]


def data(batches=8):
    g = torch.Generator().manual_seed(1)
    rows = [(torch.randn(6, 3, 8, 8, generator=g), torch.randint(0, 3, (6,), generator=g)) for _ in range(batches)]
    return DataLoader(rows, batch_size=None)


def fit(module, *callbacks, loader=None, val=None, ckpt_path=None, **kwargs):
    options = {"max_epochs": 2, **QUIET, **kwargs}
    options["enable_checkpointing"] = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    trainer = Trainer(callbacks=list(callbacks), num_sanity_val_steps=0, **options)
    loader = data() if loader is None else loader
    trainer.fit(module, loader, val, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


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

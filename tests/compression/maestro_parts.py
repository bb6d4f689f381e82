"""What the tests of maestro's callback share: a network, data, a short run."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from effdl.callbacks import MaestroCallback

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Net(LightningModule):
    """A foreign module with BatchNorm."""

    def __init__(self, model=None, lr=0.05):
        super().__init__()
        torch.manual_seed(0)
        self.model = model or nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3),
        )  # fmt: skip
        self.lr = lr

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


def fit(module, *callbacks, loader=None, val=None, ckpt_path=None, **kwargs):
    options = {"max_epochs": 2, **QUIET, **kwargs}
    options["enable_checkpointing"] = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    trainer = Trainer(callbacks=list(callbacks), num_sanity_val_steps=0, **options)
    loader = data() if loader is None else loader
    trainer.fit(module, loader, val, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


def maestro(**kwargs):
    """Ranks fall in every epoch."""
    return MaestroCallback(**{"lasso_weight": 1e-3, "threshold": 0.5, "relative": True, **kwargs})

"""What the tests of gradual-pruning share: a network, data, a short run."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader


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


def fit(module, callbacks, epochs=3, val=None, ckpt_path=None, **kwargs):
    trainer = Trainer(
        max_epochs=epochs, callbacks=callbacks, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        **kwargs,
    )  # fmt: skip
    trainer.fit(module, data(), val, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


def zeros(module):
    return {n: int((p == 0).sum()) for n, p in module.named_parameters() if p.dim() > 1}

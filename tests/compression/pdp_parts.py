"""What the tests of pdp's callback share: networks, data, a short run."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader

from effdl.callbacks import PDPCallback
from tests.support import quiet_fit

SIZES = {"model.0.weight": 12 * 32, "model.2.weight": 32 * 4}
GRANULARITIES = ["unstructured", "channel", "2:4"]


def mlp():
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))


class Net(LightningModule):
    """A foreign module that notes what its layers see."""

    def __init__(self, make=mlp, optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), look=lambda self: None):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.make, self.look = make(), optimizer, look
        self.seen, self.outputs = [], []

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.model(batch[0].to(self.dtype)), batch[1])
        self.seen.append(self.look(self))
        return loss

    def validation_step(self, batch, batch_idx):
        self.outputs.append(self.model(batch[0].to(self.dtype)))
        self.log("val/accuracy", (self.outputs[-1].argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return self.make(self.parameters())


def data(batches=8, shape=(12,)):
    g = torch.Generator().manual_seed(1)
    rows = [(torch.randn(6, *shape, generator=g), torch.randint(0, 4, (6,), generator=g)) for _ in range(batches)]
    return DataLoader(rows, batch_size=None)


def fit(module, *callbacks, loader=None, **kwargs):
    return quiet_fit(module, loader or data(), *callbacks, **{"max_epochs": 3, "num_sanity_val_steps": 0, **kwargs})


def pdp(**kwargs):
    own = {"sparsity": 0.8, "temperature": "auto", "start": 4, "stop": 16, "every": 4, "targets": "*"}
    own |= {"sparsity": None} if ":" in kwargs.get("granularity", "") else {}
    return PDPCallback(**{**own, **kwargs})


def zeros(module):
    return {n: int((p == 0).sum()) for n, p in module.named_parameters() if p.dim() > 1}

"""meal-v2: small students, teachers and data for its tests."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import TensorDataset

from effdl import MEALV2ImageClassifier, MEALV2Mixin
from effdl.data.loading import ResumableLoader
from tests.support import quiet_fit

CLASSES, N = 4, 24


def network(seed=0, width=6):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(4 * width, CLASSES),
    )  # fmt: skip


def teachers():
    return [network(seed, width=8) for seed in (11, 12)]


class Foreign(LightningModule):
    """Has never heard of effdl."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        raise AssertionError("replaced")

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


class Mine(MEALV2Mixin, Foreign):
    """The same with the mixin in, and the helper for its two rates."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.meal_param_groups(0.05), momentum=0.9)


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.05, momentum=0.9)


def stock(**kwargs):
    given = {"teachers": teachers(), "model": network(), "num_classes": CLASSES, "discriminator_k": 1, "optimizer": sgd}
    return MEALV2ImageClassifier(**(given | kwargs))


def loader(labels=None, batch_size=6):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(N, 3, 8, 8, generator=g), torch.randint(0, CLASSES, (N,), generator=g)
    return ResumableLoader(TensorDataset(x, y if labels is None else labels), batch_size=batch_size, shuffle=True)


def fit(module, data=None, epochs=2, callbacks=(), **kwargs):
    torch.manual_seed(5)
    return quiet_fit(module, data or loader(), *callbacks, max_epochs=epochs, **kwargs)


def same(a, b):
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(p, q), name

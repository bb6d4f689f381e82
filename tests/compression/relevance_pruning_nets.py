"""Networks for the tests of relevance-pruning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("torch_pruning")


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


class Residual(nn.Module):
    """Convolutions with BatchNorm in a residual sum; layers by name."""

    def __init__(self, norm=True):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.na, self.nb = (nn.BatchNorm2d(6), nn.BatchNorm2d(6)) if norm else (nn.Identity(), nn.Identity())
        self.c, self.head = nn.Conv2d(6, 5, 3, padding=1), nn.Linear(5 * 16, 3)

    def forward(self, x):
        x = F.relu(self.na(self.a(x)))
        x = F.relu(x + self.nb(self.b(x)))
        return self.head(F.max_pool2d(F.relu(self.c(x)), 2).flatten(1))


def settle(net):
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.2)
            layer.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.2)
    return net.eval()


X = torch.rand(9, 1, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(9) % 3


def plain(bias=False):
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=bias), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3, bias=bias), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 3, bias=bias),
    )  # fmt: skip

"""A small network for the tests of sara, and a few sparse steps on it."""

from __future__ import annotations

import torch
from torch import nn

from effdl.diffusion.sara import sparsify


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(16, 80), nn.LayerNorm(80), nn.Linear(80, 72)]
    return nn.Sequential(*layers)


def trained(model: nn.Module, steps: int = 3, **kwargs) -> dict:
    """Sparse weights after a few steps on noise, merged."""
    sparse = sparsify(model, **kwargs)
    optimizer = torch.optim.AdamW([s.leaf for s in sparse.values()], 1e-2)
    g = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(3, 2, 4, 4, generator=g)).square().mean().backward()
        optimizer.step()
    for weight in sparse.values():
        weight.detach()
    return sparse

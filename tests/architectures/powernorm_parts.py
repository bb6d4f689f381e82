"""What the tests of powernorm share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effdl.architectures.powernorm import PowerNorm

BUFFERS = ("running_phi", "ema_gz", "iters")


def double(value: list) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def trained(steps: int = 6, channels: int = 8, **options) -> PowerNorm:
    """A float64 layer some steps behind its warm-up, with gamma, beta, phi and ema_gz all off their start."""
    norm = PowerNorm(channels, **{"group_num": 2, "warmup_iters": 3, **options}).double()
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * tokens(channels, seed=90))
        norm.bias.copy_(0.2 * tokens(channels, seed=91))
    for step in range(steps):
        norm(1.5 * tokens(4, 6, channels, seed=step)).backward(tokens(4, 6, channels, seed=50 + step))
    norm.zero_grad()
    return norm


def images(count: int = 2, seed: int = 0) -> Tensor:
    return tokens(count, 3, 16, 16, seed=seed, dtype=torch.float32)


def settle(model: nn.Module, *inputs: Tensor, steps: int = 5) -> nn.Module:
    for _ in range(steps):
        out = model.train()(*inputs)
        (out if isinstance(out, Tensor) else out.last_hidden_state).square().mean().backward()
    return model.eval()

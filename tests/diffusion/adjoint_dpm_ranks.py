"""What the two processes of ``test_adjoint_dpm.py`` run; apart, so that they start without importing the tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effdl.core.noise import LinearVP
from effdl.diffusion._adjoint_dpm_sampler import AdjointSampler


class Small(nn.Module):
    """eps(x, t, c) in four dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return self.net(torch.cat([x, t[:, None], c], 1))


def sampler() -> AdjointSampler:
    torch.manual_seed(0)
    return AdjointSampler(Small().double(), LinearVP(0.1, 8.0), steps=5, guidance_scale=1.0)


def batch() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return torch.randn(8, 4, generator=g).double(), torch.randn(8, 4, generator=g).double()


def gradients(module: nn.Module, x: Tensor, c: Tensor) -> dict[str, Tensor]:
    module(x, c).square().mean().backward()
    return {name.removeprefix("module."): p.grad for name, p in module.named_parameters()}


def run(rank: int, folder: str) -> None:
    x, c = (part[4 * rank : 4 * rank + 4] for part in batch())
    torch.save(gradients(nn.parallel.DistributedDataParallel(sampler()), x, c), f"{folder}/{rank}.pt")

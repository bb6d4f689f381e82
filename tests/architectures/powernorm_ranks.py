"""What the two processes of ``test_powernorm.py`` run; apart, so that they start without importing the tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effdl.architectures.powernorm import PowerNorm

OPTIONS = ({}, {"backward_scale": "batch"}, {"mode": "vanilla"})


def batches() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 5, n, generator=g).double(), torch.randn(8, 5, 3, generator=g).double()) for n in [8] * 5]


def train(data: list[tuple[Tensor, Tensor]], ddp: bool, **options: str) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(PowerNorm(8, group_num=2, warmup_iters=2, **options), nn.Linear(8, 3)).double()
    wrapped = nn.parallel.DistributedDataParallel(model) if ddp else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for x, y in data:
        optimizer.zero_grad()
        (wrapped(x) - y).square().mean().backward()
        optimizer.step()
    return model.state_dict()


def run(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    half = slice(4 * rank, 4 * rank + 4)
    mine = [(x[half], y[half]) for x, y in batches()]
    torch.save([train(mine, ddp=True, **options) for options in OPTIONS], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()

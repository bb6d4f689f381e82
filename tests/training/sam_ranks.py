"""What the two processes of ``test_sam_callback.py`` run; apart, so that they start without importing the tests."""

from __future__ import annotations

import torch

from effdl.callbacks import SAMCallback
from tests.joined import joined_ddp
from tests.training.sam_parts import Net, batches, fit, scaled, weights


def run(rank: int, folder: str) -> None:
    found = {}
    for sync in (False, True):
        for micro_batches in (1, 2):
            module = Net()
            fit(
                module, SAMCallback(0.5, sync_perturbation=sync), data=batches(2 * micro_batches, seed=10 + rank),
                strategy=joined_ddp(rank), devices=2, accumulate_grad_batches=micro_batches,
                use_distributed_sampler=False,
            )  # fmt: skip
            found[f"{sync}-{micro_batches}"] = weights(module)
    overflow = Net()  # only rank 1 overflows: the step is skipped on both, and nobody waits for ever
    data = [(x * (1e30 if rank else 1), y) for x, y in batches(1)]
    fit(
        overflow, SAMCallback(0.5), data=data, strategy=joined_ddp(rank), devices=2, plugins=[scaled(1e30)],
        use_distributed_sampler=False,
    )  # fmt: skip
    found["overflow"] = weights(overflow)
    torch.save(found, f"{folder}/{rank}.pt")

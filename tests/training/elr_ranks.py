"""What the two processes of ``test_elr_lightning.py`` run; apart, so that they start without importing the tests."""

from __future__ import annotations

import torch

from effdl.data.indexed import IndexedDataset
from tests.joined import joined_ddp
from tests.training.elr_parts import Mine, examples, fit, loader, without_batchnorm


def run(rank: int, folder: str) -> None:
    module, padded = without_batchnorm(Mine()), without_batchnorm(Mine())
    fit(module, loader(batch_size=4), epochs=2, strategy=joined_ddp(rank), devices=2)
    fit(padded, loader(IndexedDataset(examples(23)), batch_size=4), epochs=2, strategy=joined_ddp(rank), devices=2)
    state = {**module.elr.state(), "weight": module.net[0].weight.detach(), "padded": padded.elr.targets}
    torch.save(state, f"{folder}/{rank}.pt")

"""Two gloo processes forked off one fresh interpreter, so that torch and Lightning are imported once, not twice:
``python -m tests.ranks MODULE FOLDER`` calls ``MODULE.run(rank, folder)`` in both; ``tests.support.run_ranks`` asks."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist


def joined(rank: int, run: Callable[[int, str], None], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        run(rank, folder)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    module, folder = sys.argv[1:]
    # nothing has been computed yet in this process, so a fork of it is as good as new
    torch.multiprocessing.start_processes(
        joined, (importlib.import_module(module).run, folder), nprocs=2, start_method="fork"
    )

"""elr: two gloo processes for test_elr_lightning: ``python -m tests.training.elr_ddp_worker FOLDER``."""

from __future__ import annotations

import os
import socket
import sys

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy

from effdl.data.indexed import IndexedDataset
from tests.training.test_elr_lightning import Mine, _without_batchnorm, examples, fit, loader


class Joined(LightningEnvironment):
    """Two processes that exist already."""

    creates_processes_externally = True
    world_size = staticmethod(lambda: 2)
    global_rank = local_rank = staticmethod(lambda: dist.get_rank())
    node_rank = staticmethod(lambda: 0)

    def set_global_rank(self, rank: int) -> None: ...

    def set_world_size(self, size: int) -> None: ...


def worker(rank: int, folder: str, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    strategy = lambda: DDPStrategy(cluster_environment=Joined(), process_group_backend="gloo")  # noqa: E731
    module, padded = _without_batchnorm(Mine()), _without_batchnorm(Mine())
    fit(module, loader(batch_size=4), epochs=2, strategy=strategy(), devices=2)
    fit(padded, loader(IndexedDataset(examples(23)), batch_size=4), epochs=2, strategy=strategy(), devices=2)
    state = {**module.elr.state(), "weight": module.net[0].weight.detach(), "padded": padded.elr.targets}
    torch.save(state, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    # forked: what takes long is importing lightning
    mp.start_processes(worker, args=(sys.argv[1], free), nprocs=2, join=True, start_method="fork")

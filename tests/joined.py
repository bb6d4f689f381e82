"""Lightning in two processes that ``tests.ranks`` has started and joined already."""

from __future__ import annotations

from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy


class Joined(LightningEnvironment):
    """Two processes that exist already; Lightning must not start any."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._rank = rank

    creates_processes_externally = True

    def global_rank(self) -> int:
        return self._rank

    def local_rank(self) -> int:
        return self._rank

    def node_rank(self) -> int:
        return 0

    def world_size(self) -> int:
        return 2

    def set_global_rank(self, rank: int) -> None: ...

    def set_world_size(self, size: int) -> None: ...


def joined_ddp(rank: int) -> DDPStrategy:
    """DDP over gloo in them; with ``devices=2``."""
    return DDPStrategy(cluster_environment=Joined(rank), process_group_backend="gloo")

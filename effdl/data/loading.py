"""A DataLoader whose order is a function of (seed, epoch) and which resumes in the middle of an epoch.

Lightning saves a loader's ``state_dict`` in its checkpoints and puts it back before the first batch; torch's
own ``DataLoader`` has none, so a run resumed mid-epoch sees that epoch's first examples twice and its last never.

Example::

    from effdl.data.loading import ResumableLoader

    loader = ResumableLoader(dataset, batch_size=64, shuffle=True, seed=0)
    trainer.fit(module, loader, ckpt_path="mid_epoch.ckpt")     # goes on with the batch that was next
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, DistributedSampler

from effdl.core import distributed


class EpochSampler(DistributedSampler):
    """Positions ``0..n-1`` in an order drawn from (seed, epoch) alone, never from the global stream.

    Process ``r`` of ``W`` gets ``order[r::W]``, padded from the start to equal length: batches of ``B`` in each process
    are together the batches of ``B * W`` of a single one. Lightning leaves a ``DistributedSampler`` as it is (any
    other would be shuffled a second time, by another seed), so this one shards itself.

    Args:
        dataset: anything with a length, shuffled afresh in each epoch when ``shuffle``.
        seed: of the orders; epochs of different seeds never share one.
        num_replicas, rank: ``W`` and ``r``; by default those of ``torch.distributed`` while iterating.
    """

    def __init__(
        self,
        dataset: Sized,
        shuffle: bool = False,
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas=num_replicas or 1, rank=rank or 0, shuffle=shuffle, seed=seed)
        self._given = num_replicas is not None and rank is not None

    def shard(self) -> tuple[int, int]:
        """``(W, r)``."""
        return (self.num_replicas, self.rank) if self._given else (distributed.world_size(), distributed.rank())

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.shard()[0])

    def __iter__(self) -> Iterator[int]:
        n, (replicas, rank) = len(self.dataset), self.shard()
        order = np.random.default_rng([self.seed, self.epoch]).permutation(n) if self.shuffle else np.arange(n)
        return iter(np.resize(order, len(self) * replicas)[rank::replicas].tolist())


class ResumableLoader(DataLoader):
    """A ``DataLoader`` with ``state_dict``/``load_state_dict`` (the epoch, and the batches given out in it).

    Args:
        dataset: map-style data set. One with ``__getitems__`` fetches whole batches; give ``collate_fn=as_it_is``
            when these come collated.
        batch_size: examples per batch (per process).
        shuffle: a new order in each epoch, from (seed, epoch).
        seed: of that order.
        kwargs: of ``torch.utils.data.DataLoader``; ``sampler=EpochSampler(...)`` replaces ``shuffle`` and ``seed``.
    """

    def __init__(
        self, dataset: Any, *, batch_size: int = 1, shuffle: bool = False, seed: int = 0, **kwargs: Any
    ) -> None:
        # Lightning makes the loader again around a sampler (overfit_batches) or a batch sampler (predict) of its own.
        if kwargs.get("sampler") is None and kwargs.get("batch_sampler") is None:
            kwargs["sampler"] = EpochSampler(dataset, shuffle, seed)
        # Without a generator of its own a DataLoader takes one number of the global stream whenever it is iterated.
        kwargs.setdefault("generator", torch.Generator())
        super().__init__(dataset, batch_size=batch_size, **kwargs)
        self.seed = seed
        self._given = (0, 0)
        self._seen: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[Any]:
        # A generator: Lightning makes the iterator before it sets the epoch, so both are read at the first batch.
        epoch = getattr(self.batch_sampler.sampler, "epoch", 0)
        # The count of a checkpoint at the end of an epoch means nothing to the next one.
        start = self._seen[1] % len(self) if self._seen is not None and self._seen[0] == epoch else 0
        self._given, self._seen = (epoch, start), None
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        for number, batch in enumerate(self._after(start) if start else super().__iter__(), start + 1):
            self._given = (epoch, number)
            yield batch

    def _after(self, start: int) -> DataLoader:
        names = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn", "multiprocessing_context")
        names += ("generator", "prefetch_factor")
        rest = list(islice(self.batch_sampler, start, None))
        return DataLoader(self.dataset, batch_sampler=rest, **{name: getattr(self, name) for name in names})

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were given out."""
        return {"epoch": self._given[0], "batches": self._given[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """The next iteration, if it is of the same epoch, goes on after the batches already given out."""
        self._seen = (state["epoch"], state["batches"])


def as_it_is(batch: Any) -> Any:
    """``collate_fn`` of a data set whose ``__getitems__`` returns collated batches."""
    return batch

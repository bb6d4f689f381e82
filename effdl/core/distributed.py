"""The few collectives that methods need; each is the identity in a single process."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from effdl.core.errors import ConfigurationError


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Index of this process."""
    return dist.get_rank() if world_size() > 1 else 0


def all_reduce_sum(*tensors: Tensor) -> None:
    """Sum each tensor over the processes, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def all_reduce_mean(*tensors: Tensor) -> None:
    """Average each tensor over the processes, in place."""
    all_reduce_sum(*tensors)
    if world_size() > 1:
        for tensor in tensors:
            tensor.div_(world_size())


def broadcast(*tensors: Tensor) -> None:
    """Give each tensor the first process's values, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def all_gather_rows(tensor: Tensor) -> Tensor:
    """Rows [n_rank, ...] of all processes, one after another in rank order; n may differ between ranks."""
    if world_size() == 1:
        return tensor
    count = torch.tensor([tensor.shape[0]], device=tensor.device)
    counts = [torch.empty_like(count) for _ in range(world_size())]
    dist.all_gather(counts, count)
    most = int(torch.cat(counts).max())
    padded = tensor.new_zeros((most, *tensor.shape[1:]))
    padded[: tensor.shape[0]] = tensor
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(n)] for part, n in zip(parts, counts)])


def check_equal_on_ranks(tensors: Iterable[Tensor], what: str) -> None:
    """Raise on every rank if the sum of any of the tensors differs between processes; free in a single one.

    Raises:
        ConfigurationError: naming what diverged.
    """
    if world_size() == 1:
        return
    value = torch.stack([tensor.detach().sum(dtype=torch.float64) for tensor in tensors])
    value = value.nan_to_num(nan=1e300)  # NaN on every rank is equal; whoever ranks weights names it
    low, high = value.clone(), value.clone()
    dist.all_reduce(low, op=dist.ReduceOp.MIN)
    dist.all_reduce(high, op=dist.ReduceOp.MAX)
    if not torch.equal(low, high):
        raise ConfigurationError(f"{what} differs between processes: weights were changed on some ranks only.")

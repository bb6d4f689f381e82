"""What the two processes of ``test_distributed.py`` run; apart, so that they start without importing the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effdl.core.distributed import (
    all_gather_rows,
    all_reduce_mean,
    all_reduce_sum,
    check_equal_on_ranks,
    rank,
    world_size,
)
from effdl.core.errors import ConfigurationError


def rows(count: int, of: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.arange(count * 2).view(count, 2) + 10 * of).to(dtype)


def refusal(*tensors: Tensor) -> str:
    """What ``check_equal_on_ranks`` raises, or an empty string."""
    try:
        check_equal_on_ranks(iter(tensors), "a weight")
    except ConfigurationError as error:
        return str(error)
    return ""


def reduced(reduce: Callable[..., None], *tensors: Tensor) -> list[Tensor]:
    reduce(*tensors)
    return list(tensors)


def results(r: int) -> dict[str, Any]:
    nan = torch.tensor([1.0, float("nan")])
    return {
        "who": [rank(), world_size()],
        "unequal": all_gather_rows(rows(3 - 2 * r, r)),
        "one is empty": all_gather_rows(rows(2 * r, r)),
        "both are empty": all_gather_rows(rows(0, r)),
        "integers": all_gather_rows(rows(1 + r, r, torch.int64)),
        "booleans": all_gather_rows(rows(1 + r, r, torch.int64) % 2 == r),
        "a column": all_gather_rows(rows(2 + r, r)[:, 1]),
        "sum": reduced(all_reduce_sum, torch.ones(2) * r, torch.tensor(3.0)),
        "mean": reduced(all_reduce_mean, torch.ones(2) * r, torch.tensor(3.0)),
        "equal": refusal(torch.ones(3), torch.zeros(2, 2)),
        "one differs": refusal(torch.ones(3), torch.zeros(2, 2) + r * 1e-7),
        "NaN on both": refusal(nan),
        "NaN on one": refusal(nan if r else torch.ones(2)),
        "half precision": refusal(torch.full((4096,), 1.0 + r * 2**-10, dtype=torch.float16)),
    }


def run(r: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=r, world_size=2)
    torch.save(results(r), f"{folder}/{r}.pt")
    torch.distributed.destroy_process_group()

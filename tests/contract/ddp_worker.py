"""C3: every case on two gloo processes, in one spawn: ``python -m tests.contract.ddp_worker FOLDER PORT NAMES``."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.contract.cases import CASES, Case, state_of
from tests.joined import joined_ddp

STEPS = 5


def run_case(case: Case, accumulate: int, strategy: Any, batch_size: int | None = None) -> dict[str, Any]:
    """Five optimizer steps on the plain module; its state, or the refusal."""
    module = case.module(plain=True)
    if batch_size is not None:
        loader = case.loader
        object.__setattr__(case, "loader", lambda: loader(batch_size))
    kwargs: dict[str, Any] = {} if case.example.manual else {"accumulate_grad_batches": accumulate}
    try:
        case.fit(module=module, max_epochs=-1, max_steps=STEPS * max(1, case_optimizers(case)), val=False,
                 strategy=strategy, devices=1 if strategy == "auto" else 2, **kwargs)  # fmt: skip
    finally:
        if batch_size is not None:
            case.__dict__.pop("loader", None)
    return state_of(module)


def case_optimizers(case: Case) -> int:
    if not case.example.manual:
        return 1
    optimizers = case.module().configure_optimizers()
    return len(optimizers) if isinstance(optimizers, (list, tuple)) else 1


def worker(rank: int, names: list[str], folder: str, port: int) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for name in names:
        for accumulate in (1, 2):
            try:
                strategy = joined_ddp(rank)
                result: dict[str, Any] = {"state": run_case(CASES[name], accumulate, strategy)}
            except Exception:  # the parent shows it; the other rank may be stuck in a collective, so end both
                result = {"error": traceback.format_exc()}
            torch.save(result, Path(folder) / f"{name}-{accumulate}-{rank}.pt")
            if "error" in result:
                os._exit(1)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _, folder, port, *names = sys.argv
    for name in names:
        _ = CASES[name].cls  # imported once, not twice
    # nothing has been computed yet in this process, so a fork of it is as good as new
    mp.start_processes(worker, (names, folder, int(port)), nprocs=2, start_method="fork")

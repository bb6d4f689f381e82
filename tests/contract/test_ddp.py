"""C3: two CPU processes, with and without accumulation: ranks bit-equal, and equal to one process with both batches."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
import torch

from tests.contract.cases import CASES, Case, every
from tests.contract.ddp_worker import run_case
from tests.support import ROOT

pytestmark = pytest.mark.ddp


@pytest.fixture(scope="module")
def spawned(tmp_path_factory, request):
    """All cases asked for in one spawn; a case that breaks ends the spawn, so the rest gets another."""
    folder = tmp_path_factory.mktemp("ddp")
    asked = {item.callspec.params["case"].entry.name for item in request.session.items if _is_spawned(item)}
    left = [name for name, case in CASES.items() if name in asked and "C3" not in case.entry.contract_exceptions]
    log = ""
    for _ in range(len(left)):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        command = [sys.executable, "-m", "tests.contract.ddp_worker", str(folder), port, *left]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False)
        log += done.stderr[-3000:]
        left = [name for name in left if not list(folder.glob(f"{name}-*.pt"))]
        if not left:
            break
    return folder, log


def _is_spawned(item: pytest.Item) -> bool:
    return "spawned" in getattr(item, "fixturenames", ()) and "case" in item.callspec.params


def load(spawned, name: str, accumulate: int, rank: int) -> dict[str, torch.Tensor]:
    folder, log = spawned
    path = folder / f"{name}-{accumulate}-{rank}.pt"
    assert path.exists(), f"rank {rank} wrote nothing: {log}"
    result = torch.load(path, weights_only=True)
    assert "error" not in result, result.get("error")
    return result["state"]


@pytest.mark.parametrize("accumulate", [1, 2])
@every("C3")
def test_c03_ranks_are_bit_equal(case: Case, accumulate: int, spawned):
    a, b = (load(spawned, case.entry.name, accumulate, rank) for rank in (0, 1))
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key].nan_to_num(), b[key].nan_to_num()), f"{key} differs between ranks"


@pytest.mark.parametrize("accumulate", [1, 2])
@every("C3")
def test_c03_equals_one_process_with_both_batches(case: Case, accumulate: int, spawned):
    if not case.example.ddp_equals_single:
        pytest.skip("two processes mean something else here: its docstring and its own tests say what")
    single = run_case(case, accumulate, "auto", batch_size=8)
    double = load(spawned, case.entry.name, accumulate, 0)
    for key, value in single.items():
        assert torch.allclose(value.float(), double[key].float(), atol=2e-5), key

"""Collectives: two gloo processes in one spawn, and the identity in a single process."""

from __future__ import annotations

import pytest
import torch

from tests.core import distributed_ranks
from tests.core.distributed_ranks import rows


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(distributed_ranks.run, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{r}.pt", weights_only=True) for r in (0, 1)]


@pytest.mark.ddp
def test_rows_of_both_in_rank_order_however_many(both):
    want = {
        "unequal": torch.cat([rows(3, 0), rows(1, 1)]),
        "one is empty": rows(2, 1),
        "both are empty": rows(0, 0),
        "integers": torch.cat([rows(1, 0, torch.int64), rows(2, 1, torch.int64)]),
        "booleans": torch.cat([rows(1, 0) % 2 == 0, rows(2, 1) % 2 == 1]),
        "a column": torch.cat([rows(2, 0), rows(3, 1)])[:, 1],
    }
    for case, value in want.items():
        for result in both:
            assert torch.equal(result[case], value), case
            assert result[case].dtype == value.dtype


@pytest.mark.ddp
def test_sums_and_means_in_place(both):
    assert [result["who"] for result in both] == [[0, 2], [1, 2]]
    for result in both:
        assert [t.tolist() for t in result["sum"]] == [[1.0, 1.0], 6.0]
        assert [t.tolist() for t in result["mean"]] == [[0.5, 0.5], 3.0]


@pytest.mark.ddp
def test_what_differs_raises_on_both_and_what_does_not_on_none(both):
    for result in both:
        for case in ("equal", "NaN on both"):
            assert result[case] == "", case
        for case in ("one differs", "NaN on one", "half precision"):
            assert result[case].startswith("a weight differs between processes"), case


def test_a_single_process_pays_nothing():
    alone = distributed_ranks.results(0)
    assert alone["who"] == [0, 1]
    assert torch.equal(alone["unequal"], rows(3, 0))
    assert [t.tolist() for t in alone["mean"]] == [[0.0, 0.0], 3.0]

    def never():
        raise AssertionError("computed without need")
        yield

    distributed_ranks.check_equal_on_ranks(never(), "a weight")

"""The benchmarks run, small, and measure what they say."""

from __future__ import annotations

import json
import time

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from benchmarks import kernels, overhead, peers
from benchmarks.__main__ import aligned, main
from benchmarks.race import peak_bytes, periods, race, ratios


class Sleepy(LightningModule):
    def __init__(self, seconds: float, fail_at: int = -1, numbers: int = 1):
        super().__init__()
        self.seconds, self.fail_at, self.layer = seconds, fail_at, nn.Linear(1, 1)
        self.numbers, self.kept = numbers, []

    def training_step(self, batch, batch_idx):
        if batch_idx == self.fail_at:
            raise RuntimeError("broken on purpose")
        self.kept = torch.ones(self.numbers)
        time.sleep(self.seconds)
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_race_takes_turns_and_sees_the_slower_one():
    makers = {"bare": lambda: (Sleepy(0.01), []), "slow": lambda: (Sleepy(0.05), [])}
    times = race(makers, torch.zeros(2, 1), rounds=4)
    found = ratios(times, "slow", "bare")
    assert found["pairs"] == 4
    assert found["minimum"] <= found["median"]
    assert 1.5 < found["median"] < 6
    assert found["step_ms"] > 50


def test_a_cost_of_every_nth_step_is_spread_over_the_period():
    times = {"bare": [(1.0, 1.0)] * 10, "method": [(6.0, 2.0), *[(1.0, 1.0)] * 4] * 2}
    found = ratios(periods(times, 5), "method", "bare")
    assert (found["median"], found["minimum"], found["cpu"], found["pairs"]) == (2.0, 2.0, 1.2, 2)


def test_an_error_in_a_run_reaches_the_caller():
    with pytest.raises(RuntimeError, match="broken on purpose"):
        race({"bare": lambda: (Sleepy(0.0, fail_at=2), [])}, torch.zeros(2, 1), rounds=4)


def test_peak_memory_sees_what_a_run_keeps():
    small, large = (peak_bytes(lambda n=n: (Sleepy(0.0, numbers=n), []), torch.zeros(2, 1)) for n in (1, 25_000_000))
    if small is None or large is None:
        pytest.skip("needs fork and /proc")
    assert large - small > 80e6


def test_overhead_command(tmp_path, capsys):
    out = tmp_path / "overhead.json"
    main(["overhead", "--pairs", "1", "--batch", "2", "--rows", "ELR", "--no-memory", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "ELR" in printed
    assert "<= 1.03" in printed
    (row,) = json.loads(out.read_text())["rows"]
    assert row["median"] > 0
    assert row["met"] == (row["median"] <= 1.03)
    with pytest.raises(SystemExit, match="no row"):
        main(["overhead", "--rows", "no such method"])


def test_a_margin_on_what_cannot_be_avoided():
    (row,) = overhead.measure(pairs=1, batch=2, names=["MEAL V2"], memory=False)
    assert row["target"] > 0.05  # the teachers' forward, measured in the same race, and the margin
    assert row["met"] == (row["median"] <= row["target"])
    assert "<= " in overhead.table([row])[1][5]


def test_every_overhead_row_can_be_made():
    names = [row.name for row in overhead.rows()]
    assert len(set(names)) == len(names) == 16
    for row in overhead.rows(["SAM", "PolyNorm v GELU"]):
        module, callbacks = row.make()
        assert isinstance(module, LightningModule)
        assert callbacks


def test_resume_against_lightnings_pruning():
    ours, theirs, not_permanent = peers.resume()
    assert ours["equal"]
    assert ours["uninterrupted_sparsity"] == pytest.approx(0.8, abs=0.01)
    assert theirs["uninterrupted_sparsity"] == pytest.approx(0.8, abs=0.02)
    assert theirs["resumed_sparsity"] < 0.7  # its masks are not in the checkpoint
    assert "state_dict" in not_permanent["raises"]
    assert "bit-equal" in aligned(peers.table([ours, theirs, not_permanent]))


def test_gradcam_agrees_with_the_peer():
    pytest.importorskip("pytorch_grad_cam")
    (row,) = peers.gradcam(pairs=1, batch=2)
    assert row["lowest_correlation"] > 0.999


def test_relevance_and_slicing_against_their_peers():
    pytest.importorskip("zennit")
    pytest.importorskip("torch_pruning")
    (row,) = peers.relevance(pairs=1, batch=2)
    assert row["lowest_correlation"] > 0.99999
    assert row["largest_difference"] < 1e-5
    coupled, single = peers.slicing(pairs=1)
    assert coupled["ours_parameters"] == coupled["theirs_parameters"]
    assert max(coupled["ours_difference"], coupled["theirs_difference"], single["ours_difference"]) < 1e-5
    assert single["theirs_difference"] > 0.01  # live partners of dead filters went too
    assert "outputs differ" in aligned(peers.table([row, coupled, single]))


def test_integer_kernels_and_low_rank_beside_float():
    pytest.importorskip("torchao")
    rows = kernels.int8(pairs=1, batch=2)
    assert all(row["difference"] < 0.05 for row in rows if "resnet18" not in row["name"])
    assert sum("torchao / theirs" in row["name"] for row in rows) == 2
    (row,) = kernels.low_rank(pairs=1, batch=2)
    assert 0.2 < row["parameters"] < 0.6
    assert "parameters" in aligned(peers.table([*rows, row]))

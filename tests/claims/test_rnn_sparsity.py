"""rnn-sparsity, check 7: what pruning costs at once and after one epoch, on strings of the Reber grammar."""

from __future__ import annotations

import statistics
import time
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer

from effdl.callbacks.rnn_sparsity import sweep
from effdl.compression.rnn_sparsity_models import RecurrentClassifier
from effdl.data.reber import ReberData

pytestmark = pytest.mark.slow
SEEDS = (0, 1)
QUIET = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "enable_checkpointing": False, "gradient_clip_val": 5.0,
}  # fmt: skip


def protocol(mode: str, seed: int, invalid: str) -> dict[tuple[float, str, int], float]:
    """(sparsity, weights, epoch) -> accuracy in per cent; 8 epochs dense, then each pruning with one more epoch."""
    data = ReberData(train=4000, val=1000, test=0, invalid=invalid, batch_size=64, seed=seed)
    torch.manual_seed(seed)
    optimizer = partial(torch.optim.Adam, lr=2e-3)
    module = RecurrentClassifier(mode, hidden_size=32, num_layers=2, optimizer=optimizer)
    Trainer(max_epochs=8, limit_val_batches=0, **QUIET).fit(module, data)
    rows = sweep(module, data, sparsities=(0.5, 0.8), epochs=1, trainer=QUIET)
    return {(row["sparsity"], row["weights"], row["epoch"]): 100 * row["accuracy"] for row in rows}


def measure(invalid: str, modes=("GRU", "LSTM")) -> dict[tuple[str, int], dict[tuple[float, str, int], float]]:
    runs = {}
    for mode in modes:
        for seed in SEEDS:
            began = time.perf_counter()
            runs[mode, seed] = protocol(mode, seed, invalid)
            print(f"{invalid} {mode} seed {seed}: {time.perf_counter() - began:.0f} s")
    for mode in modes:
        for key in runs[mode, SEEDS[0]]:
            values = [runs[mode, seed][key] for seed in SEEDS]
            told = f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"
            print(f"{invalid} | {mode} | {key[0]:.0%} {key[1]}, epoch {key[2]} | {told} | {values}")
    return runs


def test_claim_07_both_groups_at_80_percent_heal_in_one_epoch():
    runs = measure("random")
    dense = (0.0, "none", 0)
    for (mode, seed), run in runs.items():
        assert run[0.8, "both", 1] >= 95, (mode, seed)
        if mode == "GRU":
            assert run[0.5, "both", 0] >= run[dense] - 2, seed
    means = {group: statistics.mean(run[0.8, group, 0] for run in runs.values()) for group in ("h2h", "i2h")}
    print(f"80 % at once: h2h {means['h2h']:.1f}, i2h {means['i2h']:.1f}")
    assert means["h2h"] >= means["i2h"] + 10


def test_edited_strings_are_the_harder_task():
    """Not asked for by the check, whose numbers these are: 50 % costs accuracy here, 80 % all of it, and both heal."""
    for seed, run in measure("edit", modes=("GRU",)).items():
        assert run[0.0, "none", 0] >= 95, seed
        assert run[0.8, "both", 0] <= 65, seed
        assert run[0.8, "both", 1] >= 90, seed

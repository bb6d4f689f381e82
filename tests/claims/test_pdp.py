"""pdp, claims 6 and 8: against gradual and one-shot magnitude pruning on the digits, from the same trained weights."""

from __future__ import annotations

import statistics
import time
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn

from effdl.callbacks import PDPCallback, PruningCallback
from tests.claims.shuffled import Shuffled

pytestmark = pytest.mark.slow
SEEDS = range(8)  # a network at 95 % moves by two points from seed to seed
EPOCHS = 15


class Plain(LightningModule):
    """The digits MLP; it notes test accuracy as validation sees the weights, and as training does."""

    def __init__(self, test=None):
        super().__init__()
        widths = (64, 128, 128, 10)
        layers = [layer for a, b in zip(widths, widths[1:]) for layer in (nn.Linear(a, b), nn.ReLU())]
        self.network, self.test, self.soft = nn.Sequential(*layers[:-1]), test, None

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def on_train_epoch_end(self):
        if self.test is not None:
            self.soft = accuracy(self, *self.test)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def fit(module, data, epochs, *callbacks):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    Trainer(max_epochs=epochs, accelerator="cpu", logger=False, callbacks=list(callbacks), **quiet).fit(module, data)
    return module


@torch.no_grad()
def accuracy(module, x, y):
    return 100 * (module.network(x).argmax(-1) == y).float().mean().item()


@cache
def trained(inputs, seed):
    """(train, test, state of the dense network after 20 epochs, its test accuracy)."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32), torch.tensor(digits.target)
    x = x / 16 if inputs == "in [0, 1]" else (x - x.mean(0)) / (x.std(0) + 1e-6)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = (x[order[:1297]], y[order[:1297]]), (x[order[1297:]], y[order[1297:]])
    torch.manual_seed(seed)
    dense = fit(Plain(), Shuffled(*train, 64, seed), 20)
    return train, test, {k: v.clone() for k, v in dense.state_dict().items()}, accuracy(dense, *test)


def pdp(**kwargs):
    # epsilon 0.1: the full ratio holds from the tenth of the fifteen epochs
    return PDPCallback(**{"start": 0, "stop": "10ep", "every": "1ep", "targets": "*", **kwargs})


WAYS = {
    "one-shot + finetune": lambda: PruningCallback(0.95, start=0, stop=0),
    "gradual": lambda: PruningCallback(0.95, start=0, stop=0.75, every=10),
    "one-shot + finetune, global budget": lambda: PruningCallback(0.95, start=0, stop=0, scope="global"),
    "gradual, global budget": lambda: PruningCallback(0.95, start=0, stop=0.75, every=10, scope="global"),
    "PDP 1e-4": lambda: pdp(sparsity=0.95, temperature=1e-4),
    "PDP 1e-3": lambda: pdp(sparsity=0.95, temperature=1e-3),
    "PDP auto": lambda: pdp(sparsity=0.95, temperature="auto"),
    "2:4 one-shot + finetune": lambda: PruningCallback(granularity="2:4", start=0, stop=0),
    "2:4 PDP 1e-4": lambda: pdp(granularity="2:4", temperature=1e-4),
    "2:4 PDP 1e-3": lambda: pdp(granularity="2:4", temperature=1e-3),
    "2:4 PDP 1e-3, frozen at 13": lambda: pdp(granularity="2:4", temperature=1e-3, freeze="13ep"),
    "2:4 PDP auto": lambda: pdp(granularity="2:4", temperature="auto"),
}


@cache
def measured(inputs, way):
    """Over the seeds: mean accuracy of the finished networks; mean of |what training last saw - finished|. Printed."""
    finished, gaps, begin = [], [], time.perf_counter()
    for seed in SEEDS:
        train, test, state, _ = trained(inputs, seed)
        module = Plain(test)
        module.load_state_dict(state)
        fit(module, Shuffled(*train, 64, seed), EPOCHS, callback := WAYS[way]())
        finished.append(accuracy(module, *test))
        gaps.append(abs(module.soft - finished[-1]))
        assert callback.report()["sparsity"] == pytest.approx(0.5 if "2:4" in way else 0.95, abs=1e-3)
    seconds = (time.perf_counter() - begin) / len(SEEDS)
    spread, three = statistics.stdev(finished), statistics.mean(finished[:3])
    row = f"{statistics.mean(finished):.2f} ± {spread:.2f} | seeds 0-2 {three:.2f} | {[round(v, 1) for v in finished]}"
    print(f"{inputs} | {way} | {row} | gap {statistics.mean(gaps):.2f} (max {max(gaps):.1f}) | {seconds:.1f} s")
    return statistics.mean(finished), statistics.mean(gaps)


def known(*case):
    return pytest.param(*case, marks=pytest.mark.xfail(reason="measured: see docs/results.md", strict=True))


@pytest.mark.parametrize(
    ("inputs", "way"),
    [
        known("in [0, 1]", "PDP 1e-4"),  # 5.2 above one-shot, not 6
        ("in [0, 1]", "PDP 1e-3"),
        ("in [0, 1]", "PDP auto"),
        known("standardised", "PDP 1e-4"),  # 1.0 below gradual, not 0.5
        ("standardised", "PDP 1e-3"),
        ("standardised", "PDP auto"),
    ],
)
def test_claim_06_pdp_matches_gradual_and_beats_one_shot_at_95_percent(inputs, way):
    dense = [trained(inputs, seed)[3] for seed in SEEDS]
    print(f"\n{inputs} | dense | {statistics.mean(dense):.2f} ± {statistics.stdev(dense):.2f}")
    found, gap = measured(inputs, way)
    assert gap < 1
    for other in ("one-shot + finetune, global budget", "gradual, global budget"):
        measured(inputs, other)  # for the table: how much of the lead is the budget's
    assert found >= measured(inputs, "gradual")[0] - 0.5
    assert found >= measured(inputs, "one-shot + finetune")[0] + 6


@pytest.mark.parametrize(
    "way",
    ["2:4 PDP 1e-4", known("2:4 PDP 1e-3"), "2:4 PDP 1e-3, frozen at 13", "2:4 PDP auto"],  # 1e-3: 0.4 below, not 0.3
)
def test_claim_08_two_of_four_is_no_worse_than_one_shot_with_finetuning(way):
    found, _ = measured("in [0, 1]", way)
    assert found >= measured("in [0, 1]", "2:4 one-shot + finetune")[0] - 0.3

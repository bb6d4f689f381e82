"""reste, measured: accuracy of a binary CNN beside the clipped straight-through estimator, and what a steep o costs.

Run: ``EFFDL_DATA=... pytest -m slow tests/claims/test_reste.py -s``; the tables are in docs/results.md.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader

from effdl.callbacks import ReSTECallback
from tests.claims.shuffled import Shuffled
from tests.support import load_npz

pytestmark = pytest.mark.slow
SEEDS = range(5)
ESTIMATORS = {
    "ReSTE": {},
    "clipped STE": {"o_end": 1.0, "t": 1.0},  # o = 1 cut at 1 is exactly 1[|z| <= 1]
    "o = 10 from the start": {"o_end": 10.0, "schedule": "constant"},
}


class Net(LightningModule):
    """A full-precision stem and head; two binary convolutions of 32 channels, whose inputs come from a BatchNorm."""

    def __init__(self, channels: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(channels, 32, 3, stride, 1), nn.BatchNorm2d(32),
            nn.Conv2d(32, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3, 1, 1), nn.BatchNorm2d(32),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)


class Stability(Callback):
    """Every step's ``reste/gradient_stability``."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.values.append(trainer.callback_metrics["reste/gradient_stability"])


def run(seed, x, y, test, epochs, estimator, **net):
    torch.manual_seed(seed)
    module, stability = Net(**net), Stability()
    trainer = Trainer(
        max_epochs=epochs, callbacks=[ReSTECallback(**ESTIMATORS[estimator]), stability], accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1,
    )  # fmt: skip
    start = time.perf_counter()
    trainer.fit(module, DataLoader(list(Shuffled(x, y, 64, seed)), batch_size=None))
    with torch.no_grad():  # the finished network: bits
        right = (module.eval()(test[0]).argmax(1) == test[1]).float().mean()
    return 100 * float(right), float(torch.stack(stability.values).mean()), time.perf_counter() - start


def table(title, rows):
    for name, found in rows.items():
        accuracy, stability, seconds = zip(*found)
        print(
            f"{title} | {name} | {statistics.mean(accuracy):.2f} ± {statistics.pstdev(accuracy):.2f} | "
            f"{statistics.mean(stability):.2e} | {statistics.mean(seconds):.0f} s | {[round(a, 1) for a in accuracy]}"
        )
    return {name: [statistics.mean(values) for values in zip(*found)] for name, found in rows.items()}


def test_must_08_a_binary_cnn_on_digits():
    digits = load_digits()
    x, y = torch.tensor(digits.images / 8 - 1, dtype=torch.float32)[:, None], torch.tensor(digits.target)
    rows = {name: [] for name in ESTIMATORS}
    for seed in SEEDS:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        train, test = order[:1297], order[1297:]
        for name, found in rows.items():
            found.append(run(seed, x[train], y[train], (x[test], y[test]), 12, name))
    means = table("digits", rows)
    assert means["ReSTE"][0] >= 94
    assert means["ReSTE"][0] >= means["clipped STE"][0] - 0.3
    assert means["o = 10 from the start"][1] >= 5 * means["ReSTE"][1]


@pytest.mark.xfail(reason="no difference here: docs/results.md", strict=True)
def test_must_08_direction_on_a_part_of_cifar10():
    data = load_npz("cifar10.npz")
    as_x = lambda images: torch.tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1  # noqa: E731
    x, y = as_x(data["x_train"][:3000]), torch.tensor(data["y_train"][:3000]).long()
    test = as_x(data["x_test"]), torch.tensor(data["y_test"]).long()
    names = ("ReSTE", "clipped STE")
    rows = {name: [run(s, x, y, test, 8, name, channels=3, stride=2) for s in range(3)] for name in names}
    means = table("CIFAR-10, 3,000 images", rows)
    assert means["ReSTE"][0] >= means["clipped STE"][0]

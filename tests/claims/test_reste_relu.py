"""reste, measured: a network of convolution, BatchNorm, ReLU is dead when binary, and lives with ``reorder_relu``.

Run: ``pytest -m slow tests/claims/test_reste_relu.py -s``; the table is in docs/results.md.
"""

from __future__ import annotations

import statistics
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

from effdl.callbacks import ReSTECallback
from effdl.data.loading import ResumableLoader

pytestmark = pytest.mark.slow


class Net(LightningModule):
    """Of test_reste.py's shape, as networks are mostly written; without ``relu`` BatchNorm alone precedes layers."""

    def __init__(self, relu: bool) -> None:
        super().__init__()
        act = nn.ReLU if relu else nn.Identity
        self.model = nn.Sequential(
            nn.Conv2d(1, 32, 3, 1, 1), nn.BatchNorm2d(32), act(), nn.Conv2d(32, 32, 3, 1, 1), nn.BatchNorm2d(32), act(),
            nn.Conv2d(32, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)


def accuracy(seed: int, relu: bool, reorder_relu: bool) -> float:
    digits = load_digits()
    x, y = torch.tensor(digits.images / 8 - 1, dtype=torch.float32)[:, None], torch.tensor(digits.target)
    train, test = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).tensor_split([1297])
    torch.manual_seed(seed)
    module = Net(relu)
    trainer = Trainer(
        max_epochs=12, callbacks=[ReSTECallback(reorder_relu=reorder_relu)], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    loader = ResumableLoader(TensorDataset(x[train], y[train]), batch_size=64, shuffle=True, seed=seed, drop_last=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*takes the output of the ReLU.*")
        trainer.fit(module, loader)
    with torch.no_grad():
        return 100 * float((module.model.eval()(x[test]).argmax(1) == y[test]).float().mean())


def test_a_relu_before_binary_layers_kills_and_moved_away_does_not():
    means = {}
    cases = {"BN, ReLU": (True, False), "BN, ReLU, reorder_relu": (True, True), "BN alone": (False, False)}
    for name, case in cases.items():
        start = time.perf_counter()
        found = [accuracy(seed, *case) for seed in range(3)]
        means[name] = statistics.mean(found)
        seconds = (time.perf_counter() - start) / 3
        print(f"{name} | {means[name]:.1f} ± {statistics.pstdev(found):.1f} | {seconds:.0f} s")
    assert means["BN, ReLU"] < 20
    assert means["BN, ReLU, reorder_relu"] >= 94
    assert means["BN, ReLU, reorder_relu"] >= means["BN alone"] - 1

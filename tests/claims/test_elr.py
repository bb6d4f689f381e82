"""elr: cross-entropy learns wrong labels by heart, ELR does not, and its table finds them (checks 7-10)."""

from __future__ import annotations

import time
from functools import cache

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import TensorDataset

from effdl import ELRLossMixin, ELRPlusModule
from effdl.data.images import ImageData
from effdl.data.indexed import IndexedDataset
from effdl.data.loading import ResumableLoader
from tests.support import load_npz

pytestmark = pytest.mark.slow
SEEDS = (0, 1, 2)
EPOCHS, BATCH = 120, 64
METHODS = {"CE": None, "ELR(3, .7)": {"lam": 3.0, "beta": 0.7}, "ELR(3, .9)": {"lam": 3.0, "beta": 0.9}}


class MLP(LightningModule):
    """64-256-256-10 with plain cross-entropy, Adam 1e-3; has never heard of effdl."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch["image"]), batch["label"])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


class ELRMLP(ELRLossMixin, MLP):
    """The same with the mixin in."""


class Accuracy(Callback):
    """Test accuracy after every epoch."""

    def __init__(self, dataset):
        self.batch = dataset.__getitems__(range(len(dataset)))
        self.values: list[float] = []

    @torch.no_grad()
    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.eval()
        hit = pl_module(self.batch["image"]).argmax(1) == self.batch["label"]
        pl_module.train()
        self.values.append(hit.float().mean().item())


def train(module, data, epochs=EPOCHS):
    accuracy = Accuracy(data.test_dataset)
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[accuracy],
    )  # fmt: skip
    started = time.perf_counter()
    trainer.fit(module, data.train_dataloader())
    return accuracy.values, time.perf_counter() - started


@cache
def run(method: str, seed: int) -> dict[str, float]:
    """Peak and last test accuracy, share of wrong labels learned by heart, quality of the label report."""
    data = ImageData(
        "digits",
        BATCH,
        image_size=8,
        channels=1,
        val=0,
        noise="symmetric",
        noise_rate=0.4,
        mean=0.0,
        std=1.0,
        seed=seed,
    )
    assert (len(data.train_dataset), len(data.test_dataset)) == (1297, 500)
    torch.manual_seed(seed)
    settings = METHODS[method]
    module = MLP() if settings is None else ELRMLP(**settings)
    curve, seconds = train(module, data)
    noisy, clean = data.train_dataset.labels, data.train_dataset.clean_labels
    wrong = noisy != clean
    with torch.no_grad():
        predicted = module(data.train_dataset.__getitems__(range(1297))["image"]).argmax(1)
    memorised = (predicted == noisy)[wrong].float().mean().item()
    result = {"peak": max(curve), "last": curve[-1], "memorised": memorised, "seconds": seconds}
    if settings is not None:
        report = module.label_report()
        assert torch.equal(report.label, noisy)
        hits = (report.suspect & wrong).sum()
        result |= {"precision": float(hits / report.suspect.sum()), "recall": float(hits / wrong.sum())}
    return result


@cache
def table() -> dict[str, dict[str, np.ndarray]]:
    """Quantity by method, over the seeds; printed once."""
    rows = {m: [run(m, seed) for seed in SEEDS] for m in METHODS}
    found = {m: {key: np.array([r[key] for r in results]) for key in results[0]} for m, results in rows.items()}
    for method, quantities in found.items():
        print(method, {key: f"{v.mean():.3f} ± {v.std():.3f}" for key, v in quantities.items()})
    return found


ELRS = [m for m in METHODS if m != "CE"]


def test_must_07_cross_entropy_falls_from_its_peak_and_elr_does_not():
    ce = table()["CE"]
    assert (ce["peak"] - ce["last"]).min() >= 0.10
    for method in ELRS:
        elr = table()[method]
        assert (elr["last"] - ce["last"]).min() >= 0.06, method
        assert (elr["peak"] - elr["last"]).max() <= 0.02, method


def test_must_08_elr_does_not_learn_wrong_labels_by_heart():
    assert table()["CE"]["memorised"].min() > 0.60
    for method in ELRS:
        assert table()[method]["memorised"].max() < 0.10, method


def test_must_09_the_label_report_finds_the_wrong_labels():
    for method in ELRS:
        assert table()[method]["precision"].min() >= 0.92, method
        assert table()[method]["recall"].min() >= 0.92, method


class FrozenB(ELRPlusModule):
    """The teacher B' says the same of every image."""

    constant = torch.full((10,), 0.05).index_fill(0, torch.tensor(3), 0.55)

    @torch.no_grad()
    def _average_teachers(self):
        super()._average_teachers()
        self.teachers.b[-1].weight.zero_()
        self.teachers.b[-1].bias.copy_(self.constant.log())

    def on_train_start(self):
        super().on_train_start()
        self._average_teachers()


def test_must_10_each_table_of_elr_plus_is_fed_by_the_other_teacher_on_mnist():
    images = load_npz("mnist.npz")
    x = torch.from_numpy(images["x_train"][:2000]).float().div(255).unsqueeze(1)
    y = torch.from_numpy(images["y_train"][:2000]).long()
    data = IndexedDataset(TensorDataset(x, y))

    def network() -> nn.Module:
        pooled = nn.Sequential(nn.Conv2d(1, 16, 5, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(4))
        return nn.Sequential(pooled, nn.Flatten(), nn.Linear(256, 10))

    epochs, modules = 10, []
    for cls in (FrozenB, ELRPlusModule):
        torch.manual_seed(0)
        module = cls(network(), network(), num_classes=10, lam=0.0, ema_alpha=0.9, ema_step=0)
        trainer = Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(module, ResumableLoader(data, batch_size=64, shuffle=True, seed=0))
        modules.append(module)
    frozen, free = modules
    constant = (1 - 0.7**epochs) * FrozenB.constant
    assert (frozen.tables[0].targets - constant).abs().max() < 1e-5
    # Without the regulariser nothing but the tables' feed links the students: T_B, fed by A', keeps every bit.
    assert torch.equal(frozen.tables[1].targets, free.tables[1].targets)
    agreement = [(table.targets.argmax(1) == y).float().mean().item() for m in modules for table in m.tables]
    print("share of labels that T_A, T_B agree with: B' frozen", agreement[:2], "free", agreement[2:])
    assert agreement[0] < 0.2
    assert min(agreement[1:]) > 0.85

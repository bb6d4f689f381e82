"""quantized-distillation, claims 7 and 8, on scikit-learn's digits."""

from __future__ import annotations

import copy
import statistics
import time

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import nn

from effdl.callbacks import DifferentiableQuantizationCallback, QuantizedDistillationCallback
from effdl.compression.quantized_distillation import initial_points, layout_of, points_record, uniform
from effdl.core.calibrate import recalibrate_batchnorm
from effdl.core.export import save_model
from effdl.core.quantized import load_quantized, quantize_
from effdl.core.select import select_weights
from tests.claims.shuffled import Shuffled
from tests.claims.test_gradual_pruning import table

pytestmark = pytest.mark.slow
SEEDS = (0, 1, 2)


def network(*widths):
    """Three 3x3 convolutions with BatchNorm, the last two of stride 2, and a linear head."""
    layers, before = [], 1
    for i, width in enumerate(widths):
        layers += [nn.Conv2d(before, width, 3, 2 if i else 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


class Plain(LightningModule):
    """Cross-entropy with any optimizer; one-cycle where ``steps`` are given."""

    def __init__(self, model, optimizer, steps=None):
        super().__init__()
        self.model, self.make, self.steps = model, optimizer, steps

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        optimizer = self.make([p for p in self.parameters() if p.requires_grad])
        if self.steps is None:
            return optimizer
        rate = optimizer.param_groups[0]["lr"]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def adam(rate):
    return lambda p: torch.optim.Adam(p, rate)


def fit(model, data, epochs, optimizer, callbacks=(), cycle=True):
    module = Plain(model, optimizer, epochs * len(data) if cycle else None)
    Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    ).fit(module, data)  # fmt: skip
    return module.model.eval()


class Digits:
    """60 % of the digits to learn from, 40 % to test, by a seed."""

    def __init__(self, seed):
        digits = load_digits()
        x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
        y = torch.tensor(digits.target)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        cut = int(0.6 * len(x))
        self.x, self.y, self.test = x[order[:cut]], y[order[:cut]], (x[order[cut:]], y[order[cut:]])
        self.seed = seed

    def batches(self):
        return Shuffled(self.x, self.y, 64, self.seed)

    @torch.no_grad()
    def accuracy(self, model):
        x, y = self.test
        return 100 * (model.eval()(x).argmax(-1) == y).float().mean().item()

    def of_artifact(self, model, folder):
        """Test accuracy [%] of the network that the file holds, on top of another one's weights."""
        assert save_model(model, folder) == "quantized"
        return self.accuracy(load_quantized(network(8, 12, 12), folder))


def quantised(model, record):
    """A copy whose selected weights are codes, without training."""
    twin = copy.deepcopy(model)
    quantize_(twin, {weight.name: record(weight.data) for weight in select_weights(twin)})
    return twin


def student(digits):
    torch.manual_seed(digits.seed)
    return fit(network(8, 12, 12), digits.batches(), 20, adam(RATE))


RATE = 0.01


def test_claim_07_quantized_distillation_beats_post_training_quantisation(tmp_path):
    labels = (
        "teacher", "full-precision student", "post-training 2 bits", "no teacher 2 bits", "distilled 2 bits",
        "distilled 4 bits",
    )  # fmt: skip
    rows, start = {label: [] for label in labels}, time.perf_counter()
    for seed in SEEDS:
        digits = Digits(seed)
        torch.manual_seed(100 + seed)
        teacher = fit(network(32, 48, 48), digits.batches(), 20, adam(RATE))
        rows["teacher"].append(digits.accuracy(teacher))
        full = student(digits)
        rows["full-precision student"].append(digits.accuracy(full))
        rows["post-training 2 bits"].append(digits.accuracy(quantised(full, lambda w: uniform(w, 2))))
        runs = {
            "no teacher 2 bits": {"bits": 2, "teacher_weight": 0.0},
            "distilled 2 bits": {"bits": 2, "teacher": teacher},
            "distilled 4 bits": {"bits": 4, "teacher": teacher},
        }
        for label, kwargs in runs.items():
            torch.manual_seed(seed)
            callback = QuantizedDistillationCallback(**kwargs)
            model = fit(network(8, 12, 12), digits.batches(), 20, adam(RATE), [callback])
            rows[label].append(digits.of_artifact(model, tmp_path / f"{label}-{seed}"))
    table("digits", rows)
    print(f"{time.perf_counter() - start:.0f} s")
    mean = {label: statistics.mean(values) for label, values in rows.items()}
    assert mean["distilled 2 bits"] >= mean["post-training 2 bits"] + 30
    assert mean["distilled 2 bits"] >= mean["no teacher 2 bits"] - 0.5
    assert mean["distilled 2 bits"] >= 95
    assert mean["distilled 4 bits"] >= mean["full-precision student"] - 1


@pytest.mark.parametrize("optimizer", ["Adam 3e-3", "SGD 1e-4, momentum 0.9"])
def test_claim_08_learned_points_beat_quantiles_and_uniform_points(optimizer, tmp_path):
    make = adam(3e-3) if "Adam" in optimizer else lambda p: torch.optim.SGD(p, 1e-4, momentum=0.9)
    rows, start = {"full precision": []}, time.perf_counter()
    for seed in SEEDS:
        digits = Digits(seed)
        full = student(digits)
        rows["full precision"].append(digits.accuracy(full))
        for bits in (2, 3):
            begin = {
                init: quantised(
                    full, lambda w, b=bits, i=init: points_record(w, initial_points(w, 2**b, "tensor", i), "tensor")
                )
                for init in ("quantile", "uniform")
            }
            settled = copy.deepcopy(begin["quantile"])
            recalibrate_batchnorm(settled, list(digits.batches()))
            found = {f"{init} points": digits.accuracy(model) for init, model in begin.items()}
            found["quantile points, BatchNorm anew"] = digits.accuracy(settled)
            callback = DifferentiableQuantizationCallback(bits=bits, bucket_size=None)
            model = fit(copy.deepcopy(full), digits.batches(), 12, make, [callback], cycle=False)
            found["learned points"] = digits.of_artifact(model, tmp_path / f"{bits}-{seed}")
            recalibrate_batchnorm(model, list(digits.batches()))
            found["learned points, BatchNorm anew"] = digits.accuracy(model)
            for label, value in found.items():
                rows.setdefault(f"{bits} bits: {label}", []).append(value)
    table(f"digits, points by {optimizer}", rows)
    print(f"{time.perf_counter() - start:.0f} s")
    mean = {label: statistics.mean(values) for label, values in rows.items()}
    for baseline in ("quantile points", "uniform points"):
        assert mean["2 bits: learned points"] >= mean[f"2 bits: {baseline}"] + 20
    assert layout_of(None) == "tensor"

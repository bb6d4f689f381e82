"""sam, claim 9: label noise on digits. SAM keeps what AdamW forgets, at a flatter minimum."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from effdl import ImageClassifier
from effdl.callbacks import SAMCallback, SharpnessCallback
from effdl.data.images import ImageData

pytestmark = pytest.mark.slow
SEEDS = (0, 1, 2)


def run(rho: float, seed: int) -> tuple[float, float, float]:
    """Last test accuracy, lambda_max on 256 training examples with their noisy labels, seconds of training."""
    data = ImageData(
        "digits", batch_size=64, image_size=8, channels=1, val=0.0, noise="symmetric", noise_rate=0.4, mean=0.0,
        std=1.0, seed=seed,
    )  # fmt: skip
    torch.manual_seed(seed)
    layers = [nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    module = ImageClassifier(
        nn.Sequential(*layers), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1)
    )
    sharpness = SharpnessCallback(every="80ep", calibration_batches=4, trace_samples=0)
    trainer = Trainer(
        max_epochs=80, accelerator="cpu", callbacks=[SAMCallback(rho), sharpness], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    start = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - start
    accuracy = trainer.test(module, data, verbose=False)[0]["test/accuracy"]
    return accuracy, sharpness.rows[-1]["lambda_max"], seconds


def test_must_09_label_noise():
    mean = {}
    for rho in (0.0, 0.1, 0.3):
        rows = list(zip(*(run(rho, seed) for seed in SEEDS)))
        mean[rho] = [statistics.mean(row) for row in rows]
        spread = [statistics.stdev(row) for row in rows]
        print(f"rho {rho}: " + ", ".join(f"{m:.3f} ± {s:.3f}" for m, s in zip(mean[rho], spread)), flush=True)
    accuracy, sharpness = ({rho: row[i] for rho, row in mean.items()} for i in (0, 1))
    assert accuracy[0.1] >= accuracy[0.0] + 0.04
    assert accuracy[0.3] >= accuracy[0.0] + 0.07
    assert sharpness[0.1] <= 0.5 * sharpness[0.0]
    assert sharpness[0.3] <= 0.2 * sharpness[0.0]

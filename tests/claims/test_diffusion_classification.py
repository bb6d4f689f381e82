"""diffusion-classification, claims 7-9: features of a denoising network on 8x8 digits, probed with 100 labels."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from sklearn.datasets import load_digits

from effdl import DiffusionModule
from effdl.core.random import generator
from effdl.diffusion.diffusion_classification import DiffusionFeatureExtractor, baseline_rows, search_blocks
from effdl.tasks.tiny import tiny_unet

pytestmark = pytest.mark.slow

SEEDS, LABELS, STEPS = (0, 1, 2), 100, 1500
TIMES = (10, 50, 150, 500)
NAMES = {"d1": 2, "mid": 5, "u0": 6}  # first residual layer of the encoder, middle, first output block


def data(seed):
    """1,300 images to train the network, 100 of them with labels, 497 to test; in [-1, 1]."""
    digits = load_digits()
    x = torch.tensor(digits.images[:, None] / 8 - 1, dtype=torch.float32)
    y, order = torch.tensor(digits.target), torch.randperm(len(x), generator=generator(seed))
    x, y = x[order], y[order]
    return x[:1300], (x[:LABELS], y[:LABELS]), (x[1300:], y[1300:])


def denoiser(images, seed):
    seed_everything(seed, verbose=False)
    module = DiffusionModule(tiny_unet(8, 1, seed=seed), seed=seed, optimizer=lambda p: torch.optim.AdamW(p, 2e-3))
    rows = torch.randint(0, len(images), (STEPS, 64), generator=generator(seed))
    loader = torch.utils.data.DataLoader([(images[row],) for row in rows], batch_size=None)
    Trainer(
        max_steps=STEPS, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, loader)  # fmt: skip
    return module


def probed(network, schedule, train, test, times, seed):
    extractor = DiffusionFeatureExtractor(network, schedule, [5], [10])
    return search_blocks(extractor, train, test, timesteps=times, seed=seed)


def value(rows, block, timestep, pool):
    keys = (block, timestep, pool)
    return next(100 * row["accuracy"] for row in rows if (row["block"], row["timestep"], row["pool"]) == keys)


def test_must_07_08_09_features_of_a_denoiser_beat_pixels_and_random_networks():
    found = {}
    best = []
    for seed in SEEDS:
        begin = time.perf_counter()
        images, train, test = data(seed)
        module = denoiser(images, seed)
        schedule = module.noise_scheduler.alphas_cumprod
        trained = probed(module.model, schedule, train, test, TIMES, seed)
        random = probed(tiny_unet(8, 1, seed=100 + seed), schedule, train, test, (10,), seed)
        row = {
            "trained, mid, pool 1": value(trained, 5, 10, 1), "random, mid, pool 1": value(random, 5, 10, 1),
            "trained, mid, pool 2": value(trained, 5, 10, 2), "random, mid, pool 2": value(random, 5, 10, 2),
            "pixels": 100 * baseline_rows(train, test)[0]["accuracy"],
            "trained, first down block, pool 1": value(trained, 2, 10, 1),
            "trained, mid, pool 2, t 50": value(trained, 5, 50, 2),
            "trained, mid, pool 2, t 500": value(trained, 5, 500, 2),
            "seconds": time.perf_counter() - begin,
        }  # fmt: skip
        best.append(trained[0])
        for key, number in row.items():
            found.setdefault(key, []).append(number)
        print(seed, {key: round(number, 1) for key, number in row.items()}, "best:", trained[0], flush=True)
    mean = {key: statistics.mean(values) for key, values in found.items()}
    for key, values in found.items():
        print(f"{key:36s} {mean[key]:.1f} ± {statistics.stdev(values):.1f}")
    assert mean["trained, mid, pool 1"] >= mean["random, mid, pool 1"] + 4
    assert mean["trained, mid, pool 2"] >= mean["pixels"] + 1
    assert mean["trained, mid, pool 2"] >= mean["random, mid, pool 2"] + 2
    assert mean["trained, mid, pool 2"] >= mean["trained, mid, pool 1"] + 3
    assert max(mean["trained, mid, pool 2"], mean["trained, mid, pool 2, t 50"]) >= (
        mean["trained, mid, pool 2, t 500"] + 50
    )
    assert mean["trained, mid, pool 1"] >= mean["trained, first down block, pool 1"] + 10
    assert all(row["block"] in NAMES.values() and row["timestep"] <= 150 for row in best), best

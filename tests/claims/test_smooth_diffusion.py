"""smooth-diffusion's claims: noise moves the estimate more evenly, paths between noises are smoother, nothing is lost.

Run: ``pytest -m slow tests/claims/test_smooth_diffusion.py -s``; the table is in docs/results.md. The digits are
scikit-learn's own, so no data folder is needed.
"""

from __future__ import annotations

import copy
import time

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from effdl.core.noise import add_noise, alpha_sigma
from effdl.data.images import ImageData
from effdl.diffusion.smooth_diffusion import (
    SmoothDiffusionModule,
    denoiser_variations,
    interpolate,
    interpolation_std,
    path_distances,
)
from effdl.tasks.diffusion import DiffusionModule
from effdl.tasks.tiny import tiny_unet
from tests.support import BARE

pytestmark = pytest.mark.slow
SEEDS = (0, 1, 2)
QUIET = {**BARE, "limit_val_batches": 0, "gradient_clip_val": 1.0}


def adam(rate: float):
    return lambda parameters: torch.optim.Adam(parameters, rate)


def fit(module: DiffusionModule, seed: int, steps: int, batch_size: int) -> None:
    data = ImageData("digits", batch_size=batch_size, image_size=8, channels=1, seed=seed)
    Trainer(max_steps=steps, **QUIET).fit(module, datamodule=data)


def held_out(seed: int) -> torch.Tensor:
    data = ImageData("digits", image_size=8, channels=1, seed=seed, batch_size=512)
    data.setup("test")
    return next(iter(data.test_dataloader()))["image"]


def judge(module: DiffusionModule, seed: int) -> dict[str, float]:
    """On held-out (x0, t, eps): error, spread of r; on 24 paths: ISTD and mean adjacent distance."""
    module.model.eval()
    x0, draw = held_out(seed), torch.Generator().manual_seed(1000 + seed)
    t = torch.randint(1000, (len(x0),), generator=draw)
    eps, delta = torch.randn(2, *x0.shape, generator=draw)
    table = module.noise_scheduler.alphas_cumprod
    x_t = add_noise(x0, eps, *alpha_sigma(table, t, x0)).requires_grad_()
    output = module(x_t, t)
    r = denoiser_variations(x_t, output, t, table, "epsilon", delta).detach()
    images = interpolate(module, *torch.randn(2, 24, 1, 8, 8, generator=draw))
    return {
        "std r": r.std().item(),
        "cv r": (r.std() / r.mean()).item(),
        "mse": (output - eps).square().mean().item(),
        "istd": interpolation_std(images).item(),
        "distance": path_distances(images).mean().item(),
    }


def run(seed: int) -> dict[str, dict[str, float]]:
    """Base model, then 150 steps of fine-tuning of all weights without and with the penalty."""
    torch.manual_seed(seed)
    base = DiffusionModule(tiny_unet(8, 1, seed=seed), optimizer=adam(1e-3), seed=seed)
    fit(base, seed, 1500, 64)
    found = {"base": judge(base, seed)}
    for name, weight in (("plain", 0.0), ("smooth", 1.0)):
        network = copy.deepcopy(base.model).train()
        module = SmoothDiffusionModule(network, optimizer=adam(5e-4), rank=None, lambda_reg=weight, seed=seed + 100)
        start = time.perf_counter()
        fit(module, seed + 100, 150, 32)
        seconds = time.perf_counter() - start
        found[name] = {**judge(module, seed), "seconds": seconds}
    return found


@pytest.fixture(scope="module")
def results():
    found = [run(seed) for seed in SEEDS]
    for name in found[0]:
        for quantity in found[0][name]:
            values = [one[name][quantity] for one in found]
            print(f"{name:7s} {quantity:9s} {np.mean(values):.4f} ± {np.std(values):.4f}  {np.round(values, 4)}")
    return found


def ratio(results, quantity: str) -> float:
    """Mean over the seeds of smooth over plain."""
    return float(np.mean([one["smooth"][quantity] / one["plain"][quantity] for one in results]))


def test_must_05_variation_is_more_even(results):
    assert ratio(results, "std r") <= 0.80
    assert ratio(results, "cv r") <= 0.95
    assert ratio(results, "mse") <= 1.15


def test_must_06_interpolation_is_smoother(results):
    assert ratio(results, "istd") <= 0.85
    assert 0.8 <= ratio(results, "distance") <= 1.2

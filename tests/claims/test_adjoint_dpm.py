"""adjoint-dpm's claim: the noise of a diffusion model of digits is steered into a class through all sampling steps.

Run: ``pytest -m slow tests/claims/test_adjoint_dpm.py -s``; the table is in docs/results.md.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from effdl.core.random import generator
from effdl.data.images import ImageData
from effdl.diffusion.adjoint_dpm import AdjointDPMModule, ClassifierLoss, SampleRows
from effdl.tasks.diffusion import DiffusionModule
from effdl.tasks.tiny import tiny_unet
from tests.support import BARE

pytestmark = pytest.mark.slow
QUIET = {**BARE, "limit_val_batches": 0}
SEEDS, TARGET, COUNT, ROUNDS = (0, 1, 2), 3, 32, 30


def adam(rate: float):
    return lambda parameters: torch.optim.AdamW(parameters, rate)


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.images).float()[:, None] / 8 - 1, torch.from_numpy(data.target)


def judge(seed: int) -> nn.Module:
    """A small convolutional classifier of 8x8 digits."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    x, y = digits()
    optimizer, g = torch.optim.Adam(net.parameters(), 2e-3), generator(seed)
    for _ in range(600):
        rows = torch.randint(1297, (64,), generator=g)
        optimizer.zero_grad()
        F.cross_entropy(net(x[rows] + 0.1 * torch.randn(64, 1, 8, 8, generator=g)), y[rows]).backward()
        optimizer.step()
    accuracy = (net(x[1297:]).argmax(1) == y[1297:]).float().mean()
    assert accuracy > 0.9, accuracy
    return net.eval()


def denoiser(seed: int) -> nn.Module:
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = tiny_unet(8, 1, seed=seed, **blocks)
    module = DiffusionModule(unet, prediction="v_prediction", seed=seed, optimizer=adam(2e-3))
    data = ImageData("digits", image_size=8, channels=1, batch_size=64, seed=seed)
    Trainer(max_steps=600, **QUIET).fit(module, data)
    return module.model.eval()


def run(seed: int, rounds: int = ROUNDS) -> dict[str, float]:
    unet, ours, other = denoiser(seed), judge(seed), judge(seed + 100)
    module = AdjointDPMModule(
        unet, ClassifierLoss(ours, TARGET), prediction="v_prediction", num_examples=COUNT, steps=20, solver="euler",
        seed=seed, optimizer=adam(0.1),
    )  # fmt: skip
    rows = {"index": torch.arange(COUNT)}

    @torch.no_grad()
    def share(noise: Tensor, network: nn.Module) -> float:
        return float((network(module.images(rows, noise=noise)).argmax(1) == TARGET).float().mean())

    gradients = []
    for how in ("forward", "backprop"):
        images = getattr(module.sampler, how)(module.noise)
        gradients.append(torch.autograd.grad(module.loss(images, rows), module.noise)[0].flatten())
    start = time.process_time()
    Trainer(max_epochs=rounds, **QUIET).fit(module, SampleRows(COUNT))
    seconds = time.process_time() - start
    first, last = module.first_noise, module.noise.detach()
    length = (last - first).flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    away = torch.randn(first.shape, generator=generator(seed + 7))
    chance = first + length * away / away.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    found = {"seconds": seconds, "length": float(length.mean()), "rms": float(last.square().mean().sqrt())}
    found["cosine of adjoint and backprop"] = float(F.cosine_similarity(*gradients, dim=0))
    for name, noise in (("first", first), ("chance", chance), ("steered", last)):
        found |= {f"{name}, its judge": share(noise, ours), f"{name}, another judge": share(noise, other)}
    return found


def test_noise_is_steered_into_a_class():
    found = [run(seed) for seed in SEEDS]
    print()
    for name in found[0]:
        values = [result[name] for result in found]
        print(f"  {name:32s} {np.mean(values):.3f} ± {np.std(values):.3f}   {np.round(values, 3).tolist()}")
    for result in found:
        assert result["steered, its judge"] >= 0.9
        assert result["steered, another judge"] >= result["chance, another judge"] + 0.4

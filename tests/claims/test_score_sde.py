"""score-sde's claims: a corrector is worth its calls, and a score network learns to code small images.

Run: ``EFFDL_DATA=... pytest -m slow tests/claims/test_score_sde.py -s``; the tables are in docs/results.md.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from effdl.data.loading import ResumableLoader
from effdl.diffusion.score_sde import VE, ODESampler, PCSampler, ScoreSDEModule, dequantise
from tests.support import BARE, load_npz

pytestmark = pytest.mark.slow


def summary(title: str, rows: dict[str, list[float]]) -> None:
    print(f"\n{title}")
    for name, values in rows.items():
        print(f"  {name:32s} {np.mean(values):.4f} ± {np.std(values):.4f}   {np.round(values, 4).tolist()}")


# --- must show 4: a mixture with its exact score ------------------------------------------------------------------


def ring(modes: Tensor, std: float, count: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    rows = torch.randint(len(modes), (count,), generator=g)
    return modes[rows] + std * torch.randn(count, 2, generator=g)


def exact_score(sde, modes: Tensor, std: float):
    """Of an even mixture: the posterior mean of the mode, less x, over the variance."""

    def score(x: Tensor, t: Tensor) -> Tensor:
        means, v = sde.scale(t)[0] * modes, (sde.scale(t)[0] * std).square() + sde.std(t)[0].square()
        posterior = (-0.5 * torch.cdist(x, means).square() / v).softmax(1)
        return (posterior @ means - x) / v

    return score


def energy_distance(a: Tensor, b: Tensor) -> float:
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def compare(modes: Tensor, std: float, seeds, count: int = 4000, n: int = 20) -> dict[str, list[float]]:
    ways = {
        "P(N)": (n, PCSampler(corrector="none")),
        "P(2N)": (2 * n, PCSampler(corrector="none")),
        "PC(N)": (n, PCSampler(snr=0.3)),
    }
    rows: dict[str, list[float]] = {name: [] for name in (*ways, "floor")}
    for seed in seeds:
        real = ring(modes, std, count, 1000 + seed)
        rows["floor"].append(energy_distance(ring(modes, std, count, 2000 + seed), real))
        for name, (steps, sampler) in ways.items():
            sde = VE(0.01, 10.0, steps)
            x = sampler(sde, exact_score(sde, modes, std), (count, 2), torch.Generator().manual_seed(seed))
            rows[name].append(energy_distance(x, real))
    return rows


def test_must_04_the_corrector_is_worth_its_calls():
    start = time.process_time()
    two = compare(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 0.5, range(12))
    angle = torch.arange(8) * math.pi / 4
    eight = compare(2 * torch.stack([angle.cos(), angle.sin()], 1), 0.1, range(4))
    summary("energy distance, 2 modes (std 0.5)", two)
    summary("energy distance, 8 modes (std 0.1)", eight)
    print(f"  {time.process_time() - start:.0f} s of processor time")
    assert np.mean(two["PC(N)"]) <= 0.6 * np.mean(two["P(N)"])
    assert np.mean(two["PC(N)"]) < 0.01


# --- must show 9: MNIST at 8x8 with sixteen grey levels ------------------------------------------------------------

STEPS = 1000


def digits() -> tuple[Tensor, Tensor]:
    data = load_npz("mnist.npz")

    def small(split: str, count: int) -> Tensor:
        x = torch.from_numpy(data[f"x_{split}"][:count]).float()[:, None]
        x = F.avg_pool2d(F.pad(x, (2, 2, 2, 2)), 4)
        return torch.floor(x / 16) / 15 * 2 - 1

    return small("train", 20_000), small("test", 256)


class MLP(nn.Module):
    """Three hidden layers of 256, told t and ln t in each, beside a skip of a width that depends on t."""

    def __init__(self, width: int = 256, pixels: int = 64) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.arange(-2, 6) * math.pi)
        self.embedding = nn.Sequential(nn.Linear(18, width), nn.SiLU())
        self.hidden = nn.ModuleList([nn.Linear(n, width) for n in (pixels, width, width)])
        self.times = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])
        self.out, self.skip = nn.Linear(width, pixels), nn.Linear(width, pixels)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        t = label[:, None] / 999
        angle = t * self.frequencies
        time = self.embedding(torch.cat([t, t.log() / 4 + 1, angle.sin(), angle.cos()], 1))
        h = x.flatten(1)
        for layer, told in zip(self.hidden, self.times):
            h = F.silu(layer(h) + told(time))
        return (self.out(h) + self.skip(time) * x.flatten(1)).reshape(x.shape)


def trained(train: Tensor, test: Tensor, seed: int, weighting: bool, folder: Path) -> dict[str, float]:
    torch.manual_seed(seed)
    cosine = lambda step: 0.5 * (1 + math.cos(math.pi * min(step / STEPS, 1)))  # noqa: E731
    module = ScoreSDEModule(
        MLP(), "vp", levels=16, likelihood_weighting=weighting, seed=seed,
        optimizer=lambda p: torch.optim.Adam(p, 1e-3),
        scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, cosine),
    )  # fmt: skip
    data = torch.utils.data.TensorDataset(train)
    loader = ResumableLoader(data, batch_size=128, shuffle=True, seed=seed, drop_last=True)
    found: dict[str, float] = {}
    start, kept = time.process_time(), None
    for steps in (200, 500, STEPS):  # one run, looked at three times
        trainer = Trainer(max_steps=steps, **BARE)
        trainer.fit(module, loader, ckpt_path=kept, weights_only=True if kept else None)
        kept = folder / f"{seed}-{weighting}-{steps}.ckpt"
        trainer.save_checkpoint(kept)
        result = module.likelihood(test, seed=seed)
        found[f"bits, {steps} steps"] = float(result.bits.median())
        found[f"mean bits, {steps} steps"] = float(result.bits.mean())
    found["calls"] = result.calls
    for name, sampler in {"pc": PCSampler(), "ode": ODESampler()}.items():
        x = module.sample(1000, sampler, steps=500 if name == "pc" else None, seed=seed)
        found[f"pixel mean, {name}"] = float((x.mean() + 1) / 2)
    found["pixel mean, data"] = float((dequantise(train, 16).mean() + 1) / 2)  # what the network saw
    found["seconds"] = time.process_time() - start
    return found


def test_must_09_bits_per_dimension_of_small_digits(tmp_path):
    train, test = digits()
    plain = [trained(train, test, seed, False, tmp_path) for seed in range(3)]
    weighted = [trained(train, test, seed, True, tmp_path) for seed in range(3)]
    summary("bits per dimension (uniform law: 4)", {key: [run[key] for run in plain] for key in plain[0]})
    summary("likelihood weighting, uniform t", {key: [run[key] for run in weighted] for key in weighted[0]})
    for run in plain:
        assert run["bits, 200 steps"] > run["bits, 500 steps"] > run[f"bits, {STEPS} steps"]
        assert run[f"bits, {STEPS} steps"] <= 3.0
        for name in ("pc", "ode"):
            assert abs(run[f"pixel mean, {name}"] - run["pixel mean, data"]) < 0.1 * run["pixel mean, data"]

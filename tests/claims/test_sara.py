"""sara's claims on a small flow: the smallest weights do nothing, training them keeps what the network knew.

Run: ``pytest -m slow tests/claims/test_sara.py -s``; the tables are in docs/results.md.
"""

from __future__ import annotations

import copy
import math
import time

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effdl.diffusion.sara import SparseWeight, quantile_threshold, sparsify

pytestmark = pytest.mark.slow
SEEDS = (0, 1, 2)
OLD, NEW = 4, 4  # tokens 0 to 3 are learned first, token 4 later


class Flow(nn.Module):
    """Velocity (B, 2) of a rectified flow from noise to data, from x, t and a token: four layers of 256."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.token = nn.Embedding(5, 32)
        sizes = [2 + 1 + 32, *[width] * 4]
        layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.net = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor, token: Tensor) -> Tensor:
        return self.net(torch.cat([x, t[:, None], self.token(token)], 1))


def data(token: Tensor, g: torch.Generator) -> Tensor:
    """A Gaussian on a circle of radius 2 for each token: standard deviation 0.15, of the new one 0.45. (The least loss
    of a flow to a Gaussian is pi/2 times that: 0.236 and 0.707.)"""
    angle = 2 * math.pi * token / 5
    spread = torch.where(token == NEW, 0.45, 0.15)[:, None]
    return 2 * torch.stack([angle.cos(), angle.sin()], 1) + spread * torch.randn(len(token), 2, generator=g)


def loss_of(model: nn.Module, token: Tensor, g: torch.Generator) -> Tensor:
    x1, x0, t = data(token, g), torch.randn(len(token), 2, generator=g), torch.rand(len(token), generator=g)
    x = (1 - t[:, None]) * x0 + t[:, None] * x1
    return F.mse_loss(model(x, t, token), x1 - x0)


def train(model, optimizer, tokens, steps: int, seed: int, before=lambda: None, after=lambda step: None) -> None:
    """Batches of 256, a rate that falls to zero as a cosine."""
    g = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss_of(model, torch.randint(*tokens, (256,), generator=g), g).backward()
        before()
        optimizer.step()
        schedule.step()
        after(step)


@torch.no_grad()
def judged(model: nn.Module) -> dict[str, float]:
    g = torch.Generator().manual_seed(999)
    old, new = torch.arange(20_000) % OLD, torch.full((20_000,), NEW)
    return {"old": loss_of(model, old, g).item(), "new": loss_of(model, new, g).item()}


def pretrained(seed: int) -> Flow:
    torch.manual_seed(seed)
    model = Flow()
    train(model, torch.optim.AdamW(model.parameters(), 1e-3), (0, OLD), 4000, seed)
    return model


@torch.no_grad()
def with_zeros(model: nn.Module, fraction: float, seed: int | None = None) -> float:
    """The old tokens' loss without the smallest weights, or without random ones."""
    model = copy.deepcopy(model)
    theta = quantile_threshold(model.parameters(), fraction)
    g = None if seed is None else torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.masked_fill_(p.abs() < theta if g is None else torch.rand(p.shape, generator=g) < fraction, 0.0)
    return judged(model)["old"]


def tuned(base: nn.Module, how: str, seed: int, steps: int = 1500) -> dict[str, float]:
    model = copy.deepcopy(base)
    sparse: dict[str, SparseWeight] = {}
    g = torch.Generator().manual_seed(seed)

    def at_random(weights):
        return [SparseWeight(w, 1e-9, torch.rand(w.data.shape, generator=g) < 0.2) for w in weights]

    if how != "full":
        make = at_random if how == "random" else None
        sparse = sparsify(model, fraction=0.2, make=make)
    leaves = [s.leaf for s in sparse.values()] or list(model.parameters())
    optimizer = torch.optim.AdamW(leaves, 2e-3)

    matrices = [s for s in sparse.values() if s.weight.data.dim() == 2 and min(s.weight.data.shape) > 64]

    def before() -> None:
        if how.startswith("SaRA"):
            drawn = int(torch.randint(len(matrices), (), generator=g))
            matrices[drawn].add_nuclear_gradient_(5e-4)

    def after(step: int) -> None:
        if how == "SaRA" and step == steps // 2:
            for weight in sparse.values():
                weight.reselect()
                optimizer.state.pop(weight.leaf, None)
        for weight in sparse.values():
            weight.hold_()

    train(model, optimizer, (NEW, NEW + 1), steps, seed + 100, before, after)
    found = {}
    if how.startswith("SaRA"):
        small = sum(int(s.still_small().sum()) for s in sparse.values())
        found["still small"] = small / sum(s.index.numel() for s in sparse.values())
    return judged(model) | found


def run(seed: int) -> dict[str, dict[str, float]]:
    start = time.process_time()
    base = pretrained(seed)
    found = {"before": judged(base)}
    found["zeroed"] = {f"smallest {q:.0%}": with_zeros(base, q) - found["before"]["old"] for q in (0.1, 0.2, 0.3, 0.5)}
    found["zeroed"] |= {f"random {q:.0%}": with_zeros(base, q, seed) - found["before"]["old"] for q in (0.1, 0.2)}
    for how in ("SaRA", "SaRA, one selection", "random", "full"):
        found[how] = tuned(base, how, seed)
    return found | {"time": {"seconds": time.process_time() - start}}


@pytest.fixture(scope="module")
def runs():
    found = [run(seed) for seed in SEEDS]
    print()
    for name in found[0]:
        for key in found[0][name]:
            values = [each[name][key] for each in found]
            print(
                f"  {name:22s} {key:14s} {np.mean(values):.4f} ± {np.std(values):.4f}   {np.round(values, 4).tolist()}"
            )
    return found


def test_must_06_the_smallest_weights_do_nothing(runs):
    for found in runs:
        assert found["zeroed"]["smallest 20%"] <= 0.02
        assert found["zeroed"]["random 20%"] >= 20 * max(found["zeroed"]["smallest 20%"], 0)


def test_must_07_what_was_known_is_kept(runs):
    for found in runs:
        assert found["SaRA"]["old"] < found["random"]["old"]
        assert found["SaRA"]["old"] < 0.6 * found["full"]["old"]
        assert found["SaRA"]["new"] <= 1.1 * found["full"]["new"]


@pytest.mark.xfail(strict=True, reason="0.66 of the random mask's and 0.45 of full fine-tuning's: docs/results.md")
def test_must_07_by_the_margins_asked(runs):
    for found in runs:
        assert found["SaRA"]["old"] <= 0.5 * found["random"]["old"]
        assert found["SaRA"]["old"] <= 0.2 * found["full"]["old"]


def test_must_08_the_second_selection_uses_more_of_the_mask(runs):
    for found in runs:
        assert found["SaRA"]["still small"] < found["SaRA, one selection"]["still small"]

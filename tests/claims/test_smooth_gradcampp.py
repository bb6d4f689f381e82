"""smooth-gradcampp, claim 8: the heat-map lies where the object is (digits in one quadrant of a larger canvas)."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from effdl.attribution.smooth_gradcampp import SmoothGradCAMpp

SEEDS = (0, 1, 2)
TRAIN = 1400


def quadrant_digits(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """scikit-learn's 8x8 digits, each in one quadrant of a 16x16 canvas: images, labels, quadrants 0..3."""
    digits, rng = load_digits(), np.random.default_rng(seed)
    count = len(digits.images)
    quadrant = rng.integers(0, 4, count)
    images = torch.zeros(count, 1, 2, 8, 2, 8)
    images[torch.arange(count), 0, quadrant // 2, :, quadrant % 2, :] = torch.from_numpy(digits.images / 16).float()
    order = torch.from_numpy(rng.permutation(count))
    labels, quadrants = torch.from_numpy(digits.target), torch.from_numpy(quadrant)
    return images.flatten(2, 3).flatten(3)[order], labels[order], quadrants[order]


def trained_cnn(x: Tensor, y: Tensor, seed: int, epochs: int = 40) -> nn.Module:
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            loss = nn.functional.cross_entropy(net(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


def mass_inside(maps: Tensor, quadrant: Tensor) -> float:
    """Mean share of a map's mass (B, 16, 16) in the true quadrant; an empty map counts 0."""
    sums = maps.view(-1, 2, 8, 2, 8).sum((2, 4)).flatten(1)
    return float((sums.gather(1, quadrant[:, None])[:, 0] / sums.sum(1).clamp_min(1e-12)).mean())


def input_gradient(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    score = net(x).gather(1, y[:, None]).sum()
    return torch.autograd.grad(score, x)[0].abs().sum(1)


def measure(seed: int) -> dict[str, float]:
    x, y, quadrant = quadrant_digits(seed)
    net = trained_cnn(x[:TRAIN], y[:TRAIN], seed)
    x, y, quadrant = x[TRAIN:], y[TRAIN:], quadrant[TRAIN:]
    right = net(x).argmax(1) == y
    x, y, quadrant = x[right], y[right], quadrant[right]
    row = {"accuracy": float(right.float().mean()), "input gradient": mass_inside(input_gradient(net, x, y), quadrant)}
    layers = ["3", "6"]  # the ReLUs before the pooling in the middle and at the end; the last one is the default
    for name, options in {"Grad-CAM++": {"n_samples": 1, "sigma": 0.0}, "Smooth Grad-CAM++": {}}.items():
        maps = SmoothGradCAMpp(net, layers, **options)(x, y)
        row |= {f"{name}, layer {layer}": mass_inside(maps[layer], quadrant) for layer in layers}
    (default,) = SmoothGradCAMpp(net)(x[:2])
    assert default == "6"
    return row


@pytest.mark.slow
def test_must_08_the_map_lies_in_the_quadrant_of_the_digit():
    begin = time.perf_counter()
    rows = [measure(seed) for seed in SEEDS]
    table = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    for key, values in table.items():
        print(f"{key:32s} {values.mean():.3f} ± {values.std(ddof=1):.3f}   {np.round(values, 3)}")
    print(f"{time.perf_counter() - begin:.0f} s")
    assert (table["accuracy"] > 0.9).all()
    for layer in ("3", "6"):
        ours = table[f"Smooth Grad-CAM++, layer {layer}"]
        assert (ours >= 0.5).all()
        assert ours.mean() >= table["input gradient"].mean() + 0.05

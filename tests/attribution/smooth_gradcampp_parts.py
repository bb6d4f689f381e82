"""What the tests of smooth-gradcampp share: networks, images, golden cases."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effdl.attribution.smooth_gradcampp import SmoothGradCAMpp
from tests.support import golden

CASES = golden("smooth-gradcampp")["cases"]


class GoldenNet(nn.Module):
    """conv1 - relu [target] - conv2 - relu - GAP - fc, with the golden weights."""

    def __init__(self, inputs: dict, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv1, self.relu, self.conv2 = nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Conv2d(1, 1, 3)
        self.fc, self.scale = nn.Linear(1, 1), 1.0
        for layer, name in ((self.conv1, "conv1"), (self.conv2, "conv2"), (self.fc, "fc")):
            for part, suffix in (("weight", "w"), ("bias", "b")):
                value = torch.tensor(inputs[f"{name}_{suffix}"], dtype=dtype)
                setattr(layer, part, nn.Parameter(value))
        self.conv1.padding = self.conv2.padding = (1, 1)
        self.conv1._reversed_padding_repeated_twice = self.conv2._reversed_padding_repeated_twice = [1, 1, 1, 1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv2(self.relu(self.conv1(x))).relu()
        return self.scale * self.fc(hidden.mean((2, 3)))


def load(case: dict, dtype: torch.dtype = torch.float64):
    """Net, x, noise, class and the golden outputs as tensors."""
    inputs = case["inputs"]
    x, noise = (torch.tensor(inputs[key], dtype=dtype) for key in ("x", "noise"))
    outputs = {key: torch.tensor(value, dtype=torch.float64) for key, value in case["outputs"].items()}
    return GoldenNet(inputs, dtype).eval(), x, noise, inputs["class_idx"], outputs


def small_cnn(seed: int = 0, inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace), nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def images(count: int = 2, size: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


both_cases = pytest.mark.parametrize("case", CASES, ids=["6x6", "5x7"])


def _explain(net, x, c, noise=None, target="relu", **options):
    return SmoothGradCAMpp(net, target, **options).explain(x, c, noise=noise).layers[target]

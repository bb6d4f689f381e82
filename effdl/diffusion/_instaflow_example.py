"""The tiny run of ``ReflowModule`` that the contract suite drives."""

from __future__ import annotations

from typing import Any

import torch

from effdl.core.contract import ContractExample
from effdl.core.random import generator
from effdl.data.loading import ResumableLoader


def example() -> ContractExample:
    """Reflow of a class-conditional U-Net on thirty-two random pairs."""
    from effdl.tasks.tiny import tiny_unet

    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
    unet = tiny_unet(8, 1, num_classes=3, norm_num_groups=4, **blocks)
    return ContractExample(
        kwargs={"model": unet, "stage": "reflow", "optimizer": sgd},
        bad={
            "model": 3, "stage": "rectify", "teacher": torch.nn.Identity(), "convention": "sd", "steps": 0,
            "eps": [0.1, -0.1], "distance": ["l1", "lpips"], "online_steps": 0,
            "guidance": -1.0, "seed": -1, "optimizer": ContractExample.ANY, "scheduler": ContractExample.ANY,
        },
        data=pairs,
        example_input=lambda module: (torch.randn(2, 1, 8, 8), torch.tensor([1000.0, 500.0]), torch.tensor([0, 2])),
    )  # fmt: skip


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Not Adam, which makes a full step of the rounding errors where the gradient is zero (a key's bias)."""
    return torch.optim.SGD(parameters, 0.05)


def pairs(batch_size: int = 4) -> Any:
    """Batches (x0, x1, label)."""
    draw = generator(0)
    images = [torch.randn(32, 1, 8, 8, generator=draw) for _ in range(2)]
    table = torch.utils.data.TensorDataset(*images, torch.arange(32) % 3)
    return ResumableLoader(table, batch_size=batch_size, shuffle=True)

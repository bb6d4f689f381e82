"""The tiny run of ``DiffusionFeaturesModule`` that the contract suite drives."""

from __future__ import annotations

from typing import Any

import torch

from effdl.core.contract import ContractExample
from effdl.core.random import generator
from effdl.data.loading import ResumableLoader


def example() -> ContractExample:
    """A linear head on the middle block of a random U-Net."""
    from effdl.tasks.tiny import tiny_unet

    return ContractExample(
        kwargs={"model": tiny_unet(8, 1), "num_classes": 3, "pool": 1, "timestep": [10, 200]},
        bad={
            "model": [3, torch.nn.Identity()], "block": [0, 99, "nowhere", []], "timestep": [-1, 1000, []],
            "head": "tree", "pool": [0, 9], "num_classes": 1, "head_kwargs": {"depth": 3},
            "feedback": [[], [5], [9, 9], "up_blocks.1.resnets.1", ["nowhere"]], "fine_tune": 2, "null_class": 3,
            "draws": 0, "sweep": -1, "baselines": ["resnet-none"], "pretrained_baselines": 2, "noise_scheduler": 3,
            "seed": -1, "optimizer": ContractExample.ANY, "scheduler": ContractExample.ANY,
        },
        data=pictures,
        example_input=lambda module: tuple(module.features(torch.zeros(2, 1, 8, 8))),
        ddp_equals_single=False,  # processes draw different noise
    )  # fmt: skip


def pictures(batch_size: int = 4) -> Any:
    """Batches (image, label)."""
    images = torch.rand(32, 1, 8, 8, generator=generator(0)) * 2 - 1
    return ResumableLoader(
        torch.utils.data.TensorDataset(images, torch.arange(32) % 3), batch_size=batch_size, shuffle=True
    )

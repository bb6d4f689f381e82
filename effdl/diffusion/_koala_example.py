"""The tiny run of ``KOALADistillationModule`` that the contract suite drives."""

from __future__ import annotations

from typing import Any

import torch

from effdl.core.contract import ContractExample
from effdl.core.random import generator
from effdl.data.loading import ResumableLoader


def example() -> ContractExample:
    """A U-Net on one-hot classes loses a pair per stage and a transformer layer."""
    from effdl.tasks.tiny import tiny_condition_unet

    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
              "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}  # fmt: skip
    layers = {"layers_per_block": 2, "transformer_layers_per_block": (1, 2), "block_out_channels": (8, 16)}
    unet = tiny_condition_unet(8, 1, 3, norm_num_groups=4, **blocks, **layers)
    return ContractExample(
        kwargs={"teacher": unet, "depth": [1, 1], "optimizer": sgd},
        bad={
            "teacher": [3, torch.nn.Identity()], "layers_per_block": [0, 3], "depth": [0, 3, [1, 3], [1, 1, 1]],
            "mid": 1, "student": [unet, {**unet.config, "out_channels": 2}],
            "features": ["self", [], {"mid_block": "middle"}], "tap": ["map", "probs"], "lambda_task": -1.0,
            "lambda_out": -1.0, "lambda_feature": -1.0, "noise_scheduler": 3, "prediction": "score", "seed": -1,
            "optimizer": ContractExample.ANY, "scheduler": ContractExample.ANY,
        },
        data=pictures,
        example_input=lambda module: (
            torch.randn(2, 1, 8, 8), torch.tensor([10.0, 500.0]), torch.eye(3)[:2, None]
        ),
        ddp_equals_single=False,  # processes draw different noise, as in DiffusionModule
    )  # fmt: skip


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Not Adam, which makes a full step of the rounding errors where the gradient is zero (a key's bias)."""
    return torch.optim.SGD(parameters, 0.01)


def pictures(batch_size: int = 4) -> Any:
    """Batches (image, label)."""
    images = torch.rand(32, 1, 8, 8, generator=generator(0)) * 2 - 1
    return ResumableLoader(
        torch.utils.data.TensorDataset(images, torch.arange(32) % 3), batch_size=batch_size, shuffle=True
    )

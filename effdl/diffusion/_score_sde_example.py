"""The tiny run of ``ScoreSDEModule`` that the contract suite drives."""

from __future__ import annotations

import copy
from typing import Any

import torch

from effdl.core.contract import ContractExample
from effdl.core.random import generator
from effdl.data.loading import ResumableLoader


def example() -> ContractExample:
    """A U-Net on thirty-two random images."""
    from effdl.diffusion.score_sde import ScoreSDEModule
    from effdl.tasks.tiny import tiny_unet

    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
    unet = tiny_unet(8, 1, norm_num_groups=4, **blocks)
    kwargs = {"model": unet, "sde": "vp", "optimizer": sgd}
    return ContractExample(
        kwargs=kwargs,
        module=lambda: ScoreSDEModule(**{**kwargs, "model": copy.deepcopy(unet)}),  # it trains what it is given
        bad={
            "model": 3, "sde": ["vpsde", 3], "prediction": "sample",
            "sampler": ["euler", 3], "likelihood_weighting": "yes", "reduce_mean": "yes", "levels": 1,
            "likelihood_batches": [-1, 2], "warmup": -1, "seed": -1,
            "optimizer": ContractExample.ANY, "scheduler": ContractExample.ANY,
        },
        data=images,
        example_input=lambda module: (torch.randn(2, 1, 8, 8), torch.tensor([999.0, 10.0])),
    )  # fmt: skip


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Not Adam, which makes a full step of the rounding errors where the gradient is zero."""
    return torch.optim.SGD(parameters, 0.05)


def images(batch_size: int = 4) -> Any:
    """Batches (x, y), 8 x 8."""
    draw = generator(0)
    table = torch.utils.data.TensorDataset(torch.randn(32, 1, 8, 8, generator=draw).clamp(-1, 1), torch.arange(32) % 3)
    return ResumableLoader(table, batch_size=batch_size, shuffle=True)

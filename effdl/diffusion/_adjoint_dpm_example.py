"""The tiny run of ``AdjointDPMModule`` that the contract suite drives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effdl.core.contract import ContractExample
from effdl.data.loading import ResumableLoader, as_it_is


def example() -> ContractExample:
    """Noise and weights of a class-conditional U-Net, towards brighter images."""
    anything = dict.fromkeys(("optimizer", "scheduler"), ContractExample.ANY)
    return ContractExample(
        kwargs=settings(),
        bad={
            "model": 3, "loss": "brightness", "optimise": [[], ["prompt"], ["cond"]], "num_examples": 0,
            "condition": [["a cat"], {"sample": 3}], "noise": torch.zeros(3, 1, 8, 8), "steps": 0, "solver": "heun",
            "backward_steps": 3, "skip_type": "karras", "t_start": [0.0, 1.5], "t_end": 1.0, "state": "kept",
            "guidance_scale": [-1.0, 7.5], "denoise_to_zero": 1, "radius": 0.0, "noise_scheduler": torch.nn.Identity(),
            "prediction": "score", "seed": -1, **anything,
        },
        module=fresh,
        data=rows,
        example_input=lambda module: (torch.randn(2, 1, 8, 8), torch.tensor([1000.0, 500.0]), torch.tensor([0, 2])),
    )  # fmt: skip


def settings() -> dict[str, Any]:
    """Arguments, with a network of its own."""
    from effdl.tasks.tiny import tiny_unet

    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
    return {
        "model": tiny_unet(8, 1, num_classes=3, norm_num_groups=4, **blocks), "loss": brightness,
        "optimise": ["noise", "weights"], "num_examples": 32, "steps": 2, "solver": "euler",
        "t_start": 0.5, "optimizer": sgd,  # from t = 1 an untrained network makes the noise grow by 150
    }  # fmt: skip


def fresh() -> Any:
    """The module; the weights of a network that it is given are trained in place."""
    from effdl.diffusion.adjoint_dpm import AdjointDPMModule

    return AdjointDPMModule(**settings())


def brightness(images: Tensor, batch: Any) -> Tensor:
    """Distance of the pixels from one half, the mean over the batch."""
    return (images - 0.5).square().mean()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Not Adam, which makes a full step of a rounding error."""
    return torch.optim.SGD(parameters, 1e-3)


def rows(batch_size: int = 4) -> Any:
    """Batches of indices and labels."""
    from effdl.diffusion._adjoint_dpm_parts import SampleRows

    made = SampleRows(32, classes=3)
    return ResumableLoader(made.rows, batch_size=batch_size, shuffle=True, collate_fn=as_it_is)

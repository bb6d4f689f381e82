"""The tiny runs of ``ScoreSDEModule`` and ``ScoreSDEMixin`` that the contract suite drives."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from effdl.core.contract import ContractExample
from effdl.core.random import generator
from effdl.data.loading import ResumableLoader


def example() -> ContractExample:
    """A U-Net on thirty-two random images, sampled in a few steps."""
    from effdl.diffusion.score_sde import VP, ScoreSDEModule
    from effdl.tasks.tiny import tiny_unet

    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
    unet = tiny_unet(8, 1, norm_num_groups=4, **blocks)
    kwargs = {"model": unet, "sde": "vp", "optimizer": sgd}
    return ContractExample(
        kwargs=kwargs,
        # it trains what it is given; in a thousand steps predict alone would take half a minute
        module=lambda: ScoreSDEModule(**{**kwargs, "model": copy.deepcopy(unet), "sde": VP(steps=25)}),
        bad={
            "model": 3, "sde": ["vpsde", 3], "prediction": "sample",
            "sampler": ["euler", 3], "likelihood_weighting": "yes", "reduce_mean": "yes", "levels": 1,
            "likelihood_batches": [-1, 2], "warmup": -1, "seed": -1,
            "optimizer": ContractExample.ANY, "scheduler": ContractExample.ANY,
        },
        data=images,
        example_input=lambda module: (torch.randn(2, 1, 8, 8), torch.tensor([999.0, 10.0])),
    )  # fmt: skip


class Denoiser(nn.Module):
    """Two convolutions and the time, for images of one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.time = nn.Linear(1, 8)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        time = self.time(label[:, None].to(x.dtype) / 1000)
        return self.last(torch.tanh(self.first(x) + time[:, :, None, None]))


class Denoising(LightningModule):
    """Somebody's module, which trains its network in another way; optimizer and schedule are its own."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = Denoiser() if net is None else net

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        noisy = batch[0] + torch.randn_like(batch[0])
        return (self.net(noisy, torch.zeros(len(noisy))) - batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        made = torch.optim.SGD(self.parameters(), 0.02, momentum=0.9)
        return [made], [torch.optim.lr_scheduler.StepLR(made, 1, 0.7)]


def mixin_example() -> ContractExample:
    """Somebody's small denoiser under the vp equation, sampled in a few steps."""
    from effdl.diffusion.score_sde import VP, ScoreSDEMixin

    class Mine(ScoreSDEMixin, Denoising):
        pass

    kwargs: dict[str, Any] = {"sde": VP(steps=25), "network": "net"}
    return ContractExample(
        kwargs=kwargs,
        bad={
            "sde": ["vpsde", 3], "prediction": "sample", "sampler": ["euler", 3], "likelihood_weighting": "yes",
            "reduce_mean": "yes", "levels": 1, "likelihood_batches": [-1, 2], "seed": -1, "network": [3, ""],
        },
        module=lambda: Mine(**kwargs),
        rebuild=lambda _bare: Denoising(),
        data=images,
        finished=lambda module: module.net,
        example_input=lambda _module: (torch.randn(2, 1, 8, 8), torch.tensor([999.0, 10.0])),
    )  # fmt: skip


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Not Adam, which makes a full step of the rounding errors where the gradient is zero."""
    return torch.optim.SGD(parameters, 0.05)


def images(batch_size: int = 4) -> Any:
    """Batches (x, y), 8 x 8."""
    draw = generator(0)
    table = torch.utils.data.TensorDataset(torch.randn(32, 1, 8, 8, generator=draw).clamp(-1, 1), torch.arange(32) % 3)
    return ResumableLoader(table, batch_size=batch_size, shuffle=True)

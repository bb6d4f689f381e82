"""The tiny run of ``TimestepSamplerCallback`` that the contract suite drives."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from effdl.core.contract import ContractExample
from effdl.core.noise import expand
from effdl.diffusion._draws import Draws


class Velocity(nn.Module):
    """Two convolutions and the time, for 3-channel images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.time = nn.Linear(1, 8)

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(z) + self.time(t[:, None].to(z.dtype))[:, :, None, None]))


class Flow(LightningModule):
    """Somebody's flow, with the method that the callback asks for, the one that it may have, and no generator."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Velocity()

    def draw_times(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.rand(count, generator=generator, device=self.device)

    def mean_loss(self, losses: Tensor) -> Tensor:
        return losses.mean()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x0 = batch[0]
        noise = Draws(0, self.current_epoch, batch_idx, self.device).noise(x0.shape)
        t = self.draw_times(len(x0))
        weight = expand(t, x0)
        velocity = self.model((1 - weight) * x0 + weight * noise, t)
        loss = self.mean_loss((velocity.float() - (noise - x0)).square())
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/size", self.model(batch[0], torch.full((len(batch[0]),), 0.5)).abs().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.02, momentum=0.9)


def example() -> ContractExample:
    """A density with a shift, on somebody's flow."""
    return ContractExample(
        kwargs={"density": "mode(1.29)", "shift": 3.0},
        bad={
            "density": ["gamma", "logit_normal(0, 0)", "mode(1.76)", 3], "convention": "sd3", "shift": [0.0, -1.0],
            "seed": [-1, 0.5], "bins": [1, 2.5],
        },
        module=Flow,
        example_input=lambda _module: (torch.randn(2, 3, 8, 8), torch.tensor([0.1, 0.9])),
    )  # fmt: skip

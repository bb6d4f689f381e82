"""The tiny run of ``SmoothDiffusionMixin`` that the contract suite drives."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from effdl.core.contract import ContractExample
from effdl.core.noise import add_noise, alpha_sigma
from effdl.diffusion._draws import Draws


class Denoiser(nn.Module):
    """Two convolutions and the time, for 3-channel images."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.time = nn.Linear(1, 8)

    def forward(self, x: Tensor, timesteps: Tensor) -> Tensor:
        time = self.time(timesteps[:, None].to(x.dtype) / 1000)
        return self.last(torch.tanh(self.first(x) + time[:, :, None, None]))


class Denoising(LightningModule):
    """Somebody's DDPM, which draws for all processes together; its times stay where an untrained network can learn."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = Denoiser() if model is None else model
        self.noise_scheduler = DDPMScheduler()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x0 = batch[0]
        draws = Draws(0, self.current_epoch, batch_idx, self.device)
        noise, t = draws.noise(x0.shape), (500 * draws.uniform(len(x0))).long()
        a, s = alpha_sigma(self.noise_scheduler.alphas_cumprod, t, x0)
        loss = nn.functional.mse_loss(self.model(add_noise(x0, noise, a, s), t).float(), noise)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/size", self.model(batch[0], torch.full((len(batch[0]),), 500)).abs().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.02, momentum=0.9)


def example() -> ContractExample:
    """All weights of somebody's small denoiser; the LoRA has tests of its own."""
    from effdl.diffusion.smooth_diffusion import SmoothDiffusionMixin

    class Mine(SmoothDiffusionMixin, Denoising):
        pass

    return ContractExample(
        kwargs={"lambda_reg": 1.0, "decay": 0.01},
        bad={
            "lambda_reg": [-1.0, float("nan")], "decay": [0.0, 1.5], "every": [0, 1.5], "rank": [0, 1.5],
            "targets": 3, "exclude": 3, "network": 3,
        },
        module=lambda: Mine(rank=None),
        rebuild=lambda _bare: Denoising(),
        example_input=lambda _module: (torch.randn(2, 3, 8, 8), torch.tensor([10, 500])),
    )  # fmt: skip

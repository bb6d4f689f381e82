"""Other people's diffusion modules for ``test_smooth_diffusion_module.py``."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler
from lightning.pytorch import LightningModule
from torch import nn

from effdl.diffusion._smooth_diffusion_example import Denoiser, Denoising
from effdl.tasks.tiny import tiny_unet


class Late(Denoising):
    """Builds its network in ``configure_model``, and calls it by keywords."""

    def __init__(self):
        super().__init__(model=nn.Identity())
        del self.model

    def configure_model(self):
        self.unet = tiny_unet(8, 1)

    def training_step(self, batch, batch_idx):
        x, t = batch["image"], torch.tensor([100, 200, 300, 400])
        return {"loss": self.unet(sample=x, timestep=t).sample.square().mean(), "extra": 1}


class Fused(nn.Module):
    """A network with fused attention, with a detached input or with reentrant checkpoints."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner, self.kind = Denoiser(), kind

    def forward(self, x, timesteps):
        if self.kind == "detached":
            return self.inner(x.detach(), timesteps)
        if self.kind == "reentrant":
            return torch.utils.checkpoint.checkpoint(self.inner, x, timesteps, use_reentrant=True)
        heads = self.inner(x, timesteps)
        return torch._scaled_dot_product_flash_attention_for_cpu(heads, heads, heads)[0]


class NoSchedule(Denoising):
    def __init__(self):
        super().__init__()
        self.noise_scheduler = None


class Manual(Denoising):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Silent(Denoising):
    def training_step(self, batch, batch_idx):
        return sum(p.square().sum() for p in self.parameters())


class LightningDenoiser(LightningModule):
    """Keeps its schedule in a part of its own, and says what it predicts there."""

    def __init__(self) -> None:
        super().__init__()
        self.unet, self.diffusion = tiny_unet(8, 1), DDPMScheduler(prediction_type="v_prediction")

    def training_step(self, batch, batch_idx):
        return self.unet(batch, 10).sample.square().mean()

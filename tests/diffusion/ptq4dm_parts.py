"""What ptq4dm's tests share."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

from effdl.core.random import generator
from effdl.diffusion.ptq4dm import Settings

SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(clip_sample=False),
    "dpm-solver": lambda: DPMSolverMultistepScheduler(),
    "ddpm": lambda: DDPMScheduler(),
}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed))


def small(**settings) -> Settings:
    return Settings(**{"num_samples": 24, "batch_size": 8, "steps": 6, "candidates": 20, **settings})

"""What the tests of diffusion-classification share: a few batches, a short run, a hash of the weights."""

from __future__ import annotations

import hashlib

import torch
from lightning.pytorch import Trainer

from effdl import DiffusionFeaturesModule
from effdl.core.random import generator


def batches(count: int = 64, side: int = 8) -> torch.utils.data.DataLoader:
    images = torch.rand(count, 1, side, side, generator=generator(3)) * 2 - 1
    labels = torch.arange(count) % 4
    return torch.utils.data.DataLoader(list(zip(images.split(16), labels.split(16))), batch_size=None)


def fit(module: DiffusionFeaturesModule, epochs: int = 2) -> DiffusionFeaturesModule:
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, batches(), batches(16))
    return module


def digest(network: torch.nn.Module) -> str:
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in network.state_dict().values())).hexdigest()

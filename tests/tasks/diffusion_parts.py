"""What the tests of the diffusion task share: a small network, images, a short run."""

from __future__ import annotations

import logging

import lightning as L
import torch
from torch.utils.data import DataLoader

from effdl.tasks.diffusion import DiffusionModule
from effdl.tasks.tiny import tiny_unet

logging.getLogger("diffusers").setLevel(logging.ERROR)
CONFIG = {
    "sample_size": 8,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}


def images(count: int = 4, size: int = 8, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def loader(count: int = 6, **keys) -> DataLoader:
    batches = [{"image": images(seed=i), "label": torch.arange(4) % 3} | keys for i in range(count)]
    return DataLoader(batches, batch_size=None)


def fit(module: DiffusionModule, folder, data: DataLoader | None = None, **kwargs) -> L.Trainer:
    kwargs = {"max_steps": 4} | kwargs
    trainer = L.Trainer(
        accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=bool(kwargs.pop("checkpoints", False)),
        **{k: v for k, v in kwargs.items() if k not in ("val", "ckpt_path")},
    )  # fmt: skip
    trainer.fit(module, data or loader(), kwargs.get("val"), ckpt_path=kwargs.get("ckpt_path"))
    return trainer


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


CONFIG_NET = tiny_unet(8)

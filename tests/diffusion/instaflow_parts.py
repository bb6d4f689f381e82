"""What the tests of instaflow share: a velocity in the plane, its pairs, a short run."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from torch import nn

from effdl.data.loading import ResumableLoader
from effdl.diffusion.instaflow import ReflowPairs

QUIET = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}  # fmt: skip


class Plane(nn.Module):
    """A velocity in the plane, conditioned on one of three classes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x, t, c):
        return self.net(torch.cat([x, t[:, None], nn.functional.one_hot(c, 3).to(x)], 1))


def plane(seed: int = 0) -> Plane:
    torch.manual_seed(seed)
    return Plane()


def rows(count: int = 32) -> torch.utils.data.TensorDataset:
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(count, 2, generator=g)
    return torch.utils.data.TensorDataset(x0, 2 * x0 + 1, torch.arange(count) % 3)


def fit(module, data=None, callbacks=(), ckpt_path=None, val=None, **kwargs):
    data = ResumableLoader(rows(), batch_size=4, shuffle=True) if data is None else data
    options = {**QUIET, "max_epochs": 2, "enable_checkpointing": any(hasattr(c, "best_model_path") for c in callbacks)}
    trainer = Trainer(callbacks=list(callbacks), **{**options, **kwargs})
    loaders = {"datamodule": data} if isinstance(data, ReflowPairs) else {"train_dataloaders": data}
    if val is not None:
        loaders["val_dataloaders"] = val
    trainer.fit(module, **loaders, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer

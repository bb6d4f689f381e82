"""What prodiff's tests share: a constant network, batches, a run."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from effdl import ProDiffModule
from effdl.core.random import generator
from effdl.data.loading import ResumableLoader

DIFFNET = {"bins": 3, "condition": 8, "channels": 8, "layers": 2}
ENCODER = {"classes": 3, "frames": 8, "width": 8}


class Constant(nn.Module):
    """Says the same, whatever it is asked; notes the labels that it is called with."""

    def __init__(self):
        super().__init__()
        self.value, self.labels = nn.Parameter(torch.full((3, 1), 0.3)), []

    def forward(self, x, t, condition):
        self.labels.append(t.tolist())
        return self.value.expand(x.shape)


def batch_of(frames: int = 8, count: int = 6, bins: int = 3) -> dict:
    mel = torch.rand(count, bins, frames, generator=generator(1)) * 2 - 1
    return {"mel": mel, "label": torch.arange(count) % 3}


def loader(batch_size: int = 6):
    batch = batch_of(count=24)
    return ResumableLoader(
        torch.utils.data.TensorDataset(batch["mel"], batch["label"]), batch_size=batch_size, shuffle=True
    )


def fit(module, callbacks=(), epochs=2, **kwargs):
    settings = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    settings["enable_checkpointing"] = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", logger=False, callbacks=list(callbacks), **settings)
    trainer.fit(module, loader(), loader(), **kwargs)
    return module


def taught(steps=4, seed=0, **kwargs) -> ProDiffModule:
    torch.manual_seed(seed)
    module = ProDiffModule(DIFFNET, ENCODER, steps=steps, **kwargs)
    nn.init.normal_(module.model.output.weight, std=0.2)
    return module

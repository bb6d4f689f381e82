"""What the tests of koala share: configurations, a small U-Net, one step outside of a Trainer."""

from __future__ import annotations

import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from effdl.diffusion.koala import KOALADistillationModule
from effdl.tasks.tiny import tiny_condition_unet
from tests.support import BARE as QUIET
from tests.support import golden

GOLDEN = golden("koala")
SDXL = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True, "addition_embed_type": "text_time",
}  # fmt: skip
FULL = SDXL | {
    "sample_size": 128, "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip


def count(net) -> int:
    return sum(p.numel() for p in net.parameters())


def config_of(case: dict) -> dict:
    return {k: v for k, v in case.items() if k != "mid_block"}


def small(seed: int = 0, **config):
    """Two stages, attention in the inner one: 8x8 images of three one-hot classes."""
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
              "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}  # fmt: skip
    layers = {"layers_per_block": 2, "transformer_layers_per_block": (1, 3), "block_out_channels": (8, 16)}
    return tiny_condition_unet(8, 1, 3, seed, norm_num_groups=4, **(blocks | layers | config))


def batches(number: int = 4):
    g = torch.Generator().manual_seed(0)
    return [
        {"image": torch.randn(4, 1, 8, 8, generator=g), "encoder_hidden_states": torch.randn(4, 2, 3, generator=g)}
        for _ in range(number)
    ]


def module_of(teacher=None, **kwargs) -> KOALADistillationModule:
    options = {"depth": 1, "optimizer": lambda p: torch.optim.AdamW(p, 1e-3)} | kwargs
    return KOALADistillationModule(small() if teacher is None else teacher, **options)


def fit(module, data=None, callbacks=(), val=False, **kwargs):
    data = DataLoader(batches(), batch_size=None) if data is None else data
    options = QUIET | {"max_epochs": 1, "enable_checkpointing": bool(callbacks)} | kwargs
    trainer = Trainer(callbacks=list(callbacks), **options)
    trainer.fit(module, data, data if val else None)
    return trainer


def step(module, batch=None) -> torch.Tensor:
    """One step's loss outside of a Trainer, with its gradients; what it logs is in ``module.logged``."""
    module.logged = {}
    module.log = lambda name, value, **kwargs: module.logged.__setitem__(name, float(value.detach()))
    module.log_dict = lambda values, **kwargs: module.logged.update({k: float(v) for k, v in values.items()})
    module.zero_grad()
    loss = module.training_step(batches(1)[0] if batch is None else batch, 0)
    loss.backward()
    return loss.detach()

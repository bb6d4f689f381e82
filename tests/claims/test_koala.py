"""koala's claim: self-attention is what to distil, and a student that is cut out starts far ahead of a random one.

Run: ``EFFDL_DATA=... pytest -m slow tests/claims/test_koala.py -s``; the table is in docs/results.md.
"""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from lightning.pytorch import Trainer
from torch import Tensor

from effdl.data.loading import ResumableLoader, as_it_is
from effdl.diffusion.koala import KOALADistillationModule
from effdl.tasks.diffusion import DiffusionModule
from tests.support import BARE, load_npz

pytestmark = pytest.mark.slow
SEEDS = tuple(map(int, os.environ.get("EFFDL_SEEDS", "0,1,2").split(",")))
QUIET = {**BARE, "limit_val_batches": 0}
UNET = {
    "sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (16, 32), "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2, "transformer_layers_per_block": (1, 3), "cross_attention_dim": 32, "attention_head_dim": 8,
}  # fmt: skip
NULL = 10
LEARNED = {
    "no feature KD": {"lambda_feature": 0.0},
    "CA": {"features": "ca"},
    "LF": {"features": "lf"},
    "SA": {"features": "sa"},
    "SA + LF at the outer stages": {"features": ("sa", "lf_outer")},
}


class Digits(torch.utils.data.Dataset):
    """MNIST, average-pooled to 8x8, with two tokens per class; every tenth example has the null class's."""

    def __init__(self, split: str, count: int, seed: int) -> None:
        data = load_npz("mnist.npz")
        x = torch.from_numpy(data[f"x_{split}"][:count]).float()[:, None] / 127.5 - 1
        self.image = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), value=-1.0), 4)
        g = torch.Generator().manual_seed(seed)
        label = torch.from_numpy(data[f"y_{split}"][:count].astype(np.int64))
        self.label = torch.where(torch.rand(count, generator=g) < 0.1, NULL, label)
        self.tokens = torch.randn(NULL + 1, 2, 32, generator=torch.Generator().manual_seed(99))

    def __len__(self) -> int:
        return len(self.label)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        return {"image": self.image[rows], "encoder_hidden_states": self.tokens[self.label[rows]]}

    def loader(self, batch_size: int, seed: int) -> ResumableLoader:
        order = {"shuffle": True, "seed": seed, "drop_last": True}
        return ResumableLoader(self, batch_size=batch_size, collate_fn=as_it_is, **order)


def adamw(rate: float):
    return lambda parameters: torch.optim.AdamW(parameters, rate, weight_decay=0.01)


def fit(module, data: ResumableLoader, steps: int):
    Trainer(max_steps=steps, **QUIET).fit(module, data)
    return module.model.eval()


@torch.no_grad()
def distance(module: DiffusionModule, student, teacher) -> float:
    """Held-out mean squared difference of the two predictions, over all timesteps."""
    test, g = Digits("test", 1024, 5), torch.Generator().manual_seed(7)
    timesteps = torch.arange(1024) * 1000 // 1024
    a = module.noise_scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = a.sqrt() * test.image + (1 - a).sqrt() * torch.randn(test.image.shape, generator=g)
    tokens = test.tokens[test.label]
    return F.mse_loss(student(noisy, timesteps, tokens)[0], teacher(noisy, timesteps, tokens)[0]).item()


def experiment(seed: int) -> dict[str, float]:
    torch.manual_seed(seed)
    train = Digits("train", 20_000, seed)
    teacher_module = DiffusionModule(UNet2DConditionModel(**UNET), optimizer=adamw(2e-3), seed=seed)
    teacher = fit(teacher_module, train.loader(128, seed), 500)
    sizes = {"teacher, M parameters": sum(p.numel() for p in teacher.parameters()) / 1e6}

    def distilled(**kwargs) -> float:
        module = KOALADistillationModule(teacher, depth=1, optimizer=adamw(5e-4), seed=seed + 50, **kwargs)
        if not sizes.get("student, M parameters"):
            sizes["student, M parameters"] = sum(p.numel() for p in module.model.parameters()) / 1e6
            found["pruned only"] = distance(module, module.model.eval(), teacher)
        fit(module, train.loader(32, seed + 50), 120)
        return distance(module, module.model, teacher)

    found: dict[str, float] = {}
    start = time.process_time()  # a busy machine does not lengthen it
    for name, kwargs in LEARNED.items():
        found[name] = distilled(**kwargs)
    torch.manual_seed(seed + 1000)
    random = UNet2DConditionModel(**UNET | {"layers_per_block": 1, "transformer_layers_per_block": (1, 1)})
    found["random init + SA"] = distilled(student=random, features="sa")
    found = sizes | found | {"seconds, six students": time.process_time() - start}
    print(f"seed {seed}:", {name: round(value, 4) for name, value in found.items()}, flush=True)
    return found


@pytest.fixture(scope="module")
def runs():
    return [experiment(seed) for seed in SEEDS]


def test_must_07_self_attention_is_what_to_distil(runs):
    mean = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
    for name, value in mean.items():
        values = [run[name] for run in runs]
        print(f"  {name:32s} {value:.4f} ± {np.std(values):.4f}   {np.round(values, 4).tolist()}")
    none, attention = mean["no feature KD"], mean["SA"]
    assert all(run["SA + LF at the outer stages"] < run["SA"] < run["no feature KD"] for run in runs)
    assert attention <= 0.97 * none
    assert attention <= 0.4 * mean["random init + SA"]
    assert all(mean[name] <= 0.15 * mean["pruned only"] for name in LEARNED)


@pytest.mark.xfail(reason="0.924 measured where 0.92 is asked: docs/results.md", strict=True)
def test_must_07_the_outer_stages_by_the_margin_asked(runs):
    both, none = (np.mean([run[name] for run in runs]) for name in ("SA + LF at the outer stages", "no feature KD"))
    print(f"  SA+LF / none {both / none:.3f}")
    assert both <= 0.92 * none

"""rectified-flow-transformer's claims: mid-noise times help few-step sampling, cost at the ends, and change no optimum.

Run: ``pytest -m slow tests/claims/test_rectified_flow_transformer.py -s`` (needs no ``EFFDL_DATA``); the tables are in
docs/results.md.
"""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from effdl.core.random import generator
from effdl.data.loading import ResumableLoader, as_it_is
from effdl.diffusion._flow import rectified_flow_loss
from effdl.diffusion.rectified_flow_transformer import RectifiedFlowModule, integrate
from effdl.tasks.tiny import tiny_sd3_transformer
from tests.support import BARE

pytestmark = pytest.mark.slow
QUIET = {**BARE, "limit_val_batches": 0}


SEEDS = (0, 1, 2)


class Points(torch.utils.data.Dataset):
    """Points, fetched as whole batches."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        return {"image": self.x[rows]}


class Velocity(nn.Module):
    """Three hidden layers of SiLU on the point and some octaves of its time."""

    def __init__(self, dim: int, octaves: int = 8, width: int = 128) -> None:
        super().__init__()
        self.register_buffer("octaves", math.pi * 2.0 ** torch.arange(octaves), persistent=False)
        inner = [layer for _ in range(2) for layer in (nn.Linear(width, width), nn.SiLU())]
        self.net = nn.Sequential(nn.Linear(dim + 2 * octaves, width), nn.SiLU(), *inner, nn.Linear(width, dim))

    def forward(self, z: Tensor, label: Tensor, condition: None) -> Tensor:
        angle = label[:, None] / 1000 * self.octaves
        return self.net(torch.cat([z, angle.sin(), angle.cos()], 1))


def trained(x: Tensor, density: str, seed: int, steps: int, octaves: int = 8) -> RectifiedFlowModule:
    torch.manual_seed(seed)
    module = RectifiedFlowModule(
        Velocity(x.shape[1], octaves), density=density, seed=seed, optimizer=lambda p: torch.optim.Adam(p, 2e-3),
        scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(
            o, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))
        ),
    )  # fmt: skip
    loader = ResumableLoader(Points(x), batch_size=256, collate_fn=as_it_is, shuffle=True, seed=seed, drop_last=True)
    Trainer(max_steps=steps, **QUIET).fit(module, loader)
    return module.eval()


# --- must show 7: the sampler changes where the fit is good, not the optimum ---------------------------------------


@pytest.mark.parametrize("density", ["uniform", "logit_normal(0, 1)", "mode(1.29)", "cosmap"])
def test_must_07_the_gaussian_optimum(density: str):
    """RMS distance over t in [0.3, 0.7], of the draws z_t, from the closed form of the best velocity."""
    m, s, g, errors = 0.7, 0.5, generator(1), []
    x = m + s * torch.randn(50_000, 1, generator=generator(0))
    for seed in SEEDS:
        module = trained(x, density, seed, 1500, octaves=2)
        t = 0.3 + 0.4 * torch.rand(50_000, generator=g)
        c = t[:, None]
        z = (1 - c) * (m + s * torch.randn(50_000, 1, generator=g)) + c * torch.randn(50_000, 1, generator=g)
        best = -m + (c - (1 - c) * s**2) / ((1 - c) ** 2 * s**2 + c**2) * (z - (1 - c) * m)
        with torch.no_grad():
            errors.append((module(z, t) - best).square().mean().sqrt().item())
    print(f"\nRMS distance from the optimal velocity, {density}: {np.mean(errors):.4f} ± {np.std(errors):.4f}")
    assert max(errors) < 0.05


# --- must show 8: the checkerboard ---------------------------------------------------------------------------------


def checkerboard(count: int, seed: int) -> Tensor:
    """Every second unit square of [-2, 2]^2, divided by 1.2."""
    g = torch.Generator().manual_seed(seed)
    column = torch.randint(0, 4, (count,), generator=g)
    row = 2 * torch.randint(0, 2, (count,), generator=g) + column % 2
    corner = torch.stack([column, row], 1) - 2.0
    return (corner + torch.rand(count, 2, generator=g)) / 1.2


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|A - B| - E|A - A'| - E|B - B'|, over different points."""
    n = len(a)
    within = [torch.cdist(x, x).sum() / (n * (n - 1)) for x in (a, b)]
    return (2 * torch.cdist(a, b).mean() - sum(within)).item()


@torch.no_grad()
def judge(module: RectifiedFlowModule, seed: int) -> dict[str, float]:
    real, noise = checkerboard(8000, seed + 1000), torch.randn(8000, 2, generator=generator(seed + 2000))
    found = {}
    for steps in (5, 50):
        made = integrate(module, noise, torch.linspace(1, 0, steps + 1))
        found[f"energy distance, {steps} steps"] = energy_distance(made, real)
    for low, high in ((0.0, 0.05), (0.3, 0.7)):
        g, losses = generator(seed + 3000), []
        for _ in range(25):
            t = low + (high - low) * torch.rand(8000, generator=g)
            losses.append(rectified_flow_loss(module, real, torch.randn(8000, 2, generator=g), t).item())
        found[f"loss, t in [{low}, {high}]"] = float(np.mean(losses))
    return found


def test_must_08_mid_noise_times_help_few_steps():
    runs: dict[str, list[dict[str, float]]] = {"uniform": [], "logit_normal(0, 1)": []}
    for seed in SEEDS:
        for density, found in runs.items():
            start = time.process_time()
            module = trained(checkerboard(200_000, seed), density, seed, 2500)
            found.append({"seconds": time.process_time() - start, **judge(module, seed)})
    for density, found in runs.items():
        print(f"\n{density}")
        for name in found[0]:
            values = [run[name] for run in found]
            print(f"  {name:28s} {np.mean(values):.4f} ± {np.std(values):.4f}   {np.round(values, 4).tolist()}")
    plain, ours = runs.values()
    few = "energy distance, 5 steps"
    assert np.mean([run[few] for run in ours]) <= 0.95 * np.mean([run[few] for run in plain])
    for a, b in zip(plain, ours):
        assert b["loss, t in [0.0, 0.05]"] > a["loss, t in [0.0, 0.05]"]  # the price: the density was really changed


# --- must show 10: normalised queries and keys at a rate that makes logits grow -------------------------------------


class Watch(Callback):
    """The losses of a run."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


def largest_logit(module: RectifiedFlowModule, batch: dict[str, Tensor]) -> float:
    """Over both blocks, of image queries and keys."""
    seen: dict[str, Tensor] = {}
    handles = []
    for k, layer in enumerate(module.model.transformer_blocks):
        for x in "qk":
            source = getattr(layer.attn, f"norm_{x}") or getattr(layer.attn, f"to_{x}")
            handles.append(source.register_forward_hook(lambda m, a, out, key=(k, x): seen.update({key: out.float()})))
    condition = {name: batch[name] for name in ("encoder_hidden_states", "pooled_projections")}
    with torch.no_grad():
        module(batch["image"], torch.full((len(batch["image"]),), 0.5), condition)
    for handle in handles:
        handle.remove()
    found = []
    for k, layer in enumerate(module.model.transformer_blocks):
        heads = layer.attn.heads
        q, k_ = (seen[k, x] for x in "qk")
        if q.dim() == 3:
            q, k_ = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k_))
        found.append((q @ k_.transpose(-1, -2) / math.sqrt(q.shape[-1])).abs().max().item())
    return max(found)


def test_must_10_bf16_at_a_large_rate():
    g = torch.Generator().manual_seed(0)
    shapes = {"image": (4, 4, 4), "encoder_hidden_states": (3, 8), "pooled_projections": (8,)}
    batches = [{n: torch.randn(16, *shape, generator=g) for n, shape in shapes.items()} for _ in range(8)]
    widths = {"num_attention_heads": 2, "caption_projection_dim": 16}  # two blocks of width 16
    for seed in SEEDS:
        found = {}
        for qk_norm in (False, True):
            network = tiny_sd3_transformer(4, joint_attention_dim=8, pooled_projection_dim=8, seed=seed, **widths)
            options = {"optimizer": lambda p: torch.optim.AdamW(p, 0.3), "seed": seed}
            module, watch = RectifiedFlowModule(network, qk_norm=qk_norm, **options), Watch()
            loader = torch.utils.data.DataLoader(batches, batch_size=None)
            trainer = Trainer(max_steps=200, precision="bf16-true", callbacks=[watch], **QUIET)
            trainer.fit(module, loader)
            found[qk_norm] = largest_logit(module, batches[0]), watch.losses
        for qk_norm, (logit, losses) in found.items():
            print(f"\nqk_norm={qk_norm}: largest logit {logit:.3g}, loss after 200 steps {losses[-1]:.3g}")
        assert len(found[True][1]) == 200
        assert all(map(math.isfinite, found[True][1]))
        attention = [layer.attn for layer in module.model.transformer_blocks]
        gains = max(a.norm_q.weight.abs().max().item() * a.norm_k.weight.abs().max().item() for a in attention)
        assert found[True][0] <= math.sqrt(8) * gains * 1.02
        assert not found[False][0] <= 10 * found[True][0]  # without the norms they have grown

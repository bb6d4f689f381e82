"""What the two processes of ``test_smooth_diffusion.py`` run; apart, so that they start without importing the tests."""

from __future__ import annotations

import torch
from torch import nn

from effdl.core.noise import betas
from effdl.diffusion._smooth_diffusion_variation import RunningVariation, denoiser_variations

TABLE = torch.cumprod(1 - betas("linear", 1000), 0)


def steps(rows: slice) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Running mean and gradient after each of three steps on these rows of the batches."""
    draw = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(6, 6, generator=draw, dtype=torch.float64))
    running, done = RunningVariation(0.3), []
    for _ in range(3):
        x_t, delta = torch.randn(2, 8, 6, generator=draw, dtype=torch.float64)
        t = torch.randint(1000, (8,), generator=draw)
        x_t = x_t[rows].requires_grad_()
        r = denoiser_variations(x_t, torch.tanh(x_t @ weight), t[rows], TABLE, "epsilon", delta[rows])
        penalty, _ = running.penalty(r)
        done.append((running.mean, torch.autograd.grad(penalty, weight)[0]))
    return done


def run(rank: int, folder: str) -> None:
    torch.save(steps(slice(rank, None, 2)), f"{folder}/{rank}.pt")

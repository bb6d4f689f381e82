"""Images along interpolations between noises, and their picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from effdl.core.capture import evaluating
from effdl.core.solvers import sample_loop
from effdl.diffusion._smooth_diffusion_variation import interpolated_images


def interpolate(
    module: Any,
    start: Tensor,
    end: Tensor,
    points: int = 10,
    steps: int = 20,
    condition: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Images of a ``DiffusionModule`` along evenly spaced slerps between noises, by deterministic DDIM.

    Args:
        module: the task.
        start, end: unit noises (P, C, H, W), of the latents' shape.
        points: images per path.
        steps: of DDIM.
        condition: keyword arguments of the network, one row per path.

    Returns:
        (P, points, C, H, W) float32, about [-1, 1].

    Example::

        images = interpolate(module, *torch.randn(2, 4, 3, 32, 32))
        smoothness = interpolation_std(images)
    """
    scheduler = DDIMScheduler.from_config(module.noise_scheduler.config)
    given = {name: value.to(module.device) for name, value in (condition or {}).items()}

    def generate(noise: Tensor, pair: Tensor) -> Tensor:
        rows = {name: value[pair] for name, value in given.items()}
        predict = lambda x, t: module(x.to(module.dtype), t, **rows).float()  # noqa: E731
        return module.surroundings.decode_images(sample_loop(predict, noise, scheduler, steps))

    with evaluating(module.model), torch.no_grad():
        return interpolated_images(generate, start.to(module.device), end.to(module.device), points)


def draw_paths(images: Tensor, path: Path) -> Path | None:
    """One path (P, K, C, H, W) per row; ``None`` where the states are no images."""
    if images.dim() != 5 or images.shape[2] not in (1, 3):
        return None
    from torchvision.utils import make_grid, save_image

    rows = images.flatten(0, 1).float().cpu().clamp(-1, 1)
    grid = make_grid(rows, nrow=images.shape[1], value_range=(-1, 1), normalize=True)
    zoom = max(1, 64 // images.shape[-1])
    save_image(grid.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2), path)
    return path

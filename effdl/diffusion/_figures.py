"""Pictures of what a flow makes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effdl.core.pictures import image_grid, save_picture
from effdl.diffusion._flow import Condition


def first_rows(value: Condition, count: int) -> Condition:
    """The first rows of a condition."""
    if isinstance(value, dict):
        return {name: first_rows(entry, count) for name, entry in value.items()}
    return value if value is None else value[:count].detach()


def on_device(value: Condition, device: torch.device) -> Condition:
    """A condition, moved."""
    if isinstance(value, dict):
        return {name: entry.to(device) for name, entry in value.items()}
    return value if value is None else value.to(device)


def draw_samples(module: Any, noise: Tensor, condition: Condition, steps: Sequence[int], path: Path) -> Path | None:
    """One row of images per number of Euler steps, one column per noise; ``None`` where the states are no images."""
    condition, noise = on_device(condition, module.device), noise.to(module.device)
    return save_rows([module.sample(condition, noise, steps=n) for n in steps], path)


def save_rows(rows: Sequence[Tensor], path: Path) -> Path | None:
    """Rows of images ``[B, C, H, W]`` in [-1, 1], one below the other; ``None`` where the states are no images."""
    if rows[0].dim() != 4 or rows[0].shape[1] not in (1, 3):
        return None
    return save_picture(image_grid(torch.cat(list(rows)), len(rows[0])), path)

"""Images as pictures: a grid, to the loggers that take one, else to a file in the run's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SMALLEST = 64  # pixels of a side: smaller images are drawn larger


def image_grid(images: Tensor, columns: int) -> Tensor:
    """Images (B, C, H, W) in [-1, 1], C 1 or 3, as one picture uint8 (3, H', W'); small ones are enlarged."""
    from torchvision.utils import make_grid

    pixels = images.detach().float().cpu().clamp(-1, 1)
    grid = make_grid(pixels, nrow=columns, value_range=(-1, 1), normalize=True)
    zoom = max(1, SMALLEST // images.shape[-1])
    return (255 * grid).round().to(torch.uint8).repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)


def save_picture(picture: Tensor, path: Path) -> Path:
    """Write uint8 (3, H, W) as a PNG."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)
    return path


def send_picture(loggers: Sequence[Any], key: str, picture: Tensor, step: int) -> list[Any]:
    """One picture uint8 (3, H, W) to the loggers that take it: those with ``log_image`` (W&B), or an experiment that
    has ``add_image`` (TensorBoard).

    Returns:
        The loggers that do not.
    """
    others = []
    for logger in loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key, [picture.permute(1, 2, 0).numpy()], step=step)
        elif hasattr(getattr(logger, "experiment", None), "add_image"):
            logger.experiment.add_image(key, picture, step)
        else:
            others.append(logger)
    return others


def log_picture(trainer: Any, key: str, picture: Tensor) -> None:
    """One picture, under ``key``, to each of the run's loggers (:func:`send_picture`); for those that take none it is
    written as ``KEY/STEP.png`` in their folder.

    Args:
        trainer: its loggers and its step; only the first process writes.
        key: ``"samples"``.
        picture: uint8 (3, H, W).
    """
    if not trainer.is_global_zero:
        return
    for logger in send_picture(trainer.loggers, key, picture, trainer.global_step):
        if logger.log_dir is not None:
            save_picture(picture, Path(logger.log_dir) / key / f"{trainer.global_step:08d}.png")

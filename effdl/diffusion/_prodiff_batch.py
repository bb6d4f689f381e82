"""What a batch says to ProDiff: clean data, which frames count, the condition, the encoder's own losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effdl.core.batch import unpack
from effdl.core.errors import check
from effdl.core.random import generator


class Reading(NamedTuple):
    """``x`` ``[B, 1, M, T]``, zero where frames do not count; ``mask`` ``[B, T]`` or ``None``; ``condition``
    ``[B, H, T]``, or whatever the denoiser takes; ``losses`` by name."""

    x: Tensor
    mask: Tensor | None
    condition: Any
    losses: dict[str, Tensor]


def mask_of(batch: Any) -> Tensor | None:
    """``mask`` of a batch, 1 where a frame counts."""
    return batch.get("mask") if isinstance(batch, Mapping) else None


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """``x`` ``[B, 1, M, T]``, zero where frames do not count."""
    return x if mask is None else x * mask[:, None, None]


def encode(encoder: nn.Module | None, batch: Any, frames: int, grad: bool) -> tuple[Any, dict[str, Tensor]]:
    """The condition of a batch, and what its encoder wants to be trained on; without an encoder ``condition``, or the
    labels."""
    if encoder is None:
        has = isinstance(batch, Mapping) and "condition" in batch
        return batch["condition"] if has else unpack(batch).labels, {}
    with torch.set_grad_enabled(torch.is_grad_enabled() and grad):
        told = encoder(batch, frames)
    return told if isinstance(told, tuple) else (told, {})


def read(encoder: nn.Module | None, batch: Any, grad: bool) -> Reading:
    """A training batch.

    Raises:
        ConfigurationError: data of another shape, a mask or a condition of another length, a batch without any frame.
    """
    x = unpack(batch).inputs
    x = x[:, None] if x.dim() == 3 else x
    check(x.dim() == 4, "batch", tuple(x.shape), "data of shape [B, M, T] or [B, 1, M, T]")
    frames, mask = x.shape[-1], mask_of(batch)
    if mask is not None:
        check(mask.shape == (len(x), frames), "mask", tuple(mask.shape), f"shape {(len(x), frames)}")
    condition, losses = encode(encoder, batch, frames, grad)
    if isinstance(condition, Tensor) and condition.dim() == 3:
        check(condition.shape[-1] == frames, "condition", f"{condition.shape[-1]} frames", f"{frames}, as the data")
    return Reading(masked(x, mask), mask, condition, losses)


def noise_for(network: nn.Module, batch: Any, frames: int | None, seed: int) -> Tensor:
    """Unit noise ``[B, 1, M, T]`` for the labels of a batch, on the CPU: the same on every machine."""
    bins = getattr(network, "config", {}).get("bins")
    check(frames is not None and bins is not None, "noise", None, "noise, or frames and a DiffNet")
    labels = batch["label"] if isinstance(batch, Mapping) else unpack(batch).labels
    return torch.randn(len(labels), 1, bins, frames, generator=generator(seed))

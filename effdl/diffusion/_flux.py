"""diffusers' Flux transformer called like any other network: latents in and out, packed and addressed inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effdl.core.errors import check

FLUX = "FluxTransformer2DModel"
GUIDANCE = "guidance"  # key of a condition: the scale that a guidance-distilled network is told, [B]
TOLD = 3.5  # what it is told otherwise, as by the stock pipeline


def pack(latents: Tensor) -> Tensor:
    """Patches of 2x2 as tokens: ``[B, C, H, W]`` to ``[B, H W / 4, 4 C]``."""
    count, channels, height, width = latents.shape
    check(height % 2 == 0 and width % 2 == 0, "latents", tuple(latents.shape), "an even height and width for Flux")
    patches = latents.reshape(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(count, height * width // 4, 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`pack`."""
    count, _, channels = tokens.shape
    patches = tokens.reshape(count, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(count, channels // 4, height, width)


def image_ids(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Where each token lies: ``(0, row, column)``, ``[H W / 4, 3]``; text lies at 0."""
    rows, columns = torch.arange(height // 2, device=device), torch.arange(width // 2, device=device)
    rows, columns = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], 2).reshape(-1, 3).float()


def call_flux(network: nn.Module, x: Tensor, label: Tensor, condition: Any) -> Tensor:
    """One forward pass of a ``FluxTransformer2DModel`` on latents.

    Args:
        network: with ``config.guidance_embeds`` it is told a guidance scale.
        x: ``[B, C, H, W]``, C a quarter of its ``in_channels``.
        label: 1000 t ``[B]``; the network multiplies t itself, in the dtype of its activations: bf16 has few t near 1.
        condition: a dict with ``encoder_hidden_states`` [B, L, D], ``pooled_projections`` [B, P], perhaps ``guidance``
            [B].

    Returns:
        The velocity ``[B, C, H, W]``.
    """
    given = dict(condition) if isinstance(condition, dict) else {}
    text = given.get("encoder_hidden_states")
    complete = text is not None and "pooled_projections" in given
    check(complete, "condition", sorted(given), "encoder_hidden_states and pooled_projections for Flux")
    told = given.pop(GUIDANCE, None)
    if network.config.guidance_embeds:
        given[GUIDANCE] = x.new_full((len(x),), TOLD, dtype=torch.float32) if told is None else told
    height, width = x.shape[-2:]
    ids = {"img_ids": image_ids(height, width, x.device), "txt_ids": torch.zeros(text.shape[1], 3, device=x.device)}
    output = network(hidden_states=pack(x), timestep=label / 1000, return_dict=False, **ids, **given)
    return unpack(output[0], height, width)


@torch.no_grad()
def encode_flux(pipeline: Any, prompts: Sequence[str], device: torch.device | str) -> dict[str, Tensor]:
    """The condition of prompts ``[B]``, by the stock pipeline's own rule."""
    with torch.autocast(torch.device(device).type, enabled=False):
        text, pooled, _ = pipeline.encode_prompt(list(prompts), None, device=device)
    return {"encoder_hidden_states": text, "pooled_projections": pooled}

"""A batch's condition; left out in training, each text encoder by itself; and the empty one for guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effdl.core.errors import check, check_integer
from effdl.diffusion._denoiser import kind
from effdl.diffusion._flow import Condition
from effdl.diffusion._flux import FLUX, GUIDANCE
from effdl.diffusion._source import FlowSource

TEXT, POOLED = "encoder_hidden_states", "pooled_projections"


@dataclass(frozen=True)
class TextLayout:
    """Where SD3's three encoders stand in its condition.

    The sequences of CLIP-L and CLIP-G lie beside each other on the channels, T5's follows them along the tokens; the
    pooled vector is CLIP-L's, then CLIP-G's.

    Args:
        tokens: length of the CLIP sequences.
        first, second: channels of CLIP-L's and CLIP-G's sequence.
        pooled: channels of CLIP-L's pooled vector.
    """

    tokens: int = 77
    first: int = 768
    second: int = 1280
    pooled: int = 768


def read_condition(source: FlowSource, batch: Mapping[str, Any], labels: Any, device: torch.device) -> Condition:
    """Of a batch's ``prompt``, embeddings or labels; for Flux with its ``guidance`` [B], where it has one."""
    if "prompt" in batch:
        condition = source.encode(batch["prompt"], device)
    elif TEXT in batch:
        condition = {name: batch[name] for name in (TEXT, POOLED) if name in batch}
    else:
        return source.accepted(labels)
    told = GUIDANCE in batch and kind(source.network) == FLUX
    return condition | {GUIDANCE: batch[GUIDANCE]} if told else condition


def check_null(null: int | None, network: Any) -> None:
    """A null label must be a row of the network's table of classes."""
    if null is None:
        return
    check_integer("null_label", null, 0)
    if kind(network):
        rows = getattr(getattr(network, "config", None), "num_class_embeds", None) or 0
        check(null < rows, "null_label", null, f"below the network's num_class_embeds={rows}", "Or None.")


def text_layout(source: FlowSource) -> TextLayout | None:
    """Of an SD3 pipeline, or of the published transformer's widths; ``None`` where the condition is one piece."""
    if kind(source.network) == FLUX:  # its two encoders say the same
        return None
    parts = source.pipeline.components if source.pipeline is not None else {}
    first, second = parts.get("text_encoder"), parts.get("text_encoder_2")
    if source.role == "transformer" and first is not None and second is not None:
        widths = first.config.hidden_size, second.config.hidden_size
        return TextLayout(source.pipeline.tokenizer_max_length, *widths, first.config.projection_dim)
    config = getattr(source.network, "config", None) or {}
    published = (config.get("joint_attention_dim"), config.get("pooled_projection_dim")) == (4096, 2048)
    return TextLayout() if published else None


def drop(condition: Condition, uniform: Tensor, share: float, null: int | None, layout: TextLayout | None) -> Condition:
    """The condition with some rows emptied: labels become ``null``, embeddings zero.

    With K encoders each is dropped with probability ``share^(1/K)``, so that ``share`` of the rows lose all of them:
    the paper's 46.4 % for three, a tenth for guidance.

    Args:
        condition: labels or embeddings ``[B, ...]``, a dict of such, or ``None``.
        uniform: draws ``[B, 3]`` in [0, 1).
        share: of the rows without any condition.
        null: the label of no class; ``None``: labels are kept.
        layout: splits SD3's embeddings; ``None``: all or nothing.
    """
    if share == 0 or condition is None:
        return condition
    if layout is None or not isinstance(condition, dict):
        return _empty(condition, uniform[:, 0] >= share, null)
    keep = uniform >= share ** (1 / 3)
    text, pooled = condition[TEXT], condition[POOLED]
    first, second, third = keep.unbind(1)
    mask = third[:, None, None].expand_as(text).clone()
    mask[:, : layout.tokens] = True
    mask[:, : layout.tokens, : layout.first] = first[:, None, None]
    mask[:, : layout.tokens, layout.first : layout.first + layout.second] = second[:, None, None]
    is_first = torch.arange(pooled.shape[1], device=pooled.device) < layout.pooled
    halves = torch.where(is_first, first[:, None], second[:, None])
    return condition | {TEXT: text.masked_fill(~mask, 0), POOLED: pooled.masked_fill(~halves, 0)}


def empty(condition: Condition, null: int | None) -> Condition:
    """The condition that :func:`drop` leaves when it drops everything; ``None`` where there is none."""
    rows: Any = next(iter(condition.values())) if isinstance(condition, dict) else condition
    if rows is None or (null is None and not isinstance(condition, dict) and not rows.is_floating_point()):
        return None
    return _empty(condition, torch.zeros(len(rows), dtype=torch.bool, device=rows.device), null)


def _empty(condition: Condition, keep: Tensor, null: int | None) -> Condition:
    """Rows that are not kept become zero, or the label ``null``."""
    if isinstance(condition, dict):
        return {n: value if n == GUIDANCE else _empty(value, keep, None) for n, value in condition.items()}
    if condition.is_floating_point():
        return condition.masked_fill(~keep.view(-1, *[1] * (condition.dim() - 1)), 0)
    return condition if null is None else torch.where(keep, condition, null)

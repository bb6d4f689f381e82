"""Heads over frozen feature maps: pooled linear or MLP, convolutions, and attention over tokens of several maps.

Sources: Mukhopadhyay et al., 2307.08702 (linear, MLP, CNN, attention) and 2311.17921 (several blocks and timesteps).
A head is called with the maps, one per (timestep, block), timesteps outermost, each fp32 ``[B, C, H, W]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block as VisionBlock
from torch import Tensor, nn

from effdl.core.errors import check, check_choice, check_integer

HEADS = ("linear", "mlp", "cnn", "attention")
NORMS = ("layer", "batch")
Shape = tuple[int, int, int]


def pooled(features: Sequence[Tensor], pool: int) -> Tensor:
    """Average-pooled to ``pool`` x ``pool``, flattened and joined: ``[B, sum C pool^2]``."""
    return torch.cat([F.adaptive_avg_pool2d(z.float(), pool).flatten(1) for z in features], 1)


class PooledHead(nn.Sequential):
    """``AdaptiveAvgPool(pool) -> Linear``, with ReLU layers of the widths ``hidden`` before it (linear: none)."""

    def __init__(self, shapes: Sequence[Shape], classes: int, pool: int, hidden: Sequence[int] = ()) -> None:
        widths = [sum(channels for channels, _, _ in shapes) * pool**2, *hidden]
        layers: list[nn.Module] = []
        for width, following in zip(widths, widths[1:]):
            layers += [nn.Linear(width, following), nn.ReLU()]
        super().__init__(*layers, nn.Linear(widths[-1], classes))
        self.pool = pool

    def forward(self, *features: Tensor) -> Tensor:
        return super().forward(pooled(features, self.pool))


class ConvolutionHead(nn.Module):
    """Two strided convolutions per map, global average pooling, one linear layer."""

    def __init__(self, shapes: Sequence[Shape], classes: int, width: int = 256) -> None:
        super().__init__()
        self.maps = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(),
            )
            for channels, _, _ in shapes
        )  # fmt: skip
        self.classify = nn.Linear(width * len(shapes), classes)

    def forward(self, *features: Tensor) -> Tensor:
        return self.classify(torch.cat([net(z).mean((2, 3)) for net, z in zip(self.maps, features)], 1))


class TokenEncoder(nn.Module):
    """A class token, zero at the start, before the tokens ``[B, N, D]``; pre-norm ViT blocks without biases in q, k, v,
    without positions and without a norm at the end; the class token ``[B, D]`` comes out."""

    def __init__(self, dim: int, heads: int, depth: int, mlp_ratio: float = 4) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.Sequential(
            *(VisionBlock(dim, heads, mlp_ratio, qkv_bias=False, norm_layer=nn.LayerNorm) for _ in range(depth))
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.blocks(torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1))[:, 0]


class AttentionHead(nn.Module):
    """Each map: pool to at most ``pool``, norm over [C, h, w], 1x1 convolution to ``dim``; the tokens of all blocks at
    one timestep go through one encoder; the class tokens of all timesteps through one linear layer.

    Args:
        shapes: (C, H, W) of each map, timesteps outermost.
        classes: K.
        timesteps: how many of them.
        pool, dim, heads, depth, mlp_ratio: as said.
        norm: ``"layer"`` ties the head to the maps' size, ``"batch"`` does not.

    Raises:
        ConfigurationError: dim not divisible by heads.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        classes: int,
        timesteps: int = 1,
        pool: int = 16,
        dim: int = 1024,
        heads: int = 8,
        depth: int = 2,
        mlp_ratio: float = 4,
        norm: str = "layer",
    ) -> None:
        super().__init__()
        check(dim % heads == 0, "dim", dim, f"a multiple of heads={heads}")
        check_choice("norm", norm, NORMS)
        self.pool = pool
        self.shapes = [(channels, min(height, pool), min(width, pool)) for channels, height, width in shapes]
        make = {"layer": nn.LayerNorm, "batch": lambda shape: nn.BatchNorm2d(shape[0])}[norm]
        self.before = nn.ModuleList(nn.Sequential(make(s), nn.Conv2d(s[0], dim, 1)) for s in self.shapes)
        self.encoder = TokenEncoder(dim, heads, depth, mlp_ratio)
        self.timesteps = timesteps
        self.classify = nn.Linear(dim * timesteps, classes)

    def forward(self, *features: Tensor) -> Tensor:
        tokens = [self._tokens(net, z, shape) for net, z, shape in zip(self.before, features, self.shapes)]
        per_time = len(tokens) // self.timesteps
        groups = [torch.cat(tokens[i : i + per_time], 1) for i in range(0, len(tokens), per_time)]
        return self.classify(torch.cat([self.encoder(group) for group in groups], 1))

    def _tokens(self, net: nn.Module, z: Tensor, shape: Shape) -> Tensor:
        z = F.adaptive_avg_pool2d(z, (min(z.shape[2], self.pool), min(z.shape[3], self.pool)))
        if isinstance(net[0], nn.LayerNorm):
            valid = f"features of shape {shape}, for which the head was made"
            check(tuple(z.shape[1:]) == shape, "images", tuple(z.shape[1:]), valid, "norm='batch' takes other sizes.")
        return net(z).flatten(2).transpose(1, 2)


def make_head(head: str, shapes: Sequence[Shape], classes: int, timesteps: int, pool: int, **kwargs: Any) -> nn.Module:
    """A head by name; ``kwargs``: ``hidden`` of the MLP, ``width`` of the CNN, the attention head's own.

    Raises:
        ConfigurationError: unknown name or argument, a pool larger than a map's side.
    """
    check_choice("head", head, HEADS)
    known = {"linear": (), "mlp": ("hidden",), "cnn": ("width",)}
    known["attention"] = ("dim", "heads", "depth", "mlp_ratio", "norm")
    unknown = sorted(set(kwargs) - set(known[head]))
    check(not unknown, "head_kwargs", unknown, f"arguments of the {head} head: {', '.join(known[head]) or 'none'}")
    for name in ("width", "dim", "heads", "depth"):
        if name in kwargs:
            check_integer(name, kwargs[name], 1)
    if head == "cnn":
        return ConvolutionHead(shapes, classes, **kwargs)
    if head == "attention":
        return AttentionHead(shapes, classes, timesteps, pool, **kwargs)
    side = min(min(height, width) for _, height, width in shapes)
    check(pool <= side, "pool", pool, f"at most {side}, the side of the smallest feature map")
    hidden = tuple(kwargs.get("hidden", (1024,) if head == "mlp" else ()))
    check(all(isinstance(width, int) and width > 0 for width in hidden), "hidden", hidden, "positive integers")
    return PooledHead(shapes, classes, pool, hidden)

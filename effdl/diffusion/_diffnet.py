"""ProDiff's network: a non-causal WaveNet over mel frames, and an encoder of classes and speakers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effdl.core.batch import unpack
from effdl.core.errors import ConfigurationError, check_integer


def sinusoidal(t: Tensor, width: int) -> Tensor:
    """Embeddings ``[B, width]`` of indices ``[B]``: sines and cosines of frequencies 1 to 1e-4."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=t.device, dtype=torch.float32))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], 1)


class ResidualLayer(nn.Module):
    """``y = conv3(x + step) + conv1(condition)``; ``sigmoid(gate) tanh(filter)``; a residual and a skip."""

    def __init__(self, channels: int, condition: int, dilation: int) -> None:
        super().__init__()
        self.step = nn.Linear(channels, channels)
        self.condition = nn.Conv1d(condition, 2 * channels, 1)
        self.dilated = nn.Conv1d(channels, 2 * channels, 3, padding=dilation, dilation=dilation)
        self.output = nn.Conv1d(channels, 2 * channels, 1)

    def forward(self, x: Tensor, step: Tensor, condition: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        inner = x + self.step(step)[..., None]
        inner = inner if mask is None else inner * mask  # so that padded frames are zeros to their neighbours
        gate, value = (self.dilated(inner) + self.condition(condition)).chunk(2, 1)
        residual, skip = self.output(gate.sigmoid() * value.tanh()).chunk(2, 1)
        return (x + residual) / math.sqrt(2), skip


class DiffNet(nn.Module):
    """Clean data from noisy data: x_0 directly, no clamp; zero at the start of training.

    Args:
        bins: M, mel bins.
        condition: H, channels of the condition.
        channels: C of the residual layers (the paper: 256).
        layers: their number (20).
        dilation_cycle: dilations 1, 2, ..., 2^(cycle - 1), again; 1: all 1, as released.

    Example::

        x0 = DiffNet(80, 256)(torch.randn(2, 1, 80, 100), torch.tensor([4, 2]), torch.randn(2, 256, 100))
    """

    def __init__(
        self, bins: int = 80, condition: int = 256, channels: int = 256, layers: int = 20, dilation_cycle: int = 1
    ) -> None:
        super().__init__()
        for name, value in (("bins", bins), ("condition", condition), ("layers", layers)):
            check_integer(name, value, 1)
        check_integer("channels", channels, 4)
        check_integer("dilation_cycle", dilation_cycle, 1)
        self.config = {"bins": bins, "condition": condition, "channels": channels, "layers": layers}
        self.config["dilation_cycle"] = dilation_cycle
        self.channels = channels
        self.input = nn.Conv1d(bins, channels, 1)
        self.step = nn.Sequential(nn.Linear(channels, 4 * channels), nn.Mish(), nn.Linear(4 * channels, channels))
        self.layers = nn.ModuleList(
            ResidualLayer(channels, condition, 2 ** (i % dilation_cycle)) for i in range(layers)
        )
        self.skip, self.output = nn.Conv1d(channels, channels, 1), nn.Conv1d(channels, bins, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[B, 1, M, T]`` from noisy ``[B, 1, M, T]``, step indices ``[B]``, condition ``[B, H, T]`` and, where frames
        are padded, a mask ``[B, T]``."""
        mask = None if mask is None else mask[:, None].to(condition.dtype)
        step = self.step(sinusoidal(t, self.channels).to(condition.dtype))
        x = F.relu(self.input(x.squeeze(1)))
        total = torch.zeros_like(x)
        for layer in self.layers:
            x, skip = layer(x, step, condition, mask)
            total = total + skip
        return self.output(F.relu(self.skip(total / math.sqrt(len(self.layers))))).unsqueeze(1)


class ClassEncoder(nn.Module):
    """A condition ``[B, H, T]`` from what a batch says: embeddings of class and speaker, and one per frame.

    Args:
        classes: number of ``label``.
        speakers: number of ``speaker``; 0: none.
        frames: most frames.
        width: H.
    """

    def __init__(self, classes: int = 10, speakers: int = 0, frames: int = 32, width: int = 64) -> None:
        super().__init__()
        for name, value, least in (("classes", classes, 1), ("speakers", speakers, 0), ("frames", frames, 1)):
            check_integer(name, value, least)
        check_integer("width", width, 1)
        self.config = {"classes": classes, "speakers": speakers, "frames": frames, "width": width}
        self.classes = nn.Embedding(classes, width)
        self.speakers = nn.Embedding(speakers, width) if speakers else None
        self.position = nn.Parameter(0.02 * torch.randn(width, frames))

    def forward(self, batch: Any, frames: int) -> Tensor:
        """``[B, H, frames]`` of a batch with ``label`` [B] and, if there are speakers, ``speaker`` [B]."""
        labels = batch.get("label") if isinstance(batch, Mapping) else unpack(batch).labels
        if labels is None:
            raise ConfigurationError("the batch has no 'label', which the encoder wants.")
        told = self.classes(labels)
        if self.speakers is not None:
            if not isinstance(batch, Mapping) or "speaker" not in batch:
                raise ConfigurationError("the batch has no 'speaker', which the encoder wants.")
            told = told + self.speakers(batch["speaker"])
        return told[..., None] + self.position[:, :frames]

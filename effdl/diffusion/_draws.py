"""The random numbers of a training step, as a function of (seed, epoch, batch): nothing to save, nothing to restore."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from effdl.core.distributed import rank, world_size
from effdl.core.random import generator


@dataclass(frozen=True)
class Draws:
    """Noise and times of one batch, drawn on its device for the examples of all processes together.

    Process r of W takes rows r, r + W, ...: those of the examples that ``EpochSampler`` gives it, so W processes with
    batches of B draw what a single one with batches of B W does.

    Args:
        seed: of the run.
        epoch: -1 for validation, whose draws are the same in every epoch.
        batch: its number in the epoch.
        device: where to draw.

    Example::

        draws = Draws(0, self.current_epoch, batch_idx, self.device)
        x0, u = draws.noise(x1.shape), draws.uniform(len(x1))
    """

    seed: int
    epoch: int
    batch: int
    device: torch.device | str = "cpu"

    def stream(self, purpose: int) -> torch.Generator:
        """A generator of this batch; different purposes, different streams."""
        entropy = np.random.SeedSequence([self.seed, self.epoch + 1, self.batch, purpose])
        return generator(int(entropy.generate_state(1)[0]), self.device)

    def uniform(self, count: int) -> Tensor:
        """U[0, 1), ``[count]``."""
        everyone = torch.rand(count * world_size(), generator=self.stream(0), device=self.device)
        return everyone[rank() :: world_size()]

    def noise(self, shape: Sequence[int]) -> Tensor:
        """N(0, I) of a shape ``[B, ...]``."""
        count, *rest = shape
        everyone = torch.randn(count * world_size(), *rest, generator=self.stream(1), device=self.device)
        return everyone[rank() :: world_size()]

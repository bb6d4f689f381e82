"""The random numbers of a training step, as a function of (seed, epoch, batch): nothing to save, nothing to restore."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from effdl.core.distributed import rank, world_size
from effdl.core.random import generator


def own_rows(drawn: Tensor, count: int) -> Tensor:
    """This process's ``[count]`` of what was drawn for it alone or, as :meth:`Draws.rows` does, for all processes."""
    return drawn if len(drawn) == count else drawn[rank() :: world_size()]


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

    def rows(self, count: int, sample: Callable[[int, torch.Generator], Tensor], purpose: int) -> Tensor:
        """This process's ``[count, ...]`` of what ``sample(rows of all processes, generator)`` draws."""
        return sample(count * world_size(), self.stream(purpose))[rank() :: world_size()]

    def uniform(self, count: int) -> Tensor:
        """U[0, 1), ``[count]``."""
        return self.rows(count, lambda n, stream: torch.rand(n, generator=stream, device=self.device), 0)

    def noise(self, shape: Sequence[int]) -> Tensor:
        """N(0, I) of a shape ``[B, ...]``."""
        count, *rest = shape
        return self.rows(count, lambda n, stream: torch.randn(n, *rest, generator=stream, device=self.device), 1)

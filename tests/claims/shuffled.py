"""Training data in memory for the claims: batches without a DataLoader's overhead."""

from __future__ import annotations

import torch


class Shuffled:
    """Batches (x, y) of tensors in an order that is a function of (seed, epoch), whole ones only; ``flip`` mirrors
    images at random."""

    def __init__(self, x, y, batch, seed, flip=False):
        self.x, self.y, self.batch, self.flip = x, y, batch, flip
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self):
        return len(self.x) // self.batch

    def __iter__(self):
        order = torch.randperm(len(self.x), generator=self.generator)
        for rows in order[: len(self) * self.batch].view(-1, self.batch):
            x = self.x[rows]
            if self.flip:
                mirrored = torch.rand(len(x), generator=self.generator) < 0.5
                x = torch.where(mirrored.view(-1, 1, 1, 1), x.flip(-1), x)
            yield x, self.y[rows]

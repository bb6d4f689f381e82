"""What the inputs of a layer look like over calibration sequences: norms, means, variances, second moments.

Example::

    statistics = InputStatistics(features=64)
    statistics.update(x)                # (B, T, 64), one call per batch
    statistics.all_reduce()             # under DDP
    scores = weight.abs() * statistics.square_sum.sqrt()
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from effdl.core.blockwise import Block
from effdl.core.distributed import all_reduce_sum


class InputStatistics:
    """Per-channel statistics of the inputs x (B, T, C) of one layer, accumulated sequence by sequence.

    Everything is a sum over sequences, in fp32 at least, so the batch size does not matter. Tokens that do not count
    (padding) are left out. A two-dimensional input (R, C) is one sequence of R tokens, unless R = B T of a token mask.

    Args:
        features: C.
        device: of the accumulators.
        second_moment: also accumulate X^T X (C, C).
        rows: keep this many tokens, the first ones, as ``sample`` (R, C).
        name: for error messages.

    Raises:
        RuntimeError: a NaN or an infinity at a token that counts; names layer and sequence.
    """

    def __init__(
        self,
        features: int,
        device: torch.device | str = "cpu",
        second_moment: bool = False,
        rows: int = 0,
        name: str = "layer",
    ) -> None:
        self._sums = torch.zeros(3, features, dtype=torch.float64, device=device)  # x^2, x, n_s var_s
        self._counts = torch.zeros(2, dtype=torch.float64, device=device)  # sequences, tokens
        self._moment = torch.zeros(features, features, device=device) if second_moment else None
        self._kept: list[Tensor] = []
        self._room, self._seen, self.name = rows, 0, name

    @torch.no_grad()
    def update(self, x: Tensor, tokens: Tensor | None = None) -> None:
        """Add a batch; ``tokens`` (B, T) bool, False where a token does not count."""
        x = _as_sequences(x, tokens).float()
        if tokens is None or tokens.shape != x.shape[:2]:
            tokens = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        x = x.masked_fill(~tokens[..., None], 0)
        self._check_finite(x)
        count = tokens.sum(1)
        mean = x.sum(1) / count.clamp(min=1)[:, None]
        deviation = (x - mean[:, None]).masked_fill_(~tokens[..., None], 0)
        self._sums[0] += x.square().sum(1).double().sum(0)
        self._sums[1] += x.sum(1).double().sum(0)
        self._sums[2] += deviation.square().sum(1).double().sum(0)  # n_s times the biased variance of the sequence
        self._counts[0] += (count > 0).sum()
        self._counts[1] += count.sum()
        flat = x.flatten(0, 1)
        if self._moment is not None:
            self._moment += flat.T @ flat
        if self._room > 0:
            self._kept.append(flat[tokens.flatten()][: self._room].clone())
            self._room -= len(self._kept[-1])

    def _check_finite(self, x: Tensor) -> None:
        bad = ~torch.isfinite(x).flatten(1).all(1)
        if bool(bad.any()):
            sequence = self._seen + int(bad.nonzero()[0])
            raise RuntimeError(f"{self.name} gets a NaN or an infinity as input in calibration sequence {sequence}.")
        self._seen += len(x)

    def all_reduce(self) -> None:
        """Sum over the processes (the sample stays this process's own)."""
        all_reduce_sum(self._sums, self._counts, *([] if self._moment is None else [self._moment]))

    @property
    def sequences(self) -> int:
        """N, sequences with at least one token."""
        return int(self._counts[0])

    @property
    def tokens(self) -> int:
        """Tokens over all sequences."""
        return int(self._counts[1])

    @property
    def square_sum(self) -> Tensor:
        """(1/N) sum over sequences of sum_t x_tj^2, (C,): Wanda's ||X_j||^2 per sequence."""
        return (self._sums[0] / self._counts[0].clamp(min=1)).float()

    @property
    def sum(self) -> Tensor:
        """(1/N) sum over sequences of sum_t x_tj, (C,)."""
        return (self._sums[1] / self._counts[0].clamp(min=1)).float()

    @property
    def mean(self) -> Tensor:
        """Mean over tokens, (C,)."""
        return (self._sums[1] / self._counts[1].clamp(min=1)).float()

    @property
    def variance(self) -> Tensor:
        """Token-weighted average of each sequence's biased variance, (C,); between sequences nothing is added."""
        return (self._sums[2] / self._counts[1].clamp(min=1)).float()

    @property
    def hessian(self) -> Tensor:
        """H = (2/N) sum over sequences of X^T X, (C, C) fp32, of the squared output error."""
        if self._moment is None:
            raise RuntimeError("InputStatistics(second_moment=True) accumulates what the Hessian needs.")
        return self._moment * (2.0 / max(self.sequences, 1))

    @property
    def sample(self) -> Tensor:
        """The first tokens, (R, C)."""
        return torch.cat(self._kept) if self._kept else self._sums.new_zeros(0, self._sums.shape[1]).float()


def _as_sequences(x: Tensor, tokens: Tensor | None) -> Tensor:
    """(B, T, C) of any input (..., C)."""
    if x.dim() == 2 and tokens is not None and x.shape[0] == tokens.numel():
        return x.view(*tokens.shape, -1)
    if x.dim() <= 2:
        return x.reshape(1, -1, x.shape[-1])
    return x.flatten(1, -2)


def in_features(layer: nn.Module) -> int:
    """Input features of an ``nn.Linear``, or of transformers' ``Conv1D``, whose weight is (in, out)."""
    return layer.weight.shape[0 if type(layer).__name__ == "Conv1D" else 1]  # type: ignore[union-attr, return-value]


def input_statistics(
    block: Block, layers: Mapping[str, nn.Module], *, second_moment: bool = False, rows: int = 0
) -> dict[str, InputStatistics]:
    """Statistics of each layer's inputs over all batches of a block, summed over the processes.

    A layer that was not called has ``tokens == 0``.
    """
    statistics = {
        name: InputStatistics(in_features(layer), layer.weight.device, second_moment, rows, block.full_name(name))
        for name, layer in layers.items()
    }
    block.observe(layers, lambda name, x, tokens: statistics[name].update(x, tokens))
    for found in statistics.values():
        found.all_reduce()
    return statistics

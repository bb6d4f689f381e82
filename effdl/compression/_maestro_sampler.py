"""maestro: which prefix of which layer an optimizer step trains (ordered dropout)."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch

from effdl.core.random import generator

SAMPLERS = ("per_layer", "across_layers", "fixed")
FIXED = 0.25  # Pufferfish's share of the rank


class RankSampler:
    """How many components of each layer the next optimizer step sees.

    A draw is a function of (seed, cycle, position), so two integers resume it and all processes draw the same.

    ============= ====================================================================================================
    kind          draw
    ============= ====================================================================================================
    per_layer     the next of all pairs (layer i, rank j <= r_i), shuffled anew when exhausted: i is cut, the rest whole
    across_layers a uniform rank of its own for every layer
    fixed         a quarter of every layer's rank, rounded up
    ============= ====================================================================================================

    Args:
        kind: one of the three.
        ranks: current rank r_i by layer; a layer of rank 0 is never drawn.
        seed: of the shuffles.

    Example::

        sampler = RankSampler("per_layer", {"0": 2, "2": 3})
        sampler.draw()                              # {"0": 2, "2": 1}, say: layer 2 shows its first component
    """

    def __init__(self, kind: str, ranks: Mapping[str, int], seed: int = 0) -> None:
        self.kind, self.ranks, self.seed = kind, dict(ranks), seed
        self.cycle = self.position = 0
        self._order: list[int] | None = None

    def draw(self) -> dict[str, int]:
        """Active rank of every layer in the next optimizer step."""
        if self.kind == "fixed":
            return {name: math.ceil(FIXED * rank) for name, rank in self.ranks.items()}
        if self.kind == "across_layers":
            share = torch.rand(len(self.ranks), generator=generator(self.seed + self.cycle), dtype=torch.float64)
            self.cycle += 1
            return {name: math.ceil(float(u) * rank) or rank for (name, rank), u in zip(self.ranks.items(), share)}
        ends = list(itertools.accumulate(self.ranks.values()))
        if not ends[-1]:
            return dict(self.ranks)
        if self._order is None:
            self._order = torch.randperm(ends[-1], generator=generator(self.seed + self.cycle)).tolist()
        pair = self._order[self.position]
        index = bisect.bisect_right(ends, pair)
        name = list(self.ranks)[index]
        self.position += 1
        if self.position == ends[-1]:
            self._next_cycle()
        return {**self.ranks, name: pair - (ends[index] - self.ranks[name]) + 1}

    def shrink(self, ranks: Mapping[str, int]) -> None:
        """Take over smaller ranks; a new list of pairs begins."""
        if dict(ranks) != self.ranks:
            self.ranks = dict(ranks)
            if self.kind == "per_layer":
                self._next_cycle()

    def _next_cycle(self) -> None:
        self.cycle, self.position, self._order = self.cycle + 1, 0, None

    def state_dict(self) -> dict[str, Any]:
        """Ranks and position, as plain values."""
        return {"ranks": dict(self.ranks), "cycle": self.cycle, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.ranks, self.cycle, self.position = dict(state["ranks"]), state["cycle"], state["position"]
        self._order = None

"""dsnot: the rewiring of one layer's mask, rows in parallel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Refined(NamedTuple):
    """What :func:`refine` found: mask (out, in), eps (out,) before and after, swaps (out,)."""

    keep: Tensor
    before: Tensor
    after: Tensor
    swaps: Tensor


@torch.no_grad()
def refine(
    weight: Tensor,
    keep: Tensor,
    expected: Tensor,
    variance: Tensor,
    scores: Tensor,
    *,
    cycles: int = 50,
    threshold: float = 0.1,
    power: float = 1.0,
    same_sign: bool = True,
    nm: tuple[int, int] | None = None,
) -> Refined:
    """DSnoT: rewires the rows of a mask, all in parallel, until their expected output is near the dense one.

    Args:
        weight: dense W (out, in).
        keep: initial mask (out, in), ``True`` where an entry stays.
        expected: E[x] (in,).
        variance: Var[x] (in,); inputs that never vary are never grown, unless ``power`` is 0.
        scores: by which kept entries go, the smallest first, (out, in): Wanda's, whatever the initial mask; with ``nm``
            those of the initial mask.
        cycles, threshold, power, same_sign: see ``dsnot.Settings``; with ``nm`` the sign is always tested.
        nm: an entry is pruned in the group of M in which one was grown, so N:M stays N:M.

    A row stops for good at the first cycle without a candidate, so its number of zeros never changes. Each entry is
    grown or pruned at most once.

    Example::

        keep = row_mask(wanda_scores(w, x.square().sum(0)), 0.5)
        found = refine(w, keep, x.sum(0), x.var(0, unbiased=False), wanda_scores(w, x.square().sum(0)))
    """
    e = weight.float() * expected.float()
    g = _grow_order(e, keep, variance, power)
    order, ups, downs = g.argsort(dim=1, stable=True), (g > 0).sum(1), (g < 0).sum(1)
    prune = _InGroups(scores, keep, nm[1]) if nm else _BySign(scores, keep, e)
    before = (e * ~keep).sum(1)
    eps, keep, rows = before.clone(), keep.clone(), torch.arange(len(e), device=e.device)
    active = torch.ones_like(rows, dtype=torch.bool)
    from_end, from_front, swaps = (torch.zeros_like(rows) for _ in range(3))
    for _ in range(cycles):
        rise = eps > 0
        place = torch.where(rise, e.shape[1] - 1 - from_end, from_front).clamp(0, e.shape[1] - 1)
        grown = order[rows, place]
        pruned, there = prune(eps, grown)
        after = eps + e[rows, pruned] - e[rows, grown]
        active &= (eps.abs() > threshold) & there & torch.where(rise, from_end < ups, from_front < downs)
        if same_sign or nm:
            active &= after.sign() == before.sign()
        if not bool(active.any()):
            break
        keep[rows, grown] |= active
        keep[rows, pruned] &= ~active
        prune.take(eps, pruned, active)
        from_end += active & rise
        from_front += active & ~rise
        swaps += active
        eps = torch.where(active, after, eps)
    return Refined(keep, before, (e * ~keep).sum(1), swaps)


def _grow_order(e: Tensor, keep: Tensor, variance: Tensor, power: float) -> Tensor:
    """g = e / Var^p at pruned entries, 0 at kept ones and where an input never varies."""
    g = e.masked_fill(keep, 0)
    if power == 0:
        return g
    variance = variance.float()
    return torch.where(variance > 0, g / variance.clamp(min=torch.finfo(torch.float32).tiny) ** power, 0)


class _BySign:
    """Kept entries by ascending score, those with e > 0 and those with e < 0 apart, a pointer in each list."""

    def __init__(self, scores: Tensor, keep: Tensor, e: Tensor) -> None:
        members = torch.stack([keep & (e < 0), keep & (e > 0)])  # the first where eps >= 0
        self.lists = scores.float().masked_fill(~members, torch.inf).argsort(dim=2, stable=True)
        self.sizes = members.sum(2)
        self.at = torch.zeros_like(self.sizes)
        self.rows = torch.arange(len(e), device=e.device)

    def __call__(self, eps: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
        """Candidate of each row, and whether there is one."""
        which = (eps < 0).long()
        at = self.at[which, self.rows]
        return self.lists[which, self.rows, at.clamp(max=self.lists.shape[2] - 1)], at < self.sizes[which, self.rows]

    def take(self, eps: Tensor, pruned: Tensor, active: Tensor) -> None:
        self.at[(eps < 0).long(), self.rows] += active


class _InGroups:
    """The kept entry with the smallest score in the group of M of what was grown."""

    def __init__(self, scores: Tensor, keep: Tensor, m: int) -> None:
        self.scores = scores.float().masked_fill(~keep, torch.inf)  # grown ones stay at infinity
        self.m, self.rows = m, torch.arange(len(scores), device=scores.device)

    def __call__(self, eps: Tensor, grown: Tensor) -> tuple[Tensor, Tensor]:
        """Candidate of each row, and whether there is one."""
        group = (grown - grown % self.m)[:, None] + torch.arange(self.m, device=grown.device)
        least = self.scores.gather(1, group).min(1)
        return group[self.rows, least.indices], least.values < torch.inf

    def take(self, eps: Tensor, pruned: Tensor, active: Tensor) -> None:
        self.scores[self.rows, pruned] = torch.where(active, torch.inf, self.scores[self.rows, pruned])

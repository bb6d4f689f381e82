"""The k-th largest of many numbers, exactly, without sorting them: what a pruning threshold needs at every step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SMALL = 1 << 15  # below it a plain selection is faster than finding a bracket
STRIDE = 61  # of the sample; a prime, so that it runs through all positions of a kernel


def neighbours(scores: Tensor, index: Tensor) -> Tensor:
    """``[v_i, v_(i+1)]``, the entries ``index`` and ``index + 1`` (0-based) of the scores in descending order.

    Always exact, for any order of the scores and with ties. On a CPU a sample brackets the two, comparisons count what
    lies above, and only the bracket (about 1 %) is searched; elsewhere one sort, without host synchronisation.
    Opaque to ``torch.compile``, so it breaks no graph, and the index may change without a recompilation.

    Args:
        scores: any shape, N >= 2 finite floats.
        index: 0-dimensional int64 tensor in [0, N - 2], on the device of the scores.

    Returns:
        Tensor [2], detached.

    Example::

        kept, pruned = neighbours(weight.abs(), torch.tensor(99))   # the 100th and the 101st largest
    """
    return _neighbours(scores.detach(), index)


@torch.library.custom_op("effdl::neighbours", mutates_args=())
def _neighbours(scores: Tensor, index: Tensor) -> Tensor:
    flat = scores.reshape(-1)
    if flat.device.type != "cpu":
        return by_sorting(flat, index)
    place = int(index)
    if flat.numel() <= SMALL:
        return _two(flat, place)
    low, high = _bracket(flat, place)
    above = flat > high
    inside, skipped = flat[(flat >= low) ^ above], int(above.count_nonzero())
    if skipped <= place and place + 1 < skipped + inside.numel():
        return _two(inside, place - skipped)
    return _two(flat, place)  # the sample was not typical


@_neighbours.register_fake
def _(scores: Tensor, index: Tensor) -> Tensor:
    return scores.new_empty(2)


def by_sorting(flat: Tensor, index: Tensor) -> Tensor:
    """The same by a full sort of scores [N], all on the device."""
    ordered, index = flat.sort(descending=True).values, index.to(flat.device)
    return ordered.gather(0, torch.stack([index, index + 1]))


def _two(flat: Tensor, place: int) -> Tensor:
    """By selection: the pair at a place of the descending order."""
    kept = flat.kthvalue(flat.numel() - place).values
    below = flat[flat < kept]
    tied = flat.numel() - below.numel() > place + 1  # the next one is as large
    return torch.stack([kept, kept if tied else below.max()])


def _bracket(flat: Tensor, place: int) -> tuple[Tensor, Tensor]:
    """Two scores between which the wanted ones lie, five standard deviations of the sample's rank on either side."""
    sample = flat[::STRIDE].contiguous()
    count, share = sample.numel(), place / flat.numel()
    slack = 5 * math.sqrt(count * share * (1 - share)) + 2
    first, last = math.floor(share * count - slack), math.ceil(share * count + slack)
    high = sample.kthvalue(count - first).values if first >= 0 else flat.new_tensor(math.inf)
    low = sample.kthvalue(count - last).values if last < count else flat.new_tensor(-math.inf)
    return low, high


def group_neighbours(scores: Tensor, n: int, m: int, dim: int) -> tuple[Tensor, Tensor]:
    """The ``n``-th and ``n + 1``-th largest of every ``m`` consecutive scores along ``dim``, spread over their group.

    Args:
        scores: [..., G m, ...], with G groups along ``dim``.
        n: 1-based place, 1 <= n < m.
        m: size of a group.
        dim: along which groups lie.

    Returns:
        Two tensors of the shape of ``scores``, constant within each group.
    """
    columns = list(scores.detach().unflatten(dim, (-1, m)).unbind(dim + 1))
    for i in range(n + 1):  # the largest of what is left rises to column i
        for j in range(m - 1, i, -1):
            larger, smaller = torch.maximum(columns[j - 1], columns[j]), torch.minimum(columns[j - 1], columns[j])
            columns[j - 1], columns[j] = larger, smaller
    kept, pruned = (columns[i].repeat_interleave(m, dim) for i in (n - 1, n))
    return kept, pruned

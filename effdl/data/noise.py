"""Makers of wrong labels, as the label-noise literature defines them (elr).

Each returns new labels and draws from its own generator, so that the same seed gives the same labels wherever it runs.
Noise the validation split too, never the test split.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from effdl.core.errors import check, check_integer, check_number

#: truck -> automobile, bird -> airplane, cat <-> dog, deer -> horse.
CIFAR10_CONFUSIONS: dict[int, int] = {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}

# The superclass of each of CIFAR-100's fine classes, both in the alphabetical order of the data set.
_CIFAR100_SUPERCLASS = (
    [4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11]
    + [6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5]
    + [5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17]
    + [10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13]
    + [16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13]
)


def next_in_group(groups: list[int]) -> dict[int, int]:
    """Map every class to the next class of its group, the last one to the first.

    Example::

        next_in_group([0, 0, 1, 1])    # {0: 1, 1: 0, 2: 3, 3: 2}
    """
    members: dict[int, list[int]] = {}
    for fine, group in enumerate(groups):
        members.setdefault(group, []).append(fine)
    return {fine: same[(i + 1) % len(same)] for same in members.values() for i, fine in enumerate(same)}


#: The next class within the superclass, circularly.
CIFAR100_CONFUSIONS: dict[int, int] = dict(sorted(next_in_group(_CIFAR100_SUPERCLASS).items()))


def symmetric_noise(labels: Tensor, rate: float, num_classes: int, seed: int = 0) -> Tensor:
    """Replace a share ``rate`` of the labels by a class drawn uniformly from *all* classes.

    The drawn class may be the true one: the share of wrong labels is ``rate * (C - 1) / C`` on average.

    Args:
        labels: [N], integer dtype.
        rate: in [0, 1].
        num_classes: C >= 2.
        seed: of the own generator.

    Returns:
        New labels, [N], same dtype; ``labels`` is left alone.

    Example::

        noisy = symmetric_noise(labels, rate=0.4, num_classes=10, seed=1)
    """
    _check(labels, rate)
    check_integer("num_classes", num_classes, 2)
    generator = torch.Generator().manual_seed(seed)
    chosen = _share(torch.arange(len(labels)), rate, generator)
    drawn = torch.randint(num_classes, (len(chosen),), generator=generator)
    return _replace(labels, chosen, drawn)


def asymmetric_noise(labels: Tensor, rate: float, confusions: Mapping[int, int], seed: int = 0) -> Tensor:
    """Replace, in each class of ``confusions``, a share ``rate`` of the labels by the class it is mistaken for.

    Args:
        labels: [N], integer dtype.
        rate: in [0, 1]; 0.4 in the paper.
        confusions: true class -> wrong class, e.g. ``CIFAR10_CONFUSIONS`` or ``CIFAR100_CONFUSIONS``.
        seed: of the own generator.

    Returns:
        New labels, [N], same dtype; ``labels`` is left alone.

    Example::

        noisy = asymmetric_noise(labels, rate=0.4, confusions=CIFAR10_CONFUSIONS, seed=1)
    """
    _check(labels, rate)
    check(len(confusions) > 0, "confusions", confusions, "a mapping from true class to wrong class")
    generator = torch.Generator().manual_seed(seed)
    noisy = labels
    for true, wrong in sorted(confusions.items()):
        chosen = _share((labels.cpu() == true).nonzero().flatten(), rate, generator)
        noisy = _replace(noisy, chosen, torch.full((len(chosen),), wrong))
    return noisy.clone() if noisy is labels else noisy


def _check(labels: Tensor, rate: float) -> None:
    check_number("rate", rate, 0, 1, fix="0.4 makes 40 % of the labels noisy.")
    ok = isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point()
    check(ok, "labels", getattr(labels, "shape", labels), "an integer tensor of shape [N]")


def _share(candidates: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """The candidates at the places i < rate * N of a random permutation."""
    order = torch.randperm(len(candidates), generator=generator)
    return candidates[order[torch.arange(len(candidates)) < rate * len(candidates)]]


def _replace(labels: Tensor, places: Tensor, values: Tensor) -> Tensor:
    noisy = labels.clone()
    noisy[places.to(labels.device)] = values.to(labels)
    return noisy

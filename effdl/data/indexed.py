"""Data sets whose examples know their number, for methods that keep something per training example (elr)."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset


class IndexedDataset(Dataset):
    """Wrap a map-style data set so that each example carries its index: ``(x, y)`` becomes ``(x, y, i)``.

    A dict gets the key ``"index"``. The index does not depend on the order in which a loader draws. For a
    ``torch.utils.data.Subset`` it is the position in the data set the subset was taken from, so that several splits
    (and the report of suspect labels) share one numbering; wrap *before* splitting or after, the indices are the same.

    Args:
        dataset: map-style, its examples tuples or dicts.
        own_positions: number the examples of a ``Subset`` 0 ... len - 1 instead.

    Attributes:
        num_examples: largest index + 1, the number of rows a table over the indices needs.

    Example::

        train, val = torch.utils.data.random_split(dataset, [0.9, 0.1])
        x, y, index = IndexedDataset(train)[0]      # dataset[index] is (x, y)
    """

    def __init__(self, dataset: Dataset, own_positions: bool = False):
        self.dataset = dataset
        self.own_positions = own_positions

    @property
    def num_examples(self) -> int:
        """Largest index + 1."""
        return len(self) if self.own_positions else num_examples_of(self.dataset)

    def index_of(self, position: int) -> int:
        """The stable index of the example at ``position``."""
        position = int(position)
        if position < 0:
            position += len(self)
        dataset = self.dataset
        while isinstance(dataset, Subset) and not self.own_positions:
            position, dataset = int(dataset.indices[position]), dataset.dataset
        return position

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, position: int) -> Any:
        return _with_index(self.dataset[position], self.index_of(position))

    def __getitems__(self, positions: Sequence[int]) -> Any:
        """A whole batch at once where the wrapped data set can; collated if that one's is."""
        index = [self.index_of(position) for position in positions]
        if not hasattr(self.dataset, "__getitems__"):
            return [_with_index(self.dataset[position], i) for position, i in zip(positions, index)]
        examples = self.dataset.__getitems__(positions)
        if isinstance(examples, list):
            return [_with_index(example, i) for example, i in zip(examples, index)]
        return _with_index(examples, torch.tensor(index))  # it comes collated


def num_examples_of(dataset: Any, by_length: bool = True) -> int | None:
    """Rows that a table over the indices of a data set needs; a ``Subset`` counts as what it was taken from.

    Args:
        dataset: one that knows its ``num_examples``, or any with a length.
        by_length: whether its length may be taken.
    """
    while not hasattr(dataset, "num_examples") and isinstance(dataset, Subset):
        dataset = dataset.dataset
    if hasattr(dataset, "num_examples"):
        return dataset.num_examples
    return len(dataset) if by_length and isinstance(dataset, Sized) else None


def _with_index(example: Any, index: int | Tensor) -> Any:
    if isinstance(example, dict):
        return example | {"index": index}
    if isinstance(example, (tuple, list)):
        return (*example, index)
    raise TypeError(
        f"IndexedDataset needs examples that are tuples (x, y) or dicts, got {type(example).__name__}: "
        "return the label beside the input."
    )

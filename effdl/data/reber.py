"""Strings of the Reber grammar as a LightningDataModule: made here, nothing to download (`rnn-sparsity`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from effdl.core.errors import check_choice, check_integer
from effdl.data._splits import SplitData

#: State to its two ways on, (symbol, next state); 0 is the end. Strings begin with B and end with E.
GRAMMAR = {
    1: (("T", 2), ("P", 3)),
    2: (("S", 2), ("X", 4)),
    3: (("T", 3), ("V", 5)),
    4: (("X", 3), ("S", 0)),
    5: (("P", 4), ("V", 0)),
}
SYMBOLS = "TPSXV"  # what stands between B and E
MIN_LENGTH, MAX_LENGTH = 11, 53
_WALKS = 50_000


def is_reber(string: str) -> bool:
    """Whether the grammar accepts a string.

    Example::

        is_reber("BTSSXSE"), is_reber("BTSSXVE")    # True, False
    """
    if len(string) < 3 or string[0] != "B" or string[-1] != "E":
        return False
    state = 1
    for symbol in string[1:-1]:
        state = dict(GRAMMAR.get(state, ())).get(symbol, -1)
    return state == 0


def reber(n: int, seed: int = 0, invalid: Literal["random", "edit"] = "random") -> tuple[list[str], Tensor]:
    """``n`` different strings of 11 to 53 symbols and their labels int64 (n,), 1 for the valid half, shuffled.

    Valid ones walk the grammar, both ways on equally likely, and are drawn until enough different ones of legal length
    are there. No string comes twice, so none of a test set is in its training set.

    Args:
        n: number of strings; the odd one is invalid.
        seed: of all draws.
        invalid: ``"random"``: every symbol between B and E at random, at the length of a valid string; ``"edit"``: one
            to three symbols of a valid string changed. What the grammar accepts by chance is drawn again.

    Raises:
        ConfigurationError: ``n`` below 2, another ``invalid``.

    Example::

        strings, labels = reber(1000, seed=0)
    """
    check_integer("n", n, 2)
    check_integer("seed", seed, 0)
    check_choice("invalid", invalid, ("random", "edit"))
    rng = np.random.default_rng([seed, 53])
    good = _valid_strings(n // 2, rng)
    taken: dict[str, None] = {}
    make = _scrambled if invalid == "random" else _edited
    while len(taken) < n - n // 2:
        string = make(good[rng.integers(len(good))], rng)
        if not is_reber(string):
            taken[string] = None
    strings, labels = good + list(taken), np.repeat([1, 0], [len(good), len(taken)])
    order = rng.permutation(n)
    return [strings[i] for i in order], torch.from_numpy(labels[order])


def _valid_strings(count: int, rng: np.random.Generator) -> list[str]:
    symbol = np.array([[0, 0], *[[ord(s) for s, _ in GRAMMAR[state]] for state in sorted(GRAMMAR)]], dtype=np.uint8)
    following = np.array([[0, 0], *[[to for _, to in GRAMMAR[state]] for state in sorted(GRAMMAR)]])
    found: dict[bytes, None] = {}
    while len(found) < count:  # long strings are rare: most of many walks are too short or known
        state = np.ones(_WALKS, dtype=np.int64)
        walked = np.zeros((_WALKS, MAX_LENGTH - 2), dtype=np.uint8)
        for step in range(MAX_LENGTH - 2):
            ways = rng.integers(2, size=_WALKS)
            walked[:, step], state = symbol[state, ways], following[state, ways]
        legal = (state == 0) & ((walked > 0).sum(1) + 2 >= MIN_LENGTH)
        found.update(dict.fromkeys(row.tobytes().rstrip(b"\0") for row in walked[legal]))
    return [f"B{inner.decode()}E" for inner in list(found)[:count]]


def _scrambled(string: str, rng: np.random.Generator) -> str:
    return "B" + "".join(SYMBOLS[i] for i in rng.integers(len(SYMBOLS), size=len(string) - 2)) + "E"


def _edited(string: str, rng: np.random.Generator) -> str:
    symbols = list(string)
    for place in 1 + rng.permutation(len(string) - 2)[: rng.integers(1, 4)]:
        others = SYMBOLS.replace(symbols[place], "")
        symbols[place] = others[rng.integers(len(others))]
    return "".join(symbols)


def encode(strings: Sequence[str], length: int = MAX_LENGTH) -> Tensor:
    """ASCII codes uint8 (N, length), zeros to the right of each string."""
    rows = [np.frombuffer(string.encode("ascii").ljust(length, b"\0"), dtype=np.uint8) for string in strings]
    return torch.from_numpy(np.stack(rows))


class _Strings(Dataset):
    """``__getitems__`` returns a collated batch ``{"input_ids": int64 (B, length), "label": int64 (B,)}``."""

    def __init__(self, ids: Tensor, labels: Tensor) -> None:
        self.ids, self.labels = ids, labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([i]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        rows = torch.as_tensor(indices)
        return {"input_ids": self.ids[rows].long(), "label": self.labels[rows]}


class ReberData(SplitData):
    """Valid and invalid Reber strings, half and half, as ASCII codes with zeros on the right.

    Batches are ``{"input_ids": int64 (B, 53), "label": int64 (B,)}``, label 1 for valid. Training order: a function of
    (seed, epoch); the loader resumes mid-epoch. The thesis takes 18,750 strings to train and 6,250 to test.

    Args:
        train, val, test: strings of each split; no string is in two of them.
        invalid: how wrong strings are made, see :func:`reber`: ``"edit"`` is the harder task.
        batch_size: strings per batch and process.
        seed: of the strings and of the training order.

    Raises:
        ConfigurationError: an argument out of range.

    Example::

        data = ReberData(train=4000, val=1000, batch_size=64)
        Trainer(max_epochs=8, gradient_clip_val=5).fit(RecurrentClassifier("GRU", num_classes=2), data)
    """

    num_classes = 2
    vocab_size = 128

    def __init__(
        self,
        train: int = 18_750,
        val: int = 1_000,
        test: int = 6_250,
        invalid: Literal["random", "edit"] = "random",
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_integer("train", train, 2)
        check_integer("val", val, 0)
        check_integer("test", test, 0)
        check_integer("batch_size", batch_size, 1)
        check_integer("seed", seed, 0)
        check_choice("invalid", invalid, ("random", "edit"))
        self.train, self.val, self.test = train, val, test
        self.invalid, self.batch_size, self.seed = invalid, batch_size, seed

    def _read(self) -> tuple[Tensor, Tensor]:
        return _read(self.train + self.val + self.test, self.seed, self.invalid)

    def _datasets(self) -> dict[str, _Strings]:
        ids, labels = self._read()
        sizes = [self.train, self.val, self.test]
        parts = zip(ids.split(sizes), labels.split(sizes))
        return dict(zip(("train", "validation", "test"), (_Strings(*part) for part in parts)))


@lru_cache(maxsize=4)
def _read(n: int, seed: int, invalid: str) -> tuple[Tensor, Tensor]:
    """Codes and labels, kept in memory for the next data module of the process."""
    strings, labels = reber(n, seed, invalid)
    return encode(strings), labels

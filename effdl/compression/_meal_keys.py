"""meal-v2: a table whose keys are several numbers each, and which is searched without a Python loop over rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effdl.core.errors import check

TENSORS = ("codes", "classes", "values", "marks", "low", "span")


def keys_of(index: Tensor, crop: Tensor | None) -> Tensor:
    """int64 [B, 1 + P]."""
    parts = [index.view(-1, 1)] if crop is None else [index.view(-1, 1), crop.reshape(len(index), -1)]
    return torch.cat([part.long() for part in parts], 1)


def table_of(keys: Tensor, classes: Tensor, values: Tensor, marks: Tensor) -> dict[str, Tensor]:
    """Rows by rising code of their key, each once."""
    low, span = keys.amin(0), keys.amax(0) - keys.amin(0) + 1
    check(math.prod(span.tolist()) < 2**62, "crop", span.tolist(), "numbers whose ranges multiply to less than 2^62")
    codes, order = codes_of(keys - low, span).sort(stable=True)
    again = codes[1:] == codes[:-1]
    apart = again & ((marks[order][1:] - marks[order][:-1]).abs() > 1e-3)
    fix = "A batch must say in 'crop' which crop each image is, or come without random augmentation."
    check(not bool(apart.any()), "data", keys[order][1:][apart][:1].tolist(), "one image to an index and crop", fix)
    once = torch.cat([torch.ones(1, dtype=torch.bool), ~again])
    codes, keep = codes[once], order[once]
    return dict(zip(TENSORS, (codes, classes[keep], values[keep], marks[keep], low, span)))


def codes_of(offset: Tensor, span: Tensor) -> Tensor:
    """One number for the numbers of a key, the last one varying fastest."""
    code = offset[:, 0]
    for column in range(1, offset.shape[1]):
        code = code * span[column] + offset[:, column]
    return code

"""Frozen networks beside the trained one: teachers, VAEs, text encoders."""

from __future__ import annotations

import itertools
from typing import Any, Generic, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def freeze(module: M) -> M:
    """``eval()`` and ``requires_grad_(False)``, in place."""
    return module.eval().requires_grad_(False)


class Frozen(Generic[M]):
    """Holds a frozen module outside the module tree: no state_dict entry, no reducer, no optimizer, no EMA copy.

    Not an ``nn.Module`` on purpose; a deep copy (WeightAveraging makes one) shares it. Pickling it keeps the module.

    Example::

        self.teacher = Frozen(teacher)
        with torch.no_grad():
            target = self.teacher.on(x)(x)     # on the device of x
    """

    def __init__(self, module: M) -> None:
        self.module = freeze(module)

    def on(self, like: torch.Tensor | torch.device | str) -> M:
        """The module, on the device asked for (moved once, then a cheap look-up)."""
        device = like.device if isinstance(like, torch.Tensor) else torch.device(like)
        first = next(itertools.chain(self.module.parameters(), self.module.buffers()), None)
        if first is not None and first.device != device:
            with torch.inference_mode(False):  # moved in a validation, it must still serve in training
                self.module.to(device)
        return self.module

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen[M]:
        return self

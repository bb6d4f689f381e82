"""Randomness that is a method's own, and the state of the global streams."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh stream. CPU by default: the same numbers on every machine; move the draws, not the generator."""
    return torch.Generator(device=device).manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """State of torch (CPU and all CUDA devices), NumPy and Python, as tensors and plain values (``weights_only``)."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [s.cpu() for s in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what :func:`rng_state` returned; CUDA streams only where the number of devices is the same."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """Whatever is drawn from the global streams inside, they go on afterwards as if it had not been."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)

"""A few batches of the user's data for methods that measure before they act."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map

from effdl.core.errors import ConfigurationError, check_integer
from effdl.core.random import preserved_rng


def to_device(batch: Any, device: torch.device | str) -> Any:
    """All tensors of a batch on ``device``."""
    return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, batch)


def calibration_batches(trainer: Any, pl_module: Any, count: int, *, train: bool = True) -> list[Any]:
    """The first ``count`` batches of the train (or validation) data, on the module's device, each epoch the same.

    Read through a loader of its own: the training loader's iterator and the global RNG stream are not advanced.

    Args:
        trainer: a running Trainer.
        pl_module: its module.
        count: number of batches, at least 1.
        train: from the training data, else from the first validation loader.

    Raises:
        ConfigurationError: ``count`` < 1 or the loader is empty.
    """
    check_integer("calibration_batches", count, 1)
    loader = trainer.train_dataloader if train else trainer.val_dataloaders
    if isinstance(loader, (list, tuple)):
        loader = loader[0]
    if isinstance(loader, dict):
        loader = next(iter(loader.values()))
    if loader is None:
        which = "train" if train else "validation"
        raise ConfigurationError(f"calibration_batches={count}: the Trainer has no {which} data yet.")
    # augmentation and a loader's own seed draw from the global streams
    with preserved_rng():
        batches = list(itertools.islice(_in_order(loader), count))
    if not batches:
        raise ConfigurationError(f"calibration_batches={count}: the loader is empty.")
    return [to_device(batch, pl_module.device) for batch in batches]


def _in_order(loader: Any) -> Iterator[Any]:
    """A map-style DataLoader's data in its own order, without shuffling; any other iterable as it comes."""
    if not isinstance(loader, torch.utils.data.DataLoader) or isinstance(
        loader.dataset, torch.utils.data.IterableDataset
    ):
        yield from loader
        return
    if loader.batch_sampler is None:  # batch_size=None: an example of the data set is a batch
        yield from (loader.collate_fn(loader.dataset[i]) for i in range(len(loader.dataset)))
        return
    size = getattr(loader.batch_sampler, "batch_size", None) or 1
    for start in range(0, len(loader.dataset), size):
        indices = range(start, min(start + size, len(loader.dataset)))
        if hasattr(loader.dataset, "__getitems__"):
            samples = loader.dataset.__getitems__(list(indices))
        else:
            samples = [loader.dataset[i] for i in indices]
        yield loader.collate_fn(samples)


def run_batches(forward: Callable[[Any], Any], batches: Iterable[Any]) -> list[Any]:
    """``forward`` on every batch, without gradients and outside inference mode (results may meet autograd later)."""
    with torch.inference_mode(False), torch.no_grad():
        return [forward(batch) for batch in batches]

"""A few batches of the user's data for methods that measure before they act."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from effdl.core.batch import unpack
from effdl.core.capture import evaluating
from effdl.core.distributed import all_reduce_mean
from effdl.core.errors import ConfigurationError, check_integer
from effdl.core.random import generator, preserved_rng


def to_device(batch: Any, device: torch.device | str) -> Any:
    """All tensors of a batch on ``device``."""
    return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, batch)


def calibration_batches(
    trainer: Any, pl_module: Any, count: int, *, train: bool = True, seed: int | None = None
) -> list[Any]:
    """The first ``count`` batches of the train (or validation) data, on the module's device, each epoch the same.

    Read through a loader of its own: the training loader's iterator and the global RNG stream are not advanced.

    Args:
        trainer: a running Trainer.
        pl_module: its module.
        count: number of batches, at least 1.
        train: from the training data, else from the first validation loader.
        seed: of a shuffled order (map-style data), for data sets that are sorted by class; ``None``: as they lie.

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
        batches = list(itertools.islice(_in_order(loader, seed), count))
    if not batches:
        raise ConfigurationError(f"calibration_batches={count}: the loader is empty.")
    return [to_device(batch, pl_module.device) for batch in batches]


def _in_order(loader: Any, seed: int | None = None) -> Iterator[Any]:
    """A map-style DataLoader's data in its own order, or in that of a seed; any other iterable as it comes."""
    if not isinstance(loader, torch.utils.data.DataLoader) or isinstance(
        loader.dataset, torch.utils.data.IterableDataset
    ):
        yield from loader
        return
    order = list(range(len(loader.dataset)))
    if seed is not None:
        order = torch.randperm(len(order), generator=generator(seed)).tolist()
    if loader.batch_sampler is None:  # batch_size=None: an example of the data set is a batch
        yield from (loader.collate_fn(loader.dataset[i]) for i in order)
        return
    size = getattr(loader.batch_sampler, "batch_size", None) or 1
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        if hasattr(loader.dataset, "__getitems__"):
            samples = loader.dataset.__getitems__(indices)
        else:
            samples = [loader.dataset[i] for i in indices]
        yield loader.collate_fn(samples)


def run_batches(forward: Callable[[Any], Any], batches: Iterable[Any]) -> list[Any]:
    """``forward`` on every batch, without gradients and outside inference mode (results may meet autograd later)."""
    with torch.inference_mode(False), torch.no_grad():
        return [forward(batch) for batch in batches]


def recalibrate_batchnorm(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[Any], Any] | None = None
) -> None:
    """BatchNorm statistics anew: reset, then the plain average over the given batches (``momentum=None``).

    Everything but the BatchNorm layers is in eval mode meanwhile (no dropout); flags and momenta are put back. Under
    DDP the averages of the ranks are averaged: call it on all of them. Without BatchNorm no batch is read.

    Args:
        model: the network, on its device.
        batches: batches as the loader gives them (``core.batch``), or what ``forward`` takes.
        forward: runs one of them; default: the network on its inputs.

    Raises:
        ConfigurationError: no batches; the statistics are as before then, and also after any other error.
    """
    kind = nn.modules.batchnorm._BatchNorm
    norms = [m for m in model.modules() if isinstance(m, kind) and m.running_mean is not None]
    if not norms:
        return
    device = norms[0].running_mean.device
    run = forward or (lambda batch: model(unpack(batch).inputs))
    with torch.inference_mode(False), torch.no_grad(), evaluating(model):
        before = [(norm, norm.momentum, [b.clone() for b in norm.buffers(recurse=False)]) for norm in norms]
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.train().momentum = None
            for batch in batches:
                run(to_device(batch, device))
            if not any(norm.num_batches_tracked for norm in norms):
                raise ConfigurationError("calibration_batches: there are none to take BatchNorm statistics from.")
            for norm in norms:
                all_reduce_mean(norm.running_mean, norm.running_var)
        except BaseException:
            for norm, _, values in before:
                for buffer, value in zip(norm.buffers(recurse=False), values):
                    buffer.copy_(value)
            raise
        finally:
            for norm, momentum, _ in before:
                norm.momentum = momentum

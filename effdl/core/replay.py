"""Running a training step a second time on the same batch, without a trace of the second time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from effdl.core.steps import wrap


@contextlib.contextmanager
def unrecorded(pl_module: Any) -> Iterator[None]:
    """What forwards inside the block write is put back: buffers (BatchNorm), torchmetrics; ``self.log`` is mute.

    Gradients are kept: they are what a second pass is for. The objects stay the same ones, only their values return.
    Metrics and buffers are found among the module's submodules. A method that learns from each batch into a plain
    attribute must see for itself that a batch is not new.

    Example::

        with unrecorded(module):
            module.training_step(batch, batch_idx).backward()
    """
    undo = [_buffers(pl_module), *[_metric(m) for m in pl_module.modules() if isinstance(m, Metric)]]
    mute = wrap(pl_module, "log", lambda call_next, *args, **kwargs: None)
    try:
        yield
    finally:
        mute.remove()
        with torch.no_grad():
            for put_back in undo:
                put_back()


def _buffers(module: Any) -> Callable[[], None]:
    found = [(m._buffers, name, b) for m in module.modules() for name, b in m._buffers.items() if b is not None]
    values = [buffer.detach().clone() for _, _, buffer in found]

    def put_back() -> None:
        for (holder, name, buffer), value in zip(found, values):
            holder[name] = buffer.copy_(value)  # a forward may also have put another tensor there

    return put_back


def _metric(metric: Metric) -> Callable[[], None]:
    attributes = dict(metric.__dict__)
    states = {name: attributes[name] for name in metric._defaults}
    values = {name: s.detach().clone() if isinstance(s, Tensor) else list(s) for name, s in states.items()}

    def put_back() -> None:
        metric.__dict__.update(attributes)  # the states themselves, the update count, the cached result
        for name, state in states.items():
            if isinstance(state, Tensor):
                state.copy_(values[name])
            else:
                state[:] = values[name]

    return put_back

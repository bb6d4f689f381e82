"""What every effdl callback does the same: identify its state, undo itself whatever happens, log under its slug."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from lightning.pytorch.callbacks import Callback
from torch import nn

from effdl.core.paper import Paper
from effdl.core.steps import Handle, wrap


class MethodCallback(Callback):
    """Base of the method callbacks.

    A subclass stores each constructor argument under its own name, and overrides :meth:`attach`; whatever it wraps,
    hooks or swaps there (or later) it hands to :meth:`keep`. All of it is undone in ``teardown`` and, because after an
    error Lightning calls no ``teardown``, behind ``trainer.strategy.on_exception``: after all callbacks'
    ``on_exception``, so that ``ModelCheckpoint(save_on_exception=True)`` still sees the method attached.
    """

    paper: ClassVar[Paper]

    @property
    def slug(self) -> str:
        return self.paper.slug

    @property
    def state_key(self) -> str:
        """Slug and a hash of the arguments: two instances with different settings keep different states."""
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        text = repr([(name, _stable(getattr(self, name, None))) for name in names])
        return f"{self.slug}-{hashlib.sha1(text.encode()).hexdigest()[:8]}"

    def attach(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Surgery, wrappers and checks of one ``setup``; ``stage`` is fit, validate, test or predict."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.undo()  # a run that died before its teardown may have left something
        self.keep(wrap(trainer.strategy, "on_exception", self._after_exception))
        try:
            self.attach(trainer, pl_module, stage)
        except BaseException:
            self.undo()
            raise

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self.undo()

    def keep(self, handles: Handle | Iterable[Handle]) -> None:
        """Remember what must be undone (anything with ``remove()``)."""
        kept = self.__dict__.setdefault("_kept", [])
        kept.extend(handles if isinstance(handles, Iterable) else [handles])

    def undo(self) -> None:
        """Remove hooks, wrappers and class swaps, the last one first. Calling it again does nothing."""
        kept = self.__dict__.get("_kept", [])
        while kept:
            kept.pop().remove()

    def _after_exception(self, call_next: Callable, *args: Any, **kwargs: Any) -> None:
        try:
            call_next(*args, **kwargs)
        finally:
            self.undo()


def _stable(value: Any) -> Any:
    """A value's identity that is the same in the next process (no addresses)."""
    if isinstance(value, nn.Module):
        return type(value).__qualname__
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    if isinstance(value, dict):
        return sorted((str(k), _stable(v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return [_stable(v) for v in value]
    return repr(value) if isinstance(value, (int, float, str, bool, type(None))) else type(value).__qualname__

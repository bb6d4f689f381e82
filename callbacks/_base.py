"""What every effdl callback does the same: identify its state, undo itself whatever happens, log under its slug."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, ClassVar

from lightning.pytorch.callbacks import Callback
from torch import nn

from effdl.core.errors import ConfigurationError
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
        text = repr([(name, _stable(getattr(self, name, None))) for name in _arguments(type(self))])
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

    def same_arguments_on_resume(self, trainer: Any, pl_module: Any) -> Handle:
        """Refuse, before weights are loaded, a checkpoint whose state belongs to this method with other arguments.

        Lightning finds no state under this key then, and the method would start again on a run that is half-way.
        """

        def check_origin(call_next: Callable, checkpoint: dict[str, Any]) -> None:
            saved = {key for key in checkpoint.get("callbacks", {}) if key.rpartition("-")[0] == self.slug}
            if self.state_key not in saved and saved - {other.state_key for other in trainer.callbacks}:
                raise ConfigurationError(
                    f"ckpt_path: the checkpoint is of a run with other arguments of {type(self).__name__}. Resume with "
                    "the same ones, or start anew: load its state_dict into the module, and fit without ckpt_path."
                )
            call_next(checkpoint)

        return wrap(pl_module, "on_load_checkpoint", check_origin)

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


@cache  # Lightning's profiler asks for the key at every hook of every batch
def _arguments(kind: type[MethodCallback]) -> list[str]:
    """The constructor arguments of a class, those of the classes it passes them on to included."""
    makers = [cls for cls in kind.__mro__ if issubclass(cls, MethodCallback) and "__init__" in vars(cls)]
    return sorted({name for cls in makers for name in list(inspect.signature(cls.__init__).parameters)[1:]})


def _stable(value: Any) -> Any:
    """A value's identity that is the same in the next process: no addresses, no order of a set."""
    if isinstance(value, partial):
        return [_stable(value.func), _stable(value.args), _stable(value.keywords)]
    if isinstance(value, dict):
        return sorted((str(k), _stable(v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return [_stable(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, map(_stable, value)))
    if hasattr(value, "__qualname__"):  # functions and classes
        return f"{value.__module__}.{value.__qualname__}"
    text = "" if isinstance(value, nn.Module) else repr(value)
    return type(value).__qualname__ if not text or re.search("0x[0-9a-f]{6,}", text) else text

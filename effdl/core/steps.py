"""Wrapping a method of somebody else's object, counting optimizer steps, and listening to the logits of a step."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from effdl.core.batch import logits_of
from effdl.core.errors import ConfigurationError

Wrapper = Callable[..., Any]


class Handle:
    """Undoes one thing, once. ``remove()`` may be called again."""

    def __init__(self, undo: Callable[[], None]) -> None:
        self._undo: Callable[[], None] | None = undo

    def remove(self) -> None:
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()


class _Chain:
    """All wrappers around one method of one object. The last one out puts back the object that was there.

    One registry per (object, method), because Lightning tears callbacks down in the order it set them up: naive
    wrappers-around-wrappers restore the wrong one and leak.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name
        self.own = name in owner.__dict__
        self.original = getattr(owner, name)
        self.wrappers: list[Wrapper] = []

        # a plain function with the original's signature: Lightning inspects argument names and overrides
        @functools.wraps(self.original)
        def call(*args: Any, **kwargs: Any) -> Any:
            inner = self.original
            for wrapper in self.wrappers:
                inner = functools.partial(wrapper, inner)
            return inner(*args, **kwargs)

        call._effdl_chain = self  # type: ignore[attr-defined]
        self.call = call
        owner.__dict__[name] = call

    def remove(self, wrapper: Wrapper) -> None:
        self.wrappers = [w for w in self.wrappers if w is not wrapper]
        # somebody else's wrapper on top keeps calling ours, which by now only forwards
        if not self.wrappers and self.owner.__dict__.get(self.name) is self.call:
            if self.own:
                self.owner.__dict__[self.name] = self.original
            else:
                del self.owner.__dict__[self.name]


def wrap(owner: Any, name: str, wrapper: Wrapper) -> Handle:
    """Wrap ``owner.name``: ``wrapper(call_next, *args, **kwargs)``. The first one added is the innermost.

    Example::

        handle = wrap(module, "training_step", lambda step, *args: 2 * step(*args))
        handle.remove()
    """
    present = owner.__dict__.get(name)
    chain = getattr(present, "_effdl_chain", None)
    if chain is not None and chain.owner is not owner:
        # a deep copy of a wrapped module carries the original's wrapper: put back what the copy would have had
        del owner.__dict__[name]
        if chain.own:
            owner.__dict__[name] = chain.original
        chain = None
    chain = chain or _Chain(owner, name)
    chain.wrappers = [*chain.wrappers, wrapper]
    return Handle(lambda: chain.remove(wrapper))


def require_automatic_optimization(pl_module: Any, who: str) -> None:
    """Raise in ``setup`` where the module optimises by hand and the method would silently do nothing."""
    if not getattr(pl_module, "automatic_optimization", True):
        raise ConfigurationError(
            f"{who} needs automatic optimisation: {type(pl_module).__name__} sets automatic_optimization=False, "
            "so its steps cannot be seen from outside. Use the function form inside your own training_step."
        )


def after_optimizer_step(trainer: Any, act: Callable[[torch.optim.Optimizer], None], who: str) -> list[Handle]:
    """Call ``act(optimizer)`` right after each real optimizer step. Register in ``on_fit_start``.

    ``register_step_post_hook`` fires once per real step under accumulation, clipping, bf16, manual optimisation,
    LBFGS, DDP and compile, and not for steps that the fp16 scaler skips. ``trainer.global_step`` is still the old
    value inside: keep a counter of your own.

    Raises:
        ConfigurationError: an optimizer that only looks like a torch one.
    """
    handles = []
    for optimizer in trainer.optimizers:
        if not hasattr(optimizer, "register_step_post_hook"):
            raise ConfigurationError(
                f"{who} follows the optimizer's steps, and {type(optimizer).__name__} has no register_step_post_hook: "
                "use a torch.optim.Optimizer."
            )
        handles.append(optimizer.register_step_post_hook(lambda opt, args, kwargs: act(opt)))
    return handles


class Tap:
    """What the network said during a step."""

    def __init__(self) -> None:
        self._own: list[Tensor] = []
        self._children: list[Tensor] = []

    def logits(self) -> Tensor:
        """The last logits [B, C] of the step: of the LightningModule's own forward, else of a direct child.

        Raises:
            ConfigurationError: no forward was seen (a module compiled before, or logits made elsewhere).
        """
        seen = self._own or self._children
        if not seen:
            raise ConfigurationError(
                "no logits of shape [batch, classes] were seen during training_step. If the network was compiled "
                "before training, compile it after attaching; if logits come from a nested module, name it with "
                "network='...'."
            )
        return seen[-1]


@contextlib.contextmanager
def tap_logits(module: nn.Module, network: str | None = None) -> Iterator[Tap]:
    """Listen, inside ``training_step``, to the logits of the one forward that happens there anyway.

    Args:
        module: the LightningModule.
        network: name of the submodule whose output are the logits, (B, C) or, as of a language model, (B, ..., C);
            ``None``: the module itself or a direct child, (B, C) only.

    Example::

        with tap_logits(self) as tap:
            loss = super().training_step(batch, batch_idx)
        loss = loss + regulariser(tap.logits())
    """
    tap = Tap()

    def listen(into: list[Tensor]) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            logits = logits_of(output)
            shape_fits = isinstance(logits, Tensor) and (
                logits.dim() == 2 or (network is not None and logits.dim() > 2)
            )
            if shape_fits and logits.is_floating_point():
                into.append(logits)

        return hook

    if network is not None:
        handles = [module.get_submodule(network).register_forward_hook(listen(tap._own))]
    else:
        handles = [module.register_forward_hook(listen(tap._own))]
        handles += [child.register_forward_hook(listen(tap._children)) for child in module.children()]
    try:
        yield tap
    finally:
        for handle in handles:
            handle.remove()

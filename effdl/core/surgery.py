"""Putting layers in place of others in a user's model: before optimizers exist, keeping what the user set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from effdl.core.errors import ConfigurationError
from effdl.core.select import NothingMatched
from effdl.core.steps import Handle, wrap


@dataclass(frozen=True)
class SurgeryReport:
    """What a replacement changed: names, and the model's parameter count before and after."""

    replaced: tuple[str, ...]
    parameters_before: int
    parameters_after: int

    @property
    def delta(self) -> int:
        return self.parameters_after - self.parameters_before


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, a shared one counted once."""
    return sum(p.numel() for p in module.parameters())


def replace_modules(
    root: nn.Module, selected: dict[str, nn.Module], make: Callable[[str, nn.Module], nn.Module]
) -> SurgeryReport:
    """Replace each selected layer by ``make(name, layer)``, wherever it is registered (ties stay tied).

    All replacements are built before the first is put in, so an error in ``make`` leaves the model as it was. A new
    layer takes over device, dtype and training flag of the old one, the ``requires_grad`` of parameters of the same
    name (of all of them where the old layer was frozen), and its hooks.

    Example::

        replace_modules(model, select_modules(model, "norm*"), lambda name, old: nn.Identity())
    """
    before = count_parameters(root)
    fresh = {id(old): _inherit(old, make(name, old)) for name, old in selected.items()}
    for parent in list(root.modules()):
        for child_name, child in list(parent._modules.items()):
            if id(child) in fresh and child is not fresh[id(child)]:
                parent._modules[child_name] = fresh[id(child)]
    return SurgeryReport(tuple(selected), before, count_parameters(root))


def _inherit(old: nn.Module, new: nn.Module) -> nn.Module:
    reference = next((t for t in [*old.parameters(), *old.buffers()] if t.is_floating_point()), None)
    if reference is not None and not reference.is_meta:
        new.to(device=reference.device, dtype=reference.dtype)
    new.train(old.training)
    flags = {name: p.requires_grad for name, p in old.named_parameters()}
    frozen = bool(flags) and not any(flags.values())
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(flags.get(name, not frozen))
    for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        getattr(new, kind).update(getattr(old, kind))
    for kind in ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"):
        getattr(new, kind).update(getattr(old, kind))
    return new


def when_built(pl_module: Any, act: Callable[[], None]) -> list[Handle]:
    """Run ``act`` now, or, for a module that builds its layers in its own ``setup``/``configure_model``, after that.

    ``act`` raises :class:`NothingMatched` while there is nothing to act on; the error surfaces only once the last of
    the two hooks has run. Call in a callback's ``setup``.
    """
    try:
        act()
        return []
    except NothingMatched:
        builds_late = _overrides(pl_module, "configure_model")
        if not builds_late and not _overrides(pl_module, "setup"):
            raise
    done = False

    def attempt(last: bool) -> None:
        nonlocal done
        if done:
            return
        try:
            act()
            done = True
        except NothingMatched:
            if last:
                raise

    def after_setup(call_next: Callable, *args: Any, **kwargs: Any) -> None:
        call_next(*args, **kwargs)
        attempt(last=not builds_late)

    def after_configure(call_next: Callable) -> None:
        call_next()
        attempt(last=True)

    handles = [wrap(pl_module, "setup", after_setup)]
    if builds_late:
        handles.append(wrap(pl_module, "configure_model", after_configure))
    return handles


def _overrides(pl_module: Any, hook: str) -> bool:
    """Whether the user's class (not Lightning's) defines the hook."""
    owner = next((cls for cls in type(pl_module).__mro__ if hook in cls.__dict__), None)
    return owner is not None and not owner.__module__.startswith(("lightning.", "pytorch_lightning."))


def refuse_after_weight_averaging(trainer: Any, callback: Any) -> None:
    """Surgery behind a ``WeightAveraging`` would leave its copy, made in ``setup``, with the old layers."""
    for other in trainer.callbacks:
        if other is callback:
            return
        if any(cls.__name__ == "WeightAveraging" for cls in type(other).__mro__):
            raise ConfigurationError(
                f"{type(callback).__name__} changes layers and is listed after {type(other).__name__}, which copies "
                f"the model in its setup. List {type(callback).__name__} before {type(other).__name__}."
            )


def disable_transformer_fast_path(root: nn.Module) -> None:
    """``nn.TransformerEncoder(Layer)`` reads ``norm1.weight``/``.eps`` and its activation directly on its fast path."""
    for module in root.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = module.enable_nested_tensor = False


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a module's first floating-point parameter, float32 where it has none."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)

"""Activations and their gradients, by hooks that are gone afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from effdl.core.errors import ConfigurationError, suggest


def named_module(root: nn.Module, name: str, argument: str = "targets") -> nn.Module:
    """``root.get_submodule(name)`` with close names in the error; sees through ``torch.compile``."""
    root = uncompiled(root)
    modules = dict(root.named_modules())
    if name not in modules:
        near = suggest(name, modules)
        raise ConfigurationError(f"{argument}={name!r}: no such layer in {type(root).__name__}. {near}")
    return modules[name]


def uncompiled(module: nn.Module) -> nn.Module:
    """The original of a module wrapped by ``torch.compile`` (hooks on the compiled one may never fire)."""
    return getattr(module, "_orig_mod", module)


@contextlib.contextmanager
def capture(
    root: nn.Module,
    names: Iterable[str],
    *,
    clone: bool = False,
    inputs: bool = False,
    pick: Callable[[Any], Tensor] | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Record the output (or first input) of the named modules during the block.

    Args:
        root: the model.
        names: module names as in ``named_modules``.
        clone: hand out (and pass on) a copy, so that a later in-place operation cannot change what was recorded.
        inputs: record the first positional input instead of the output.
        pick: takes the tensor out of an output that is a tuple or a dataclass; default: the first tensor.

    The yielded dict fills as modules run; the last call of a module wins.

    Example::

        with capture(model, ["layer4"]) as seen:
            logits = model(x)
        gradient = torch.autograd.grad(logits[:, 0].sum(), seen["layer4"])[0]
    """
    root = uncompiled(root)
    seen: dict[str, Tensor] = {}
    handles = []

    def record(name: str) -> Callable[..., Any]:
        def on_input(_module: nn.Module, args: tuple) -> None:
            seen[name] = first_tensor(args) if pick is None else pick(args)

        def on_output(_module: nn.Module, _args: tuple, output: Any) -> Any:
            seen[name] = first_tensor(output) if pick is None else pick(output)
            # the consumer gets a copy; what was recorded stays the tensor the score depends on
            return output.clone() if clone and isinstance(output, Tensor) else None

        return on_input if inputs else on_output

    try:
        for name in names:
            module = named_module(root, name)
            register = module.register_forward_pre_hook if inputs else module.register_forward_hook
            handles.append(register(record(name)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def first_tensor(value: Any) -> Tensor:
    """The first tensor of nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        for item in value:
            with contextlib.suppress(ConfigurationError):
                return first_tensor(item)
    raise ConfigurationError(f"no tensor in an output of type {type(value).__name__}")


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[nn.Module]:
    """Eval mode; every part's training flag comes back, also on error."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield module
    finally:
        for part, training in flags:
            part.training = training


@contextlib.contextmanager
def undisturbed(module: nn.Module, *, training: bool = False) -> Iterator[nn.Module]:
    """An analysis leaves no trace: training flags, ``requires_grad``, ``.grad``, buffers are put back, also on error.

    Inside, the module is in ``eval`` (or train) mode, gradients are enabled and inference mode is off, whatever loop
    Lightning is in. The RNG stream is not touched: draw from your own ``torch.Generator``.
    """
    flags = {m: m.training for m in module.modules()}
    wants = {p: (p.requires_grad, p.grad) for p in module.parameters()}
    with torch.inference_mode(False):
        buffers = {b: b.detach().clone() for b in module.buffers()}
        try:
            for p in wants:
                p.grad = None  # a backward inside would add to the user's in place
            module.train(training)
            with torch.enable_grad():
                yield module
        finally:
            for m, flag in flags.items():
                m.training = flag
            for p, (flag, grad) in wants.items():
                p.requires_grad_(flag)
                p.grad = grad
            with torch.no_grad():
                for buffer, value in buffers.items():
                    with torch.inference_mode(buffer.is_inference()):  # made by a validation step
                        buffer.copy_(value)

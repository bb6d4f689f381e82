"""A float64 twin of a model, for derivatives that float32 does not hold."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from effdl.core.capture import uncompiled
from effdl.core.errors import ConfigurationError, check


def check_double(device: torch.device) -> None:
    """Raise on a device without float64."""
    fix = "Use False, or move the model and the images to the CPU."
    check(device.type != "mps", "double", True, f"False on {device.type!r}, which has no float64", fix)


def double_copy(model: nn.Module, device: torch.device) -> nn.Module:
    """The uncompiled model with float64 parameters, buffers and plain tensor attributes; ``model`` stays as it is.

    A deep copy, and no swap of the model's own tensors: what a forward caches would otherwise stay behind in float64.
    Ties stay ties. Parameters are frozen, ``.grad`` is not copied: the copy takes float64 weights and no more. Hooks
    come along; an object outside the model whose method is a hook is shared, and so is a LightningModule's trainer.

    Args:
        model: with floating parameters of any precision.
        device: where it will run.

    Raises:
        ConfigurationError: a device without float64; a model that cannot be deep-copied.
    """
    check_double(device)
    model = uncompiled(model)
    with torch.inference_mode(False), torch.no_grad():
        memo = {id(tensor): _wide(tensor) for tensor in _tensors(model)} | _owners_of_hooks(model)
        try:
            twin = copy.deepcopy(model, memo).double()  # double(): for what a module itself derives from its dtype
        except Exception as error:
            raise ConfigurationError(
                f"double=True: {type(model).__name__} cannot be deep-copied ({error}). Explain a submodule that can, "
                "or a float64 model of your own: copy its state_dict into a second one and call .double() on it."
            ) from error
    for part, new in zip(model.modules(), twin.modules()):
        if "_trainer" in vars(part):  # a LightningModule's copy forgets it, and its forward may ask
            new.__dict__["_trainer"] = vars(part)["_trainer"]
    return twin


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers and tensors that are plain attributes (constants; what old-style weight_norm recomputes)."""
    plain = (value for part in model.modules() for value in vars(part).values() if isinstance(value, Tensor))
    return [t for t in itertools.chain(model.parameters(), model.buffers(), plain) if t.is_floating_point()]


def _wide(tensor: Tensor) -> Tensor:
    wide = tensor.detach().to(torch.float64, copy=True)
    return nn.Parameter(wide, requires_grad=False) if isinstance(tensor, nn.Parameter) else wide


def _owners_of_hooks(model: nn.Module) -> dict[int, Any]:
    """{id: object} of what lies outside the model and has a method hooked to it: a callback, say, with its Trainer."""
    inside = set(map(id, model.modules()))
    tables = [v for part in model.modules() for k, v in vars(part).items() if k.endswith("_hooks") and v]
    hooks = itertools.chain.from_iterable(table.values() for table in tables if isinstance(table, dict))
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return {id(owner): owner for owner in owners if owner is not None and id(owner) not in inside}

"""Which filters can go, and which of them only together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effdl.core.capture import undisturbed
from effdl.core.select import NothingMatched, Targets, select_modules
from effdl.core.structure import ChannelGroup, Member, width_of

_CONVOLUTIONS = (nn.modules.conv._ConvNd,)


def prunable(model: nn.Module, targets: Targets = None, exclude: Targets = None) -> list[str]:
    """Names of the layers whose filters can go: by default the convolutions, in a network without them Linear layers.

    Raises:
        ConfigurationError: nothing matched.
    """
    try:
        found = select_modules(model, targets, exclude, _CONVOLUTIONS)
    except NothingMatched:
        found = select_modules(model, targets, exclude, (nn.Linear,))
    return list(found)


def uncoupled(model: nn.Module, example: Tensor, groups: list[ChannelGroup]) -> list[ChannelGroup]:
    """Each layer a group of its own, with the BatchNorm that takes its output directly."""
    made: dict[int, tuple[str, Tensor]] = {}
    norms: dict[str, list[str]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):

            def see(_m: nn.Module, args: tuple, name: str = name) -> None:
                if id(args[0]) in made:
                    norms.setdefault(made[id(args[0])][0], []).append(name)

            handles.append(module.register_forward_pre_hook(see))
        elif isinstance(module, (*_CONVOLUTIONS, nn.Linear)):

            def note(_m: nn.Module, _args: tuple, out: Tensor, name: str = name) -> None:
                made[id(out)] = (name, out)

            handles.append(module.register_forward_hook(note))
    try:
        with undisturbed(model), torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    apart = []
    for group in groups:
        for name in filters_of(model, group):
            width = width_of(model.get_submodule(name))
            every = torch.arange(width)
            followers = [Member(norm, "both", every, every) for norm in dict.fromkeys(norms.get(name, []))]
            apart.append(ChannelGroup(width, (Member(name, "out", every, every), *followers), False))
    return apart


def filters_of(model: nn.Module, group: ChannelGroup) -> dict[str, Member]:
    """The convolutions and Linear layers that make (or, depthwise, carry) the channels of a group."""
    kinds = (*_CONVOLUTIONS, nn.Linear)
    return {m.name: m for m in group.of_role("out", "both") if isinstance(model.get_submodule(m.name), kinds)}

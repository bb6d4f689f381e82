"""Structure: which channels live and die together, taking dead ones out of a network, rebuilding it from the counts.

A channel that was masked still costs what a live one costs. :func:`compact` takes it out, through the dependency graph
of Torch-Pruning (extra ``prune``): the rows of the layer that makes it, the BatchNorm, depthwise convolution and
residual partners that carry it, the columns of every layer that reads it.

Example::

    small, counts = compact(model, (images,), {"conv1": dead})            # the same outputs, fewer parameters
    again = rebuild(make_model(), counts)                                  # the smaller architecture, without effdl's
    again.load_state_dict(small.state_dict(), strict=True)                 # masks and without Torch-Pruning
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from effdl.core._channel_groups import (
    MAKERS,
    ChannelGroup,
    Member,
    arguments,
    channel_groups,
    channel_parameters,
    silence_,
    traced_groups,
    weight_rows,
    whole_group,
    width_of,
)
from effdl.core.capture import undisturbed
from effdl.core.errors import ConfigurationError, check, require, suggest

Channels = Tensor | Sequence[int]
Counts = dict[str, dict[str, int]]

#: Attributes of a layer that count channels; what ``counts`` holds and ``rebuild`` sets.
_COUNTED = ("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_parameters")
#: Layers that mix channels by their statistics: taking one out, even a dead one, changes the others.
_MIXING = (nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)

__all__ = [
    "ChannelGroup",
    "Member",
    "channel_groups",
    "channel_parameters",
    "compact",
    "dead_channels",
    "multiply_accumulates",
    "rebuild",
    "silence_",
    "swap_children",
    "weight_rows",
    "width_of",
]


@torch.inference_mode(False)
def compact(
    model: nn.Module, example_inputs: Any, pruned: Mapping[str, Channels], *, atol: float = 1e-5
) -> tuple[nn.Module, Counts]:
    """A copy of the network without its dead channels, and the channel counts that rebuild its architecture.

    A channel goes only where every layer that makes it (all partners of a residual sum) has it dead, and, in a grouped
    convolution, where its whole row of groups can go. One channel of each layer stays. Channels in front of a
    GroupNorm or LayerNorm stay, since these mix channels.

    Args:
        model: the masked network, in the mode it is in; it is not touched.
        example_inputs: a tensor, or the tuple of positional inputs.
        pruned: layer name to its dead output channels: indices, or a bool mask (True: dead). Their weights must be 0.
        atol: largest difference between outputs of both networks in eval mode, relative to the largest output; more
            where numbers have fewer bits (half precision, TF32).

    Returns:
        ``(smaller network, counts)``; ``counts`` (layer to attribute to number) is JSON and goes to :func:`rebuild`.

    Raises:
        ConfigurationError: an unknown layer or channel; a dead channel has weights that are not zero, or still emits
            a constant (a bias, the shift of a BatchNorm) that its readers see; outputs are not the same.
        MissingExtraError: Torch-Pruning is not installed.
    """
    tp = require("torch_pruning", "prune")
    small = copy.deepcopy(model)
    flags = [p.requires_grad for p in small.parameters()]
    before = _counts(small)
    dead = {name: _as_mask(small, name, channels) for name, channels in pruned.items()}
    groups, graph = traced_groups(small, example_inputs, [name for name, mask in dead.items() if mask.any()])
    with torch.no_grad():
        quiet = _silent_inputs(small, example_inputs)
        plan = [(group, _removable(small, group, dead, quiet)) for group in groups]
        modules = dict(small.named_modules())
        for group, gone in plan:
            if gone.any():
                root = modules[group.members[0].name]
                whole_group(tp, graph, root, gone.nonzero().flatten().tolist()).prune(record_history=False)
    for parameter, flag in zip(small.parameters(), flags):
        parameter.requires_grad_(flag)
    _check_same(model, small, example_inputs, atol)
    for (_, old), new in zip(model.named_modules(), small.modules()):
        new.training = old.training
    counts = {name: count for name, count in _counts(small).items() if count != before[name]}
    return small, counts


def _as_mask(model: nn.Module, name: str, channels: Channels) -> Tensor:
    """Bool mask over the output channels of one layer, checked to be dead indeed."""
    modules = dict(model.named_modules())
    layer = modules.get(name)
    check(isinstance(layer, MAKERS), "pruned", name, "a convolution or Linear layer", suggest(name, modules))
    width, given = width_of(layer), torch.as_tensor(channels).detach().cpu()
    if given.dtype == torch.bool:
        check(given.shape == (width,), f"pruned[{name!r}]", tuple(given.shape), f"a mask of shape ({width},)")
        mask = given.clone()
    else:
        legal = given.numel() == 0 or bool((given >= 0).all() and (given < width).all())
        check(legal, f"pruned[{name!r}]", given.tolist(), f"channel numbers from 0 to {width - 1}")
        mask = torch.zeros(width, dtype=torch.bool)
        mask[given.long()] = True
    alive = weight_rows(layer)[mask.to(layer.weight.device)].ne(0).any(1).cpu()
    if alive.any():
        raise ConfigurationError(
            f"pruned[{name!r}]: channels {mask.nonzero().flatten()[alive].tolist()[:8]} have weights that are not "
            "zero. Mask them first: effdl.core.structure.silence_."
        )
    return mask


@torch.no_grad()
def _silent_inputs(model: nn.Module, example_inputs: Any) -> dict[str, Tensor]:
    """For each layer that reads channels: (width,) which of its inputs are zero throughout."""
    quiet: dict[str, Tensor] = {}
    handles = []

    def listen(name: str, linear: bool) -> Any:
        def hook(_module: nn.Module, args: tuple) -> None:
            x = args[0].movedim(-1 if linear else 1, 0).flatten(1)
            zero = x.eq(0).all(1).cpu()
            quiet[name] = quiet[name] & zero if name in quiet else zero

        return hook

    for name, module in model.named_modules():
        if isinstance(module, MAKERS):
            handles.append(module.register_forward_pre_hook(listen(name, isinstance(module, nn.Linear))))
    try:
        with undisturbed(model), torch.no_grad():
            model(*arguments(example_inputs))
    finally:
        for handle in handles:
            handle.remove()
    return quiet


def _removable(model: nn.Module, group: ChannelGroup, dead: dict[str, Tensor], quiet: dict[str, Tensor]) -> Tensor:
    """Bool (group.size,): channels that can go without a trace."""
    gone = torch.ones(group.size, dtype=torch.bool)
    if group.is_output or any(isinstance(model.get_submodule(m.name), _MIXING) for m in group.members):
        return ~gone
    for member in group.of_role("out"):
        own = dead.get(member.name)
        alive = torch.ones(len(member.index), dtype=torch.bool) if own is None else ~own[member.index]
        gone[member.channel[alive]] = False
    for member in group.of_role("in"):
        loud = ~quiet[member.name][member.index]
        still = gone[member.channel] & loud
        if still.any():
            raise ConfigurationError(
                f"dead channels {member.channel[still].unique().tolist()[:8]} of {group.makers[0]!r} still reach "
                f"{member.name!r} as a constant: a bias, or the shift of a BatchNorm between them, is not zero there. "
                "Zero these too: effdl.core.structure.silence_."
            )
    gone = _whole_rows(model, group, gone)
    if gone.all():
        gone[0] = False
        gone = _whole_rows(model, group, gone)
    return gone


def _whole_rows(model: nn.Module, group: ChannelGroup, gone: Tensor) -> Tensor:
    """Grouped convolutions lose the same inputs in each of their groups, and equally many outputs."""
    while True:
        left = gone.clone()
        for member in group.of_role("in", "out"):
            layer = model.get_submodule(member.name)
            parts = getattr(layer, "groups", 1)
            if parts == 1:
                continue
            width = layer.in_channels if member.role == "in" else layer.out_channels
            mine = torch.zeros(width, dtype=torch.bool)
            mine[member.index] = left[member.channel]
            rows = mine.view(parts, -1)
            if member.role == "in":
                rows = rows.all(0).expand_as(rows)
            else:
                rows = rows & (rows.cumsum(1) <= rows.sum(1).min())
            left[member.channel[~rows.reshape(-1)[member.index]]] = False
        if torch.equal(left, gone):
            return gone
        gone = left


def _check_same(model: nn.Module, small: nn.Module, example_inputs: Any, atol: float) -> None:
    inputs = arguments(example_inputs)
    with undisturbed(model), undisturbed(small), torch.no_grad():
        pairs = list(zip(tree_leaves(model(*inputs)), tree_leaves(small(*inputs))))
    for want, got in pairs:
        if isinstance(want, Tensor) and want.is_floating_point():
            tf32 = want.is_cuda and want.dtype == torch.float32  # convolutions there keep ten bits by default
            rounding = 2**-10 if tf32 else torch.finfo(want.dtype).eps
            allowed = max(atol, 8 * rounding) * max(1.0, float(want.abs().max()))
            if want.shape != got.shape or not torch.allclose(want, got, rtol=0, atol=allowed):
                raise ConfigurationError(
                    "the compacted network does not compute the same: its channels are coupled in a way that the "
                    "dependency graph does not see. Leave the layers around custom operations out of pruned."
                )


def _counts(model: nn.Module) -> Counts:
    return {
        name: {a: int(getattr(module, a)) for a in _COUNTED if isinstance(getattr(module, a, None), int)}
        for name, module in model.named_modules()
    }


def rebuild(model: nn.Module, counts: Mapping[str, Mapping[str, int]]) -> nn.Module:
    """A copy of the full-size network with the channel counts of a compacted one; weights are the leading slices.

    Pure torch: it is what a saved ``state_dict`` of :func:`compact`'s network loads into, ``strict=True``.

    Args:
        model: the architecture that was compacted, with any weights.
        counts: from :func:`compact`, or the JSON it was saved as.

    Raises:
        ConfigurationError: ``counts`` name a layer or an attribute that the network does not have.

    Example::

        model = rebuild(resnet18(num_classes=10), json.load(open("channels.json")))
        model.load_state_dict(safetensors.torch.load_file("model.safetensors"))
    """
    built = copy.deepcopy(model)
    modules = dict(built.named_modules())
    for name, attributes in counts.items():
        check(name in modules, "counts", name, "a layer of the network", suggest(name, modules))
        layer = modules[name]
        for attribute, number in attributes.items():
            known = attribute in _COUNTED and isinstance(getattr(layer, attribute, None), int)
            check(known and number > 0, f"counts[{name!r}]", {attribute: number}, "counts of this layer's channels")
            setattr(layer, attribute, int(number))
        for kind in (layer._parameters, layer._buffers):
            for key, tensor in kind.items():
                if tensor is not None and tensor.dim():
                    kind[key] = _resized(layer, key, tensor)
    return built


def _resized(layer: nn.Module, key: str, tensor: Tensor) -> Tensor:
    if isinstance(layer, nn.modules.conv._ConvNd):
        outer, inner = layer.out_channels, layer.in_channels // layer.groups
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            outer, inner = layer.in_channels, layer.out_channels // layer.groups
        shape = (outer, inner, *tensor.shape[2:]) if key == "weight" else (layer.out_channels,)
    elif isinstance(layer, nn.Linear):
        shape = (layer.out_features, layer.in_features)[: tensor.dim()]
    else:
        shape = (getattr(layer, "num_features", None) or layer.num_parameters,)
    values = tensor.detach()[tuple(slice(0, n) for n in shape)].clone()
    return nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values


def dead_channels(model: nn.Module) -> dict[str, Tensor]:
    """Layer name to bool (channels,): output channels of convolutions and Linear layers whose weights are all zero."""
    return {n: weight_rows(m).eq(0).all(1).cpu() for n, m in model.named_modules() if isinstance(m, MAKERS)}


def swap_children(model: nn.Module, other: nn.Module) -> None:
    """Put the layers, parameters and buffers of a network of the same class into ``model``, which stays the object."""
    for kind in ("_modules", "_parameters", "_buffers"):
        getattr(model, kind).update(getattr(other, kind))


def multiply_accumulates(model: nn.Module, example_inputs: Any) -> int:
    """Multiply-accumulate operations of one example in convolutions, Linear layers and matrix products.

    One of them is two FLOPs; biases, activations and normalisation are not counted.
    """
    from torch.utils.flop_counter import FlopCounterMode

    first = tree_map(lambda x: x[:1] if isinstance(x, Tensor) else x, arguments(example_inputs))
    with undisturbed(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*first)
    return counter.get_total_flops() // 2

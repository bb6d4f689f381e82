"""Which channels live and die together: groups of coupled channels, read from Torch-Pruning's dependency graph."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from effdl.core.errors import ConfigurationError, check, require, suggest

MAKERS = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True)
class Member:
    """One layer of a :class:`ChannelGroup`.

    Args:
        name: of the layer.
        role: ``"out"`` makes the channels, ``"in"`` reads them, ``"both"`` passes each on by itself (BatchNorm,
            depthwise convolution).
        index: (n,) the layer's own channel numbers.
        channel: (n,) the group's channel each of them belongs to.
    """

    name: str
    role: str
    index: Tensor
    channel: Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only be removed together: coupled by residual sums, concatenation, depthwise convolutions.

    Args:
        size: number of channels.
        members: the layers.
        is_output: they are outputs of the network and stay.
    """

    size: int
    members: tuple[Member, ...]
    is_output: bool

    def of_role(self, *roles: str) -> list[Member]:
        return [member for member in self.members if member.role in roles]

    @property
    def makers(self) -> list[str]:
        """Names of the layers whose output channels these are, the one first that was asked for."""
        return [member.name for member in self.of_role("out")]


@torch.inference_mode(False)
def channel_groups(model: nn.Module, example_inputs: Any, layers: Iterable[str]) -> list[ChannelGroup]:
    """The groups of the output channels of the named convolutions and Linear layers; each layer is in one of them.

    Args:
        model: the network; a copy of it is traced.
        example_inputs: a tensor, or the tuple of positional inputs.
        layers: names of layers that make channels; a depthwise convolution belongs to the group of its producer.

    Raises:
        ConfigurationError: a layer of another kind, or one that the example inputs never reach.
        MissingExtraError: Torch-Pruning is not installed.
    """
    return traced_groups(copy.deepcopy(model), example_inputs, layers)[0]


def traced_groups(model: nn.Module, example_inputs: Any, layers: Iterable[str]) -> tuple[list[ChannelGroup], Any]:
    tp = require("torch_pruning", "prune")
    modules = dict(model.named_modules())
    names = {module: name for name, module in modules.items()}
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # the graph is read from autograd
    with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = tp.DependencyGraph().build_dependency(model, arguments(example_inputs), verbose=False)
    found: list[ChannelGroup] = []
    for name in layers:
        layer = modules.get(name)
        check(isinstance(layer, MAKERS), "pruned", name, "a convolution or Linear layer", suggest(name, modules))
        if any(name in [m.name for m in group.of_role("out", "both")] for group in found):
            continue
        if layer not in graph.module2node:
            raise ConfigurationError(f"{name!r} takes no part in the network's output: its channels have no readers.")
        root = _producer(graph, layer) if _is_depthwise(layer) else layer
        found.append(_group(tp, graph, root, names))
    return found, graph


def arguments(example_inputs: Any) -> tuple:
    """Positional inputs, copied: what a validation loop has seen takes no part in autograd."""
    given = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    with torch.inference_mode(False):
        return tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, given)


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.conv._ConvNd) and layer.groups == layer.out_channels == layer.in_channels > 1


def width_of(layer: nn.Module) -> int:
    """Output channels of a convolution, output features of a Linear layer."""
    return layer.out_channels if isinstance(layer, nn.modules.conv._ConvNd) else layer.out_features


def weight_rows(layer: nn.Module) -> Tensor:
    """(channels, ...): the weights that make each output channel, also of a transposed convolution."""
    weight = layer.weight.detach()
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        weight = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1)


def _producer(graph: Any, layer: nn.Module) -> nn.Module:
    """The layer that makes the channels of a depthwise convolution; itself, where they are the network's inputs."""
    node = graph.module2node[layer]
    while node.inputs:
        node = node.inputs[0]
        if isinstance(node.module, MAKERS) and not _is_depthwise(node.module):
            return node.module
    return layer


def whole_group(tp: Any, graph: Any, root: nn.Module, index: Sequence[int]) -> Any:
    linear = isinstance(root, nn.Linear)
    prune = tp.prune_linear_out_channels if linear else tp.prune_conv_out_channels
    return graph.get_pruning_group(root, prune, list(index))


def _group(tp: Any, graph: Any, root: nn.Module, names: dict[nn.Module, str]) -> ChannelGroup:
    members, is_output = [], False
    for item in whole_group(tp, graph, root, range(width_of(root))):
        module, handler = item.dep.target.module, item.dep.handler
        makes = graph.is_out_channel_pruning_fn(handler)
        is_output |= isinstance(module, tp.ops._OutputOp) or (makes and not item.dep.target.outputs)
        if not isinstance(module, nn.Module) or module not in names:
            continue
        reads = graph.is_in_channel_pruning_fn(handler)
        role = "both" if makes and reads or _is_depthwise(module) else "out" if makes else "in"
        index, channel = torch.tensor(list(item.idxs)), torch.tensor(list(item.root_idxs))
        members.append(Member(names[module], role, index, channel))
    return ChannelGroup(width_of(root), tuple(members), is_output)


def channel_parameters(model: nn.Module, group: ChannelGroup) -> list[tuple[str, int, Member]]:
    """``(parameter name, its channel dimension, member)`` of all that must be zero for a channel to be silent."""
    found = []
    for member in group.of_role("out", "both"):
        layer = model.get_submodule(member.name)
        for attribute, parameter in layer._parameters.items():
            if parameter is not None:
                transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd) and attribute == "weight"
                found.append((f"{member.name}.{attribute}", 1 if transposed and layer.groups == 1 else 0, member))
    return found


@torch.no_grad()
def silence_(model: nn.Module, group: ChannelGroup, dead: Tensor) -> None:
    """Zero all parameters behind the ``dead`` channels (bool, (group.size,)) in place: weights, biases, BatchNorm."""
    for name, dim, member in channel_parameters(model, group):
        chosen = member.index[dead.cpu()[member.channel]]
        parameter = model.get_parameter(name)
        parameter.index_fill_(dim, chosen.to(parameter.device), 0.0)

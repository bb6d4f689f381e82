"""pdp: which weights of a module are pruned, and how much of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from effdl.compression.pdp import Groups, PrunedWeight, layer_sparsities
from effdl.core.distributed import check_equal_on_ranks
from effdl.core.errors import ConfigurationError
from effdl.core.select import NothingMatched, Targets, Weight, select_weights

USUAL = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)


def chosen(root: nn.Module, targets: Targets, exclude: Targets, granularity: str) -> list[Weight]:
    """The weights to prune; without ``targets`` the usual layers but the first convolution and the last Linear.

    Raises:
        ConfigurationError: nothing is left, or groups of M do not fill the input features of a layer (named).
    """
    weights = select_weights(root, targets, exclude)
    if targets is None:
        weights = _usual(weights)
    small = [w.name for w in weights if _count(_groups(w, granularity), w) < 2]
    if small:
        rank_zero_warn(f"Dense, as there is nothing to choose from in them: {', '.join(small)}")
    weights = [w for w in weights if w.name not in small]
    if not weights:
        raise NothingMatched(
            f"targets={targets!r} leaves no weight to prune: by default the first convolution and the last Linear stay "
            "dense. Name layers in targets; '*' takes all."
        )
    _check_divisible(weights, granularity)
    return weights


def _usual(weights: list[Weight]) -> list[Weight]:
    weights = [w for w in weights if isinstance(w.module, USUAL) or type(w.module).__name__ == "Conv1D"]
    first = next((w for w in weights if isinstance(w.module, nn.modules.conv._ConvNd)), None)
    last = next((w for w in reversed(weights) if isinstance(w.module, nn.Linear)), None)
    return [w for w in weights if w is not first and w is not last]


def _check_divisible(weights: Sequence[Weight], granularity: str) -> None:
    unit = Groups.parse(granularity).unit
    if unit.kind != "n:m":
        return
    bad = [w.name for w in weights if w.data.shape[_groups(w, granularity).inputs] % unit.sizes[1]]
    if bad:
        raise ConfigurationError(
            f"granularity={granularity!r} needs input features divisible by {unit.sizes[1]}: {', '.join(bad)} "
            f"{'has' if len(bad) == 1 else 'have'} not. Name their layers in exclude."
        )


def budget(
    weights: Sequence[Weight], granularity: str, scope: str, sparsity: float, temperature: float | str
) -> dict[str, PrunedWeight]:
    """Final share and temperature of each weight, from the weights as they are; one with nothing to prune is left out.

    Raises:
        ConfigurationError: the processes hold different weights.
        RuntimeError: NaN or infinity in a weight.
    """
    check_equal_on_ranks((w.data for w in weights), "a weight to be pruned")
    magnitudes = []
    for w in weights:
        groups = _groups(w, granularity)
        if not bool(torch.isfinite(w.data).all()):
            raise RuntimeError(f"{w.name} has NaN or infinite entries and cannot be ranked for pruning.")
        magnitudes.append(groups.magnitudes(w.data) / _size(groups, w) ** 0.5)
    shares = [sparsity] * len(weights)
    if scope == "global" and Groups.parse(granularity).unit.kind != "n:m":
        shares = layer_sparsities(magnitudes, sparsity)[1]
    kept = {w.name: {"sparsity": share, "temperature": 0.0} for w, share in zip(weights, shares)}
    named = {w.name: w for w in weights}
    layers = layers_of(named, granularity, kept)
    for name in [n for n, layer in layers.items() if layer.sparsity * layer.count < 1]:
        rank_zero_warn(f"{name} stays dense: its share of the budget is less than one of its {layers[name].count}.")
        del layers[name]
    for name, layer in layers.items():
        layer.set_share(1.0, named[name].data.device)
        layer.temperature = _temperature(layer, named[name], temperature)
    _warn(layers, named)
    return layers


def layers_of(weights: Mapping[str, Weight], granularity: str, kept: Mapping[str, Any]) -> dict[str, PrunedWeight]:
    """From what a checkpoint keeps of each: ``{"sparsity": R_l, "temperature": tau}``."""
    groups = {name: _groups(weight, granularity) for name, weight in weights.items()}
    return {name: PrunedWeight(groups[name], _count(groups[name], w), **kept[name]) for name, w in weights.items()}


def _groups(weight: Weight, granularity: str) -> Groups:
    return Groups.parse(granularity, weight.transposed)


def _count(groups: Groups, weight: Weight) -> int:
    return weight.data.shape[groups.outputs] if groups.unit.kind == "channel" else weight.data.numel()


def _size(groups: Groups, weight: Weight) -> int:
    return weight.data.numel() // _count(groups, weight)


def _temperature(layer: PrunedWeight, weight: Weight, temperature: float | str) -> float:
    if temperature != "auto":
        return float(temperature) * _size(layer.groups, weight)
    t = layer.groups.threshold(weight.data, layer.index)
    return max(0.1 * float((t * t).mean()), 1e-12)


def _warn(layers: Mapping[str, PrunedWeight], weights: Mapping[str, Weight]) -> None:
    """Of masks that will be as good as hard, that will never decide, or that cannot tell weights apart."""
    tied = []
    for name, layer in layers.items():
        kept, pruned = layer.groups.pair(weights[name].data, layer.index)
        if bool((kept == pruned).all()):
            tied.append(name)
    if tied:
        rank_zero_warn(f"The threshold falls on equal magnitudes, which stay or go together: {', '.join(tied)}")
    total = sum(weights[n].data.numel() for n in layers)
    undecided = sum(float(w.told(weights[n].data)[1]) * weights[n].data.numel() for n, w in layers.items())
    if total and undecided < 0.01 * total:
        rank_zero_warn(
            f"temperature: only {undecided / total:.1%} of the weights have 0.01 < m < 0.99, so the masks are as good "
            "as hard and their gradient decides nothing. Raise it, or use 'auto'."
        )
    if total and undecided > 0.5 * total:
        rank_zero_warn(
            f"temperature: {undecided / total:.0%} of the weights have 0.01 < m < 0.99, so binarising the masks will "
            "change the network. Lower it, or use 'auto'."
        )

"""pdp: which weights of a module are pruned, and how much of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from effdl.compression.pdp import Groups, PrunedWeight, Ramp, layer_sparsities
from effdl.core.distributed import check_equal_on_ranks
from effdl.core.errors import ConfigurationError, check, check_choice, check_number, require
from effdl.core.schedules import check_point, resolve_point
from effdl.core.select import NothingMatched, Targets, Weight, check_targets, select_weights

USUAL = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)


def check_arguments(callback: Any) -> None:
    """Raise ConfigurationError for an argument of PDPCallback outside its range."""
    unit, fixed = Groups.parse(callback.granularity).unit, final_sparsity(None, callback.granularity)
    if unit.kind == "n:m":
        valid = f"None or {fixed}, which {callback.granularity} means"
        check(callback.sparsity in (None, fixed), "sparsity", callback.sparsity, valid)
    else:
        check_number("sparsity", callback.sparsity, 0, 1, closed="[)", fix="0.9 removes nine weights of ten.")
    if callback.temperature != "auto":
        check_number("temperature", callback.temperature, 0, float("inf"), closed="()", fix="Or 'auto'.")
    for name in ("start", "stop", "freeze"):
        if name != "freeze" or callback.freeze is not None:
            check_point(name, getattr(callback, name))
    check_point("every", callback.every, positive=True)
    check_choice("scope", callback.scope, ("global", "local"))
    for name in ("eval_hard", "compact"):
        check(isinstance(getattr(callback, name), bool), name, getattr(callback, name), "True or False")
    if callback.compact:
        check(unit.kind == "channel", "compact", True, "False unless granularity='channel': only channels can go")
        require("torch_pruning", "prune")
    check_targets("targets", callback.targets)
    check_targets("exclude", callback.exclude)


def points(callback: Any, trainer: Any) -> tuple[Ramp, int | None]:
    """The ramp and the step of ``freeze``, in optimizer steps."""
    begin, end = (resolve_point(name, getattr(callback, name), trainer) for name in ("start", "stop"))
    ramp = Ramp(begin, end, resolve_point("every", callback.every, trainer, interval=True))
    if callback.freeze is None:
        return ramp, None
    freeze = resolve_point("freeze", callback.freeze, trainer)
    check(freeze >= begin, "freeze", callback.freeze, f"a point not before start={callback.start!r}")
    return ramp, freeze


def final_sparsity(sparsity: float | None, granularity: str) -> float | None:
    """R, which N:M has by itself."""
    unit = Groups.parse(granularity).unit
    return 1 - unit.sizes[0] / unit.sizes[1] if unit.kind == "n:m" else sparsity


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
    targets = [sparsity] * len(weights)
    if scope == "global" and Groups.parse(granularity).unit.kind != "n:m":
        targets = layer_sparsities(magnitudes, sparsity)[1]
    kept = {w.name: {"sparsity": target, "temperature": 0.0} for w, target in zip(weights, targets)}
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


def shares(layers: Mapping[str, PrunedWeight], weights: Mapping[str, Weight]) -> dict[str, float]:
    """Over all their weights: ``sparsity`` if binarised now, and the share ``undecided`` (0.01 < m < 0.99)."""
    if not layers:
        return {"sparsity": 0.0, "undecided": 0.0}
    sizes = [weights[name].data.numel() for name in layers]
    told = torch.stack([layer.told(weights[name].data) * n for (name, layer), n in zip(layers.items(), sizes)])
    return dict(zip(("sparsity", "undecided"), (told.sum(0) / sum(sizes)).tolist()))


def _groups(weight: Weight, granularity: str) -> Groups:
    return Groups.parse(granularity, weight.transposed)


def _count(groups: Groups, weight: Weight) -> int:
    return weight.data.shape[groups.outputs] if groups.unit.kind == "channel" else weight.data.numel()


def _size(groups: Groups, weight: Weight) -> int:
    return weight.data.numel() // _count(groups, weight)


def _temperature(layer: PrunedWeight, weight: Weight, temperature: float | str) -> float:
    if temperature != "auto":
        return float(temperature) * _size(layer.groups, weight)
    # 0.05 to 0.5 of t^2 is right for single weights; in groups of M many lie near their t, and norms of channels differ
    # by much less than t
    squares, t = layer.groups.magnitudes(weight.data).square(), layer.groups.threshold(weight.data, layer.index)
    scale = {"unstructured": 0.1 * (t * t).mean(), "n:m": 0.05 * (t * t).mean(), "channel": 0.1 * squares.std()}
    return max(float(scale[layer.groups.unit.kind]), 1e-12)


def _warn(layers: Mapping[str, PrunedWeight], weights: Mapping[str, Weight]) -> None:
    """Of masks that will be as good as hard, that will never decide, or that cannot tell weights apart."""
    tied = []
    for name, layer in layers.items():
        kept, pruned = layer.groups.pair(weights[name].data, layer.index)
        if bool((kept == pruned).all()):
            tied.append(name)
    if tied:
        rank_zero_warn(f"The threshold falls on equal magnitudes, which stay or go together: {', '.join(tied)}")
    undecided = shares(layers, weights)["undecided"]
    if layers and undecided < 0.01:
        rank_zero_warn(
            f"temperature: only {undecided:.1%} of the weights have 0.01 < m < 0.99, so the masks are as good "
            "as hard and their gradient decides nothing. Raise it, or use 'auto'."
        )
    if undecided > 0.5:
        rank_zero_warn(
            f"temperature: {undecided:.0%} of the weights have 0.01 < m < 0.99, so binarising the masks will "
            "change the network. Lower it, or use 'auto'."
        )

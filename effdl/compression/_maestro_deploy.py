"""maestro: the finished network at its ranks, and smaller ones out of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from effdl.compression._maestro_norms import importance
from effdl.core.errors import ConfigurationError, check_number
from effdl.core.factorize import merge, multiply_adds, narrow, pair_shape, row, split_parameters
from effdl.core.surgery import replace_modules

SCHEME = "channel"
BLOCK = 0.1  # of a layer's rank, what one step of ``extract`` takes away


def deploy(
    model: nn.Module, ranks: Mapping[str, int], *, smallest: bool = True, inplace: bool = False
) -> tuple[nn.Module, dict[str, dict[str, Any]]]:
    """The network of the first ``ranks[name]`` components of each pair, in stock layers.

    Args:
        model: with pairs of the ``channel`` scheme; copied unless ``inplace``.
        ranks: pair to number of components; 0 leaves the bias alone (as one component of zeros).
        smallest: multiply out the pairs that are no smaller than a dense layer; ``False``: all stay pairs, and any
            prefix of them can still be taken.
        inplace: change the model itself.

    Returns:
        The model, and for each pair its :func:`core.factorize.row`.

    Example::

        small, rows = deploy(network, {"conv1": 12, "fc": 4})
    """
    model = model if inplace else copy.deepcopy(model)
    rows = {name: row(pair_shape(model.get_submodule(name)), max(rank, 1), SCHEME) for name, rank in ranks.items()}
    if not smallest:
        for name, told in rows.items():
            size = split_parameters(pair_shape(model.get_submodule(name)), told["rank"], SCHEME)
            told |= {"form": "factors", "after": size}

    def make(name: str, pair: nn.Sequential) -> nn.Module:
        small = narrow(pair, ranks[name])
        return small if rows[name]["form"] == "factors" else merge(small, name)

    replace_modules(model, {name: model.get_submodule(name) for name in ranks}, make)
    return model, rows


def extract(
    model: nn.Module, ranks: Mapping[str, int], budget: float, args: tuple | None = None
) -> tuple[nn.Module, dict[str, dict[str, Any]]]:
    """A smaller network of the same training run: prefixes chosen for a budget, without fine-tuning.

    Greedy: a tenth of some layer's rank goes, from the layer that loses the least importance per unit saved, until the
    budget holds. BatchNorm statistics are those of the large network: ``core.calibrate.recalibrate_batchnorm`` next.

    Args:
        model: the finished network, all pairs (``MaestroCallback(smallest=False)``); copied.
        ranks: its pairs and their ranks.
        budget: share in (0, 1] of the dense network's cost: of its parameters, or, where ``args`` are given, of its
            multiply-adds.
        args: what the network is called with.

    Returns:
        As :func:`deploy`.

    Raises:
        ConfigurationError: no prefix is that small.

    Example::

        small, rows = extract(network, callback.ranks, 0.25, (images[:1],))
    """
    check_number("budget", budget, 0, 1, closed="(]", fix="0.25 is a quarter of the dense network.")
    costs, rest, dense = _costs(model, ranks, args)
    chosen = dict(ranks)
    total = rest + sum(costs[name][rank] for name, rank in chosen.items())
    limit = budget * (rest + dense)
    values = {name: importance(*(part.weight for part in model.get_submodule(name))).tolist() for name in ranks}
    while total > limit:
        steps = [_step(name, rank, costs[name], values[name]) for name, rank in chosen.items()]
        _, name, rank, saved = min((step for step in steps if step), default=(0, None, 0, 0))
        if name is None:
            least = total / limit * budget
            raise ConfigurationError(f"budget={budget!r} is not reached: rank 1 everywhere is {least:.3f} of the cost.")
        chosen[name], total = rank, total - saved
    return deploy(model, chosen)


def _costs(
    model: nn.Module, ranks: Mapping[str, int], args: tuple | None
) -> tuple[dict[str, list[float]], float, float]:
    """Cost of each pair at rank 0 (as 1), 1, ...: dense where that is less; of all else; of the dense layers."""
    counts = None if args is None else multiply_adds(model, args)
    costs, own, dense = {}, 0.0, 0.0
    for name, rank in ranks.items():
        pair = model.get_submodule(name)
        positions = 1.0 if counts is None else counts[f"{name}.1"] / pair[1].weight.numel()
        own += positions * sum(part.weight.numel() for part in pair)
        dense += positions * math.prod(pair_shape(pair))
        sizes = [row(pair_shape(pair), max(r, 1), SCHEME)["after"] for r in range(rank + 1)]
        costs[name] = [positions * size for size in sizes]
    whole = sum(p.numel() for p in model.parameters()) if counts is None else sum(counts.values())
    return costs, whole - own, dense


def _step(name: str, rank: int, cost: list[float], values: list[float]) -> tuple[float, str, int, float] | None:
    """Importance lost per unit saved, the layer, its next rank, what that saves; ``None``: there is no smaller one."""
    block = max(1, round(BLOCK * (len(cost) - 1)))
    lower = next((r for r in range(rank - block, 0, -1) if cost[r] < cost[rank]), None)
    if lower is None and rank > 1 and cost[1] < cost[rank]:
        lower = 1
    if lower is None:
        return None
    saved = cost[rank] - cost[lower]
    return values[lower] / saved, name, lower, saved

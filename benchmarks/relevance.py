"""Rows of ``python -m benchmarks peers``: relevance against zennit's, slicing against torch-pruning alone."""

from __future__ import annotations

import copy
import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.race import images, in_turns, ratios


def agreement(theirs: Tensor, ours: Tensor) -> dict[str, float]:
    """Each enlarges the map by an interpolation of its own, so the correlation is what can be compared."""
    pairs = zip(theirs.flatten(1).double(), ours.flatten(1).double())
    correlation = [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in pairs]
    difference = (theirs - ours).abs()
    return {
        "correlation": statistics.mean(correlation),
        "lowest_correlation": min(correlation),
        "mean_difference": difference.mean().item(),
        "largest_difference": difference.max().item(),
    }


def relevance(pairs: int, batch: int) -> list[dict[str, Any]]:
    """Time ratio ours / zennit's of epsilon in Linear, z+ in convolutions; torchvision's resnet18 at 64x64."""
    try:
        from zennit.attribution import Gradient
        from zennit.composites import LayerMapComposite
        from zennit.rules import Epsilon, Norm, Pass, ZPlus
        from zennit.torchvision import ResNetCanonizer
        from zennit.types import Activation, AvgPool, Convolution, Linear
    except ImportError:
        return [{"name": "LRP: zennit is not installed (pip install 'effdl[bench]')"}]
    from torchvision.models import resnet18
    from zennit.layer import Sum

    from effdl.core import lrp

    torch.manual_seed(0)
    model, x = resnet18(num_classes=10).eval(), images(batch, 64)["image"]
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):  # as after training, not the identity
            nn.init.uniform_(layer.running_mean, -0.1, 0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    # in their order: for zennit a convolution is a Linear, too
    rules: list[Any] = [
        (Activation, Pass()), (Sum, Norm(1e-9)), (AvgPool, Norm(1e-9)), (Convolution, ZPlus(1e-9, zero_params="bias")),
        (Linear, Epsilon(1e-6)),
    ]  # fmt: skip
    start = nn.functional.one_hot(model(x).argmax(1), 10).float()
    composite = LayerMapComposite(rules, canonizers=[ResNetCanonizer()])
    ours = lrp.Composite(linear=lrp.Epsilon(1e-6))

    def theirs() -> Tensor:
        with Gradient(model=model, composite=composite) as attributor:
            return attributor(x, start)[1]

    runs = {"theirs": theirs, "ours": lambda: lrp.relevance(model, x, start, rule=ours, layers=[]).inputs}
    maps = {name: run() for name, run in runs.items()}
    times = in_turns(runs, pairs)
    return [{"name": "LRP, ours / zennit", **ratios(times, "ours", "theirs"), **agreement(**maps)}]


def slicing(pairs: int) -> list[dict[str, Any]]:
    """Half the filters dead, taken out by core.structure (traced, sliced, checked) and by torch-pruning's graph alone.

    Once whole coupled groups are dead, once filters of each layer by itself: then torch-pruning also takes out their
    live partners in residual sums, while core.structure leaves both.
    """
    import timm

    from effdl.core.errors import require
    from effdl.core.structure import channel_groups, silence_

    try:
        tp = require("torch_pruning", "prune")
    except ImportError:
        return [{"name": "slicing: torch-pruning is not installed (pip install 'effdl[prune]')"}]
    torch.manual_seed(0)
    dense, x = timm.create_model("resnet18", num_classes=10, zero_init_last=False).eval(), images(2, 64)["image"]
    names = [name for name, layer in dense.named_modules() if isinstance(layer, nn.Conv2d)]
    groups = channel_groups(dense, x, names)
    chance = torch.Generator().manual_seed(0)
    found = []
    for coupled in (True, False):
        model, dead = copy.deepcopy(dense), {}
        if coupled:
            for group in groups:
                gone = torch.rand(group.size, generator=chance) < 0.5
                silence_(model, group, gone)
                dead |= {m.name: m.index[gone[m.channel]] for m in group.of_role("out")}
        else:
            for name in names:
                layer = model.get_submodule(name)
                gone = torch.rand(layer.out_channels, generator=chance) < 0.5
                layer.weight.data[gone] = 0
                dead[name] = gone.nonzero().flatten()
            for layer in model.modules():
                if isinstance(layer, nn.BatchNorm2d):  # nothing but zeros behind a dead filter
                    nn.init.zeros_(layer.bias)
        runs = {"theirs": partial(_torch_pruning, tp, model, x, dead), "ours": partial(_compacted, model, x, dead)}
        networks, times = {name: run() for name, run in runs.items()}, in_turns(runs, pairs)
        what = "coupled groups" if coupled else "single filters"
        found.append({"name": f"slicing {what}, ours / torch-pruning", **ratios(times, "ours", "theirs")})
        with torch.no_grad():
            want = model(x)
            for name, network in networks.items():
                found[-1][f"{name}_parameters"] = sum(p.numel() for p in network.parameters())
                found[-1][f"{name}_difference"] = ((network(x) - want).abs().max() / want.abs().max()).item()
    return found


def _compacted(model: nn.Module, x: Tensor, dead: dict[str, Tensor]) -> nn.Module:
    from effdl.core.structure import compact

    return compact(model, x, dead)[0]


def _torch_pruning(tp: Any, model: nn.Module, x: Tensor, dead: dict[str, Tensor]) -> nn.Module:
    """What its users write: a copy, a graph, and the group of each layer's dead filters, coupled partners once."""
    copied = copy.deepcopy(model)
    graph, gone = tp.DependencyGraph().build_dependency(copied, (x,)), set()
    for name, index in dead.items():
        layer = copied.get_submodule(name)
        if layer not in gone and len(index):
            group = graph.get_pruning_group(layer, tp.prune_conv_out_channels, index.tolist())
            if graph.check_pruning_group(group):
                gone |= {dep.target.module for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)}
                group.prune()
    return copied

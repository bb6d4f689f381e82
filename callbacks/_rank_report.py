"""What a low-rank callback tells at the end: per layer, and the dense network beside the factorised one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from effdl.core.calibrate import to_device
from effdl.core.factorize import join, multiply_adds
from effdl.core.report import latencies_ms, measure


def columns(
    rows: Mapping[str, Mapping[str, Any]],
    metrics: Mapping[str, dict[str, float]],
    small: nn.Module,
    inputs: tuple[tuple, dict[str, Any]] | None,
) -> dict[str, Any]:
    """Keys of ``report()``: totals of the selected layers, their rows, ``before`` and ``after``.

    Args:
        rows: per layer of the LightningModule, with ``form``, ``before`` and ``after`` (weights).
        metrics: validation metrics ``before`` and ``after`` the split.
        small: the network that was split.
        inputs: one example of what it is called with; without it neither multiply-adds nor latency are told.
    """
    layers = {name: dict(row) for name, row in rows.items()}
    told = {f"selected_weights_{key}": sum(row[key] for row in rows.values()) for key in ("before", "after")}
    own = {name: _within(small, name) for name in rows}
    dense = copy.deepcopy(small)
    join(dense, own.values())
    before: dict[str, Any] = {"name": "dense", "metrics": metrics.get("before", {}), **measure(dense)}
    after: dict[str, Any] = {"name": "factorised", "metrics": metrics.get("after", {})}
    if inputs is not None:
        args, kwargs = to_device(inputs, next(small.parameters()).device)
        before["latency_ms"], after["latency_ms"] = latencies_ms([dense, small], args, kwargs)
        counts = multiply_adds(dense, args, kwargs), multiply_adds(small, args, kwargs)
        for name, inner in own.items():
            layers[name]["macs before"] = counts[0].get(inner, 0)
            layers[name]["macs after"] = sum(counts[1].get(part, 0) for part in (inner, f"{inner}.0", f"{inner}.1"))
        told |= {"multiply_adds_before": sum(counts[0].values()), "multiply_adds_after": sum(counts[1].values())}
    return {**told, "layers": layers, "before": before, "after": after}


def _within(network: nn.Module, name: str) -> str:
    """A layer's name in the network, from that in the LightningModule, which is longer by the network's own."""
    known = dict(network.named_modules())
    while name not in known:
        name = name.partition(".")[2]
    return name


def validation_metrics(trainer: Any, slug: str) -> dict[str, float]:
    """The last validation's metrics (anything logged, where there was none), without the method's own."""
    seen = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith(slug)}
    return {k: v for k, v in seen.items() if "val" in k} or seen

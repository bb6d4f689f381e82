"""What a low-rank callback tells at the end: per layer, and the dense network beside the factorised one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from effdl.core.calibrate import to_device
from effdl.core.factorize import join, multiply_adds
from effdl.core.report import ForwardProbe, latencies_ms, measure


def columns(
    rows: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, dict[str, float]], probe: ForwardProbe | None
) -> dict[str, Any]:
    """Keys of ``report()``: totals of the selected layers, their rows, ``before`` and ``after``.

    Args:
        rows: per layer of the LightningModule, with ``form``, ``before`` and ``after`` (weights).
        metrics: validation metrics ``before`` and ``after`` the split.
        probe: on the network that was split; without it (or a forward) neither multiply-adds nor latency are told.
    """
    layers = {name: dict(row) for name, row in rows.items()}
    told = {f"selected_weights_{key}": sum(row[key] for row in rows.values()) for key in ("before", "after")}
    before: dict[str, Any] = {"name": "dense", "metrics": metrics.get("before", {})}
    after: dict[str, Any] = {"name": "factorised", "metrics": metrics.get("after", {})}
    if probe is None or probe.inputs is None:
        return {**told, "layers": layers, "before": before, "after": after}
    small = probe.model
    # as in ``product``: names of the LightningModule are one "model." longer
    own = {name: next(n for n in (name, name.partition(".")[2]) if _has(small, n)) for name in rows}
    dense = copy.deepcopy(small)
    join(dense, own.values())
    args, kwargs = to_device(probe.inputs, next(small.parameters()).device)
    before |= measure(dense)
    before["latency_ms"], after["latency_ms"] = latencies_ms([dense, small], args, kwargs)
    counts = multiply_adds(dense, args, kwargs), multiply_adds(small, args, kwargs)
    for name, inner in own.items():
        layers[name]["macs before"] = counts[0].get(inner, 0)
        layers[name]["macs after"] = sum(n for key, n in counts[1].items() if key == inner or key[:-2] == inner)
    told |= {"multiply_adds_before": sum(counts[0].values()), "multiply_adds_after": sum(counts[1].values())}
    return {**told, "layers": layers, "before": before, "after": after}


def validation_metrics(trainer: Any, slug: str) -> dict[str, float]:
    """The last validation's metrics (anything logged, where there was none), without the method's own."""
    seen = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith(slug)}
    return {k: v for k, v in seen.items() if "val" in k} or seen


def _has(model: Any, name: str) -> bool:
    return name in dict(model.named_modules())

"""What a pruning callback tells at the end, of any mask store."""

from __future__ import annotations

import copy
from typing import Any

import torch

from effdl.compression.gradual_pruning import storage_bits
from effdl.core.calibrate import to_device
from effdl.core.masks import MaskStore
from effdl.core.report import ForwardProbe, latencies_ms


def pruning_report(store: MaskStore) -> dict[str, Any]:
    """Counted sparsity, per weight and in all, and what the selected weights cost to store."""
    layers = store.report()
    total, alive = (sum(row[key] for row in layers.values()) for key in ("numel", "nonzero"))
    stored = storage_bits(total, alive)
    sizes = {f"selected_{form}_bytes": bits // 8 for form, bits in stored.items()}
    return {"sparsity": 1 - alive / total, **sizes, "layers": layers}


def columns(dense: dict[str, Any], probe: ForwardProbe | None) -> dict[str, Any]:
    """The final table: the dense network where the ramp began, and the pruned one; their latencies side by side.

    Zeros do not hurry a dense kernel: the dense latency is that of the same network with its zeros filled in, measured
    in turns with the pruned one's, so that a busy machine does not invent a speed-up.
    """
    before, after = {"name": "dense", **dense}, {"name": "pruned"}
    if probe is not None and probe.inputs is not None:
        twin = copy.deepcopy(probe.model)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.masked_fill_(parameter == 0, 0.01)
        args, kwargs = to_device(probe.inputs, next(twin.parameters()).device)
        before["latency_ms"], after["latency_ms"] = latencies_ms([twin, probe.model], args, kwargs)
    return {**({"before": before} if dense else {}), "after": after}

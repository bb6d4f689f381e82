"""What a pruning callback tells of any mask store: warnings on the way, the report at the end."""

from __future__ import annotations

import copy
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from effdl.compression.gradual_pruning import storage_bits
from effdl.core.calibrate import to_device
from effdl.core.masks import MaskStore
from effdl.core.report import ForwardProbe, latencies_ms


def warn_of_frozen(store: MaskStore) -> None:
    """Name the weights that are pruned and do not train."""
    frozen = [name for name, weight in store.weights.items() if not weight.parameter.requires_grad]
    if frozen:
        rank_zero_warn(
            f"{len(frozen)} weights to be pruned are frozen and cannot heal: {', '.join(frozen[:3])}"
            f"{', ...' if len(frozen) > 3 else ''}. Name their layers in exclude to keep them dense."
        )


def warn_of_spent_rate(first: float, now: float) -> None:
    """At the end of the ramp: the learning rate had decayed before it."""
    if now < 0.01 * first:
        rank_zero_warn(
            f"The learning rate fell from {first:g} to {now:g} while pruning: the network cannot heal. "
            "Let stop come earlier, or the schedule decay later."
        )


def warn_of_early_end(step: int, end: int, reached: float, final: float) -> None:
    """At the end of training: the ramp had not ended."""
    if step < end:
        rank_zero_warn(
            f"Training stopped at step {step} before stop (step {end}): only {reached:.3f} of sparsity {final:.3f} "
            "reached."
        )


def pruning_report(store: MaskStore) -> dict[str, Any]:
    """Counted sparsity, per weight and in all, and what the selected weights cost to store."""
    layers = store.report()
    total, alive = (sum(row[key] for row in layers.values()) for key in ("numel", "nonzero"))
    stored = storage_bits(total, alive)
    sizes = {f"selected_{form}_bytes": bits // 8 for form, bits in stored.items()}
    return {"sparsity": 1 - alive / total, **sizes, "layers": layers}


def columns(dense: dict[str, Any], probe: ForwardProbe | None, full: Any = None) -> dict[str, Any]:
    """The final table: the dense network where the ramp began, and the pruned one; their latencies side by side.

    Zeros do not hurry a dense kernel: the dense latency is that of the same network with its zeros filled in, measured
    in turns with the pruned one's, so that a busy machine does not invent a speed-up. ``full``: the network before
    channels were taken out of it, whose latency is the dense one then.
    """
    before, after = {"name": "dense", **dense}, {"name": "pruned"}
    if probe is not None and probe.inputs is not None:
        twin = full or copy.deepcopy(probe.model)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.masked_fill_(parameter == 0, 0.01)
        args, kwargs = to_device(probe.inputs, next(twin.parameters()).device)
        before["latency_ms"], after["latency_ms"] = latencies_ms([twin, probe.model], args, kwargs)
    return {**({"before": before} if dense else {}), "after": after}

"""What sara keeps in checkpoints and says at the end, and what it does not go with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effdl.callbacks._calibrated import CalibratedCallback
from effdl.callbacks._low_rank import LowRankCallback
from effdl.callbacks._masked import MaskedCallback
from effdl.callbacks._quantized_training import QuantizedTrainingCallback
from effdl.core.errors import ConfigurationError, check
from effdl.core.masks import pack, unpack
from effdl.core.surgery import refuse_after_weight_averaging
from effdl.diffusion.sara import SUFFIX, SparseWeight, learning_rate

LARGEST = 5e-3  # threshold that the official rule of the rate was made for
SHARDED = {"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"}
Weights = Mapping[str, SparseWeight]


def refuse_company(callback: Any, trainer: Any) -> None:
    """Raise for a strategy of split parameters, and for callbacks that change the same weights while they train."""
    kinds = [cls.__name__ for cls in type(trainer.strategy).__mro__]
    fix = "Use one that keeps whole parameters on each rank, like ddp."
    check(not set(kinds) & SHARDED, "strategy", kinds[0], "one of whole parameters", fix)
    refuse_after_weight_averaging(trainer, callback)
    for other in trainer.callbacks:
        name = type(other).__name__
        if other is not callback and type(other) is type(callback):
            raise ConfigurationError("two SaRACallbacks: one alone says what trains. Name all targets in one.")
        if isinstance(other, MaskedCallback):
            raise ConfigurationError(
                f"{name} holds at zero the weights that SaRACallback trains. Prune first, in a run of its own."
            )
        before = isinstance(other, CalibratedCallback) and other.when == "start"
        if before or isinstance(other, (LowRankCallback, QuantizedTrainingCallback)):
            raise ConfigurationError(
                f"{name} beside SaRACallback: both change the same weights. Fine-tune first, and use {name} then."
            )


def fold(weights: Weights, state: dict[str, Tensor]) -> dict[str, Any]:
    """Dense weights under their own names (all of them, of a tied one); what trains is kept beside."""
    kept: dict[str, Any] = {"leaves": {}, "masks": {}, "initial": {}, "active": {}, "held": {}}
    for name, sparse in weights.items():
        leaf = state.get(name + SUFFIX)
        if leaf is None:  # merged by now
            continue
        raw = state[name]
        for key, value in list(state.items()):
            if key.endswith(SUFFIX) and value.data_ptr() == leaf.data_ptr():
                kept["leaves"][key] = state.pop(key)
        dense = sparse.dense(raw, leaf)
        for key in [k for k, v in state.items() if v.data_ptr() == raw.data_ptr() and v.shape == raw.shape]:
            state[key] = dense
        kept["masks"][name] = pack(sparse.mask())
        kept["initial"][name] = sparse.initial
        if sparse.active is not None:
            kept["active"][name], kept["held"][name] = pack(sparse.active != 0), sparse.held
    return kept


def unfold(weights: Weights, state: dict[str, Tensor], kept: dict[str, Any]) -> None:
    """The leaves again; which entries train is the checkpoint's to say, also before another base is loaded."""
    differ = sorted(weights.keys() ^ kept["masks"].keys())
    if differ:
        raise ConfigurationError(f"ckpt_path: {differ[0]} trains in one of this run and the checkpoint's, not in both.")
    state.update(kept["leaves"])
    for name, sparse in weights.items():
        sparse.restore(unpack(kept["masks"][name]), kept["initial"][name], kept["leaves"][name + SUFFIX])
        if name in kept["active"]:
            sparse.active = unpack(kept["active"][name]).to(sparse.leaf)
            sparse.held = kept["held"][name].to(sparse.leaf)


def told(weights: Weights, total: int) -> dict[str, Any]:
    """Entries that trained, in all and per parameter; theta, the rate it suggests; the size of the delta."""
    layers = {}
    for name, sparse in weights.items():
        row = {"numel": sparse.weight.data.numel(), "trained": sparse.index.numel()}
        layers[name] = row | {"still small": int(sparse.still_small().sum())}
    trained = sum(row["trained"] for row in layers.values())
    threshold = next(iter(weights.values())).threshold
    rule = {"suggested_rate": learning_rate(threshold)} if threshold <= LARGEST else {}
    return {
        "threshold": threshold,
        "trained": trained,
        "share": trained / total,
        "still_small": sum(row["still small"] for row in layers.values()) / trained,
        **rule,
        "delta_bytes": sum(s.index.numel() * s.weight.data.element_size() for s in weights.values()),
        "layers": layers,
    }


def draw_magnitudes(weights: Weights, path: Path) -> None:
    """The trained entries' magnitudes in units of theta, before and after."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for label, of in (("before", "initial"), ("after", "values")):
        sizes = torch.cat([getattr(s, of).abs().float() / s.threshold for s in weights.values()])
        axes.hist(sizes.clamp(max=5).numpy(), bins=100, range=(0, 5), histtype="step", label=label)
    axes.axvline(1, color="grey", linewidth=1)
    axes.set(xlabel="|p| / theta (5: and above)", ylabel="trained weights", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=150)

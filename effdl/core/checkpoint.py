"""Every checkpoint opens without effdl: what a method adds is folded away on save and put back before the load."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor

from effdl.core.steps import Handle, wrap

State = dict[str, Tensor]
MODEL_STATES = ("state_dict", "current_model_state")  # the second is what WeightAveraging adds


def fold_checkpoints(
    pl_module: Any,
    slug: str,
    fold: Callable[[State], dict[str, Any]],
    unfold: Callable[[State, dict[str, Any]], None] | None = None,
) -> list[Handle]:
    """Wrap the module's ``on_save_checkpoint`` and ``on_load_checkpoint``.

    The module's hooks run last (after WeightAveraging's) and also for ``save_weights_only``; callbacks' do neither.

    Args:
        pl_module: the LightningModule.
        slug: the method's key under ``checkpoint["effdl"]``.
        fold: given a state dict (a new dict that aliases live weights: replace entries, never write in place),
            makes it the plain model's and returns what must be kept beside it.
        unfold: puts back into the state dict what ``fold`` returned. Called only when fitting: ``test(ckpt_path=...)``
            wants the folded weights.
    """

    def save(call_next: Callable, checkpoint: dict[str, Any]) -> None:
        call_next(checkpoint)
        fold_into(checkpoint, slug, fold)

    def load(call_next: Callable, checkpoint: dict[str, Any]) -> None:
        if unfold is not None and _fitting(pl_module):
            unfold_from(checkpoint, slug, unfold)
        call_next(checkpoint)

    return [wrap(pl_module, "on_save_checkpoint", save), wrap(pl_module, "on_load_checkpoint", load)]


def fold_into(checkpoint: dict[str, Any], slug: str, fold: Callable[[State], dict[str, Any]]) -> None:
    """What :func:`fold_checkpoints` does on save, for a mixin's own ``on_save_checkpoint``."""
    kept = {}
    for key in MODEL_STATES:
        if key in checkpoint:
            checkpoint[key] = copy.copy(checkpoint[key])  # with its _metadata: the versions of the layers
            kept[key] = fold(checkpoint[key])
    checkpoint.setdefault("effdl", {})[slug] = kept


def unfold_from(checkpoint: dict[str, Any], slug: str, unfold: Callable[[State, dict[str, Any]], None]) -> None:
    """What :func:`fold_checkpoints` does on load, for a mixin's own ``on_load_checkpoint``."""
    kept = checkpoint.get("effdl", {}).get(slug, {})
    for key in MODEL_STATES:
        if key in kept and key in checkpoint:
            unfold(checkpoint[key], kept[key])


def _fitting(pl_module: Any) -> bool:
    trainer = getattr(pl_module, "_trainer", None)
    return trainer is None or str(getattr(trainer.state.fn, "value", trainer.state.fn)) == "fit"

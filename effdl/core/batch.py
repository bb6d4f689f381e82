"""The only place that knows what a batch looks like: dicts with the field's keys, ``(x, y)``, ``(x, y, index)``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from effdl.core.errors import ConfigurationError

INPUT_KEYS = ("image", "pixel_values", "input_ids", "mel", "images", "inputs", "x")
LABEL_KEYS = ("label", "labels", "target", "y")
INDEX_KEYS = ("index", "idx")


class Batch(NamedTuple):
    """Inputs, labels and data-set indices of a batch; what it does not carry is ``None``."""

    inputs: Any
    labels: Tensor | None
    index: Tensor | None


def unpack(
    batch: Any, input_key: str | None = None, label_key: str | None = None, index_key: str | None = None
) -> Batch:
    """Inputs, labels and indices of a batch.

    Args:
        batch: a mapping (``image``/``pixel_values``/``input_ids``, ``label``, ``index``), a tuple ``(x,)``,
            ``(x, y)`` or ``(x, y, index)``, or a bare tensor.
        input_key, label_key, index_key: keys of a mapping that override the usual ones.

    Raises:
        ConfigurationError: a mapping without an input, or without a key that was asked for.

    Example::

        inputs, labels, index = unpack({"image": x, "label": y})
    """
    if isinstance(batch, Mapping):
        inputs = _pick(batch, input_key, INPUT_KEYS)
        if inputs is None:
            raise ConfigurationError(
                f"the batch has keys {sorted(batch)} and no input among {INPUT_KEYS}: name yours with input_key=..."
            )
        return Batch(inputs, _pick(batch, label_key, LABEL_KEYS), _pick(batch, index_key, INDEX_KEYS))
    if isinstance(batch, (tuple, list)):
        inputs, labels, index = (*batch, None, None, None)[:3]
        return Batch(inputs, labels, index)
    return Batch(batch, None, None)


def crop_of(batch: Any) -> Tensor | None:
    """What a mapping says of the crops its images are, int (B,) or (B, P) under ``"crop"``; ``None`` where nothing."""
    return batch.get("crop") if isinstance(batch, Mapping) else None


def _pick(batch: Mapping, key: str | None, usual: tuple[str, ...]) -> Any:
    if key is not None:
        if key not in batch:
            raise ConfigurationError(f"the batch has no key {key!r}; it has {sorted(batch)}.")
        return batch[key]
    return next((batch[k] for k in usual if k in batch), None)


def logits_of(output: Any) -> Any:
    """The logits of a network's output: a tensor, ``.logits`` (transformers), ``["logits"]``, first of a tuple."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output.get("logits")
    if hasattr(output, "logits"):
        return output.logits
    return output[0] if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor) else None

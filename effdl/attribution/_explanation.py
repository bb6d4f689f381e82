"""What an explanation of smooth-gradcampp holds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LayerMap:
    """What one layer says. Spatial sizes are the layer's own; float32; float64 where the
    model is, or with ``double``.

    ``cam`` (B, h, w) in [0, 1]; ``raw`` = sum_k w_k A_k before the ReLU; ``weights`` (B, K); ``alpha``, ``first``,
    ``second``, ``third`` (D1..D3) and ``activation`` (clean A) are (B, K, h, w).
    With ``mode="maps"`` only ``cam`` and ``activation`` exist: there is no single set of weights.
    """

    cam: Tensor
    activation: Tensor
    raw: Tensor | None = None
    weights: Tensor | None = None
    alpha: Tensor | None = None
    first: Tensor | None = None
    second: Tensor | None = None
    third: Tensor | None = None


@dataclass(frozen=True)
class Explanation:
    """``layers`` {name: LayerMap}; of each clean sample (B,) the ``scores``, and without ``target_fn`` the explained
    ``classes``, their softmax ``probabilities`` and the ``predicted`` classes."""

    layers: dict[str, LayerMap]
    scores: Tensor
    classes: Tensor | None = None
    probabilities: Tensor | None = None
    predicted: Tensor | None = None

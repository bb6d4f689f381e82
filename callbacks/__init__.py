"""Callbacks that attach a method to any Lightning Trainer.

Example::

    from effdl.callbacks import PruningCallback

    trainer = Trainer(callbacks=[PruningCallback(sparsity=0.9)])
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "DSnoTCallback": "effdl.callbacks.dsnot",
    "DifferentiableQuantizationCallback": "effdl.callbacks.differentiable_quantization",
    "DiffusionPTQCallback": "effdl.callbacks.ptq4dm",
    "MaestroCallback": "effdl.callbacks.maestro",
    "MixedPrecisionPTQCallback": "effdl.callbacks.hessian_mixed_precision",
    "NUPESCallback": "effdl.callbacks.nupes",
    "PDPCallback": "effdl.callbacks.pdp",
    "PolyComCallback": "effdl.callbacks.polycom",
    "PowerNormCallback": "effdl.callbacks.powernorm",
    "PruningCallback": "effdl.callbacks.gradual_pruning",
    "QKNormCallback": "effdl.callbacks.rectified_flow_transformer",
    "QuantizedDistillationCallback": "effdl.callbacks.quantized_distillation",
    "RNGStateCallback": "effdl.callbacks.rng_state",
    "ReSTECallback": "effdl.callbacks.reste",
    "RelevancePruningCallback": "effdl.callbacks.relevance_pruning",
    "RNNPruningCallback": "effdl.callbacks.rnn_sparsity",
    "SAMCallback": "effdl.callbacks.sam",
    "SaRACallback": "effdl.callbacks.sara",
    "SharpnessCallback": "effdl.callbacks.sharpness",
    "SmoothGradCAMCallback": "effdl.callbacks.smooth_gradcampp",
    "TimestepSamplerCallback": "effdl.callbacks.timestep_sampler",
    "TrainedRankPruningCallback": "effdl.callbacks.trained_rank_pruning",
}

if TYPE_CHECKING:
    from effdl.callbacks.differentiable_quantization import DifferentiableQuantizationCallback
    from effdl.callbacks.dsnot import DSnoTCallback
    from effdl.callbacks.gradual_pruning import PruningCallback
    from effdl.callbacks.hessian_mixed_precision import MixedPrecisionPTQCallback
    from effdl.callbacks.maestro import MaestroCallback
    from effdl.callbacks.nupes import NUPESCallback
    from effdl.callbacks.pdp import PDPCallback
    from effdl.callbacks.polycom import PolyComCallback
    from effdl.callbacks.powernorm import PowerNormCallback
    from effdl.callbacks.ptq4dm import DiffusionPTQCallback
    from effdl.callbacks.quantized_distillation import QuantizedDistillationCallback
    from effdl.callbacks.rectified_flow_transformer import QKNormCallback
    from effdl.callbacks.relevance_pruning import RelevancePruningCallback
    from effdl.callbacks.reste import ReSTECallback
    from effdl.callbacks.rng_state import RNGStateCallback
    from effdl.callbacks.rnn_sparsity import RNNPruningCallback
    from effdl.callbacks.sam import SAMCallback
    from effdl.callbacks.sara import SaRACallback
    from effdl.callbacks.sharpness import SharpnessCallback
    from effdl.callbacks.smooth_gradcampp import SmoothGradCAMCallback
    from effdl.callbacks.timestep_sampler import TimestepSamplerCallback
    from effdl.callbacks.trained_rank_pruning import TrainedRankPruningCallback

__all__ = [
    "DSnoTCallback",
    "DifferentiableQuantizationCallback",
    "DiffusionPTQCallback",
    "MaestroCallback",
    "MixedPrecisionPTQCallback",
    "NUPESCallback",
    "PDPCallback",
    "PolyComCallback",
    "PowerNormCallback",
    "PruningCallback",
    "QKNormCallback",
    "QuantizedDistillationCallback",
    "RNGStateCallback",
    "ReSTECallback",
    "RelevancePruningCallback",
    "RNNPruningCallback",
    "SAMCallback",
    "SaRACallback",
    "SharpnessCallback",
    "SmoothGradCAMCallback",
    "TimestepSamplerCallback",
    "TrainedRankPruningCallback",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'effdl.callbacks' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])

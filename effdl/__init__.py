"""effdl: the methods of deep-learning papers as parts for the Lightning Trainer you already have.

Names are exported lazily (PEP 562), so that ``effdl list`` does not wait for torch.

Example::

    import effdl
    from effdl.callbacks import PruningCallback

    pruning = effdl.create("gradual-pruning", sparsity=0.9)   # the same as PruningCallback(sparsity=0.9)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "AdjointDPMModule": "effdl.diffusion.adjoint_dpm",
    "AdjointSampler": "effdl.diffusion.adjoint_dpm",
    "AutoencoderModule": "effdl.tasks.autoencoder",
    "ConfigurationError": "effdl.core.errors",
    "DiffusionFeaturesModule": "effdl.diffusion.diffusion_classification",
    "DiffusionModule": "effdl.tasks.diffusion",
    "ELRImageClassifier": "effdl.training.elr",
    "ELRLossMixin": "effdl.training.elr",
    "ELRPlusModule": "effdl.training.elr",
    "ImageClassifier": "effdl.tasks.image",
    "KOALADistillationModule": "effdl.diffusion.koala",
    "LanguageModel": "effdl.tasks.language",
    "MEALV2ImageClassifier": "effdl.compression.meal_v2",
    "MEALV2Mixin": "effdl.compression.meal_v2",
    "PolyNorm": "effdl.architectures.polycom",
    "PolyReLU": "effdl.architectures.polycom",
    "PowerNorm": "effdl.architectures.powernorm",
    "ProDiffModule": "effdl.diffusion.prodiff",
    "ProgressiveDistillMixin": "effdl.diffusion.progressive_distill",
    "RectifiedFlowModule": "effdl.diffusion.rectified_flow_transformer",
    "ReflowModule": "effdl.diffusion.instaflow",
    "ScoreSDEMixin": "effdl.diffusion.score_sde",
    "ScoreSDEModule": "effdl.diffusion.score_sde",
    "SmoothDiffusionMixin": "effdl.diffusion.smooth_diffusion",
    "SmoothDiffusionModule": "effdl.diffusion.smooth_diffusion",
    "SparseGraphRNN": "effdl.compression.rnn_sparsity",
    "SparseGraphRNNModule": "effdl.compression.rnn_sparsity_models",
    "TextToImageModule": "effdl.tasks.text_to_image",
    "compare": "effdl.comparison",
    "create": "effdl.catalog",
}

if TYPE_CHECKING:
    from effdl.architectures.polycom import PolyNorm, PolyReLU
    from effdl.architectures.powernorm import PowerNorm
    from effdl.catalog import create
    from effdl.comparison import compare
    from effdl.compression.meal_v2 import MEALV2ImageClassifier, MEALV2Mixin
    from effdl.compression.rnn_sparsity import SparseGraphRNN
    from effdl.compression.rnn_sparsity_models import SparseGraphRNNModule
    from effdl.core.errors import ConfigurationError
    from effdl.diffusion.adjoint_dpm import AdjointDPMModule, AdjointSampler
    from effdl.diffusion.diffusion_classification import DiffusionFeaturesModule
    from effdl.diffusion.instaflow import ReflowModule
    from effdl.diffusion.koala import KOALADistillationModule
    from effdl.diffusion.prodiff import ProDiffModule
    from effdl.diffusion.progressive_distill import ProgressiveDistillMixin
    from effdl.diffusion.rectified_flow_transformer import RectifiedFlowModule
    from effdl.diffusion.score_sde import ScoreSDEMixin, ScoreSDEModule
    from effdl.diffusion.smooth_diffusion import SmoothDiffusionMixin, SmoothDiffusionModule
    from effdl.tasks.autoencoder import AutoencoderModule
    from effdl.tasks.diffusion import DiffusionModule
    from effdl.tasks.image import ImageClassifier
    from effdl.tasks.language import LanguageModel
    from effdl.tasks.text_to_image import TextToImageModule
    from effdl.training.elr import ELRImageClassifier, ELRLossMixin, ELRPlusModule

__all__ = [
    "AdjointDPMModule",
    "AdjointSampler",
    "AutoencoderModule",
    "ConfigurationError",
    "DiffusionFeaturesModule",
    "DiffusionModule",
    "ELRImageClassifier",
    "ELRLossMixin",
    "ELRPlusModule",
    "ImageClassifier",
    "KOALADistillationModule",
    "LanguageModel",
    "MEALV2ImageClassifier",
    "MEALV2Mixin",
    "PolyNorm",
    "PolyReLU",
    "PowerNorm",
    "ProDiffModule",
    "ProgressiveDistillMixin",
    "RectifiedFlowModule",
    "ReflowModule",
    "ScoreSDEMixin",
    "ScoreSDEModule",
    "SmoothDiffusionMixin",
    "SmoothDiffusionModule",
    "SparseGraphRNN",
    "SparseGraphRNNModule",
    "TextToImageModule",
    "compare",
    "create",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'effdl' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])

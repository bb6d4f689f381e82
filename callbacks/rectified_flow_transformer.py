"""rectified-flow-transformer on a Trainer: normalised queries and keys for a module that one has already."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from effdl.callbacks._base import MethodCallback
from effdl.core.contract import ContractExample
from effdl.core.errors import ConfigurationError
from effdl.core.select import Targets, check_targets
from effdl.core.surgery import SurgeryReport, refuse_after_weight_averaging, when_built
from effdl.diffusion.rectified_flow_transformer import PAPER, add_qk_norm


class QKNormCallback(MethodCallback):
    """RMS-normalises queries and keys, so that attention logits cannot grow and bf16 training does not diverge.

    Puts a norm with a gain per channel of a head, started at 1, into every attention layer of diffusers' or timm's kind
    (:func:`effdl.diffusion.rectified_flow_transformer.add_qk_norm`), before the optimizer is made, and leaves it there.
    A checkpoint loads into the module that ``add_qk_norm`` made of the bare one; an SD3 transformer saves and loads as
    a stock one (``qk_norm: rms_norm``). A trained network changes its function and needs a short fine-tuning: the paper
    does it when going from 256^2 to high resolution in bf16. Cost: two norms per attention layer and stream.

    Args:
        targets, exclude: attention layers by name glob or type; default all of them. One that has norms is left alone.

    Raises:
        ConfigurationError: nothing matched; an attention processor that would not call the norms; listed after a
            ``WeightAveraging``.

    Logs ``rectified-flow-transformer/logit_bound`` after each epoch: the largest attention logit that any input can
    cause, ``sqrt(d) max|g_q| max|g_k|``.

    Example::

        from effdl.callbacks import QKNormCallback

        Trainer(precision="bf16-mixed", callbacks=[QKNormCallback()]).fit(module, data)
    """

    paper = PAPER

    def __init__(self, targets: Targets = None, exclude: Targets = None) -> None:
        check_targets("targets", targets)
        check_targets("exclude", exclude)
        self.targets, self.exclude = targets, exclude
        self.surgery: SurgeryReport | None = None

    def attach(self, trainer: Any, pl_module: Any, stage: str) -> None:
        refuse_after_weight_averaging(trainer, self)
        self.keep(when_built(pl_module, lambda: self._insert(pl_module)))

    def _insert(self, pl_module: Any) -> None:
        done = add_qk_norm(pl_module, self.targets, self.exclude)
        if done.replaced or self.surgery is None:  # setup runs for fit, and again for test
            self.surgery = done

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log(f"{self.slug}/logit_bound", logit_bound(pl_module))

    def matched(self, module: Any) -> list[str]:
        """Names of the attention layers that got norms."""
        return list(self.surgery.replaced) if self.surgery else []

    def report(self) -> dict[str, Any]:
        """Parameters before and after.

        Raises:
            ConfigurationError: before any setup.
        """
        if self.surgery is None:
            raise ConfigurationError("report() needs a fit: nothing was normalised yet.")
        return {
            "parameter_delta": self.surgery.delta,
            "before": {"name": "stock", "parameters": self.surgery.parameters_before},
            "after": {"name": "QK-norm"},
        }

    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite."""
        return ContractExample(
            kwargs={},
            bad={"targets": ["no.such.layer", 3], "exclude": "no.such.layer"},
            module=_tiny_vit_classifier,
            rebuild=_rebuilt,
        )


def logit_bound(module: nn.Module) -> Tensor:
    """``sqrt(d) max|g_q| max|g_k|`` over the attention layers of a module, a scalar; streams of one layer mix."""
    bounds = []
    for layer in module.modules():
        norms = [[getattr(layer, name, None) for name in names] for names in
                 (("norm_q", "norm_added_q", "q_norm"), ("norm_k", "norm_added_k", "k_norm"))]  # fmt: skip
        gains = [[n.weight.detach() for n in some if getattr(n, "weight", None) is not None] for some in norms]
        if all(gains):
            largest = [torch.stack([gain.abs().max() for gain in some]).max() for some in gains]
            bounds.append(math.sqrt(len(gains[0][0])) * largest[0] * largest[1])
    return torch.stack(bounds).max()


def _rebuilt(module: nn.Module) -> nn.Module:
    add_qk_norm(module)
    return module


def _tiny_vit_classifier() -> Any:
    from timm.models import VisionTransformer

    from effdl.tasks.image import ImageClassifier

    return ImageClassifier(
        VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=10)
    )

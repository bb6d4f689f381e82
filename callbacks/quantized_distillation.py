"""quantized-distillation on a Trainer: a student that trains through its quantised weights, under a teacher."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from effdl.callbacks._quantized_training import QuantizedTrainingCallback
from effdl.compression.quantized_distillation import (
    GRADIENTS,
    BucketSize,
    Gradient,
    check_bits,
    fake_quantize,
    uniform,
)
from effdl.core.contract import ContractExample
from effdl.core.distill import Reduction, Teacher
from effdl.core.errors import check, check_choice
from effdl.core.paper import Paper
from effdl.core.quantizers import QuantizedWeight
from effdl.core.random import preserved_rng
from effdl.core.reweight import reweight_everywhere
from effdl.core.select import Targets, Weight, as_list, matches
from effdl.core.steps import Handle, after_optimizer_step

PAPER = Paper(
    slug="quantized-distillation",
    title="Model compression via distillation and quantization",
    authors=("Polino, Antonio", "Pascanu, Razvan", "Alistarh, Dan"),
    year=2018,
    arxiv="1802.05668",
    venue="ICLR 2018",
)


class QuantizedDistillationCallback(QuantizedTrainingCallback):
    """Trains a student whose forward always uses quantised weights, under a teacher's soft labels (Polino et al. 2018).

    The parameters stay the full-precision masters that the optimizer moves; each forward, in training and validation,
    sees Q(w), and the gradient at Q(w) goes to w (algorithm 1 of the paper). Loss: w_t T^2 KL(teacher || student) +
    (1 - w_t) (the loss of the module's own step). At the end the network holds packed codes and no float weight:
    ``core.export.save_model`` writes them, ``core.deploy.deploy`` runs them. Activations are not quantised.

    Works with any optimizer, accumulation, DDP, bf16 and fp16 autocast, ``WeightAveraging``, and ``torch.compile``
    applied after attaching. Cost: a few elementwise passes over the weights per forward, and the teacher's forward. At
    2 bits train long, in small buckets; large ones fail there. A wider student makes up for few bits.

    ============================ ==============================================================================
    layout                       runs on (``core.deploy``)
    ============================ ==============================================================================
    bucket 32/64/128/256 that    ``"torch-int4"`` at 4 bits (linear layers)
    divides the inputs
    ``"row"``, ``symmetric``     ``"torch-int8"``, ``"torchao"`` (up to 8 bits)
    any other                    ``"lut"`` (small, not faster) or ``"dense"`` (float speed and size)
    ============================ ==============================================================================

    Args:
        bits: b of the weights, 1 to 8 (2 to 8 if symmetric).
        teacher: a network, its timm name, a folder or file (``core.distill.resolve_teacher``).
        temperature: T > 0; 2 in the official code.
        teacher_weight: w_t in [0, 1]; with 0 no teacher is needed (quantisation-aware training).
        reduction: of the KL: ``"batchmean"`` (Hinton), ``"element_mean"`` (the official code, C times weaker).
        bucket_size: consecutive weights that share alpha and beta, >= 2; ``None``: a tensor; ``"row"``: an output.
        gradient: ``"ste"``; ``"truncated"``: masters stay in [-1, 1]; ``"exact_scale"``: through alpha and beta too.
        symmetric: levels around zero, without beta; zeros stay zeros.
        quantize_first_last: the first and last selected layer too.
        quantize_bias: biases and the weights of normalisations too, as the official code does.
        network: name of the submodule whose output are the logits, where they are not the module's own.
        targets, exclude: layers by name glob or type; default every Linear, convolution, Embedding, attention and
            recurrent layer, HF ``Conv1D``.

    Raises:
        ConfigurationError: an argument outside its range; a teacher of other classes; nothing matched; NaN, infinite or
            half-precision weights; a callback that holds weights at zero, unless ``symmetric``.

    Logs ``quantized-distillation/loss`` and ``quantized-distillation/task_loss`` per step.

    Example::

        from effdl.callbacks import QuantizedDistillationCallback

        callback = QuantizedDistillationCallback(bits=4, teacher="resnet50")
        Trainer(callbacks=[callback]).fit(student, data)
        print(callback.report()["bits_per_weight"])
    """

    paper = PAPER

    def __init__(
        self,
        bits: int = 4,
        teacher: Teacher | None = None,
        temperature: float = 2.0,
        teacher_weight: float = 0.7,
        reduction: Reduction = "batchmean",
        bucket_size: BucketSize = 256,
        gradient: Gradient = "ste",
        symmetric: bool = False,
        quantize_first_last: bool = True,
        quantize_bias: bool = False,
        network: str | None = None,
        targets: Targets = None,
        exclude: Targets = None,
    ) -> None:
        check(isinstance(symmetric, bool), "symmetric", symmetric, "True or False")
        check_bits(bits, symmetric)
        check_choice("gradient", gradient, GRADIENTS)
        check(isinstance(quantize_bias, bool), "quantize_bias", quantize_bias, "True or False")
        self.bits, self.gradient, self.symmetric, self.quantize_bias = bits, gradient, symmetric, quantize_bias
        self.check_shared(
            bucket_size, teacher, temperature, teacher_weight, reduction, network, quantize_first_last, targets, exclude
        )

    def _attach_weight(self, pl_module: Any, weight: Weight) -> list[Handle]:
        # a partial of a function: a deep copy of the module must not copy the callback
        see = partial(
            fake_quantize, bits=self.bits, layout=self._layout, gradient=self.gradient, symmetric=self.symmetric
        )
        return reweight_everywhere(pl_module, weight.parameter, see)

    def _seen(self, name: str, raw: Tensor, points: Tensor | None) -> Tensor:
        return fake_quantize(raw, self.bits, self._layout, self.gradient, self.symmetric)

    def _record(self, name: str, raw: Tensor, points: Tensor | None) -> QuantizedWeight:
        clamped = raw.clamp(-1, 1) if self.gradient == "truncated" else raw
        return uniform(clamped, self.bits, self._layout, self.symmetric)

    def _keeps_zeros(self) -> bool:
        return self.symmetric

    def _chosen(self, pl_module: Any) -> list[Weight]:
        chosen = super()._chosen(pl_module)
        return [*chosen, *_vectors(pl_module, self.exclude)] if self.quantize_bias else chosen

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self.gradient == "truncated":
            # else a master outside would never have a gradient again
            self.keep(after_optimizer_step(trainer, lambda _: self._clamp(), type(self).__name__))

    @torch.no_grad()
    def _clamp(self) -> None:
        torch._foreach_clamp_min_([w.data for w in self.weights.values()], -1.0)
        torch._foreach_clamp_max_([w.data for w in self.weights.values()], 1.0)

    def _warn(self, records: dict[str, QuantizedWeight]) -> None:
        lost = {n for n, w in self.weights.items() if w.data.dim() > 1 and not self.symmetric and _is_sparse(w.data)}
        if lost:
            rank_zero_warn(f"{', '.join(sorted(lost)[:3])}: zeros do not stay zero unless symmetric=True.")

    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite."""
        with preserved_rng():
            torch.manual_seed(5)
            teacher = nn.Sequential(
                nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)
            )
        return ContractExample(
            kwargs={"teacher": teacher, "bucket_size": 32},
            bad={
                "bits": [0, 9, 2.5, True],
                "teacher": [None, 3, "no_such_network"],
                "temperature": [0, -1.0, float("nan")],
                "teacher_weight": [-0.1, 1.5],
                "reduction": "mean",
                "bucket_size": [1, 0, "column", 2.5],
                "gradient": "straight",
                "symmetric": "yes",
                "quantize_first_last": None,
                "quantize_bias": 1,
                "network": ["no.such.layer", 3],
                "targets": ["no.such.layer", 3],
                "exclude": "no.such.layer",
            },
            zeros_stay=False,
            second={"teacher": None, "teacher_weight": 0.0, "bits": 2},
        )


def _vectors(pl_module: nn.Module, exclude: Targets) -> list[Weight]:
    """Biases, and the weights of normalisations."""
    found: dict[int, Weight] = {}
    for name, module in pl_module.named_modules():
        if not any(matches(name, module, target) for target in as_list(exclude)):
            for attribute, p in module._parameters.items():
                if p is not None and p.dim() < 2 and p.is_floating_point() and p.numel() > 1:
                    found.setdefault(id(p), Weight(f"{name}.{attribute}" if name else attribute, module, attribute))
    return list(found.values())


def _is_sparse(weight: Tensor) -> bool:
    return int((weight == 0).sum()) > 0.1 * weight.numel()

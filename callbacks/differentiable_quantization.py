"""quantized-distillation on a Trainer, its second half: the quantisation points of a trained network are learned."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from effdl.callbacks._quantized_report import plain_copy
from effdl.callbacks._quantized_training import QuantizedTrainingCallback, points_key
from effdl.callbacks.quantized_distillation import PAPER
from effdl.compression.quantized_distillation import (
    BucketSize,
    assign_points,
    check_bits,
    initial_points,
    points_record,
    quantize_to_points,
)
from effdl.core.calibrate import calibration_batches
from effdl.core.capture import undisturbed
from effdl.core.checkpoint import State
from effdl.core.contract import ContractExample
from effdl.core.distill import Reduction, Teacher
from effdl.core.distributed import all_reduce_mean
from effdl.core.errors import check, check_choice, check_integer
from effdl.core.export import product
from effdl.core.quantizers import QuantizedWeight
from effdl.core.random import preserved_rng
from effdl.core.replay import unrecorded
from effdl.core.reweight import reweight_everywhere
from effdl.core.select import Targets, Weight
from effdl.core.steps import Handle, after_optimizer_step
from effdl.core.surgery import refuse_after_weight_averaging

CROSSED = 0.25  # share of points in one step, above which training is about to collapse


class DifferentiableQuantizationCallback(QuantizedTrainingCallback):
    """Learns the quantisation points of a trained network whose weights stay as they are (Polino et al. 2018, sec. 4).

    Each selected weight gets s = 2^b sorted points in the scaled space [0, 1]; every entry sits at the nearest one, and
    the points train by gradient descent. Everything else is frozen, so that any ``configure_optimizers`` trains points
    alone; BatchNorm statistics are collected anew in train mode. At the end the network holds packed codes and
    codebooks (``core.quantized``), which run on the ``"lut"`` and ``"dense"`` backends.

    Start from a trained network, with a small rate, for the gradient of a point is a sum over its weights: at 2 bits
    Adam 3e-3, with more points 1e-3, or SGD 1e-4 with momentum 0.9; Adam 1e-2 and SGD 1e-3 collapse. A warning tells
    when points jump over their neighbours, which a collapse at 2 bits need not do. No weight decay: it would pull
    points to 0. A few epochs are enough. Where there is BatchNorm, much of the gain comes from its statistics: compare
    with ``core.calibrate.recalibrate_batchnorm`` alone. List it before a ``WeightAveraging``. Checkpoints keep frozen
    weights and points beside Q(v), which any module loads.

    Args:
        bits: b, 1 to 8.
        bucket_size: consecutive weights that share alpha and beta, >= 2; ``None``: a tensor; ``"row"``: an output.
        init: ``"quantile"`` of the weights, so that all points are used, or ``"uniform"`` steps.
        assign: ``"gradient"``: of the same number of points in all, tensors with larger gradients get more, and each at
            least half of 2^b; ``None``: the same for each.
        calibration_batches: of the training data, for ``assign``.
        teacher: a network, its timm name, a folder or file (``core.distill.resolve_teacher``).
        temperature: T > 0 of the teacher's loss.
        teacher_weight: its weight in [0, 1].
        reduction: of the KL: ``"batchmean"``, ``"element_mean"``.
        quantize_first_last: the first and last selected layer too.
        network: name of the submodule whose output are the logits, where they are not the module's own.
        targets, exclude: layers by name glob or type; default every Linear, convolution, Embedding, attention and
            recurrent layer, HF ``Conv1D``.

    Raises:
        ConfigurationError: an argument outside its range; nothing matched; NaN, infinite or half-precision weights; a
            callback that holds weights at zero; listed after a ``WeightAveraging``.

    Logs ``quantized-distillation/crossed``, per epoch the largest share of points that passed a neighbour in one step.

    Example::

        from effdl.callbacks import DifferentiableQuantizationCallback

        callback = DifferentiableQuantizationCallback(bits=2, bucket_size=None)
        Trainer(max_epochs=12, callbacks=[callback]).fit(trained, data)
        print(callback.report()["bits_per_weight"])
    """

    paper = PAPER

    def __init__(
        self,
        bits: int = 4,
        bucket_size: BucketSize = 256,
        init: Literal["quantile", "uniform"] = "quantile",
        assign: Literal["gradient"] | None = None,
        calibration_batches: int = 5,
        teacher: Teacher | None = None,
        temperature: float = 2.0,
        teacher_weight: float = 0.0,
        reduction: Reduction = "batchmean",
        quantize_first_last: bool = True,
        network: str | None = None,
        targets: Targets = None,
        exclude: Targets = None,
    ) -> None:
        check_bits(bits)
        check_choice("init", init, ("quantile", "uniform"))
        check_choice("assign", assign, ("gradient", None))
        check(assign is None or bits >= 2, "assign", assign, "None with 1 bit", "A tensor needs two points.")
        check_integer("calibration_batches", calibration_batches, 1)
        self.bits, self.init, self.assign, self.calibration_batches = bits, init, assign, calibration_batches
        self.check_shared(
            bucket_size, teacher, temperature, teacher_weight, reduction, network, quantize_first_last, targets, exclude
        )

    # ---- attaching -------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        super()._begin()
        self._points: dict[str, nn.Parameter] = {}
        self._crossed: Tensor | None = None
        self._shares: dict[str, int] = {}

    def attach(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            refuse_after_weight_averaging(trainer, self)
        super().attach(trainer, pl_module, stage)

    def _before_attaching(self, trainer: Any, pl_module: Any, chosen: list[Weight]) -> None:
        self._shares = dict.fromkeys([weight.name for weight in chosen], 2**self.bits)
        if self.assign is not None:
            norms = self._gradient_norms(trainer, pl_module, chosen)
            self._shares = dict(zip(self._shares, assign_points(norms, 2**self.bits)))
        self._original = plain_copy(product(pl_module))
        self._changes.append(_frozen(pl_module))
        self._changes.append(_collecting_statistics(pl_module))

    def _attach_weight(self, pl_module: Any, weight: Weight) -> list[Handle]:
        module, key, layout = weight.module, points_key(weight.attribute), self._layout
        start = initial_points(weight.data, self._shares[weight.name], layout, self.init)
        points = nn.Parameter(start)
        points._effdl_points = True  # type: ignore[attr-defined]
        module.register_parameter(key, points)
        self._points[weight.name] = points
        # looked up anew: functional_call and a checkpoint's load put others there
        see = lambda raw: quantize_to_points(raw, module._parameters[key], layout)  # noqa: E731
        remove = Handle(lambda: module._parameters.pop(key))
        return [remove, *reweight_everywhere(pl_module, weight.parameter, see)]

    def _seen(self, name: str, raw: Tensor, points: Tensor | None) -> Tensor:
        return quantize_to_points(raw, points, self._layout)

    def _record(self, name: str, raw: Tensor, points: Tensor | None) -> QuantizedWeight:
        return points_record(raw, points, self._layout)

    def _unfold(self, state: State, kept: dict[str, Any]) -> None:
        super()._unfold(state, kept)
        for name, points in kept["points"].items():
            if name in self._points:  # another assignment of points: no optimizer holds these yet
                self._points[name].data = torch.empty_like(points, device=self._points[name].device)

    def _gradient_norms(self, trainer: Any, pl_module: Any, chosen: list[Weight]) -> list[float]:
        """||mean gradient||_2 of each weight over a few training batches, the same on every rank."""
        trainer.fit_loop.setup_data()  # idempotent; the loaders are not there yet
        batches = calibration_batches(trainer, pl_module, self.calibration_batches)
        parameters = [weight.parameter for weight in chosen]
        with undisturbed(pl_module), unrecorded(pl_module), preserved_rng():
            for parameter in parameters:
                parameter.requires_grad_()
            for index, batch in enumerate(batches):
                output = pl_module.training_step(batch, index)
                (output["loss"] if isinstance(output, dict) else output).backward()
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            norms = torch.stack([grad.float().norm() / len(batches) for grad in grads])
        norms = norms.detach().to(trainer.strategy.root_device)
        all_reduce_mean(norms)
        return norms.tolist()

    # ---- one step --------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        before = {name: points.detach().clone() for name, points in self._points.items()}
        self.keep(after_optimizer_step(trainer, lambda _: self._sort(before), type(self).__name__))

    @torch.no_grad()
    def _sort(self, before: dict[str, Tensor]) -> None:
        """Points stay in order; how many passed a neighbour is watched without waiting for the device."""
        passed, count = [], 0
        for name, points in self._points.items():
            old = before[name] if before[name].device == points.device else before[name].to(points.device)
            up, down = points[:-1] > old[1:], points[1:] < old[:-1]
            passed.append((F.pad(up, (0, 1)) | F.pad(down, (1, 0))).sum())
            count += points.numel()
            points.copy_(points.sort().values)
            before[name] = points.detach().clone()
        share = torch.stack(passed).sum() / count
        self._crossed = share if self._crossed is None else torch.maximum(self._crossed, share)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self._crossed is None:
            return
        pl_module.log(f"{self.slug}/crossed", self._crossed)
        if float(self._crossed) > CROSSED:
            rank_zero_warn(
                f"In one step {float(self._crossed):.0%} of the quantisation points passed a neighbour's old position: "
                "lower the learning rate (at 2 bits Adam 3e-3, or SGD 1e-4 with momentum 0.9), or training collapses."
            )
        self._crossed = None

    # ---- the end ---------------------------------------------------------------------------------------------

    def _warn(self, records: dict[str, QuantizedWeight]) -> None:
        empty = [n for n, r in records.items() if r.codes.unique().numel() < self._points[n].numel()]
        if empty:
            rank_zero_warn(f"Some quantisation points have no weight at them: {', '.join(empty[:3])}.")

    def _compared(self, pl_module: Any) -> tuple[nn.Module, str]:
        return self._original, "full precision"

    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite."""
        with preserved_rng():
            torch.manual_seed(5)
            teacher = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 3))
        return ContractExample(
            kwargs={"bits": 3, "bucket_size": 64, "teacher": teacher, "teacher_weight": 0.5},
            bad={
                "bits": [0, 9, 2.5, True],
                "bucket_size": [1, 0, "column", 2.5],
                "init": "random",
                "assign": "hessian",
                "calibration_batches": [0, 1.5],
                "teacher": [None, 3, "no_such_network"],
                "temperature": [0, -1.0, float("nan")],
                "teacher_weight": [-0.1, 1.5],
                "reduction": "mean",
                "quantize_first_last": None,
                "network": ["no.such.layer", 3],
                "targets": ["no.such.layer", 3],
                "exclude": "no.such.layer",
            },
            zeros_stay=False,
        )


def _frozen(pl_module: nn.Module) -> Handle:
    """Nothing trains but points, until the handle is removed."""
    flags = [(p, p.requires_grad) for p in pl_module.parameters() if not hasattr(p, "_effdl_points")]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    return Handle(lambda: [parameter.requires_grad_(flag) for parameter, flag in flags] and None)


def _collecting_statistics(pl_module: nn.Module) -> Handle:
    """BatchNorm in train mode, as those of a pretrained network often are not; a validation puts back what it found."""
    norms = [m for m in pl_module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    flags = [(norm, norm.training) for norm in norms]
    for norm in norms:
        norm.train()
    return Handle(lambda: [norm.train(flag) for norm, flag in flags] and None)

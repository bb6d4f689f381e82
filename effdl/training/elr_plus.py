"""elr: ELR+, two networks that teach each other with weight-averaged teachers and mixup (arXiv 2007.00151, sec. 5)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from effdl.core.batch import logits_of, unpack
from effdl.core.contract import ContractExample
from effdl.core.distributed import rank
from effdl.core.errors import check, check_choice, check_integer
from effdl.core.networks import build_model
from effdl.core.paper import Paper
from effdl.tasks._optimizers import optimizer_and_scheduler
from effdl.tasks.image import ImageClassifier
from effdl.training._elr_loss import (
    at_least_float32,
    check_elr_arguments,
    check_elr_plus_arguments,
    elr_plus_loss,
    ema_decay,
    mix_pairs,
    mixed_targets,
    mixup_weight,
    sigmoid_rampup,
)
from effdl.training._elr_table import LabelReport, TargetTable, label_report
from effdl.training.elr import PAPER, example_batches, require_index, training_examples

__all__ = [
    "ELRPlusModule",
    "LogitAverage",
    "elr_plus_loss",
    "ema_decay",
    "mix_pairs",
    "mixed_targets",
    "mixup_weight",
    "sigmoid_rampup",
]


class LogitAverage(nn.Module):
    """The mean of two networks' logits, [B, C]: what ELR+ predicts with."""

    def __init__(self, a: nn.Module, b: nn.Module) -> None:
        super().__init__()
        self.a, self.b = a, b

    def forward(self, inputs: Tensor) -> Tensor:
        return 0.5 * (logits_of(self.a(inputs)) + logits_of(self.b(inputs)))


class ELRPlusModule(ImageClassifier):
    """ELR+: two classifiers that teach each other through weight averages and mixup (Liu et al. 2020, section 5).

    Each batch trains both students with their own mix: student A sees l x + (1 - l) x[perm], its table T_A learns from
    the teacher B' (the weight average of B) on the unmixed images, and the other way round. It predicts with the mean
    of the two networks' logits. Where :class:`ELRLossMixin` costs nothing, this costs two trainings and two teacher
    forwards; on CIFAR-10 with 50 % wrong labels the paper gains 3 points by it. Optimises by hand: no clipping and no
    accumulation by the Trainer. Batches as for :class:`ELRLossMixin`. Every rank draws its own mix.

    Args:
        model: a timm name, from which both students are made with different weights, or the first student.
        second: the second student where ``model`` is a network: the same architecture, other initial weights.
        num_classes: C.
        num_examples, beta, lam, clamp, targets_device, targets_dtype: as of :class:`ELRLossMixin`.
        mixup_alpha: a of l ~ Beta(a, a), >= 0; 0 turns mixup off.
        ema_alpha: final decay of the teachers, in [0, 1); 0.9999 with ``ema_step=None`` for Clothing1M.
        ema_step: steps over which the decay rises, ``None`` for min(1 - 1/(t + 1), ema_alpha).
        coef_step: steps over which the regulariser rises, 0 for none; 40000 for CIFAR-100.
        refine_labels: re-weight the mixed labels by the targets; the paper does so for 100 classes.
        teacher_bn: ``"batch"``: teachers normalise by the batch, as in the paper's code; ``"copy"``: by the running
            statistics of their students.
        predict_with: ``"students"`` or ``"ema"``, whose logits are averaged in validation, test and the product.
        seed: of the mixing, a function of (seed, step, student, rank).
        pretrained, model_kwargs: of timm, for both students.
        optimizer, scheduler: one of each per student.

    Logs ``elr/loss_a``, ``elr/loss_b`` and ``elr/suspects``, the share of the batch whose label T_A disagrees with.

    Raises:
        ConfigurationError: a value out of range, ``second`` missing beside a network, data of unknown size.
        TypeError: a batch without index. IndexError: an index outside the table.

    Example::

        data = ImageData("cifar10.npz", noise="symmetric", noise_rate=0.5)
        module = ELRPlusModule("resnet18", num_classes=10, optimizer=partial(SGD, lr=0.02, momentum=0.9))
        Trainer(max_epochs=200).fit(module, data)
    """

    paper: ClassVar[Paper] = PAPER

    def __init__(
        self,
        model: str | nn.Module = "resnet18",
        second: nn.Module | None = None,
        num_classes: int = 10,
        num_examples: int | None = None,
        beta: float = 0.7,
        lam: float = 3.0,
        clamp: float = 1e-4,
        mixup_alpha: float = 1.0,
        ema_alpha: float = 0.997,
        ema_step: int | None = 40_000,
        coef_step: int = 0,
        refine_labels: bool = False,
        teacher_bn: Literal["batch", "copy"] = "batch",
        predict_with: Literal["students", "ema"] = "students",
        targets_device: str | None = None,
        targets_dtype: Literal["float32", "float16"] = "float32",
        seed: int = 0,
        pretrained: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        check_elr_arguments(beta, lam, clamp)
        check_elr_plus_arguments(mixup_alpha, ema_alpha, ema_step, coef_step)
        _check_choices(teacher_bn, predict_with, refine_labels, seed, num_classes)
        tables = [TargetTable(num_examples, beta, targets_device, targets_dtype) for _ in range(2)]
        pair = LogitAverage(*_two_students(model, second, num_classes, pretrained, model_kwargs or {}))
        super().__init__(pair, num_classes, optimizer=optimizer, scheduler=scheduler)
        del self.model  # the base class's name for what predicts: see the property
        self.automatic_optimization = False
        self.students = pair
        self.teachers = copy.deepcopy(pair).requires_grad_(False)
        self.tables, self.steps = tables, 0
        self.lam, self.clamp, self.mixup_alpha, self.refine_labels = lam, clamp, mixup_alpha, refine_labels
        self.ema_alpha, self.ema_step, self.coef_step = ema_alpha, ema_step, coef_step
        self.teacher_bn, self.predict_with, self.seed = teacher_bn, predict_with, seed
        self.train()

    @property
    def model(self) -> nn.Module:
        """What predicts, and what a user takes home: the mean of the students' or of the teachers' logits."""
        return self.teachers if self.predict_with == "ema" else self.students

    def train(self, mode: bool = True) -> ELRPlusModule:
        super().train(mode)
        if self.teacher_bn == "copy":
            self.teachers.eval()
        return self

    def on_train_start(self) -> None:
        for table in self.tables:
            table.fit_to(training_examples(self.trainer))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        inputs, labels, index = unpack(batch)
        require_index(index)
        self.steps += 1
        losses = [self._student_loss(which, inputs, labels, index) for which in (0, 1)]
        optimizers = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        # One backward for both graphs (they share nothing): DDP allows one per step. Under 16-mixed the scale may
        # change between the two optimizer steps; the rare step of B that meets this is off by the factor two.
        self.manual_backward(losses[0] + losses[1])
        for optimizer in optimizers:
            optimizer.step()
        self._average_teachers()
        self._step_schedulers("step")
        suspects = (self.tables[0].read(index).argmax(dim=1) != labels).float().mean()
        self.log_dict({"elr/loss_a": losses[0].detach(), "elr/loss_b": losses[1].detach()}, prog_bar=True)
        self.log("elr/suspects", suspects, on_step=False, on_epoch=True, batch_size=len(index))

    def _student_loss(self, which: int, inputs: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        """The loss of student A (0) or B (1), whose table learns from the other's teacher."""
        student = (self.students.a, self.students.b)[which]
        teacher = (self.teachers.b, self.teachers.a)[which]
        rng = np.random.default_rng([self.seed, self.steps, which, rank()])
        weight = mixup_weight(self.mixup_alpha, rng)
        permutation = torch.from_numpy(rng.permutation(len(inputs))).to(inputs.device)
        logits = logits_of(student(mix_pairs(inputs, permutation, weight)))
        with torch.no_grad():
            probabilities = at_least_float32(logits_of(teacher(inputs))).softmax(dim=1)
        table = self.tables[which]
        table.learn(index, probabilities, labels)
        q = mix_pairs(table.read(index), permutation, weight)
        ramp = sigmoid_rampup(self.steps, self.coef_step)
        return elr_plus_loss(
            logits, labels, q, permutation, weight,
            lam=self.lam, ramp=ramp, clamp=self.clamp, refine_labels=self.refine_labels,
        )  # fmt: skip

    @torch.no_grad()
    def _average_teachers(self) -> None:
        """theta' <- gamma theta' + (1 - gamma) theta: parameters only, as in the paper's code."""
        gamma = ema_decay(self.steps, self.ema_alpha, self.ema_step)
        average = get_ema_multi_avg_fn(gamma)
        average(list(self.teachers.parameters()), list(self.students.parameters()), None)
        if self.teacher_bn == "copy":
            for ours, theirs in zip(self.teachers.buffers(), self.students.buffers()):
                ours.copy_(theirs)

    def configure_optimizers(self) -> Any:
        made = [optimizer_and_scheduler(s, self.optimizer, self.scheduler) for s in (self.students.a, self.students.b)]
        if self.scheduler is None:
            return made
        # Under manual optimisation Lightning ignores the interval: it is ours to honour.
        self._interval = made[0]["lr_scheduler"]["interval"]
        return [{**one, "lr_scheduler": one["lr_scheduler"]["scheduler"]} for one in made]

    def _step_schedulers(self, interval: str) -> None:
        if self.scheduler is None or interval != self._interval:
            return
        for schedule in self.lr_schedulers():
            monitor = getattr(schedule, "monitor", None)
            schedule.step(*([] if monitor is None else [self.trainer.callback_metrics[monitor]]))

    def on_train_epoch_end(self) -> None:
        self._step_schedulers("epoch")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = {"steps": self.steps, "tables": [table.state() for table in self.tables]}
        checkpoint.setdefault("effdl", {})["elr"] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint.get("effdl", {}).get("elr", {"steps": 0, "tables": [{}, {}]})
        self.steps = state["steps"]
        for table, saved in zip(self.tables, state["tables"]):
            table.load_state(saved)

    def label_report(self, path: str | Path | None = None, labels: Tensor | None = None) -> LabelReport:
        """What the mean of the two tables says about every training label; as of :class:`ELRLossMixin`."""
        a, b = self.tables
        a.report()  # raises before a fit
        report = label_report((a.targets + b.targets) / 2, a.labels if labels is None else labels)
        if path is not None and rank() == 0:
            report.to_csv(path)
        return report

    def report(self) -> dict[str, Any]:
        """For the run's report: how many labels were seen, and how many are suspect."""
        return {} if self.tables[0].targets is None else self.label_report().summary()

    def figures(self, folder: Path) -> None:
        """Writes ``labels.csv``, the label report."""
        if self.tables[0].targets is not None:
            self.label_report(Path(folder) / "labels.csv")

    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite."""
        free = dict.fromkeys(("pretrained", "model_kwargs", "optimizer", "scheduler"), ContractExample.ANY)
        bad = {
            "model": "resnet_eighteen", "second": "resnet18", "num_classes": 1, "num_examples": [0, 1.5],
            "beta": [1.0, -0.1], "lam": [-1.0, float("nan")], "clamp": [0.0, 0.5], "mixup_alpha": -1.0,
            "ema_alpha": [1.0, -0.1], "ema_step": -1, "coef_step": [-1, 0.5], "refine_labels": "yes",
            "teacher_bn": "layer", "predict_with": "both", "targets_device": "abacus", "targets_dtype": "int8",
            "seed": -1, **free,
        }  # fmt: skip
        return ContractExample(
            kwargs={"model": _example_network(), "second": _example_network(), "num_classes": 3},
            bad=bad,
            module=lambda: cls(_example_network(), _example_network(), num_classes=3, ema_step=4, mixup_alpha=0.5),
            data=example_batches,
            manual=True,
            ddp_equals_single=False,  # every rank draws its own mix
        )


def _check_choices(teacher_bn: str, predict_with: str, refine_labels: bool, seed: int, num_classes: int) -> None:
    check_choice("teacher_bn", teacher_bn, ("batch", "copy"))
    check_choice("predict_with", predict_with, ("students", "ema"))
    check(isinstance(refine_labels, bool), "refine_labels", refine_labels, "true or false")
    check_integer("seed", seed, 0)
    check_integer("num_classes", num_classes, 2)


def _two_students(
    model: str | nn.Module, second: nn.Module | None, num_classes: int, pretrained: bool, kwargs: dict[str, Any]
) -> tuple[nn.Module, nn.Module]:
    """Twice the timm model, or the two networks given."""
    made = isinstance(model, nn.Module)
    fix = "Give a second network of the same architecture with other initial weights."
    check(isinstance(second, nn.Module) if made else second is None, "second", second,
          "a network where model is a network, else None", fix)  # fmt: skip
    check(not made or second is not model, "second", second, "another network than model", fix)
    if made:
        return model, second
    return tuple(build_model(model, num_classes, pretrained, kwargs) for _ in range(2))


def _example_network() -> nn.Module:
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    return nn.Sequential(*layers)

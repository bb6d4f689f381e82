"""meal-v2: fine-tune a trained student on the averaged softmax of frozen teachers, without labels (arXiv 2009.08453).

For a batch x, the same crop for all, with teachers T_k and student S:

    q = 1/K sum_k softmax(T_k(x))        m = 1/K sum_k T_k(x)        z = S(x)
    L = -mean_b sum_c q_bc log softmax(z)_bc + d_weight * BCE(D([z; m]), [1, 0 for z; 0, 1 for m])

q does the work; the discriminator D on the logits adds little. The paper speaks of an adversary; its code adds L_d with
a plus sign for the student as well, which asks the student to be *easier* to tell apart. ``adversarial="reversal"`` is
what the paper describes, ``"cooperative"`` what its code does, ``None`` leaves D out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from effdl.compression._meal_cache import SoftLabelCache, open_cache
from effdl.compression._meal_loss import (
    MEALDiscriminator,
    MEALTerms,
    cutmix_images,
    discriminator_loss,
    meal_loss,
    reverse_gradient,
    soft_label_loss,
)
from effdl.compression._meal_run import (
    MEALRun,
    check_cache,
    check_first,
    cut_and_mixed,
    example_teacher,
    fold_discriminator,
    make_discriminator,
    param_groups,
    prepare_teachers,
    unfold_discriminator,
    warn_of_groups,
    warn_of_outrun,
)
from effdl.compression._meal_teachers import Renormalize, Teachers, as_list, check_meal_arguments, looks_untrained
from effdl.core.batch import unpack
from effdl.core.contract import ContractExample
from effdl.core.distill import ask, network_inputs
from effdl.core.errors import ConfigurationError
from effdl.core.export import product
from effdl.core.paper import Paper
from effdl.core.steps import require_automatic_optimization
from effdl.tasks._optimizers import optimizer_and_scheduler
from effdl.tasks.image import ImageClassifier

__all__ = [
    "MEALDiscriminator",
    "MEALTerms",
    "MEALV2ImageClassifier",
    "MEALV2Mixin",
    "Renormalize",
    "SoftLabelCache",
    "cutmix_images",
    "discriminator_loss",
    "looks_untrained",
    "meal_loss",
    "reverse_gradient",
]

PAPER = Paper(
    slug="meal-v2",
    title="MEAL V2: Boosting Vanilla ResNet-50 to 80%+ Top-1 Accuracy on ImageNet without Tricks",
    authors=("Shen, Zhiqiang", "Savvides, Marios"),
    year=2020,
    arxiv="2009.08453",
    venue="NeurIPS Workshop on Deep Learning and Representation Learning",
)


class MEALV2Mixin:
    """Trains a classifier on what frozen teachers say together, instead of its labels (Shen & Savvides 2020).

    ``class Mine(MEALV2Mixin, ImageClassifier)`` replaces the stock loss; on a class without the stock hook
    ``compute_loss(outputs, batch)`` the whole ``training_step`` is replaced by ``self(inputs)`` and the loss above.
    Validation stays the module's own. The student keeps its architecture, parameters, names and checkpoints; teachers
    are in none of them, and the discriminator lies in ``checkpoint["effdl"]["meal-v2"]``.

    Reach for it to gain 1 to 4 points with an existing checkpoint. **Start from a trained student** (untrained ones end
    points below) and take teachers that **know more than the student's data teaches**: teachers trained on the same
    small data gained nothing over labels. The paper: no label smoothing, mixup or weight decay, SGD 0.01, momentum 0.9
    (0.001 in the second half of 180 epochs), crops, flips. Cost: the teachers' forward passes; ``cache`` spares them.

    Args:
        teachers: one or several networks, timm names, folders of runs or weights (``core.distill.resolve_teacher``).
        teacher_weights: one per teacher, summing to 1; ``None``: all the same.
        adversarial: ``"reversal"`` (D learns to tell student from teachers, the student not to be told), or
            ``"cooperative"`` (the official code: both minimise L_d, ReLU behind D), or ``None`` (no D). Differences
            are small, as long as L_d does not rise far above ln 2 = 0.69 under reversal.
        d_weight: of L_d, >= 0.
        d_lr: learning rate of D, the second group of the stock classifier's optimizer; in your own
            ``configure_optimizers`` use :meth:`meal_param_groups`. ``None``: the student's, which the official code in
            effect uses. Its 1e-4 is meant but overwritten; under reversal so slow a D is outrun (docs/results.md).
        discriminator_k: k of D's widths C, C/k, C/k^2, 2.
        cutmix: alpha of Beta(alpha, alpha) for mixing boxes of the training images (the paper's variant: 1.0), 0: off.
            Teachers see the mixed images; labels are not mixed, so ``train/accuracy`` says little then.
        teacher_transform: what a teacher sees of the images, a callable (``Renormalize``) for all or a list of them.
            ``None``: named teachers whose weights came with other statistics than the data module's ``mean`` and
            ``std`` get images normalised anew.
        input_key: of a dict batch, where it is not one of the usual ones.
        cache: a :class:`SoftLabelCache` of these teachers, or its file: they are loaded to be compared, and never run.
            Needs ``adversarial=None`` and no CutMix.

    Logs ``meal-v2/kl`` (zero where the student says what the teachers say), ``meal-v2/agreement`` (share of equal
    arg-max) and ``meal-v2/discriminator`` (L_d).

    Raises:
        ConfigurationError: an argument out of range; a teacher that cannot be had, is the student, is not in
            ``eval()``, tells other classes apart or returns NaN; a cache that is damaged, of other teachers or of other
            images; labels of a multi-label task; manual optimisation.

    Example::

        teachers = ["senet154.gluon_in1k", "resnet152s.gluon_in1k"]
        module = MEALV2ImageClassifier(teachers=teachers, model="resnet50", num_classes=1000, pretrained=True)
        Trainer(max_epochs=180).fit(module, data)
        torch.save(module.model.state_dict(), "resnet50.pt")     # a plain timm resnet50
    """

    paper: ClassVar[Paper] = PAPER

    def __init__(
        self,
        *args: Any,
        teachers: str | dict[str, Any] | nn.Module | list[str | dict[str, Any] | nn.Module],
        teacher_weights: list[float] | None = None,
        adversarial: Literal["reversal", "cooperative"] | None = "reversal",
        d_weight: float = 1.0,
        d_lr: float | None = None,
        discriminator_k: int = 8,
        cutmix: float = 0.0,
        teacher_transform: Callable[[Tensor], Tensor] | list[Callable[[Tensor], Tensor] | None] | None = None,
        input_key: str | None = None,
        cache: str | SoftLabelCache | None = None,
        **kwargs: Any,
    ) -> None:
        told = d_weight, d_lr, discriminator_k, cutmix, teacher_transform, input_key
        check_meal_arguments(teachers, teacher_weights, adversarial, *told)
        opened = open_cache(cache, adversarial, cutmix)
        super().__init__(*args, **kwargs)
        self.meal_teachers = Teachers(as_list(teachers), self, teacher_transform)
        self.meal_weights, self.meal_adversarial, self.meal_d_weight = teacher_weights, adversarial, d_weight
        self.meal_d_lr, self.meal_cutmix, self.meal_input_key, self.meal_cache = d_lr, cutmix, input_key, opened
        check_cache(opened, self, self.meal_teachers, teacher_weights)
        self.meal_discriminator = make_discriminator(self, self.meal_teachers, discriminator_k, adversarial)
        hook = getattr(super(), "compute_loss", lambda: None)
        self._meal_stock = list(inspect.signature(hook).parameters) == ["outputs", "batch"]
        self._meal_run, self._meal_done = MEALRun(), False  # of one fit; whether this step's loss was ours

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        check_first(cls, MEALV2Mixin)

    # ---- the run -----------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            require_automatic_optimization(self, "MEALV2Mixin")
            self._meal_run = MEALRun()

    def on_fit_start(self) -> None:
        super().on_fit_start()
        prepare_teachers(self.meal_teachers, self.meal_cache, self.device, self.trainer.datamodule)

    def on_train_start(self) -> None:
        super().on_train_start()
        self.meal_teachers.check_frozen()
        warn_of_groups(self.trainer.optimizers, self.meal_discriminator, self.meal_d_lr)
        if self.trainer.is_global_zero:
            self._meal_run.start(product(self), resumed=self.trainer.global_step > 0)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        self.meal_teachers.check_eval()
        return super().on_train_batch_start(batch, batch_idx)

    def training_step(self, batch: Any, *args: Any) -> Any:
        if self.meal_cutmix:
            batch = cut_and_mixed(batch, self.meal_cutmix, self.meal_input_key, self.current_epoch, *args)
        if not self._meal_stock:
            loss = self.meal_loss(ask(self, network_inputs(batch, self.meal_input_key)), batch)
            self.log("train/loss", loss.detach(), prog_bar=True)
            return loss
        self._meal_done = False
        step = super().training_step
        output = step(batch, *args[: len(inspect.signature(step).parameters) - 1])
        if output is not None and not self._meal_done:
            raise ConfigurationError(f"training_step of {type(self).__name__} does not ask compute_loss for its loss.")
        return output

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if self._meal_stock and self.training:
            return self.meal_loss(*args, **kwargs)
        return super().compute_loss(*args, **kwargs)

    def meal_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """L of the student's logits [B, C]; asks teachers (or the cache) about the inputs, never looks at labels."""
        inputs, labels = network_inputs(batch, self.meal_input_key), unpack(batch, self.meal_input_key).labels
        if self.meal_cache is not None:
            q, fine = self.meal_cache.answer(batch, self.meal_input_key)
            terms = soft_label_loss(outputs, q)
            self._meal_run.see(inputs, [q], labels, fine)
        else:
            answers = self.meal_teachers.logits(inputs)
            adversary = self.meal_discriminator, self.meal_adversarial, self.meal_d_weight
            terms = meal_loss(outputs, answers, *adversary, self.meal_weights)
            self._meal_run.see(inputs, answers, labels)
        self.log_dict(terms.logged(self.paper.slug), on_step=False, on_epoch=True, batch_size=len(outputs))
        self._meal_done = True
        return terms.total

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        self._meal_run.check_fine()

    def on_train_end(self) -> None:
        super().on_train_end()
        warn_of_outrun(self.meal_adversarial, self.trainer.callback_metrics.get(f"{self.paper.slug}/discriminator"))

    # ---- optimizer and checkpoint ------------------------------------------------------------------------------

    def meal_param_groups(
        self, student_lr: float | None = None, d_lr: float | None = None, weight_decay: float | None = 0.0
    ) -> list[dict[str, Any]]:
        """Student and, where there is one, discriminator as two parameter groups, for your ``configure_optimizers``.

        Args:
            student_lr, weight_decay: of the student's group; ``None``: the optimizer's own.
            d_lr: of the discriminator's, whose weight decay is 0; ``None``: the constructor's, else the student's.

        Example::

            return torch.optim.SGD(self.meal_param_groups(0.01), momentum=0.9)
        """
        d_lr = self.meal_d_lr if d_lr is None else d_lr
        return param_groups(self, self.meal_discriminator, student_lr, d_lr, weight_decay)

    def configure_optimizers(self) -> Any:
        configure = super().configure_optimizers
        if getattr(configure, "__func__", None) is not ImageClassifier.configure_optimizers:
            return configure()
        groups = self.meal_param_groups(weight_decay=None)
        return optimizer_and_scheduler(self, lambda _: self.optimizer(groups), self.scheduler)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        fold_discriminator(checkpoint, self.paper.slug)
        checkpoint["effdl"][self.paper.slug]["before"] = dict(self._meal_run.before)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        kept = unfold_discriminator(checkpoint, self.paper.slug, self.state_dict())
        self._meal_run.before = dict(kept.get("before", {}))

    def on_validation_end(self) -> None:
        super().on_validation_end()
        self._meal_run.validated(self.trainer)

    def report(self) -> dict[str, Any]:
        """Student before (validated with ``Trainer(num_sanity_val_steps=-1)``) and after; the teachers' size."""
        return self._meal_run.report(product(self), self.meal_teachers)

    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite."""
        return ContractExample(
            kwargs={"teachers": [example_teacher()]},
            bad={
                "teachers": [[], "no_such_network", 3],
                "teacher_weights": [[0.5], [0.5, 0.5], ["all"]],
                "adversarial": "friendly",
                "d_weight": [-1.0, float("nan")],
                "d_lr": [0.0, float("inf")],
                "discriminator_k": [0, 1.5],
                "cutmix": [-1.0, float("nan")],
                "teacher_transform": [3, [None, None]],
                "input_key": 3,
                "cache": ["no/such.safetensors", 3],
            },
        )


class MEALV2ImageClassifier(MEALV2Mixin, ImageClassifier):
    """The stock image classifier under MEAL V2: arguments of both, as ``effdl run meal-v2`` uses it.

    Example::

        module = MEALV2ImageClassifier(teachers="runs/teacher/version_0", model="resnet18", checkpoint="student.pt")
        Trainer(max_epochs=10).fit(module, ImageData("digits"))
    """

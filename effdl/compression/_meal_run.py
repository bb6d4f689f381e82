"""meal-v2: what one training remembers, warns of and reports."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from effdl.compression._meal_cache import SoftLabelCache
from effdl.compression._meal_loss import MEALDiscriminator, cutmix_images, with_inputs
from effdl.compression._meal_teachers import Teachers, check_single_label, looks_untrained
from effdl.core.batch import unpack
from effdl.core.calibrate import to_device
from effdl.core.checkpoint import fold_into, unfold_from
from effdl.core.distill import classes_of
from effdl.core.distributed import rank
from effdl.core.errors import ConfigurationError, check
from effdl.core.export import product, save_timm
from effdl.core.random import preserved_rng
from effdl.core.report import first_example, latencies_ms, measure

_DISCRIMINATOR = "meal_discriminator."
_FOLDERS: list[tempfile.TemporaryDirectory] = []


class MEALRun:
    """One training: whether the teachers' answers can be used, the student as it was before, an example for latency."""

    def __init__(self) -> None:
        # bool, on the device, as nobody waits for it in a step: [K], teachers' answers that are finite; or [2], of a
        # cache: all keys are known, all images are those that were asked about
        self.fine: Tensor | None = None
        self.cached = False
        self.before: dict[str, Any] = {}
        self.example: Any = None

    @torch.no_grad()
    def see(self, inputs: Any, answers: list[Tensor], labels: Tensor | None, cached: Tensor | None = None) -> None:
        """Every batch; the first one is looked at on the spot. ``cached``: what the cache says of its answer, [2].

        Raises:
            ConfigurationError: NaN or infinity from a teacher, a cache of other data, labels of a multi-label task.
        """
        fine = torch.stack([z.isfinite().all() for z in answers]) if cached is None else cached
        self.cached = cached is not None
        first, self.fine = self.fine is None, fine if self.fine is None else self.fine & fine
        if first:
            check_single_label(labels, answers[0].shape[1])
            self.example = to_device(first_example(inputs), "cpu")
        if first or (self.cached and not fine.is_cuda):
            self.check_fine()

    def check_fine(self) -> None:
        """Raise where a teacher has said something else than numbers, or a cache nothing; waits for the device."""
        if self.fine is None or bool(self.fine.all()):
            return
        if self.cached and not self.fine[0]:
            raise ConfigurationError(
                "cache: it has no soft label of some image or crop of this run. Build it over all the training data, "
                "with the same seed and crops."
            )
        if self.cached:
            raise ConfigurationError(
                "cache: it was built of other images than this run's: another split, normalisation or augmentation."
            )
        bad = [f"teachers[{i}]" for i, ok in enumerate(self.fine.tolist()) if not ok]
        raise ConfigurationError(f"{', '.join(bad)}: NaN or infinite logits; its weights or its precision fail.")

    def start(self, student: nn.Module, resumed: bool) -> None:
        """Measure the student as it comes; warn where it has never been trained."""
        if not resumed and looks_untrained(student):
            rank_zero_warn(
                "The student looks untrained (its normalisation layers are as they were made). MEAL V2 fine-tunes a "
                "trained student; from random weights it ends points below. Set pretrained or checkpoint."
            )
        if "parameters" not in self.before:
            self.before |= measure(student)

    def validated(self, trainer: Any) -> None:
        """Keep the metrics of a whole validation before the first step (``num_sanity_val_steps=-1``)."""
        if not trainer.sanity_checking or trainer.num_sanity_val_steps != float("inf"):
            return
        metrics = trainer.callback_metrics
        seen = {key: float(value) for key, value in metrics.items()}
        self.before.setdefault("metrics", {k: v for k, v in seen.items() if "val" in k} or seen)

    def report(self, student: nn.Module, teachers: Teachers) -> dict[str, Any]:
        """Columns before and after; the teachers' parameters and latency beside the student's."""
        told: dict[str, Any] = {"teachers": len(teachers)}
        told["teacher_parameters"] = sum(p.numel() for network in teachers.networks for p in network.parameters())
        if not self.before:
            return told
        before, after = {"name": "before", **self.before}, {"name": "after MEAL V2"}
        if isinstance(self.example, Tensor):
            device = next(student.parameters()).device
            example = self.example.to(device)
            # the same architecture before and after: one measurement
            before["latency_ms"] = after["latency_ms"] = latencies_ms([student], (example,))[0]
            told["teachers_latency_ms"] = sum(
                latencies_ms([holder.on(device)], (example if view is None else view(example),), seconds=0.5)[0]
                for holder, view in zip(teachers.holders, teachers.views)
            )
        return {**told, "before": before, "after": after}


def num_classes_of(module: nn.Module) -> int | None:
    """What the module (``num_classes``) or its network tells."""
    return getattr(module, "num_classes", None) or classes_of(product(module))


def check_cache(cache: SoftLabelCache | None, module: nn.Module, teachers: Teachers, weights: Any) -> None:
    """Raise where a cache is of other teachers or classes than a module's."""
    if cache is not None:
        cache.verify(teachers=teachers.identity(weights), num_classes=num_classes_of(module))


def prepare_teachers(teachers: Teachers, cache: SoftLabelCache | None, device: torch.device, data: Any) -> None:
    """On the student's device, each with its view of the images; beside a cache where they are, and compared."""
    teachers.prepare(device if cache is None else torch.device("cpu"), data)
    if cache is not None:
        cache.verify(views=teachers.seen())


def make_discriminator(module: nn.Module, teachers: Teachers, k: int, adversarial: str | None) -> nn.Module | None:
    """D for the classes that the module (``num_classes``), its network or the first teacher tells; ``None`` without."""
    if adversarial is None:
        return None
    told = num_classes_of(module) or classes_of(teachers.networks[0])
    check(isinstance(told, int), "num_classes", told, "self.num_classes where no head tells it")
    with preserved_rng():  # the student's random numbers stay what they are without us
        return MEALDiscriminator(told, k, last_relu=adversarial == "cooperative")


def check_first(cls: type, mixin: type) -> None:
    """Raise where a class before the mixin would decide what a step computes."""
    before = cls.__mro__[: cls.__mro__.index(mixin)]
    wrong = [c.__name__ for c in before if {"training_step", "compute_loss"} & set(vars(c))]
    if wrong:
        name = mixin.__name__
        raise ConfigurationError(f"{name} must come first: class {cls.__name__}({name}, {wrong[0]}).")


def cut_and_mixed(batch: Any, alpha: float, input_key: str | None, epoch: int, batch_idx: int = 0, *_: Any) -> Any:
    """CutMix, a function of (process, epoch, batch): the same in a resumed run and in a second pass (SAM)."""
    images = unpack(batch, input_key).inputs
    check(isinstance(images, Tensor) and images.dim() == 4, "cutmix", alpha, "0 without images")
    return with_inputs(batch, images, cutmix_images(images, alpha, np.random.default_rng([rank(), epoch, batch_idx])))


def param_groups(
    module: nn.Module, discriminator: nn.Module | None, lr: float | None, d_lr: float | None, weight_decay: float | None
) -> list[dict[str, Any]]:
    """The student's trained parameters and, where there is one, the discriminator's, in this order."""
    adversary = [] if discriminator is None else list(discriminator.parameters())
    ids = {id(p) for p in adversary}
    d_lr = lr if d_lr is None else d_lr
    student: dict[str, Any] = {"params": [p for p in module.parameters() if p.requires_grad and id(p) not in ids]}
    student |= {key: value for key, value in (("lr", lr), ("weight_decay", weight_decay)) if value is not None}
    own = {"params": adversary, "weight_decay": 0.0} | ({} if d_lr is None else {"lr": d_lr})
    return [student, own] if adversary else [student]


def fold_discriminator(checkpoint: dict[str, Any], slug: str) -> None:
    """The state dicts of a checkpoint become the plain student's; D lies in ``checkpoint["effdl"][slug]``."""

    def fold(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: state.pop(key) for key in list(state) if key.startswith(_DISCRIMINATOR)}

    fold_into(checkpoint, slug, fold)


def unfold_discriminator(checkpoint: dict[str, Any], slug: str, own: dict[str, Tensor]) -> dict[str, Any]:
    """Put D back before the strict load; where a checkpoint (of an ordinary training, say) has none, that of ``own``.

    Returns:
        What lies in ``checkpoint["effdl"][slug]``.
    """
    own = {key: value for key, value in own.items() if key.startswith(_DISCRIMINATOR)}
    if own and "state_dict" in checkpoint:
        checkpoint["state_dict"].update(own)
        unfold_from(checkpoint, slug, lambda state, kept: state.update(kept))
    return checkpoint.get("effdl", {}).get(slug, {})


def warn_of_groups(optimizers: list[Any], discriminator: nn.Module | None, d_lr: float | None) -> None:
    """The discriminator outside every optimizer or at another rate than asked for; weight decay."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    if any(group.get("weight_decay", 0) > 5e-5 for group in groups):
        rank_zero_warn("weight_decay > 5e-5: MEAL V2 trains without it, as soft labels regularise enough.")
    if discriminator is None:
        return
    ids = {id(p) for p in discriminator.parameters()}
    own = [group for group in groups if ids & {id(p) for p in group["params"]}]
    use = "Use self.meal_param_groups() in configure_optimizers."
    if not own:
        rank_zero_warn(f"The discriminator is in no optimizer and will not learn. {use}")
    elif d_lr is None:
        return
    elif any(len(group["params"]) > len(ids) for group in own):
        rank_zero_warn(f"The discriminator trains at the student's learning rate instead of d_lr. {use}")
    elif any(abs(group.get("initial_lr", group["lr"]) / d_lr - 1) > 1e-6 for group in own):
        rank_zero_warn("The scheduler sets the discriminator's learning rate itself: give it one value per group.")


def warn_of_outrun(adversarial: str | None, loss: Tensor | None) -> None:
    """At the end: under reversal L_d has no upper bound, and a slow D is no opponent."""
    if adversarial == "reversal" and loss is not None and float(loss) > 0.8:
        rank_zero_warn(
            f"L_d ended at {float(loss):.2f}, above chance (0.69): the student has outrun the discriminator and drifts "
            "away from its teachers. Raise d_lr, or lower d_weight or the student's rate."
        )


@cache
def example_teacher() -> str:
    """The folder of a small fixed network for three classes, for the contract suite; it goes with the process."""
    import timm

    with preserved_rng():
        torch.manual_seed(11)
        network = timm.create_model("test_resnet", num_classes=3)
    _FOLDERS.append(tempfile.TemporaryDirectory(prefix="effdl-meal-"))
    return str(save_timm(network, Path(_FOLDERS[-1].name)))

"""meal-v2: several teachers, each seeing the images as it was trained to, and what must hold of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effdl.core.distill import Teacher, resolve_teacher, teacher_logits
from effdl.core.errors import ConfigurationError, check, check_choice, check_integer, check_number
from effdl.core.fingerprint import fingerprint
from effdl.core.teacher import Frozen

Transform = Callable[[Tensor], Tensor]
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


class Renormalize:
    """Images [B, C, H, W] from one normalisation to another's, and to another size.

    Args:
        mean, std: of the images as they come, of pixels in [0, 1]; one number or one per channel.
        to_mean, to_std: as the teacher was trained.
        size: side of the teacher's (square) images; ``None``: as they are.

    Example::

        view = Renormalize(0.5, 0.5, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), size=224)
    """

    def __init__(
        self,
        mean: float | Sequence[float],
        std: float | Sequence[float],
        to_mean: float | Sequence[float],
        to_std: float | Sequence[float],
        size: int | None = None,
    ) -> None:
        old, new = _statistics(mean, std), _statistics(to_mean, to_std)
        if size is not None:
            check_integer("size", size, 1)
        as_column = [torch.tensor(values).view(-1, 1, 1) for values in (*old, *new)]
        # ((x s + m) - m') / s' as one scale and one shift
        self.scale = as_column[1] / as_column[3]
        self.shift = (as_column[0] - as_column[2]) / as_column[3]
        self.size = size

    def __call__(self, images: Tensor) -> Tensor:
        if self.scale.device != images.device:
            self.scale, self.shift = self.scale.to(images.device), self.shift.to(images.device)
        images = images * self.scale.to(images.dtype) + self.shift.to(images.dtype)
        if self.size is None or images.shape[-2:] == (self.size, self.size):
            return images
        resized = F.interpolate(images.float(), (self.size, self.size), mode="bicubic", antialias=True)
        return resized.to(images.dtype)  # there is no such kernel for half precision on a CPU


def _statistics(mean: Any, std: Any) -> Statistics:
    both = tuple(tuple(map(float, (v,) if isinstance(v, (int, float)) else v)) for v in (mean, std))
    check(all(s > 0 for s in both[1]), "std", std, "positive numbers")
    return both


class Teachers:
    """The frozen teachers of one student: neither in its parameters nor in its state_dict.

    Args:
        sources: what ``resolve_teacher`` takes, each.
        student: refused as its own teacher.
        transform: what each teacher sees of the images: one callable for all or one (or ``None``) per teacher.
    """

    def __init__(self, sources: Sequence[Teacher], student: nn.Module, transform: Any = None) -> None:
        self.holders: list[Frozen[nn.Module]] = []
        self._named: list[bool] = []
        for i, source in enumerate(sources):
            self.holders.append(resolve_teacher(source, student, f"teachers[{i}]"))
            self._named.append(isinstance(source, str))
        self.transform = transform
        self.views: list[Transform | None] = [None] * len(self.holders)

    def __len__(self) -> int:
        return len(self.holders)

    @property
    def networks(self) -> list[nn.Module]:
        return [holder.module for holder in self.holders]

    def __deepcopy__(self, memo: dict[int, Any]) -> Teachers:
        return self  # WeightAveraging copies the student; its teachers are shared

    def prepare(self, device: torch.device, data: Any) -> None:
        """On the device, each with its view of the images.

        Args:
            device: the student's.
            data: the Trainer's data module; its ``mean`` and ``std``, where it has them, are those of the images.
        """
        for holder in self.holders:
            holder.on(device)
        if self.transform is not None:
            self.views = as_views(self.transform, len(self))
            return
        known = [self._trained_on(i) for i in range(len(self))]
        images = None if getattr(data, "mean", None) is None else _statistics(data.mean, data.std)
        if images is None and len({s for s in known if s}) > 1:
            warnings.warn(
                "The teachers were trained with different normalisations, and those of the images are not known: set "
                "mean and std on the data module, or give teacher_transform.",
                stacklevel=2,
            )
        self.views = [Renormalize(*images, *s) if images and s and not _same(images, s) else None for s in known]

    def _trained_on(self, i: int) -> Statistics | None:
        """Of a teacher whose weights came by name; those of a network that was handed over may be anything."""
        config = getattr(self.networks[i], "pretrained_cfg", None) or {}
        if not self._named[i] or not config.get("mean") or not config.get("std"):
            return None
        return _statistics(config["mean"], config["std"])

    def logits(self, inputs: Any) -> list[Tensor]:
        """z_k of the same crop, [B, C] each, one teacher after the other."""
        seen = [inputs if view is None else view(inputs) for view in self.views]
        return [teacher_logits(holder, x) for holder, x in zip(self.holders, seen)]

    def identity(self, weights: Sequence[float] | None) -> str:
        """A fingerprint of who is asked, and how much each counts."""
        return fingerprint(self.networks, [float(w) for w in weights or [1 / len(self)] * len(self)])

    def seen(self) -> str:
        """A fingerprint of what they see of the images, once prepared."""
        return fingerprint([_told(view) for view in self.views])

    def check_eval(self) -> None:
        """Raise where a teacher was switched to training: its Dropout and BatchNorm would silently ruin q."""
        for i, network in enumerate(self.networks):
            if any(module.training for module in network.modules()):
                raise ConfigurationError(
                    f"teachers[{i}] is in training mode: something called train() on it. Call eval() again."
                )

    def check_frozen(self) -> None:
        """Raise where a teacher would be trained."""
        self.check_eval()
        for i, network in enumerate(self.networks):
            if any(p.requires_grad for p in network.parameters()):
                raise ConfigurationError(f"teachers[{i}] has parameters with requires_grad=True: freeze them again.")


def _same(a: Statistics, b: Statistics) -> bool:
    pairs = [(x, y) for u, v in zip(a, b) for x, y in zip(u * (len(v) // len(u) or 1), v * (len(u) // len(v) or 1))]
    return all(math.isclose(x, y, abs_tol=1e-6) for x, y in pairs)


def as_views(transform: Any, count: int) -> list[Transform | None]:
    """``teacher_transform`` as one entry per teacher."""
    return list(transform) if isinstance(transform, (list, tuple)) else [transform] * count


def _told(view: Any) -> Any:
    """Something of a view that is the same in the next process."""
    if isinstance(view, Renormalize):
        return [view.scale, view.shift, view.size]
    return None if view is None else getattr(view, "__qualname__", type(view).__qualname__)


def as_list(teachers: Any) -> list[Teacher]:
    """One teacher or several, as a list."""
    return list(teachers) if isinstance(teachers, (list, tuple, nn.ModuleList)) else [teachers]


def check_meal_arguments(
    teachers: Any,
    weights: Any,
    adversarial: Any,
    d_weight: Any,
    d_lr: Any,
    k: Any,
    cutmix: Any,
    transform: Any,
    input_key: Any,
) -> None:
    """Raise ConfigurationError for what cannot be right whatever the networks are."""
    count = len(as_list(teachers))
    check(count > 0, "teachers", teachers, "at least one teacher")
    check_weights(weights, count)
    check_choice("adversarial", adversarial, ("reversal", "cooperative", None))
    check_number("d_weight", d_weight, 0, math.inf, closed="[)")
    if d_lr is not None:
        check_number("d_lr", d_lr, 0, math.inf, closed="()")
    check_integer("discriminator_k", k, 1)
    check_number("cutmix", cutmix, 0, math.inf, closed="[)", fix="1.0 is the paper's Beta(1, 1).")
    check_views(transform, count)
    check(input_key is None or isinstance(input_key, str), "input_key", input_key, "a name or None")


def check_weights(weights: Any, count: int) -> None:
    """Raise unless ``teacher_weights`` fits so many teachers."""
    if weights is not None:
        ok = isinstance(weights, (list, tuple)) and len(weights) == count
        check(ok, "teacher_weights", weights, f"one number per teacher, {count}")
        for weight in weights:
            check_number("teacher_weights", weight, 0, 1)
        check(math.isclose(sum(weights), 1, abs_tol=1e-6), "teacher_weights", weights, "numbers that sum to 1")


def check_views(transform: Any, count: int) -> None:
    """Raise unless ``teacher_transform`` fits so many teachers."""
    many = isinstance(transform, (list, tuple))
    views = transform if many else [transform]
    ok = all(view is None or callable(view) for view in views) and (not many or len(views) == count)
    check(ok, "teacher_transform", transform, f"a callable, or a list of {count}")


def looks_untrained(network: nn.Module) -> bool:
    """Whether every normalisation layer is as it was made: all its weights one number, all its biases one number.

    ``False`` for a network without such layers, of which nothing can be said.
    """
    norms = [m for m in network.modules() if isinstance(m, _NORMS) and m.weight is not None and m.weight.numel() > 1]
    return bool(norms) and all(_constant(m.weight) and (m.bias is None or _constant(m.bias)) for m in norms)


def _constant(x: Tensor) -> bool:
    return bool((x == x.flatten()[0]).all())


def check_single_label(labels: Tensor | None, classes: int) -> None:
    """Raise where labels say that several classes may be right at once: softmax is not their model."""
    if isinstance(labels, Tensor) and labels.dim() == 2 and labels.shape[1] == classes:
        sums = labels.float().sum(1)
        if not torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
            raise ConfigurationError(
                f"labels of shape {tuple(labels.shape)} with several classes at once: MEAL V2 averages softmax outputs "
                "and does not fit multi-label heads (sigmoid)."
            )

"""meal-v2: the loss, the discriminator and CutMix; plain torch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effdl.core.distill import check_same_shape, mean_probabilities, soft_cross_entropy, soft_kl
from effdl.core.errors import ConfigurationError, check_integer

Adversarial = Literal["reversal", "cooperative"] | None


class MEALDiscriminator(nn.Module):
    """D: logits R^C -> R^2, three linear layers C -> C/k -> C/k^2 -> 2 with ReLU between them.

    The official 1x1 convolutions on [B, C, 1, 1] are these layers. Neither ``nn.Linear`` nor ``nn.ReLU`` is inside,
    so that nothing that prunes or replaces layers of a network takes these for its own.

    Args:
        num_classes: C >= 2.
        k: >= 1; a width below 2 becomes 2, with a warning.
        last_relu: ReLU on the output too, as in the official code: logits below zero have no gradient.
    """

    def __init__(self, num_classes: int, k: int = 8, last_relu: bool = False) -> None:
        super().__init__()
        check_integer("num_classes", num_classes, 2)
        check_integer("discriminator_k", k, 1)
        inner = [num_classes // k, num_classes // k**2]
        if min(inner) < 2:
            fix = f"discriminator_k={max(1, int((num_classes / 2) ** 0.5))} avoids it."
            told = f"{num_classes} classes and discriminator_k={k}: hidden widths below 2 ({inner}) become 2."
            warnings.warn(f"{told} {fix}", stacklevel=2)
        widths = [num_classes, *(max(2, width) for width in inner), 2]
        layers = [nn.Linear(a, b) for a, b in zip(widths, widths[1:])]
        self.weights = nn.ParameterList([layer.weight for layer in layers])
        self.biases = nn.ParameterList([layer.bias for layer in layers])
        self.last_relu = last_relu

    @property
    def num_classes(self) -> int:
        return self.weights[0].shape[1]

    def forward(self, logits: Tensor) -> Tensor:
        """[N, 2] of logits [N, C], computed in their dtype."""
        x, last = logits, len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            x = F.linear(x, weight.to(x.dtype), bias.to(x.dtype))
            x = x.relu() if i < last or self.last_relu else x
        return x


def reverse_gradient(x: Tensor) -> Tensor:
    """x, whose gradient arrives with the opposite sign (Ganin & Lempitsky 2015). 2x - x is exactly x."""
    return 2 * x.detach() - x


def discriminator_loss(
    discriminator: nn.Module, student: Tensor, teacher: Tensor, adversarial: Adversarial = "reversal"
) -> Tensor:
    """L_d: binary cross-entropy of D on the student's rows (target [1, 0]) and the teachers' ([0, 1]).

    Args:
        discriminator: D, [N, C] -> [N, 2].
        student: logits z, [B, C].
        teacher: mean logits m, [B, C].
        adversarial: ``"reversal"``: D learns to tell them apart, the student not to be told apart;
            ``"cooperative"``: both minimise L_d, as the official code does.

    Returns:
        Mean over the 2B x 2 entries.
    """
    own = reverse_gradient(student) if adversarial == "reversal" else student
    said = discriminator(torch.cat([own, teacher.detach()]))
    targets = torch.eye(2, dtype=said.dtype, device=said.device).repeat_interleave(len(student), dim=0)
    return F.binary_cross_entropy_with_logits(said, targets)


class MEALTerms(NamedTuple):
    """The loss and what it is made of; scalars, float32 at least, all but ``total`` without gradient."""

    total: Tensor  # similarity + d_weight * discriminator
    similarity: Tensor  # L_s, the soft cross-entropy
    kl: Tensor  # L_s less the entropy of q: zero where the student says what the teachers say
    agreement: Tensor  # share of the batch where student and q have the same arg-max
    discriminator: Tensor | None  # L_d

    def logged(self, slug: str) -> dict[str, Tensor]:
        """What a run logs, by name."""
        told = {"kl": self.kl, "agreement": self.agreement, "discriminator": self.discriminator}
        return {f"{slug}/{name}": value for name, value in told.items() if value is not None}


def meal_loss(
    logits: Tensor,
    teachers: Sequence[Tensor],
    discriminator: nn.Module | None = None,
    adversarial: Adversarial = "reversal",
    d_weight: float = 1.0,
    teacher_weights: Sequence[float] | None = None,
) -> MEALTerms:
    """L = L_s + d_weight L_d, where L_s = -mean_b sum_c q_bc log softmax(z)_bc and q = mean_k softmax(z_k).

    q is the mean of *probabilities*, not the softmax of mean logits, and there is no temperature. Labels do not occur.

    Args:
        logits: z, the student's, [B, C].
        teachers: z_k, one [B, C] per teacher.
        discriminator, adversarial: as in :func:`discriminator_loss`; without a discriminator L = L_s.
        d_weight: >= 0.
        teacher_weights: of q and of the mean logits, summing to 1; ``None``: 1/K each.

    Raises:
        ConfigurationError: a teacher of another shape, or a discriminator for another number of classes.

    Example::

        terms = meal_loss(student(x), [teacher(x) for teacher in teachers], MEALDiscriminator(1000))
        terms.total.backward()
    """
    for z in teachers:
        check_same_shape(logits, z)
    with torch.autocast(logits.device.type, enabled=False):  # log-softmax and a small BCE: float32
        z = logits if logits.dtype == torch.float64 else logits.float()
        answers = [t.detach().to(z.dtype) for t in teachers]
        terms = soft_label_loss(z, mean_probabilities(answers, teacher_weights))
        if discriminator is None or adversarial is None:
            return terms
        _check_width(discriminator, z)
        weights = teacher_weights or [1 / len(answers)] * len(answers)
        mean = torch.stack([w * t for w, t in zip(weights, answers)]).sum(0)
        adversary = discriminator_loss(discriminator, z, mean, adversarial)
        return terms._replace(total=terms.total + d_weight * adversary, discriminator=adversary.detach())


def soft_label_loss(logits: Tensor, q: Tensor) -> MEALTerms:
    """L_s of the student's logits [B, C] and probabilities q [B, C], in float32 at least: L without a discriminator."""
    check_same_shape(logits, q)
    with torch.autocast(logits.device.type, enabled=False):
        z = logits if logits.dtype == torch.float64 else logits.float()
        similarity = soft_cross_entropy(z, q)
        agreement = (z.argmax(-1) == q.argmax(-1)).float().mean()
        return MEALTerms(similarity, similarity.detach(), soft_kl(z.detach(), q), agreement, None)


def _check_width(discriminator: nn.Module, logits: Tensor) -> None:
    width = getattr(discriminator, "num_classes", logits.shape[1])
    if width != logits.shape[1]:
        raise ConfigurationError(
            f"num_classes: the discriminator was made for {width} classes and the logits have {logits.shape[1]}: "
            "set self.num_classes in your module before super().__init__() returns."
        )


def cutmix_images(images: Tensor, alpha: float, rng: np.random.Generator) -> Tensor:
    """A box of each image [B, C, H, W] comes from another of the batch; its share of the area is 1 - Beta(a, a).

    Labels stay where they are: the teachers say what the mixed image shows.
    """
    height, width = images.shape[-2:]
    side = (1 - rng.beta(alpha, alpha)) ** 0.5
    y, x = rng.integers(height), rng.integers(width)
    half = round(side * height / 2), round(side * width / 2)
    rows, columns = slice(max(y - half[0], 0), y + half[0]), slice(max(x - half[1], 0), x + half[1])
    other = torch.from_numpy(rng.permutation(len(images))).to(images.device)
    mixed = images.clone()
    mixed[..., rows, columns] = images[other][..., rows, columns]
    return mixed


def with_inputs(batch: Any, old: Any, new: Any) -> Any:
    """The batch with its inputs ``old`` replaced."""
    if isinstance(batch, Mapping):
        return {key: new if value is old else value for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)([new, *batch[1:]]) if type(batch) in (tuple, list) else (new, *batch[1:])
    return new

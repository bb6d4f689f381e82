"""elr: ELR+, two networks that teach each other with weight-averaged teachers and mixup (arXiv 2007.00151, sec. 5).

Student A is trained on mixed images; its table T_A learns from the teacher B', the weight average of student B, on the
unmixed ones, and the other way round.
"""

from __future__ import annotations

import math

import torch
from scipy.special import betaincinv
from torch import Tensor
from torch.nn import functional as F

from effdl.core.errors import check_integer, check_number
from effdl.training.elr import (
    at_least_float32,
    check_elr_arguments,
    check_shapes,
    clamped_softmax,
    elr_regularizer,
    update_targets,
)


def sigmoid_rampup(step: float, length: float) -> float:
    """exp(-5 (1 - clip(step, 0, length) / length)^2): from 0.0067 at step 0 to 1 at ``length``; 1 where length = 0.

    Example::

        sigmoid_rampup(5, 10)   # 0.2865
    """
    if length == 0:
        return 1.0
    remaining = 1 - min(max(step, 0.0), length) / length
    return math.exp(-5 * remaining**2)


def ema_decay(step: int, alpha: float = 0.997, ramp: int | None = 40_000) -> float:
    """gamma(t), the decay of the teachers: theta' <- gamma theta' + (1 - gamma) theta after optimizer step t.

    Args:
        step: t >= 0, optimizer steps of this student so far.
        alpha: the final decay, in [0, 1).
        ramp: steps over which gamma rises to ``alpha``; ``None`` takes min(1 - 1 / (t + 1), alpha) (Clothing1M).
    """
    if ramp is None:
        return min(1 - 1 / (step + 1), alpha)
    return alpha * sigmoid_rampup(step + 1, ramp)


def mixup_weight(alpha: float, generator: torch.Generator) -> float:
    """l ~ Beta(alpha, alpha), max(l, 1 - l), so in [0.5, 1]; 1 (no mixing) where ``alpha`` = 0."""
    check_number("alpha", alpha, 0, float("inf"), closed="[)", fix="1 is the paper's value, 0 turns mixup off.")
    if alpha == 0:
        return 1.0
    uniform = float(torch.rand((), generator=generator, dtype=torch.float64))  # a CPU generator: no device sync
    weight = float(betaincinv(alpha, alpha, uniform))
    return max(weight, 1 - weight)


def mix_pairs(x: Tensor, permutation: Tensor, weight: float) -> Tensor:
    """l x + (1 - l) x[perm] along the first dimension: images, one-hot labels or targets."""
    return weight * x + (1 - weight) * x[permutation]


def mixed_targets(
    targets: Tensor, index: Tensor, teacher_logits: Tensor, permutation: Tensor, weight: float, beta: float = 0.7
) -> Tensor:
    """Update T with the teacher's softmax on the unmixed images, then q = l T[idx] + (1 - l) T[idx][perm].

    Args:
        targets: T, [N, C], updated in place.
        index: [B], int64.
        teacher_logits: of the *other* network's teacher on the unmixed images, [B, C].
        permutation: [B], int64, the partners in the mix.
        weight: l in [0.5, 1].
        beta: momentum in [0, 1).

    Returns:
        q, [B, C], at least float32, without gradient.
    """
    probabilities = at_least_float32(teacher_logits.detach()).softmax(dim=1)
    return mix_pairs(update_targets(targets, index, probabilities, beta), permutation, weight)


def elr_plus_loss(
    logits: Tensor,
    labels: Tensor,
    q: Tensor,
    permutation: Tensor,
    weight: float,
    *,
    lam: float = 3.0,
    ramp: float = 1.0,
    clamp: float = 1e-4,
    refine_labels: bool = False,
) -> Tensor:
    """The ELR+ loss of one student: soft cross-entropy with mixed labels plus the ramped regulariser against q.

    Args:
        logits: of the student on the *mixed* images, [B, C].
        labels: y, [B], int64, unmixed.
        q: from :func:`mixed_targets`, [B, C].
        permutation: [B], int64, as used for the images.
        weight: l, as used for the images.
        lam: weight of the regulariser, >= 0.
        ramp: ``sigmoid_rampup(step, coef_step)`` in [0, 1].
        clamp: predictions are clamped to [clamp, 1 - clamp].
        refine_labels: re-weight the labels by q, y <- normalise(y q); the paper's code does so for 100 classes.

    Returns:
        The scalar loss, possibly negative.

    Example::

        images = mix_pairs(x, permutation, weight)
        q = mixed_targets(targets_a, index, teacher_b(x), permutation, weight)
        loss = elr_plus_loss(student_a(images), y, q, permutation, weight)
    """
    check_elr_arguments(0.0, lam, clamp)
    check_shapes(logits, q, "q")
    logits = at_least_float32(logits)
    y = mix_pairs(F.one_hot(labels, logits.shape[1]).to(logits.dtype), permutation, weight)
    if refine_labels:
        y = y * q
        # A label that the targets rule out altogether (q underflowed to 0) drops out instead of dividing by zero.
        y = y / y.sum(dim=1, keepdim=True).clamp_min(torch.finfo(y.dtype).tiny)
    cross_entropy = -(y * logits.log_softmax(dim=1)).sum(dim=1).mean()
    return cross_entropy + ramp * lam * elr_regularizer(clamped_softmax(logits, clamp), q, clamp)


def check_elr_plus_arguments(mixup_alpha: float, ema_alpha: float, ema_step: int | None, coef_step: int) -> None:
    """Raise :class:`ConfigurationError` for values that ELR+ cannot use."""
    check_number("mixup_alpha", mixup_alpha, 0, float("inf"), closed="[)", fix="1 is the paper's value, 0 = no mixup.")
    check_number("ema_alpha", ema_alpha, 0, 1, closed="[)", fix="0.997 is the paper's value.")
    if ema_step is not None:
        check_integer("ema_step", ema_step, 0, fix="40000 is the paper's value, None means no ramp.")
    check_integer("coef_step", coef_step, 0, fix="0 means no ramp.")

"""elr: the losses of ELR and ELR+ as plain functions of tensors."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from effdl.core.errors import check, check_integer, check_number
from effdl.training._elr_table import update_targets


def elr_loss(
    logits: Tensor,
    labels: Tensor,
    index: Tensor,
    targets: Tensor,
    beta: float = 0.7,
    lam: float = 3.0,
    clamp: float = 1e-4,
) -> Tensor:
    """Cross-entropy plus the early-learning regulariser, equation (6); updates ``targets`` in place first.

    Args:
        logits: z, shape [B, C], any float dtype; half precision is computed in float32.
        labels: y, shape [B], int64, possibly wrong.
        index: which row of ``targets`` each example owns, shape [B], int64. Stable over the epochs.
        targets: T, shape [N, C], zeros before the first epoch.
        beta: momentum of T, in [0, 1).
        lam: weight of the regulariser, >= 0. The paper: 3 (CIFAR-10), 1 (asymmetric noise), 7 (CIFAR-100).
        clamp: predictions are clamped to [clamp, 1 - clamp].

    Returns:
        The scalar loss, possibly negative. No gradient flows through T.

    Raises:
        ConfigurationError: a value out of range, C < 2, or shapes that do not fit.
        IndexError: an index outside the table.

    Example::

        targets = torch.zeros(len(dataset), 10)
        for x, y, index in loader:
            loss = elr_loss(model(x), y, index, targets, beta=0.7, lam=3.0)
            optimizer.zero_grad(); loss.backward(); optimizer.step()
    """
    check_elr_arguments(beta, lam, clamp)
    check_shapes(logits, targets)
    check(
        labels.shape == logits.shape[:1],
        "labels",
        tuple(labels.shape),
        f"one class number per row of logits {tuple(logits.shape)}",
    )
    logits = at_least_float32(logits)
    p = clamped_softmax(logits, clamp)
    rows = update_targets(targets, index, normalised(p), beta)
    return F.cross_entropy(logits, labels) + lam * elr_regularizer(p, rows, clamp)


def check_elr_arguments(beta: float, lam: float, clamp: float) -> None:
    """Raise :class:`ConfigurationError` unless ``0 <= beta < 1``, ``lam >= 0`` and ``0 < clamp < 0.5``."""
    check_number("beta", beta, 0, 1, closed="[)", fix="0.7 is the paper's value, 0.9 for CIFAR-100.")
    check_number("lam", lam, 0, float("inf"), closed="[)", fix="3 is the paper's value, 0 is plain cross-entropy.")
    check_number("clamp", clamp, 0, 0.5, closed="()", fix="1e-4 is the paper's value.")


def check_shapes(logits: Tensor, targets: Tensor, name: str = "targets") -> None:
    """Raise unless ``logits`` is [B, C] with C >= 2 and ``targets`` (called ``name``) has C columns too."""
    check(
        logits.ndim == 2 and logits.shape[1] >= 2,
        "logits",
        tuple(logits.shape),
        "shape [B, C] with C >= 2",
        "Flatten the pixels of a segmentation into examples; a binary problem needs two logits.",
    )
    check(
        targets.ndim == 2 and targets.shape[1] == logits.shape[1],
        name,
        tuple(targets.shape),
        f"two dimensions, {logits.shape[1]} columns, one per class of logits",
    )


def at_least_float32(x: Tensor) -> Tensor:
    """Upcast half precision: 1 - 1e-4 rounds to 1 in bfloat16, and log(1 - 1) is infinite."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def clamped_softmax(logits: Tensor, clamp: float = 1e-4) -> Tensor:
    """p = clamp(softmax(z)), [B, C], not re-normalised. The clamp has no gradient outside its range."""
    return at_least_float32(logits).softmax(dim=1).clamp(clamp, 1 - clamp)


def normalised(p: Tensor) -> Tensor:
    """phat = p / sum_c p without gradient, [B, C]: what the table learns."""
    p = p.detach()
    return p / p.sum(dim=1, keepdim=True)


def elr_regularizer(p: Tensor, rows: Tensor, clamp: float = 1e-4) -> Tensor:
    """mean_b log(1 - <T_b, p_b>), a scalar <= 0.

    Args:
        p: predictions after :func:`clamped_softmax`, [B, C].
        rows: the rows of T that belong to them, [B, C], without gradient.
        clamp: as in :func:`elr_loss`.
    """
    # Not a matrix product: autocast would run it in half precision.
    agreement = (rows * p).sum(dim=1)
    # <T, p> <= max p <= 1 - clamp holds exactly; rounding of a float16 table could step over it.
    return torch.log(1 - agreement.clamp(max=1 - clamp)).mean()


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


def mixup_weight(alpha: float, rng: np.random.Generator) -> float:
    """l ~ Beta(alpha, alpha), max(l, 1 - l), so in [0.5, 1]; 1 (no mixing) where ``alpha`` = 0."""
    weight = float(rng.beta(alpha, alpha)) if alpha > 0 else 1.0
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

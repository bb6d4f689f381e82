"""elr: Early-Learning Regularization, a classifier that does not memorise wrong labels (arXiv 2007.00151).

Each training example i keeps a running average T[i] of the network's own predictions. Early in training these are
right even where the label is wrong; the loss of equation (6) holds the prediction p near T:

    L = CE(z, y) + lam * mean_b log(1 - <T[idx_b], p_b>)

The second term is negative and minimised, so it pulls <T, p> towards 1. Expect a loss below zero: monitor validation
accuracy, not the loss. After training ``argmax T[i] != y[i]`` lists the suspect labels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from effdl.core.errors import check, check_number


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


@torch.no_grad()
def update_targets(targets: Tensor, index: Tensor, probabilities: Tensor, beta: float) -> Tensor:
    """T[idx] <- beta T[idx] + (1 - beta) phat in place; returns the new rows.

    An index that appears twice in a batch takes its last prediction, on every device and every rank alike.

    Args:
        targets: T, [N, C], any float dtype and device.
        index: [B], int64.
        probabilities: phat, [B, C].
        beta: momentum in [0, 1).

    Returns:
        T[idx], [B, C], with the dtype and device of ``probabilities``.

    Raises:
        IndexError: an index below 0 or >= N (checked where ``index`` lies on the CPU; CUDA asserts by itself).
    """
    place = index.to(targets.device)
    check_index(place, len(targets))
    order = place.argsort(stable=True)
    last = order[torch.searchsorted(place[order], place, right=True) - 1]
    rows = beta * targets[place].to(probabilities.dtype) + (1 - beta) * probabilities.to(targets.device)[last]
    targets[place] = rows.to(targets.dtype)
    return rows.to(probabilities.device)


def check_index(index: Tensor, size: int) -> None:
    """Raise ``IndexError`` naming the first index outside [0, size). Looks only at CPU tensors: no sync."""
    if index.device.type != "cpu" or torch.compiler.is_compiling():
        return
    outside = index[(index < 0) | (index >= size)]
    if len(outside):
        raise IndexError(
            f"index {int(outside[0])} is outside the ELR table of {size} examples: num_examples must be the largest "
            "dataset index + 1 (for a Subset, the size of the data set it was taken from)."
        )


class LabelReport(NamedTuple):
    """What the table says about every label; all tensors have shape [N]."""

    label: Tensor  # int64, as given
    target: Tensor  # int64, argmax T: what the network believed
    confidence: Tensor  # float32 in [0, 1]: max T / sum T, 0 for an example that was never seen
    suspect: Tensor  # bool: seen, and target != label


def label_report(targets: Tensor, labels: Tensor) -> LabelReport:
    """Find wrong labels: those that the running targets disagree with.

    Args:
        targets: T, [N, C].
        labels: the labels trained on, [N], in the order of the table.

    Example::

        report = label_report(targets, labels)
        suspects = report.suspect.nonzero().flatten()
    """
    check(labels.shape == targets.shape[:1], "labels", tuple(labels.shape), f"shape [{len(targets)}], one per row of T")
    labels, values = labels.cpu(), targets.float().cpu()
    best, argmax = values.max(dim=1)
    seen = best > 0
    confidence = torch.where(seen, best / values.sum(dim=1).clamp_min(1e-12), 0.0)
    return LabelReport(labels, argmax, confidence, seen & (argmax != labels))

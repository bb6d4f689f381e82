"""The three losses of koala."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class DistillationLoss(NamedTuple):
    """The scalar ``total`` and its parts: ``task``, ``out``, and the layers' losses (L,) of every feature."""

    total: Tensor
    task: Tensor
    out: Tensor
    features: dict[str, Tensor]


def distillation_loss(
    target: Tensor,
    student: Tensor,
    teacher: Tensor,
    features: Mapping[str, tuple[Sequence[Tensor], Sequence[Tensor]]],
    lambda_task: float = 1.0,
    lambda_out: float = 1.0,
    lambda_feature: float = 1.0,
) -> DistillationLoss:
    """``l_t |eps - eps_S|^2 + l_o |eps_T - eps_S|^2 + l_f sum_l |f_T^l - f_S^l|^2``; KOALA, eq. 1-3.

    Each square is the mean over its elements, in float32 at least; the sum over layers is plain and grows with depth.

    Args:
        target: what is to be predicted, the noise (B, C, H, W).
        student, teacher: the two predictions (B, C, H, W).
        features: ``{feature: (the student's tensors, the teacher's)}``, pairs of equal shape.
        lambda_task, lambda_out, lambda_feature: weights >= 0.

    Example::

        loss = distillation_loss(eps, eps_s, eps_t, {"sa": (student_features, teacher_features)}).total
    """
    task, out = mean_square(student, target), mean_square(student, teacher)
    each = {
        name: torch.stack([mean_square(s, t) for s, t in zip(ours, theirs, strict=True)])
        for name, (ours, theirs) in features.items()
    }
    summed = sum(losses.sum() for losses in each.values())
    return DistillationLoss(lambda_task * task + lambda_out * out + lambda_feature * summed, task, out, each)


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared difference, in float32 at least."""
    return F.mse_loss(*(x if x.dtype == torch.float64 else x.float() for x in (a, b)))

"""Where a module's training loss can be heard example by example."""

from __future__ import annotations

from torch import Tensor


class MeanLoss:
    """Makes the training loss in one place: a method that others may wrap, as ``TimestepSamplerCallback`` does.

    Example::

        loss = self.mean_loss(F.mse_loss(prediction, target, reduction="none"))     # in a training_step
    """

    def mean_loss(self, losses: Tensor) -> Tensor:
        """The mean of ``losses``, ``[B, ...]``: of each example, or of each of its elements, weights included."""
        return losses.mean()

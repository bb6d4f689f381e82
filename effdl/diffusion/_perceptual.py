"""Distances on decoded images, for distillation's second phase."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from effdl.core.errors import ConfigurationError, check
from effdl.core.teacher import freeze

Distance = Callable[[Tensor, Tensor], Tensor]
SMALLEST = 16  # pixels; VGG pools four times


def lpips() -> nn.Module:
    """LPIPS over VGG-16 (``[B, 3, H, W]`` in [-1, 1], twice, to ``[B, 1, 1, 1]``), as torchmetrics holds it.

    Raises:
        ConfigurationError: VGG's weights are neither in torchvision's cache nor to be had.
    """
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        return LearnedPerceptualImagePatchSimilarity(net_type="vgg").net
    except (OSError, RuntimeError) as error:
        raise ConfigurationError(
            f"distance='lpips' needs torchvision's VGG-16 weights, which cannot be loaded ({error}): "
            "put them into torch.hub's cache, or give a callable distance(images, targets)."
        ) from error


def check_distance(distance: Any, stage: str, steps: int) -> None:
    """Raise unless ``distance`` is L2, or an image distance where the student makes an image in one call."""
    valid = distance in ("l2", "lpips") if isinstance(distance, str) else callable(distance)
    check(valid, "distance", distance, "'l2', 'lpips' or a callable")
    check(distance == "l2" or (stage == "distill" and steps == 1), "distance", distance,
          "'l2' unless stage='distill' and steps=1",
          "Images exist only where the student makes one in a single step from the noise.")  # fmt: skip


class PerceptualDistance(nn.Module):
    """``E D(decode(a), decode(b))``, in fp32, for latents or images a and b.

    Args:
        source: decodes; its VAE is frozen and passes gradients.
        distance: ``"lpips"`` or a callable ``distance(images, targets)``, per example or already averaged.

    Raises:
        ConfigurationError: LPIPS on images that have not three channels or fewer than 16 pixels.
    """

    def __init__(self, source: Any, distance: str | Distance) -> None:
        super().__init__()
        channels = None
        if source.vae is not None:
            channels = source.vae.config.out_channels
        elif source.shape is not None:
            channels = source.shape[0]
        self.is_lpips = distance == "lpips"
        if self.is_lpips:
            check(channels in (3, None), "distance", distance, f"'l2' for states that decode to {channels} channels",
                  "LPIPS sees RGB: latents need a VAE.")  # fmt: skip
        self.source, self.distance = source, freeze(lpips()) if self.is_lpips else distance

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """A scalar; the gradient flows to ``prediction`` only."""
        images = self.source.decode(prediction)
        with torch.no_grad():
            targets = self.source.decode(target)
        if self.is_lpips:
            fits = images.dim() == 4 and images.shape[1] == 3 and min(images.shape[2:]) >= SMALLEST
            check(fits, "distance", "lpips", f"'l2' for {tuple(images.shape)}: no RGB images of {SMALLEST} pixels")
        with torch.autocast(images.device.type, enabled=False):
            return self.distance(images.float(), targets.float()).mean()

"""Something new to learn, for the recipe: some classes of an image data set, perhaps as negatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from effdl.core.errors import check
from effdl.data.images import ImageData


class ChosenImages(ImageData):
    """:class:`ImageData` of a few classes only.

    Args:
        classes_kept: numbers of the classes that stay, under their own numbers; ``None``: all.
        negative: bright becomes dark.
        kwargs: of ``ImageData``.

    Example::

        data = ChosenImages([7, 8, 9], name="digits", image_size=8, channels=1)
    """

    def __init__(self, classes_kept: list[int] | None = None, negative: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        some = classes_kept is None or len(classes_kept) > 0
        check(some, "classes_kept", classes_kept, "numbers of classes, or None for all")
        self.classes_kept, self.negative = classes_kept, negative

    def _parts(self, splits: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        return {split: self._chosen(*part) for split, part in super()._parts(splits).items()}

    def _chosen(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.classes_kept is not None:
            kept = torch.isin(labels, torch.tensor(self.classes_kept))
            images, labels = images[kept], labels[kept]
        return (255 - images if self.negative else images), labels

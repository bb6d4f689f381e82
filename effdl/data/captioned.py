"""Images with a text each as a LightningDataModule: the digits and their names, a folder, a parquet file, the hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from effdl.core.errors import check
from effdl.core.fingerprint import fingerprint
from effdl.data._read import Images, read_images
from effdl.data.images import ImageData, ImageTensors

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class CaptionedTensors(ImageTensors):
    """:class:`ImageTensors` whose batches also carry ``"prompt"``, a list of B strings: ``texts[label]``.

    Args:
        texts: one for each label.
        kwargs: of :class:`ImageTensors`.
    """

    def __init__(self, images: Tensor, labels: Tensor, texts: Sequence[str], **kwargs: Any) -> None:
        super().__init__(images, labels, **kwargs)
        self.texts = texts

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        batch: dict[str, Any] = super().__getitems__(indices)
        return batch | {"prompt": [self.texts[label] for label in batch["label"].tolist()]}

    def fingerprint(self) -> str:
        """Of images, normalisation and texts."""
        return fingerprint(self.images, self.mean, self.std, [self.texts[i] for i in self.labels.tolist()])


class CaptionedImageData(ImageData):
    """Images with a text each: the embedded digits (offline), a local folder or parquet file, or the hub.

    Batches are those of :class:`ImageData` with ``prompt``, a list of B strings; ``label`` numbers the different texts.

    Args:
        name: ``"digits"``, a hub data set, or a path: a folder of images with a ``metadata.csv`` or ``.jsonl`` of
            ``file_name`` and ``text``, or of ``CLASS/*.png``; a parquet file with an image and a text column.
        prompt: a template for the text; ``{}`` becomes the caption, or the name of the class where there are none.
            ``None``: ``"a photo of the digit {}"`` for the digits, else ``"{}"``.
        text_key: column of the captions where it is not called ``text``, ``caption`` or ``prompt``. Of a list the
            first one is taken.
        batch_size, image_size, channels, val, max_train, augment, image_key, seed: as in :class:`ImageData`.

    Raises:
        ConfigurationError: an argument out of range, a path that is not there, columns that are not found.
        HubError: the hub cannot be reached and the cache has no copy.

    Example::

        data = CaptionedImageData("digits", batch_size=64)       # "a photo of the digit three"
        Trainer(max_epochs=20).fit(TextToImageModule("tiny"), data)
    """

    def __init__(
        self,
        name: str = "digits",
        prompt: str | None = None,
        text_key: str | None = None,
        batch_size: int = 64,
        image_size: int | None = None,
        channels: int = 3,
        val: float = 0.1,
        max_train: int | None = None,
        augment: bool = False,
        image_key: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            name, batch_size, image_size, channels, val, max_train, augment=augment, image_key=image_key, seed=seed
        )
        given = prompt or ("a photo of the digit {}" if name == "digits" else "{}")
        check(isinstance(given, str) and given.count("{}") == 1, "prompt", prompt, "a template with one {}")
        self.prompt, self.text_key = given, text_key

    @property
    def prompts(self) -> tuple[str, ...]:
        """The different texts, in the order of their labels."""
        return tuple(self.prompt.replace("{}", text) for text in self.classes)

    def _read(self) -> Images:
        if self.name == "digits":
            return Images(super()._read().splits, DIGITS)
        return read_images(self.name, self.image_size, self.channels, self.image_key, self.text_key, text=True)

    def _dataset(self, split: str, images: Tensor, labels: Tensor) -> CaptionedTensors:
        augment = self.augment and split == "train"
        return CaptionedTensors(
            images, labels, self.prompts, mean=self.mean, std=self.std, augment=augment, seed=self.seed
        )

"""Images as a LightningDataModule: decoded once, kept as tensors, in an order that is a function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from effdl.core.errors import check, check_choice, check_integer, check_number
from effdl.data._read import Images, read_images
from effdl.data._splits import SplitData
from effdl.data.noise import CIFAR10_CONFUSIONS, CIFAR100_CONFUSIONS, asymmetric_noise, symmetric_noise

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class ImageTensors(Dataset):
    """Images and labels in memory. ``dataset[i]`` is one example; ``__getitems__`` returns a whole *collated* batch.

    A batch is ``{"image": float32 (B, C, H, W), "label": int64 (B,), "index": int64 (B,)}``.
    Load it with ``ResumableLoader(dataset, collate_fn=as_it_is)``; torch's default collation is not needed.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,), perhaps noisy.
        mean, std: of the normalisation ``(image / 255 - mean) / std``, one number or one per channel.
        clean_labels: the labels before noise was added; ``labels`` by default.
        augment: random crop (out of a border of an eighth) and horizontal flip, drawn from (seed, epoch, index).
        indexed: whether batches carry ``"index"``.
        crops: how many crops of an image there are under ``augment``; number (epoch mod crops) is shown, drawn from
            (seed, number, index), and batches carry ``"crop"``: int64 (B, 3), of :func:`cropped`. 0: always new ones.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: float | Sequence[float] = 0.5,
        std: float | Sequence[float] = 0.5,
        clean_labels: Tensor | None = None,
        augment: bool = False,
        indexed: bool = True,
        seed: int = 0,
        crops: int = 0,
    ) -> None:
        self.images, self.labels, self.crops = images, labels, crops
        self.clean_labels = labels if clean_labels is None else clean_labels
        self.mean, self.std = (255 * torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (mean, std))
        self.augment, self.indexed, self.seed, self.epoch = augment, indexed, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by ``ResumableLoader``: the augmentation is a function of it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([i]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        index = torch.as_tensor(indices)
        images = self.images[index]
        crop = self._crop(list(map(int, indices)), images.shape[-2]) if self.augment else None
        images = images if crop is None else cropped(images, crop)
        image = images.to(torch.float32).sub_(self.mean).div_(self.std)
        batch = {"image": image, "label": self.labels[index]}
        batch |= {"index": index} if self.indexed else {}
        return batch | {"crop": crop} if self.augment and self.crops else batch

    def _crop(self, indices: list[int], height: int) -> Tensor:
        if not self.crops:
            return draw_crops(len(indices), height, np.random.default_rng([self.seed, self.epoch, *indices]))
        number = self.epoch % self.crops
        return torch.cat([draw_crops(1, height, np.random.default_rng([self.seed, number, i])) for i in indices])


def draw_crops(count: int, height: int, rng: np.random.Generator) -> Tensor:
    """int64 (count, 3): top and left corner in an image with a border of an eighth; 1 for the half to mirror."""
    corners = rng.integers(0, 2 * max(height // 8, 1) + 1, (count, 2))
    return torch.from_numpy(np.column_stack([corners, rng.random(count) < 0.5]).astype(np.int64))


def cropped(images: Tensor, crop: Tensor) -> Tensor:
    """Each image (B, C, H, W) shifted by up to an eighth of its side (zeros come in) and perhaps mirrored.

    Args:
        images: of any dtype.
        crop: (B, 3), of :func:`draw_crops`.
    """
    height, width = images.shape[-2:]
    padded = torch.nn.functional.pad(images, [max(height // 8, 1)] * 4)
    corners = crop[:, :2].tolist()
    parts = [image[:, top : top + height, left : left + width] for image, (top, left) in zip(padded, corners)]
    shifted = torch.stack(parts)
    return torch.where(crop[:, 2].bool().view(-1, 1, 1, 1), shifted.flip(-1), shifted)


class ImageData(SplitData):
    """Images from the embedded digits (offline), the hub, a local folder, or a parquet or npz file.

    Everything is decoded once into uint8 tensors; batches are dicts ``image`` float32 (B, C, H, W), ``label`` int64
    (B,) and ``index`` int64 (B,), the position of the example in its split. A split that the data does not have is held
    out of the training examples. Training order: a function of (seed, epoch); the loader resumes mid-epoch.

    Args:
        name: ``"digits"`` (scikit-learn's 1,797 handwritten digits, 1,297 of them for training), a hub data set
            (``"cifar10"``), or a path: a folder of images (``train/CLASS/*.png``, as ``datasets`` reads it), a parquet
            file with an image and a label column, an npz file with ``x_train``, ``y_train``, ``x_test``, ``y_test`` (or
            ``x``, ``y``; uint8, NHWC or NHW; perhaps ``classes``).
        batch_size: examples per batch and process.
        image_size: side of the (square) images; ``None``: 32 for the digits, else the size that the data has.
        channels: 3, or 1 for grey.
        val: share of the training examples held out for validation where the data has no validation split.
        max_train: use at most this many training examples.
        noise: ``"symmetric"`` or ``"asymmetric"`` wrong labels in train and validation, never in test.
        noise_rate: share of the examples that get a (perhaps) wrong label, in [0, 1].
        augment: random crops and mirror images in training. Off by default: a mirrored digit is no digit.
        mean, std: of the normalisation, one number or one per channel; pixels are in [0, 1] before it.
        indexed: whether batches carry ``index``.
        crops: with ``augment``, so many crops of an image, each shown again after as many epochs, and batches carry
            ``crop``, which tells them apart: for what is kept per crop (``SoftLabelCache``). 0: new ones every epoch.
        image_key, label_key: columns to read where the usual names do not fit.
        seed: of the held-out split, the noise, the training order and the augmentation.

    Raises:
        ConfigurationError: an argument out of range, a path that is not there, columns that are not found.
        HubError: the hub cannot be reached and the cache has no copy.

    Example::

        data = ImageData("digits", batch_size=64)
        model = ImageClassifier("resnet18", num_classes=data.num_classes)
        Trainer(max_epochs=5).fit(model, data)
        data = ImageData("cifar10.npz", noise="symmetric", noise_rate=0.4)     # data.train_dataset.clean_labels
    """

    def __init__(
        self,
        name: str = "digits",
        batch_size: int = 64,
        image_size: int | None = None,
        channels: int = 3,
        val: float = 0.1,
        max_train: int | None = None,
        noise: Literal["symmetric", "asymmetric"] | None = None,
        noise_rate: float = 0.0,
        augment: bool = False,
        mean: float | list[float] = 0.5,
        std: float | list[float] = 0.5,
        indexed: bool = True,
        crops: int = 0,
        image_key: str | None = None,
        label_key: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check(isinstance(name, str) and name != "", "name", name, "'digits', a hub data set or a path")
        check_integer("batch_size", batch_size, 1)
        check_integer("seed", seed, 0)
        check_integer("crops", crops, 0)
        check(augment or crops == 0, "crops", crops, "0 without augment=True")
        check_choice("channels", channels, (1, 3))
        check_choice("noise", noise, (None, "symmetric", "asymmetric"))
        check_number("val", val, 0, 1, closed="[)", fix="0.1 holds out a tenth of the training examples.")
        check_number("noise_rate", noise_rate, 0, 1)
        check(noise_rate == 0 or noise is not None, "noise", noise, "'symmetric' or 'asymmetric' with a noise_rate")
        for argument, value in (("image_size", image_size), ("max_train", max_train)):
            if value is not None:
                check_integer(argument, value, 1)
        for argument, value in (("mean", mean), ("std", std)):
            ok = isinstance(value, (int, float)) or (isinstance(value, (list, tuple)) and len(value) in (1, channels))
            check(ok, argument, value, f"one number or {channels}")
        check(bool(np.all(np.asarray(std) > 0)), "std", std, "positive numbers")
        self.name, self.batch_size, self.image_size, self.channels = name, batch_size, image_size, channels
        self.val, self.max_train, self.noise, self.noise_rate = val, max_train, noise, noise_rate
        self.augment, self.mean, self.std, self.indexed, self.crops = augment, mean, std, indexed, crops
        self.image_key, self.label_key, self.seed = image_key, label_key, seed
        self._splits: dict[str, ImageTensors] | None = None

    # What a model wants to know before training; reads the data at the first question.

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self._read().classes

    @property
    def num_classes(self) -> int:
        """Number of classes, for linking to a model's ``num_classes``."""
        return len(self.classes)

    @property
    def num_examples(self) -> int:
        """Number of training examples; ``index`` of a training batch is below it."""
        return len(self.train_dataset)

    def _read(self) -> Images:
        size = 32 if self.name == "digits" and self.image_size is None else self.image_size
        return read_images(self.name, size, self.channels, self.image_key, self.label_key)

    def _datasets(self) -> dict[str, ImageTensors]:
        if self._splits is None:
            parts = self._parts(self._read().splits)
            self._splits = {split: self._dataset(split, *part) for split, part in parts.items()}
        return self._splits

    def _parts(self, splits: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        """Training, validation and test examples; what the data does not have is held out of its training split."""
        splits = dict(splits)
        check("train" in splits, "name", self.name, f"a data set with a train split, not only {sorted(splits)}")
        images, labels = splits["train"]
        rest = torch.from_numpy(np.random.default_rng(self.seed).permutation(len(labels)))
        held = {"validation": splits.get("validation", splits.get("valid")), "test": splits.get("test")}
        count = round(self.val * len(labels))
        for split, part in held.items():
            if part is None:
                held[split], rest = (images[rest[:count]], labels[rest[:count]]), rest[count:]
        rest = rest[: self.max_train]
        return {"train": (images[rest], labels[rest])} | held

    def _dataset(self, split: str, images: Tensor, labels: Tensor) -> ImageTensors:
        noisy = labels if split == "test" or not self.noise_rate else self._noisy(labels, split)
        augment = self.augment and split == "train"
        return ImageTensors(images, noisy, self.mean, self.std, labels, augment, self.indexed, self.seed, self.crops)

    def _noisy(self, labels: Tensor, split: str) -> Tensor:
        seed = 2 * self.seed + (split == "validation")
        if self.noise == "symmetric":
            return symmetric_noise(labels, self.noise_rate, self.num_classes, seed)
        return asymmetric_noise(labels, self.noise_rate, confusions_of(self.classes), seed)


def confusions_of(classes: Sequence[str]) -> Mapping[int, int]:
    """What is mistaken for what: the literature's tables for CIFAR-10 and CIFAR-100, else each class for the next."""
    if tuple(classes) == CIFAR10_CLASSES:
        return CIFAR10_CONFUSIONS
    if len(classes) == 100 and tuple(classes[:2]) == ("apple", "aquarium_fish"):
        return CIFAR100_CONFUSIONS
    return {label: (label + 1) % len(classes) for label in range(len(classes))}

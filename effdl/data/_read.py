"""Where images come from: the embedded digits, the hub, a local folder, a parquet or an npz file; decoded once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effdl.core.errors import ConfigurationError, check
from effdl.core.hub import from_hub

IMAGE_COLUMNS = ("image", "img", "pixel_values", "x")
LABEL_COLUMNS = ("label", "labels", "fine_label", "target", "y")
TEXT_COLUMNS = ("text", "caption", "prompt", "captions", "sentence")
LOCAL_FORMS = "a folder of images (train/CLASS/*.png), a parquet file, an .npz file (x_train, y_train, x_test, y_test)"
MAX_BYTES = 16 * 2**30


@dataclass(frozen=True)
class Images:
    """Decoded splits: uint8 (N, C, H, W) with int64 labels (N,), by name; ``classes`` are the names of the labels."""

    splits: dict[str, tuple[Tensor, Tensor]]
    classes: tuple[str, ...]


def local_path(name: str) -> Path | None:
    """``name`` as an existing path, or ``None`` where it is a hub id; a path that is not there is refused."""
    path = Path(name).expanduser()
    if path.exists():
        return path
    looks_like_one = path.is_absolute() or path.suffix in (".npz", ".parquet", ".txt") or name.startswith((".", "~"))
    check(not looks_like_one, "name", name, "an existing path or the name of a hub data set", "No such file.")
    return None


def read_images(
    name: str,
    image_size: int | None,
    channels: int,
    image_key: str | None = None,
    label_key: str | None = None,
    text: bool = False,
) -> Images:
    """Read and decode a data set; kept in memory, so that the second module of a process gets the same tensors.

    Args:
        name: ``"digits"``, a hub id, or a local path (``LOCAL_FORMS``).
        image_size: side of the square images; ``None`` keeps the data's own size.
        channels: 1 or 3.
        image_key, label_key: columns (or npz fields without ``_train``), where the usual names do not fit.
        text: prefer a column of texts over one of labels: the different texts are then the classes.
    """
    path = None if name == "digits" else local_path(name)
    changed = path.stat().st_mtime_ns if path else 0
    return _read(str(path or name), changed, image_size, channels, image_key, label_key, text)


@lru_cache(maxsize=4)
def _read(
    name: str,
    changed: int,
    image_size: int | None,
    channels: int,
    image_key: str | None,
    label_key: str | None,
    text: bool,
) -> Images:
    if name == "digits":
        raw, classes = _columns(_digits(), image_key, label_key)
    elif Path(name).suffix == ".npz":
        raw, classes = _npz(Path(name), image_key, label_key)
    else:
        data = _datasets(name)
        data, label_key = _texts_as_labels(data, label_key) if text else (data, label_key)
        raw, classes = _columns(data, image_key, label_key)
    splits = {split: (decode(x, image_size, channels), _labels(y)) for split, (x, y) in raw.items()}
    count = 1 + max(int(labels.max()) for _, labels in splits.values())
    return Images(splits, tuple(classes or map(str, range(count))))


def _digits() -> Any:
    """scikit-learn's 1,797 handwritten digits (8x8, 17 greys) as an HF DatasetDict: 1,297 train, 500 test."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images * 255 / 16).round().astype(np.uint8)
    order = np.random.RandomState(0).permutation(len(images))  # the legacy stream: frozen in every NumPy
    features = Features({"image": Image(), "label": ClassLabel(names=list("0123456789"))})
    rows = {"train": order[:1297], "test": order[1297:]}
    return DatasetDict(
        {
            split: Dataset.from_dict({"image": list(images[i]), "label": digits.target[i]}, features=features)
            for split, i in rows.items()
        }
    )


def _datasets(name: str) -> dict[str, Any]:
    from datasets import Dataset, load_dataset

    if Path(name).suffix == ".parquet":
        return {"train": Dataset.from_parquet(name)}
    return from_hub(load_dataset, name, instead=LOCAL_FORMS)


def _npz(path: Path, image_key: str | None, label_key: str | None) -> tuple[dict[str, tuple], list[str] | None]:
    x, y = image_key or "x", label_key or "y"
    with np.load(path, allow_pickle=False) as file:
        names = {"train": "train", "val": "validation", "test": "test"}
        raw = {
            names[split]: (file[f"{x}_{split}"], file[f"{y}_{split}"])
            for split in names
            if f"{x}_{split}" in file and f"{y}_{split}" in file
        }
        if x in file and y in file:
            raw.setdefault("train", (file[x], file[y]))
        if "train" not in raw:
            raise ConfigurationError(f"{path} has {file.files}; expected {x}_train and {y}_train, or {x} and {y}.")
        return raw, [str(c) for c in file["classes"]] if "classes" in file else None


def _columns(data: dict[str, Any], image_key: str | None, label_key: str | None) -> tuple[dict[str, tuple], Any]:
    import datasets

    first = data["train"] if "train" in data else next(iter(data.values()))
    image = _column(first.features, image_key, datasets.Image, IMAGE_COLUMNS, "image_key")
    label = _column(first.features, label_key, datasets.ClassLabel, LABEL_COLUMNS, "label_key")
    raw = {}
    for split, table in data.items():
        # parquet files written without HF's own metadata hold bytes, or structs of bytes and a path
        if isinstance(table.features[image], dict) or table.features[image] == datasets.Value("binary"):
            table = table.cast_column(image, datasets.Image())
        if table.features[label] == datasets.Value("string"):
            table = table.class_encode_column(label)
        raw[split] = (table[image], table[label])
        classes = getattr(table.features[label], "names", None)
    return raw, classes


def _texts_as_labels(data: dict[str, Any], text_key: str | None) -> tuple[dict[str, Any], str | None]:
    """The tables with their texts as numbered classes, the same numbers in all splits; as they are without texts."""
    from datasets import ClassLabel

    first = next(iter(data.values()))
    key = text_key or next((name for name in TEXT_COLUMNS if name in first.features), None)
    if key is None:
        return data, None
    check(key in first.features, "text_key", key, f"one of the columns {list(first.features)}")
    texts = {
        split: [text if isinstance(text, str) else text[0] for text in table[key]] for split, table in data.items()
    }
    names = sorted({text for column in texts.values() for text in column})
    number = {text: i for i, text in enumerate(names)}
    tables = {
        split: table.remove_columns(key).add_column(key, [number[text] for text in texts[split]])
        for split, table in data.items()
    }
    return {split: table.cast_column(key, ClassLabel(names=names)) for split, table in tables.items()}, key


def _column(features: Any, given: str | None, kind: type, usual: Sequence[str], argument: str) -> str:
    if given is not None:
        check(given in features, argument, given, f"one of the columns {list(features)}")
        return given
    typed = [name for name, feature in features.items() if isinstance(feature, kind)]
    named = [name for name in usual if name in features]
    if not typed and not named:
        raise ConfigurationError(f"{argument} must say which of the columns {list(features)} to use.")
    return (typed + named)[0]


def _labels(labels: Any) -> Tensor:
    labels = np.asarray(labels).reshape(-1)
    check(np.issubdtype(labels.dtype, np.integer), "label_key", str(labels.dtype), "integer labels")
    return torch.from_numpy(labels.astype(np.int64))


def decode(images: Any, image_size: int | None, channels: int) -> Tensor:
    """PIL images, or uint8 arrays (H, W) or (H, W, C), as one uint8 tensor (N, ``channels``, H, W)."""
    if len(images) == 0:
        raise ConfigurationError("the data set has no images.")
    stacked = isinstance(images, np.ndarray)
    if stacked:
        ok = images.dtype == np.uint8 and images.ndim in (3, 4)
        check(ok, "name", f"{images.dtype} {images.shape}", "uint8 images (N, H, W) or (N, H, W, C)", "Times 255?")
    step = 1024 if stacked else 1
    out: Tensor | None = None
    for i in range(0, len(images), step):
        pixels = _fit(images[i : i + step] if stacked else _pixels(images[i])[None], image_size, channels)
        if out is None:
            size = len(images) * pixels[0].numel()
            check(size <= MAX_BYTES, "image_size", image_size, "images that fit in 16 GiB", "Use smaller images.")
            out = torch.empty(len(images), *pixels.shape[1:], dtype=torch.uint8)
        if pixels.shape[1:] != out.shape[1:]:
            sizes = f"{tuple(out.shape[2:])} and {tuple(pixels.shape[2:])}"
            check(False, "image_size", image_size, "a number, as the images differ in size", f"Some are {sizes}.")
        out[i : i + step] = pixels
    return out


def _pixels(image: Any) -> np.ndarray:
    grey = getattr(image, "mode", "RGB") in ("1", "L", "I", "I;16", "F")
    return np.array(image.convert("L" if grey else "RGB") if hasattr(image, "convert") else image, dtype=np.uint8)


def _fit(images: np.ndarray, image_size: int | None, channels: int) -> Tensor:
    """uint8 (B, H, W) or (B, H, W, C) -> uint8 (B, ``channels``, side, side): shorter side resized, centre cropped."""
    from torchvision.transforms.v2 import functional as F

    pixels = torch.from_numpy(images)
    pixels = pixels.permute(0, 3, 1, 2) if pixels.ndim == 4 else pixels[:, None]
    if pixels.shape[1] == 3 and channels == 1:
        pixels = F.rgb_to_grayscale(pixels)
    pixels = pixels[:, :channels].expand(-1, channels, -1, -1)
    if image_size is not None and pixels.shape[2:] != (image_size, image_size):
        pixels = F.center_crop(F.resize(pixels, [image_size], antialias=True), [image_size, image_size])
    return pixels

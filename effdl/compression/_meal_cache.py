"""meal-v2: what the teachers say, asked once and kept on disk (the FKD speed-up, arXiv 2112.01528).

Of q, the teachers' mean softmax for one crop of one image, the k largest probabilities are kept; what is left of 1 is
spread evenly over the other C - k classes ("marginal smoothing"). k = C keeps q exactly.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effdl.compression._meal_keys import TENSORS, codes_of, keys_of, table_of
from effdl.compression._meal_teachers import Teachers, as_list, check_views, check_weights
from effdl.core.batch import crop_of, unpack
from effdl.core.calibrate import to_device
from effdl.core.distill import Teacher, mean_probabilities, network_inputs
from effdl.core.errors import ConfigurationError, check, check_integer
from effdl.core.fingerprint import fingerprint
from effdl.core.random import preserved_rng

_FORMAT = "effdl soft labels 1"


def smoothed(classes: Tensor, values: Tensor, num_classes: int) -> Tensor:
    """q [B, C] of its k largest, [B, k]: the rest of 1 is spread evenly over the other C - k classes."""
    rest = (1 - values.sum(1, keepdim=True)).clamp(min=0) / max(num_classes - values.shape[1], 1)
    return rest.expand(-1, num_classes).scatter(1, classes.long(), values)


class SoftLabelCache:
    """The teachers' soft labels by (index, crop): training with it runs no teacher.

    Batches must say which example an image is (``index``) and, where it is one of several crops, which (``crop``), as
    ``ImageData(augment=True, crops=M)`` does: M crops of each image, drawn from (seed, number, index), shown again
    after M epochs. Without augmentation the index is enough. Nothing else may change an image at random: CutMix does.

    Made by :meth:`build` or :meth:`load`. A row takes 4k bytes (probabilities), 2k (classes; 4k beyond 32767 of them)
    and 12 for its key and a mark of its image, by which other data is noticed; all of it lies on the GPU in training.

    Example::

        data = ImageData("cifar10", augment=True, crops=4)
        SoftLabelCache.build(["senet154.gluon_in1k"], data, k=5, device="cuda").save("soft.safetensors")
        MEALV2ImageClassifier(teachers=["senet154.gluon_in1k"], cache="soft.safetensors", adversarial=None, ...)
    """

    def __init__(self, tensors: dict[str, Tensor], num_classes: int, teachers: str, views: str) -> None:
        self.num_classes, self.teachers, self.views = num_classes, teachers, views
        self._tensors = tensors

    @property
    def k(self) -> int:
        return self._tensors["values"].shape[1]

    def __len__(self) -> int:
        return len(self._tensors["codes"])

    def __deepcopy__(self, memo: dict[int, Any]) -> SoftLabelCache:
        return self  # WeightAveraging copies the student; what it learns from is shared

    # ---- making one ------------------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        teachers: Teacher | list[Teacher],
        data: Any,
        k: int = 5,
        crops: int | None = None,
        teacher_weights: list[float] | None = None,
        teacher_transform: Any = None,
        input_key: str | None = None,
        device: torch.device | str = "cpu",
    ) -> SoftLabelCache:
        """Ask the teachers about every crop of the training data.

        Args:
            teachers, teacher_weights, teacher_transform, input_key: as for ``MEALV2Mixin``, which must get the same.
            data: the run's LightningDataModule (or a loader) of batches with ``index``.
            k: probabilities to keep of each q, 1 <= k <= C.
            crops: passes over the data, each with the next epoch's crops; ``None``: ``data.crops`` of them, or 1.
            device: where the teachers run.

        Raises:
            ConfigurationError: an argument out of range, a batch without ``index``, crops that are not told apart,
                NaN from a teacher.
        """
        check_integer("k", k, 1)
        passes = (getattr(data, "crops", None) or 1) if crops is None else crops
        check_integer("crops", passes, 1)
        random = getattr(data, "augment", False) and not getattr(data, "crops", 0)
        check(not random, "data", type(data).__name__, "one whose crops come again", "Set its crops beside augment.")
        given = as_list(teachers)
        check_weights(teacher_weights, len(given))
        check_views(teacher_transform, len(given))
        asked = Teachers(given, nn.Identity(), teacher_transform)
        asked.prepare(torch.device(device), data)
        with preserved_rng():
            batches = (to_device(batch, device) for batch in _batches(data, passes))
            rows = [_row(batch, asked, k, teacher_weights, input_key) for batch in batches]
        check(bool(rows), "data", type(data).__name__, "at least one batch")
        keys, classes, values, marks, totals = (torch.cat(part) for part in zip(*rows))
        check(bool(values.isfinite().all()), "teachers", "NaN", "finite logits for every image")
        table = table_of(keys, classes, values, marks)
        return cls(table, int(totals[0]), asked.identity(teacher_weights), asked.seen())

    # ---- asking it -------------------------------------------------------------------------------------------------

    def find(self, index: Tensor, crop: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rows of some keys, and which of these are known; on the device of ``index``, nobody waits for it.

        Args:
            index: int [B].
            crop: int [B] or [B, P], what tells the crops of an image apart; ``None`` where there is one of each.

        Raises:
            ConfigurationError: keys of another width.
        """
        low, span, codes = (self._on(index.device)[name] for name in ("low", "span", "codes"))
        keys = keys_of(index, crop)
        width = f"{len(low) - 1} numbers beside the index, as when the cache was built"
        check(keys.shape[1] == len(low), "crop", keys.shape[1] - 1, width)
        offset = keys - low
        code = codes_of(offset, span)
        row = torch.searchsorted(codes, code).clamp_(max=len(codes) - 1)
        return row, ((offset >= 0) & (offset < span)).all(1) & (codes[row] == code)

    def soft_labels(self, row: Tensor) -> Tensor:
        """q [B, C] of some rows, float32."""
        tensors = self._on(row.device)
        return smoothed(tensors["classes"][row], tensors["values"][row], self.num_classes)

    def lookup(self, index: Tensor, crop: Tensor | None = None) -> Tensor:
        """q [B, C] by key (:meth:`find`); waits for the device.

        Raises:
            ConfigurationError: a key that the cache does not have.
        """
        row, known = self.find(index, crop)
        if not bool(known.all()):
            raise ConfigurationError(f"index, crop: the cache has no {keys_of(index, crop)[~known][0].tolist()}.")
        return self.soft_labels(row)

    def answer(self, batch: Any, input_key: str | None = None) -> tuple[Tensor, Tensor]:
        """q [B, C] of a training batch; and bool [2]: all keys are known, all images are those that were asked about.

        Raises:
            ConfigurationError: a batch without ``index``.
        """
        index, inputs = _index_of(batch, input_key), network_inputs(batch, input_key)
        row, known = self.find(index, crop_of(batch))
        mark, size = _mark(inputs, index)
        same = (mark - self._on(index.device)["marks"][row]).abs() <= 0.005 * size + 1e-6  # also after bf16
        return self.soft_labels(row), torch.stack([known.all(), (same | ~known).all()])

    def verify(self, **wanted: Any) -> None:
        """Raise unless the cache is of these ``teachers``, ``views`` (fingerprints) and ``num_classes``."""
        fix = "Build it anew of the data module, teachers, teacher_weights and teacher_transform of this run."
        for name, value in wanted.items():
            own = getattr(self, name)
            check(value in (None, own), "cache", f"made with {name} {own}", f"one made with {name} {value}", fix)

    # ---- on disk ---------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, with a checksum."""
        from safetensors.torch import save_file

        path = Path(path).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.cpu() for name, tensor in self._tensors.items()}
        told = {"num_classes": self.num_classes, "teachers": self.teachers, "views": self.views}
        signed = json.dumps(told | {"sum": _sum(tensors, told)})
        save_file(tensors, path, {"format": _FORMAT, "told": signed})
        return path

    @classmethod
    def load(cls, path: str | Path) -> SoftLabelCache:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigurationError: no such file, another kind of file, or one that is damaged.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path).expanduser()
        check(path.is_file(), "cache", str(path), "a file that SoftLabelCache.save wrote")
        try:
            with safe_open(path, "pt") as file:
                told = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ConfigurationError(f"cache={str(path)!r} cannot be read: {error}. Build it anew.") from error
        ours = told.get("format") == _FORMAT and set(tensors) == set(TENSORS)
        check(ours, "cache", str(path), "a file that SoftLabelCache.save wrote")
        read = json.loads(told["told"])
        whole = read.pop("sum") == _sum(tensors, read)
        check(whole, "cache", str(path), "an undamaged file", "Build it anew.")
        return cls(tensors, **read)

    def _on(self, device: torch.device) -> dict[str, Tensor]:
        if self._tensors["codes"].device != device:
            with torch.inference_mode(False):
                self._tensors = {name: tensor.to(device) for name, tensor in self._tensors.items()}
        return self._tensors


def open_cache(cache: Any, adversarial: Any, cutmix: float) -> SoftLabelCache | None:
    """The mixin's ``cache``, read where it is a path; raise where other arguments do not go with it."""
    if cache is None:
        return None
    check(isinstance(cache, (str, Path, SoftLabelCache)), "cache", cache, "a path, a SoftLabelCache or None")
    opened = cache if isinstance(cache, SoftLabelCache) else SoftLabelCache.load(cache)
    fix = "The discriminator compares logits, and a cache holds probabilities."
    check(adversarial is None, "adversarial", adversarial, "None with a cache", fix)
    check(cutmix == 0, "cutmix", cutmix, "0 with a cache", "Nobody was asked about the mixed images.")
    return opened


# ---- one batch -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _row(batch: Any, asked: Teachers, k: int, weights: Any, input_key: str | None) -> tuple[Tensor, ...]:
    inputs, index = network_inputs(batch, input_key), _index_of(batch, input_key)
    q = mean_probabilities(asked.logits(inputs), weights)
    check_integer("k", k, 1, q.shape[1], fix="There are no more classes.")
    values, classes = q.topk(k)
    small = torch.int16 if q.shape[1] <= torch.iinfo(torch.int16).max else torch.int32
    keys, (mark, _) = keys_of(index, crop_of(batch)), _mark(inputs, index)
    return keys.cpu(), classes.to(small).cpu(), values.cpu(), mark.cpu(), torch.full((1,), q.shape[1])


def _index_of(batch: Any, input_key: str | None) -> Tensor:
    index = unpack(batch, input_key).index
    told = "a dict with 'index' or a tuple (x, y, index): effdl.data's modules, or IndexedDataset around yours"
    check(isinstance(index, Tensor), "cache: the batch", type(batch).__name__, told)
    return index


def _mark(inputs: Any, index: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each image, its right side weighed more (mirrored it has another), and of its size; 0 of text."""
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        return torch.zeros(len(index), device=index.device), torch.zeros(len(index), device=index.device)
    pixels = inputs.float()
    weighed = pixels * torch.linspace(0, 2, pixels.shape[-1], device=pixels.device)
    return weighed.flatten(1).mean(1), weighed.abs().flatten(1).mean(1)


def _batches(data: Any, passes: int) -> Iterable[Any]:
    loader = data
    if hasattr(data, "train_dataloader"):
        data.prepare_data()
        data.setup("fit")
        loader = data.train_dataloader()
    for number in range(passes):
        for part in (getattr(loader, "sampler", None), getattr(loader, "dataset", None)):
            if hasattr(part, "set_epoch"):
                part.set_epoch(number)
        yield from loader


def _sum(tensors: dict[str, Tensor], told: dict[str, Any]) -> str:
    return fingerprint(told, [(tensors[name].shape, tensors[name]) for name in TENSORS])

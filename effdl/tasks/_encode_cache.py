"""What the frozen encoders of a pipeline say of a data set: computed in one pass, kept in safetensors files.

A cache folder holds ``images-KEY/`` and ``text-KEY/`` with blocks of rows. The key is a fingerprint of the data, the
encoders and the prompts, so a change of any of them makes a new folder. A pass that was stopped goes on with the blocks
that are missing; several processes share the blocks between them. Rows are read when they are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from effdl.core.distributed import rank, world_size
from effdl.core.errors import check
from effdl.core.fingerprint import fingerprint
from effdl.tasks._denoising import prompts_of
from effdl.tasks._diffusers import Surroundings

ROWS = 256  # of a block
STEP = 16  # rows that are encoded together
OPEN = 64  # blocks kept open
SAMPLED = 64  # examples that stand for a data set which does not know its own fingerprint


class Blocks:
    """``count`` rows of named tensors in files of ``ROWS`` rows each.

    Example::

        blocks = Blocks(Path("table"), 1000)
        for number, rows in blocks.missing():
            blocks.write(number, {"x": torch.zeros(len(rows), 3)})
        blocks[[0, 999]]["x"]                                          # (2, 3)
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self._open = lru_cache(OPEN)(lambda number: safe_open(self.path(number), "pt"))

    def path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    def __len__(self) -> int:
        return -(-self.count // ROWS)

    def missing(self) -> Iterator[tuple[int, range]]:
        """Number and rows of the blocks that this process has to write."""
        for number in range(rank(), len(self), world_size()):
            if not self.path(number).is_file():
                yield number, range(number * ROWS, min((number + 1) * ROWS, self.count))

    def write(self, number: int, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """A whole block, or nothing: a file appears when it is complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.path(number).with_suffix(".partial")
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata)
        partial.replace(self.path(number))

    def metadata(self) -> Iterator[dict[str, str]]:
        """Of each block."""
        for number in range(len(self)):
            yield self._open(number).metadata() or {}

    def __getitem__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}
        for row in rows:
            file = self._open(row // ROWS)
            for name in file.keys():  # noqa: SIM118
                found.setdefault(name, []).append(file.get_slice(name)[row % ROWS])
        return {name: torch.stack(tensors) for name, tensors in found.items()}


class EncodeCache:
    """Moments of the latents and embeddings of the prompts, for the data sets of a run.

    Not an ``nn.Module``; a deep copy is itself.

    Args:
        folder: where the blocks lie; all processes of all nodes must see it.
        surroundings: the encoders.

    Example::

        cache = EncodeCache("cache", surroundings)
        cache.fill({"train": loader}, [""], "cuda", trainer.strategy.barrier)
        batch = cache.encoded("train", batch)            # "image" gone, "moments" and the network's text there
    """

    def __init__(self, folder: str | Path, surroundings: Surroundings) -> None:
        self.folder, self.surroundings = Path(folder).expanduser(), surroundings
        self.images: dict[str, Blocks] = {}
        self.texts: Blocks | None = None
        self._row: dict[str, int] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> EncodeCache:
        return self

    def fill(
        self, loaders: dict[str, Any], prompts: Iterable[str], device: Any, barrier: Callable[..., Any] = lambda: None
    ) -> None:
        """Encode what is not there yet: the data sets behind the loaders, their prompts, and further ``prompts``.

        Raises:
            ConfigurationError: a data set without length, ``index`` or prompts, or one that changes its images.
        """
        self.images = {name: self._fill_images(loader, device) for name, loader in loaders.items()}
        barrier()  # the prompts are in all blocks of all processes
        told = [json.loads(entry["prompts"]) for blocks in self.images.values() for entry in blocks.metadata()]
        known = sorted({prompt for block in told for prompt in block} | set(prompts))
        self._row = {prompt: row for row, prompt in enumerate(known)}
        key = fingerprint(
            *(e.module for e in self.surroundings.text_encoders.values()), *_sizes(self.surroundings), known
        )
        self.texts = Blocks(self.folder / f"text-{key}", len(known))
        for number, rows in _progress(self.texts, "Encoding prompts"):
            some = [known[i : min(i + STEP, rows.stop)] for i in _starts(rows)]
            parts = [self.surroundings.encode_prompts(prompts, device) for prompts in some]
            self.texts.write(number, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        self.surroundings.unconditional(device)
        barrier()

    def _fill_images(self, loader: Any, device: Any) -> Blocks:
        data = getattr(loader, "dataset", None)
        check(hasattr(data, "__len__"), "cache", type(loader).__name__, "a DataLoader of a data set with a length")
        check(not getattr(data, "augment", False), "cache", str(self.folder), "images that are not augmented")
        blocks = Blocks(
            self.folder / f"images-{_data_key(loader)}-{fingerprint(self.surroundings.vae.module)}", len(data)
        )
        for number, rows in _progress(blocks, "Encoding images"):
            moments, prompts = [], []
            for i in _starts(rows):
                batch = fetch(loader, range(i, min(i + STEP, rows.stop)))
                mean, std = self.surroundings.image_moments(batch["image"].to(device))
                moments.append(torch.stack((mean, std), 1).cpu())
                prompts += prompts_of(batch)
            blocks.write(number, {"moments": torch.cat(moments)}, {"prompts": json.dumps(prompts)})
        return blocks

    def close(self) -> None:
        """Forget what was filled; the next fit may have other data."""
        self.images, self.texts, self._row = {}, None, {}

    def text(self, prompts: Sequence[str]) -> dict[str, Tensor] | None:
        """The network's arguments for prompts, on the CPU; ``None`` if one of them is not in the cache."""
        rows = [self._row.get(prompt) for prompt in prompts]
        return None if self.texts is None or None in rows else self.texts[rows]

    def encoded(self, name: str, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch on the CPU, its ``image`` replaced by ``moments`` (B, 2, C, h, w): mean and standard deviation."""
        kept = {key: value for key, value in batch.items() if key != "image"}
        return kept | self.images[name][batch["index"].tolist()] | (self.text(prompts_of(batch)) or {})


def _starts(rows: range) -> range:
    return range(rows.start, rows.stop, STEP)


def _progress(blocks: Blocks, what: str) -> Iterable[tuple[int, range]]:
    missing = list(blocks.missing())
    return tqdm(missing, desc=what, leave=False, disable=len(missing) < 2 or rank() > 0)


def _sizes(surroundings: Surroundings) -> Iterator[Any]:
    """What of the tokenizers decides the tokens of a text."""
    for name, part in surroundings.pipeline.components.items():
        if name.startswith("tokenizer") and part is not None:
            ids = part("a photo of 1 cat, please!", truncation=True).input_ids
            yield [len(part), part.model_max_length, ids]


def fetch(loader: Any, rows: Sequence[int]) -> dict[str, Any]:
    """A collated batch of the loader's data set, by position.

    Raises:
        ConfigurationError: it is no dict with ``image``, a prompt, and ``index`` equal to the position.
    """
    data, rows = loader.dataset, list(rows)
    examples = data.__getitems__(rows) if hasattr(data, "__getitems__") else [data[i] for i in rows]
    batch = loader.collate_fn(examples)
    keys = sorted(batch) if isinstance(batch, dict) else type(batch).__name__
    whole = isinstance(batch, dict) and "image" in batch and prompts_of(batch) is not None
    there = whole and "index" in batch and torch.as_tensor(batch["index"]).tolist() == rows
    check(there, "cache", keys, "batches with 'image', 'prompt' and 'index', the position in the data set")
    return batch


def _data_key(loader: Any) -> str:
    """The data set's own ``fingerprint()``, or its length and some of its examples."""
    data = loader.dataset
    if callable(getattr(data, "fingerprint", None)):
        return data.fingerprint()
    batch = fetch(loader, sorted({i * (len(data) - 1) // max(SAMPLED - 1, 1) for i in range(SAMPLED)}))
    return fingerprint(len(data), batch["image"], prompts_of(batch))

"""Text as a LightningDataModule: tokenised once, cut into blocks, in an order that is a function of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from effdl.core.errors import ConfigurationError, check, check_integer, check_number
from effdl.core.hub import from_hub
from effdl.data._read import local_path
from effdl.data._splits import SplitData

LOCAL_FORMS = "a text file, a parquet file with a text column, or a folder of either"
SPLITS = ("train", "validation", "test")


class ByteTokenizer:
    """UTF-8 bytes as tokens: 256 of them, nothing to download, no text it cannot write.

    Example::

        ByteTokenizer().decode(ByteTokenizer().encode("für"))    # "für", by way of [102, 195, 188, 114]
    """

    def __len__(self) -> int:
        return 256

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids).decode("utf-8", errors="replace")


class TokenBlocks(Dataset):
    """Tokens (M,) as M // block_size blocks; ``__getitems__`` returns a whole *collated* batch
    ``{"input_ids": int64 (B, block_size), "labels": the same}`` (the model shifts them by one, as transformers does).
    """

    def __init__(self, tokens: Tensor, block_size: int) -> None:
        count = len(tokens) // block_size
        self.blocks = tokens[: count * block_size].view(count, block_size)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {key: value[0] for key, value in self.__getitems__([i]).items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        ids = self.blocks[torch.as_tensor(indices)].long()
        return {"input_ids": ids, "labels": ids.clone()}


class TextData(SplitData):
    """Blocks of text from Python's own documentation (offline), the hub, or a local text or parquet file.

    Batches are ``{"input_ids": int64 (B, block_size), "labels": int64 (B, block_size)}`` with labels equal to the
    inputs. A split that the data does not have is cut from the end of the training text: first test, then validation.
    Training order: a function of (seed, epoch); the loader resumes mid-epoch.

    Args:
        name: ``"pydoc"`` (465,000 characters of prose: the topics of CPython's ``help()``), a hub data set
            (``"Salesforce/wikitext"``), or a path: a text file, a parquet file, or a folder that ``datasets`` reads.
        tokenizer: ``"bytes"`` (256 tokens, no download), or a transformers tokenizer's hub name or folder.
        block_size: tokens per example.
        batch_size: examples per batch and process.
        val: share of the training text that becomes the validation text, and the same again the test text, each
            where the data has none.
        subset: name of the hub data set's configuration (``"wikitext-2-raw-v1"``).
        text_key: column that holds the text.
        max_train: use at most this many training blocks, those from the start of the text.
        seed: of the training order.

    Raises:
        ConfigurationError: an argument out of range, a path that is not there, a text shorter than one block.
        HubError: the hub cannot be reached and the cache has no copy.

    Example::

        data = TextData(block_size=128, batch_size=16)
        model = LanguageModel(tiny_gpt2(vocab_size=data.vocab_size))
        Trainer(max_epochs=1).fit(model, data)
    """

    def __init__(
        self,
        name: str = "pydoc",
        tokenizer: str = "bytes",
        block_size: int = 128,
        batch_size: int = 16,
        val: float = 0.1,
        subset: str | None = None,
        text_key: str = "text",
        max_train: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check(isinstance(name, str) and name != "", "name", name, "'pydoc', a hub data set or a path")
        check(isinstance(tokenizer, str) and tokenizer != "", "tokenizer", tokenizer, "'bytes', a hub name or a folder")
        check_integer("block_size", block_size, 2)
        check_integer("batch_size", batch_size, 1)
        check_integer("seed", seed, 0)
        check_number("val", val, 0, 0.5, closed="[)", fix="0.1 holds out a tenth of the training text.")
        if max_train is not None:
            check_integer("max_train", max_train, 1)
        self.name, self.tokenizer_name, self.block_size, self.batch_size = name, tokenizer, block_size, batch_size
        self.val, self.subset, self.text_key, self.max_train, self.seed = val, subset, text_key, max_train, seed
        self._splits: dict[str, TokenBlocks] | None = None

    @property
    def tokenizer(self) -> Any:
        """What turns text into tokens and back: ``encode``, ``decode``, ``len``."""
        return _tokenizer(self.tokenizer_name)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, for linking to a model's ``vocab_size``."""
        return len(self.tokenizer)

    def _read(self) -> dict[str, Tensor]:
        path = None if self.name == "pydoc" else local_path(self.name)
        changed = path.stat().st_mtime_ns if path else 0
        return _read(str(path or self.name), changed, self.subset, self.text_key, self.tokenizer_name, self.val)

    def _datasets(self) -> dict[str, TokenBlocks]:
        if self._splits is None:
            splits = {split: TokenBlocks(tokens, self.block_size) for split, tokens in self._read().items()}
            if not len(splits["train"]):
                fix = f"The training text has {len(self._read()['train'])} tokens."
                check(False, "block_size", self.block_size, "a block shorter than the text", fix)
            splits["train"].blocks = splits["train"].blocks[: self.max_train]
            self._splits = splits
        return self._splits


@lru_cache(maxsize=4)
def _tokenizer(name: str) -> Any:
    if name == "bytes":
        return ByteTokenizer()
    from transformers import AutoTokenizer

    return from_hub(AutoTokenizer.from_pretrained, name, instead="a tokenizer's folder, or tokenizer='bytes'")


@lru_cache(maxsize=4)
def _read(name: str, changed: int, subset: str | None, text_key: str, tokenizer: str, val: float) -> dict[str, Tensor]:
    """Tokens of the three splits, int32 (M,), kept in memory for the next data module of the process."""
    texts = split_text(_texts(name, subset, text_key), val)
    encode = _tokenizer(tokenizer).encode
    return {
        split: torch.from_numpy(np.asarray(encode(text, add_special_tokens=False), dtype=np.int32))
        for split, text in texts.items()
    }


def _texts(name: str, subset: str | None, text_key: str) -> dict[str, str]:
    import datasets

    path = Path(name)
    if name == "pydoc":
        data = {"train": datasets.Dataset.from_dict({text_key: _pydoc()})}
    elif path.is_file() and path.suffix != ".parquet":
        return {"train": path.read_text(encoding="utf-8")}
    elif path.is_file():
        data = {"train": datasets.Dataset.from_parquet(name)}
    else:
        data = from_hub(datasets.load_dataset, name, *([subset] if subset else []), instead=LOCAL_FORMS)
    for table in data.values():
        check(text_key in table.column_names, "text_key", text_key, f"one of the columns {table.column_names}")
    return {split: "\n".join(table[text_key]) for split, table in data.items()}


def _pydoc() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ConfigurationError(
            f"name='pydoc' is not valid: this Python came without pydoc_data; name {LOCAL_FORMS} instead."
        ) from error
    return [topics[topic] for topic in sorted(topics)]


def split_text(texts: dict[str, str], val: float) -> dict[str, str]:
    """Training, validation and test text; what is missing is cut from the end of the training text.

    Example::

        split_text({"train": "0123456789"}, val=0.2)    # {"train": "012345", "validation": "67", "test": "89"}
    """
    check("train" in texts, "name", sorted(texts), "a data set with a train split")
    texts = dict(texts)
    share = round(val * len(texts["train"]))
    for split in ("test", "validation"):
        if split not in texts:
            cut = len(texts["train"]) - share
            texts["train"], texts[split] = texts["train"][:cut], texts["train"][cut:]
    return {split: texts[split] for split in SPLITS}

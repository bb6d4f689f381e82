"""effdl.data.text: every way in, the blocks, the splits and the tokenizers."""

from __future__ import annotations

import math

import pytest
import torch

from effdl.core.errors import ConfigurationError
from effdl.data.text import ByteTokenizer, TextData, split_text
from tests.support import offline_hub

TEXT = "".join(f"{i:04d} " for i in range(1000))  # 5,000 characters, each place recognisable


@pytest.fixture
def file(tmp_path) -> str:
    (tmp_path / "some.txt").write_text(TEXT)
    return str(tmp_path / "some.txt")


def text_of(dataset) -> str:
    return ByteTokenizer().decode(dataset.blocks.flatten().tolist())


def test_python_documentation_is_the_default_and_needs_no_network():
    data = TextData(block_size=64, batch_size=8)
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"input_ids", "labels"}
    for value in batch.values():
        assert value.shape == (8, 64)
        assert value.dtype == torch.int64
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert batch["input_ids"].max() < data.vocab_size == 256
    assert "statement" in text_of(data.train_dataset)
    sizes = [len(d) for d in (data.train_dataset, data.val_dataset, data.test_dataset)]
    assert [round(s / sum(sizes), 2) for s in sizes] == [0.8, 0.1, 0.1]


def test_labels_may_be_changed_without_changing_the_inputs():
    batch = TextData(block_size=64).train_dataset.__getitems__([0, 1])
    batch["labels"][:] = -100
    assert batch["input_ids"].min() >= 0


def test_byte_tokenizer_writes_any_text():
    text = "naïve – 数学\n"
    assert ByteTokenizer().decode(ByteTokenizer().encode(text)) == text


def test_text_file_is_cut_into_three_texts_in_order(file):
    data = TextData(file, block_size=10)
    parts = [text_of(d) for d in (data.train_dataset, data.val_dataset, data.test_dataset)]
    assert "".join(parts) == TEXT
    assert [len(p) for p in parts] == [4000, 500, 500]


def test_splits_the_data_has_are_kept():
    expected = {"train": "01234567", "validation": "89", "test": "ab"}
    assert split_text({"train": "0123456789", "test": "ab"}, 0.2) == expected
    whole = {"train": "0", "validation": "1", "test": "2"}
    assert split_text(whole, 0.3) == whole


def test_without_validation_there_is_no_validation_loader(file):
    assert TextData(file, val=0.0).val_dataloader() == []


def test_parquet_file(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": [TEXT[:2500], TEXT[2500:]]}).to_parquet(tmp_path / "t.parquet")
    data = TextData(str(tmp_path / "t.parquet"), block_size=1000, val=0.0)
    assert text_of(data.train_dataset) == (TEXT[:2500] + "\n" + TEXT[2500:])[:5000]


def test_folder_with_splits(tmp_path):
    (tmp_path / "train.txt").write_text("abcdefgh\nijklmnop\n")
    (tmp_path / "test.txt").write_text("zyxw\n")
    data = TextData(str(tmp_path), block_size=4, val=0.0)
    assert text_of(data.test_dataset) == "zyxw"
    assert text_of(data.train_dataset) == "abcdefgh\nijklmno"


def test_hub_data_set_with_a_configuration(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*names):
        asked.append(names)
        table = datasets.Dataset.from_dict({"text": [TEXT]})
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), table))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("effdl.core.hub.reachable", lambda: True)
    data = TextData("someone/prose", subset="small", block_size=100)
    assert len(data.train_dataset) == len(data.test_dataset) == 50
    assert asked == [("someone/prose", "small")]


def test_a_transformers_tokenizer_from_a_folder(tmp_path, file):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["[UNK]", *sorted({f"{i:04d}" for i in range(1000)})])}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(tmp_path / "words")
    data = TextData(file, tokenizer=str(tmp_path / "words"), block_size=10, val=0.0)
    assert data.vocab_size == 1001
    assert data.train_dataset.blocks.flatten().tolist() == list(range(1, 1001))


def test_max_train_takes_the_start_of_the_text(file):
    assert text_of(TextData(file, block_size=10, max_train=3).train_dataset) == TEXT[:30]


def test_order_is_a_function_of_seed_and_epoch(file):
    def epoch(seed, number):
        loader = TextData(file, block_size=5, batch_size=50, seed=seed).train_dataloader()
        loader.sampler.set_epoch(number)
        return torch.cat([b["input_ids"] for b in loader])

    assert torch.equal(epoch(0, 1), epoch(0, 1))
    assert not torch.equal(epoch(0, 1), epoch(0, 2))
    assert not torch.equal(epoch(0, 1), epoch(1, 1))
    assert torch.equal(epoch(0, 1).sort(0).values, epoch(1, 2).sort(0).values)


def test_the_loader_goes_on_mid_epoch(file):
    first, second = (TextData(file, block_size=10, batch_size=64).train_dataloader() for _ in range(2))
    whole = [b["input_ids"] for b in first]
    iterator = iter(first)
    for _ in range(3):
        next(iterator)
    second.load_state_dict(first.state_dict())
    rest = [b["input_ids"] for b in second]
    assert len(whole) == math.ceil(400 / 64) == 3 + len(rest)
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], rest))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("name", "./not/there.txt"),
        ("name", ""),
        ("tokenizer", ""),
        ("block_size", 1),
        ("block_size", 10**7),
        ("batch_size", 0),
        ("val", 0.5),
        ("max_train", 0),
        ("seed", -1),
        ("text_key", "nothing"),
    ],
)
def test_a_bad_argument_is_named(argument, value, tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": [TEXT]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(ConfigurationError, match=argument):
        TextData(**({"name": str(tmp_path / "t.parquet")} | {argument: value})).setup()


def test_hub_out_of_reach_names_the_local_forms(monkeypatch):
    offline_hub(monkeypatch, "datasets.load_dataset", ConnectionError("no network"))
    with pytest.raises(ConfigurationError, match=r"'someone/prose' cannot be loaded.*a text file, a parquet file"):
        TextData("someone/prose").setup()

"""effdl.data.captioned: images with texts, from the digits, folders and parquet files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from effdl.core.errors import ConfigurationError
from effdl.data.captioned import DIGITS, CaptionedImageData
from effdl.data.images import ImageData


def first(data: CaptionedImageData) -> dict:
    return next(iter(data.train_dataloader()))


def pixels(value: int) -> np.ndarray:
    return np.full((8, 8, 3), value, dtype=np.uint8)


def test_digits_are_called_by_their_names():
    data, plain = CaptionedImageData(batch_size=16), ImageData(batch_size=16)
    batch, other = first(data), first(plain)
    assert batch["prompt"] == [f"a photo of the digit {DIGITS[label]}" for label in other["label"].tolist()]
    assert (batch["image"] == other["image"]).all()
    assert batch["index"].tolist() == other["index"].tolist()
    assert data.prompts[3] == "a photo of the digit three"
    assert first(CaptionedImageData(prompt="{}!"))["prompt"][0].endswith("!")


def test_one_example_is_a_row_of_the_batch():
    data = CaptionedImageData()
    one, rows = data.train_dataset[5], data.train_dataset.__getitems__([4, 5])
    assert one["prompt"] == rows["prompt"][1]
    assert (one["image"] == rows["image"][1]).all()


def test_a_folder_with_captions(tmp_path):
    (tmp_path / "train").mkdir()
    lines = []
    for i, text in enumerate(["a wolf", "a lamb", "a wolf", "grass"]):
        Image.fromarray(pixels(60 * i)).save(tmp_path / "train" / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": text}))
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(lines))
    data = CaptionedImageData(str(tmp_path), batch_size=4, val=0.0, prompt="photo of {}")
    batch = first(data)
    told = {round(float((x.mean() + 1) * 127.5)): text for x, text in zip(batch["image"], batch["prompt"])}
    assert told == {0: "photo of a wolf", 60: "photo of a lamb", 120: "photo of a wolf", 180: "photo of grass"}


def test_a_folder_of_classes(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(pixels(i)).save(tmp_path / "train" / name / f"{i}.png")
    data = CaptionedImageData(str(tmp_path), batch_size=4, val=0.0, prompt="a {}")
    assert sorted(first(data)["prompt"]) == ["a cat", "a cat", "a dog", "a dog"]


def test_parquet_with_captions_also_several_per_image(tmp_path):
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "story": List(Value("string")), "label": Value("int64")})
    rows = {"image": [pixels(0), pixels(200)], "story": [["night", "dark"], ["day"]], "label": [1, 1]}
    Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "x.parquet"))
    data = CaptionedImageData(str(tmp_path / "x.parquet"), batch_size=2, val=0.0, text_key="story")
    batch = first(data)
    assert {text for x, text in zip(batch["image"], batch["prompt"]) if x.mean() < 0} == {"night"}
    assert set(batch["prompt"]) == {"night", "day"}
    with pytest.raises(ConfigurationError, match="text_key"):
        CaptionedImageData(str(tmp_path / "x.parquet"), text_key="tale").setup()


def test_captions_have_the_same_numbers_in_all_splits(tmp_path):
    for split, texts in {"train": ["b", "c"], "test": ["a", "c"]}.items():
        (tmp_path / split).mkdir()
        lines = [json.dumps({"file_name": f"{i}.png", "text": text}) for i, text in enumerate(texts)]
        (tmp_path / split / "metadata.jsonl").write_text("\n".join(lines))
        for i in range(2):
            Image.fromarray(pixels(i)).save(tmp_path / split / f"{i}.png")
    data = CaptionedImageData(str(tmp_path), batch_size=2, val=0.0)
    assert data.classes == ("a", "b", "c")
    assert [next(iter(data.test_dataloader()))[key] for key in ("prompt",)] == [["a", "c"]]


def test_a_fingerprint_knows_images_and_texts():
    base = CaptionedImageData(max_train=20).train_dataset.fingerprint()
    assert base == CaptionedImageData(max_train=20).train_dataset.fingerprint()
    for other in ({"prompt": "{}"}, {"image_size": 16}, {"seed": 1}):
        assert CaptionedImageData(**{"max_train": 20} | other).train_dataset.fingerprint() != base


@pytest.mark.parametrize(
    ("argument", "kwargs"),
    [("prompt", {"prompt": "a photo"}), ("prompt", {"prompt": "{} {}"}), ("batch_size", {"batch_size": 0}),
     ("name", {"name": "./nothing"}), ("val", {"val": 1.0})],
)  # fmt: skip
def test_a_bad_argument_is_named(argument, kwargs):
    with pytest.raises(ConfigurationError, match=argument):
        CaptionedImageData(**kwargs).setup()

"""effdl.data.images: every way in: npz, folder, parquet, hub."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from effdl.core.errors import ConfigurationError
from effdl.data.images import ImageData
from tests.support import offline_hub


def check_equal_to(arrays, data: ImageData):
    pixels = torch.from_numpy(arrays["x_test"]).permute(0, 3, 1, 2)
    assert torch.equal(data.test_dataset.images, pixels)
    assert data.test_dataset.labels.tolist() == arrays["y_test"].tolist()
    assert data.num_classes == 5
    assert len(data.train_dataset) + len(data.val_dataset) == 60


def test_npz_file(npz, arrays):
    check_equal_to(arrays, ImageData(npz))


def test_npz_file_of_grey_images_in_one_array(tmp_path, arrays):
    np.savez(tmp_path / "g.npz", x=arrays["x_train"][..., 0], y=arrays["y_train"], classes=list("abcde"))
    data = ImageData(str(tmp_path / "g.npz"), val=0.25)
    assert [len(d) for d in (data.train_dataset, data.val_dataset, data.test_dataset)] == [30, 15, 15]
    assert data.classes == tuple("abcde")
    assert data.train_dataset.images.shape == (30, 3, 12, 12)
    seen = torch.cat([d.images[:, 0].flatten(1) for d in (data.train_dataset, data.val_dataset, data.test_dataset)])
    assert len(seen.unique(dim=0)) == 60


def test_npz_fields_of_other_names(tmp_path, arrays):
    np.savez(tmp_path / "o.npz", pics_train=arrays["x_train"], kind_train=arrays["y_train"])
    data = ImageData(str(tmp_path / "o.npz"), image_key="pics", label_key="kind")
    assert data.num_classes == 5
    with pytest.raises(ConfigurationError, match="expected x_train and y_train"):
        ImageData(str(tmp_path / "o.npz")).setup()


def test_folder_of_images(tmp_path, arrays):
    from PIL import Image

    for split in ("train", "test"):
        for i, (x, y) in enumerate(zip(arrays[f"x_{split}"], arrays[f"y_{split}"])):
            folder = tmp_path / split / f"class{y}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(x).save(folder / f"{i:03d}.png")
    data = ImageData(str(tmp_path))
    assert data.classes == tuple(f"class{i}" for i in range(5))
    order = np.argsort(arrays["y_test"], kind="stable")
    expected = torch.from_numpy(arrays["x_test"][order]).permute(0, 3, 1, 2)
    assert torch.equal(data.test_dataset.images, expected)


@pytest.mark.parametrize("form", ["datasets", "bytes", "lists"])
def test_parquet_file(tmp_path, arrays, form):
    import datasets
    from PIL import Image

    def png(x):
        Image.fromarray(x).save(tmp_path / "one.png")
        return (tmp_path / "one.png").read_bytes()

    images, labels = arrays["x_train"], arrays["y_train"].tolist()
    if form == "datasets":
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list("abcde"))})
        table = datasets.Dataset.from_dict({"img": list(images), "label": labels}, features=features)
    elif form == "bytes":
        table = datasets.Dataset.from_dict({"image": [png(x) for x in images], "label": labels})
    else:
        table = datasets.Dataset.from_dict({"x": images.tolist(), "y": labels})
    table.to_parquet(tmp_path / "d.parquet")
    data = ImageData(str(tmp_path / "d.parquet"), val=0.0)
    assert len(data.train_dataset) == 60
    rows = {
        x.permute(1, 2, 0).contiguous().numpy().tobytes(): int(y)
        for x, y in zip(data.train_dataset.images, data.train_dataset.labels)
    }
    assert rows == {x.tobytes(): y for x, y in zip(images, labels)}


def test_hub_data_set(monkeypatch, arrays):
    import datasets

    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=list("abcde"))})
    table = {
        split: datasets.Dataset.from_dict(
            {"img": list(arrays[f"x_{split}"]), "fine_label": arrays[f"y_{split}"]}, features=features
        )
        for split in ("train", "test")
    }
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or datasets.DatasetDict(table))
    monkeypatch.setattr("effdl.core.hub.reachable", lambda: True)
    check_equal_to(arrays, ImageData("someone/some_images"))
    assert asked == ["someone/some_images"]


def test_hub_out_of_reach_names_the_local_forms(monkeypatch):
    offline_hub(monkeypatch, "datasets.load_dataset", ConnectionError("no network"))
    with pytest.raises(ConfigurationError, match=r"'someone/other' cannot be loaded.*folder of images.*parquet.*npz"):
        ImageData("someone/other").setup()

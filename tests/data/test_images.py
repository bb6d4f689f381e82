"""effdl.data.images: every way in, the batches, the splits, the noise, the order and the resume."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from effdl.core.errors import ConfigurationError
from effdl.data.images import ImageData, ImageTensors
from effdl.data.loading import EpochSampler, ResumableLoader, as_it_is
from effdl.data.noise import CIFAR10_CONFUSIONS


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (60, 12, 12, 3), dtype=np.uint8),
        "y_train": np.arange(60) % 5,
        "x_test": rng.integers(0, 256, (20, 12, 12, 3), dtype=np.uint8),
        "y_test": np.arange(20) % 5,
    }


@pytest.fixture
def npz(tmp_path, arrays) -> str:
    np.savez(tmp_path / "some.npz", **arrays)
    return str(tmp_path / "some.npz")


def batches(loader) -> list[list[int]]:
    return [batch["index"].tolist() for batch in loader]


# The batches


def test_digits_are_the_default_and_come_as_the_fields_usual_dict():
    data = ImageData(batch_size=32)
    batch = next(iter(data.train_dataloader()))
    assert {key: (tuple(v.shape), v.dtype) for key, v in batch.items()} == {
        "image": ((32, 3, 32, 32), torch.float32),
        "label": ((32,), torch.int64),
        "index": ((32,), torch.int64),
    }
    assert batch["image"].min() == -1
    assert batch["image"].max() == 1
    assert data.num_classes == 10
    assert (len(data.train_dataset), len(data.val_dataset), len(data.test_dataset)) == (1167, 130, 500)


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    digits = load_digits()
    data = ImageData(image_size=8, channels=1, val=0.0)
    ours = torch.cat([data.train_dataset.images, data.test_dataset.images]).flatten(1).double() * 16 / 255
    theirs = torch.from_numpy(digits.data)
    assert torch.equal(ours.round().sort(0).values, theirs.sort(0).values)


def test_index_names_the_example_whatever_the_order():
    dataset = ImageData().train_dataset
    for batch in ImageData(batch_size=100).train_dataloader():
        assert torch.equal(dataset.labels[batch["index"]], batch["label"])
        assert torch.equal(dataset[int(batch["index"][3])]["image"], batch["image"][3])


def test_index_can_be_left_out():
    assert set(next(iter(ImageData(indexed=False).train_dataloader()))) == {"image", "label"}


def test_every_example_is_seen_once_in_an_epoch():
    seen = sorted(sum(batches(ImageData(batch_size=50).train_dataloader()), []))
    assert seen == list(range(1167))


def test_normalisation_takes_one_number_or_one_per_channel(npz):
    raw = ImageData(npz, mean=0.0, std=1.0).test_dataset.__getitems__([0, 1])["image"]
    assert torch.allclose(raw * 255, (raw * 255).round(), atol=1e-4)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    ours = ImageData(npz, mean=mean, std=std).test_dataset.__getitems__([0, 1])["image"]
    expected = (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(ours, expected, atol=1e-5)


def test_decoding_is_done_once_per_process():
    assert ImageData(seed=0)._read().splits["train"][0] is ImageData(seed=1)._read().splits["train"][0]


# The ways in


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
    monkeypatch.setattr("effdl.core.hub.reachable", lambda: False)
    monkeypatch.setattr("effdl.core.hub.go_offline", lambda: None)
    monkeypatch.setattr("effdl.core.hub.offline", lambda: True)

    def load_dataset(name):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(ConfigurationError, match=r"'someone/other' cannot be loaded.*folder of images.*parquet.*npz"):
        ImageData("someone/other").setup()


# Sizes


def test_images_are_resized_and_cropped_to_a_square(tmp_path, arrays):
    np.savez(tmp_path / "wide.npz", x=np.concatenate([arrays["x_train"]] * 2, axis=2), y=arrays["y_train"])
    assert ImageData(str(tmp_path / "wide.npz"), image_size=16).train_dataset.images.shape[1:] == (3, 16, 16)
    assert ImageData(str(tmp_path / "wide.npz")).train_dataset.images.shape[1:] == (3, 12, 24)


def test_images_of_different_sizes_need_image_size(tmp_path, arrays):
    from PIL import Image

    for i, x in enumerate(arrays["x_train"][:8]):
        folder = tmp_path / "train" / f"class{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[: 8 + i % 3]).save(folder / f"{i}.png")
    with pytest.raises(ConfigurationError, match="image_size"):
        ImageData(str(tmp_path)).setup()
    assert ImageData(str(tmp_path), image_size=8, val=0.0).train_dataset.images.shape == (8, 3, 8, 8)


def test_colour_becomes_grey_and_grey_three_equal_channels(npz):
    grey = ImageData(npz, channels=1).test_dataset.images
    assert grey.shape == (20, 1, 12, 12)
    digits = ImageData().test_dataset.images
    assert torch.equal(digits[:, 0], digits[:, 2])


# Splits, noise


def test_max_train_keeps_the_held_out_examples_as_they_were(npz):
    full, few = ImageData(npz), ImageData(npz, max_train=7)
    assert few.num_examples == 7
    assert torch.equal(full.val_dataset.images, few.val_dataset.images)
    assert torch.equal(full.train_dataset.images[:7], few.train_dataset.images)


@pytest.mark.parametrize("noise", ["symmetric", "asymmetric"])
def test_noise_is_in_train_and_validation_never_in_test(noise):
    data = ImageData(noise=noise, noise_rate=0.4, val=0.3)
    clean = ImageData(val=0.3)
    share = 0.36 if noise == "symmetric" else 0.4
    for split in ("train_dataset", "val_dataset"):
        noisy = getattr(data, split)
        wrong = (noisy.labels != noisy.clean_labels).float().mean()
        assert abs(wrong - share) < 0.06
        assert torch.equal(noisy.clean_labels, getattr(clean, split).labels)
    assert torch.equal(data.test_dataset.labels, clean.test_dataset.labels)
    if noise == "asymmetric":
        d = data.train_dataset
        moved = d.labels != d.clean_labels
        assert torch.equal(d.labels[moved], (d.clean_labels[moved] + 1) % 10)


def test_asymmetric_noise_of_cifar10_is_the_literatures(tmp_path, arrays):
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    np.savez(tmp_path / "c.npz", x=arrays["x_train"], y=np.arange(60) % 10, classes=classes)
    d = ImageData(str(tmp_path / "c.npz"), noise="asymmetric", noise_rate=1.0, val=0.0).train_dataset
    assert [CIFAR10_CONFUSIONS.get(c, c) for c in d.clean_labels.tolist()] == d.labels.tolist()


def test_another_seed_is_another_split_noise_and_order():
    a, b, c = (ImageData(noise="symmetric", noise_rate=0.5, seed=s) for s in (0, 0, 1))
    assert torch.equal(a.train_dataset.labels, b.train_dataset.labels)
    assert not torch.equal(a.train_dataset.clean_labels, c.train_dataset.clean_labels)
    assert batches(a.train_dataloader()) == batches(b.train_dataloader())
    assert batches(a.train_dataloader()) != batches(c.train_dataloader())


def test_augmentation_is_a_function_of_seed_and_epoch_and_only_in_training(npz):
    def epoch(number: int, augment: bool = True) -> torch.Tensor:
        loader = ImageData(npz, augment=augment, batch_size=60).train_dataloader()
        loader.sampler.set_epoch(number)
        return next(iter(loader))["image"]

    assert torch.equal(epoch(1), epoch(1))
    assert not torch.equal(epoch(1), epoch(1, augment=False))
    plain, same = ImageData(npz).test_dataset, ImageData(npz, augment=True).test_dataset
    assert torch.equal(plain[3]["image"], same[3]["image"])


def test_a_crop_comes_again_and_is_told_whatever_the_batch(npz):
    def epoch(number: int, batch_size: int = 60, **kwargs) -> dict[int, tuple]:
        loader = ImageData(npz, augment=True, crops=2, batch_size=batch_size, **kwargs).train_dataloader()
        loader.sampler.set_epoch(number)
        rows = [zip(b["index"].tolist(), b["image"], b["crop"]) for b in loader]
        return {i: (image, crop) for row in rows for i, image, crop in row}

    first, second, third, other = epoch(0), epoch(1), epoch(2, batch_size=7), epoch(0, seed=1)
    assert first.keys() == third.keys()
    for i, (image, crop) in first.items():
        assert torch.equal(third[i][0], image)
        assert torch.equal(third[i][1], crop)
        assert crop.shape == (3,)
    crops = [torch.stack([crop for _, crop in found.values()]) for found in (first, second, other)]
    assert not torch.equal(crops[0], crops[1])
    assert not torch.equal(crops[0], crops[2])
    assert crops[0][:, 2].unique().tolist() == [0, 1]
    assert "crop" not in ImageData(npz, augment=True).train_dataset[0]
    assert "crop" not in ImageData(npz, augment=True, crops=2).test_dataset[0]


# Order and resume


def test_order_is_a_function_of_seed_and_epoch_alone():
    loader = ImageData(batch_size=100).train_dataloader()
    first = batches(loader)
    torch.manual_seed(7)
    np.random.seed(7)
    assert batches(loader) == first
    loader.sampler.set_epoch(1)
    assert batches(loader) != first
    loader.sampler.set_epoch(0)
    assert batches(loader) == first


def test_iterating_leaves_the_global_random_streams_alone():
    loader = ImageData(batch_size=100, augment=True).train_dataloader()
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    batches(loader)
    assert torch.equal(before, torch.get_rng_state())
    assert (numpys == np.random.get_state()[1]).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_where_its_state_was_taken(workers):
    def make():
        data = TensorDataset(torch.arange(23))
        loader = ResumableLoader(data, batch_size=4, shuffle=True, seed=3, num_workers=workers)
        loader.sampler.set_epoch(5)
        return loader

    whole = [b[0].tolist() for b in make()]
    first, second = make(), make()
    iterator = iter(first)
    head = [next(iterator)[0].tolist() for _ in range(2)]
    second.load_state_dict(first.state_dict())
    assert head + [b[0].tolist() for b in second] == whole
    assert [b[0].tolist() for b in second] == whole  # the next epoch is a whole one
    assert len(second) == 6


class Recorder(L.LightningModule):
    """A foreign module that remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * 12 * 12, 5)
        self.seen: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["index"].tolist())
        return nn.functional.cross_entropy(self.layer(batch["image"].flatten(1)), batch["label"])

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def fit(npz, folder, resume: str | None = None, **kwargs) -> Recorder:
    L.seed_everything(0, verbose=False)
    saving = L.pytorch.callbacks.ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False
    )
    trainer = L.Trainer(
        max_steps=15, default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=None if resume else [saving], enable_checkpointing=not resume, **kwargs,
    )  # fmt: skip
    module = Recorder()
    trainer.fit(module, ImageData(npz, batch_size=8, augment=True), ckpt_path=resume, weights_only=resume and True)
    return module


@pytest.mark.parametrize("limit", [None, 4])
def test_a_run_resumed_anywhere_is_the_uninterrupted_run(npz, tmp_path, limit):
    kwargs = {"limit_train_batches": limit} if limit else {}
    whole = fit(npz, tmp_path, **kwargs)
    for stop in (3, 7, 8, 9):  # epochs are 7 (or 4) batches long
        resumed = fit(npz, tmp_path, resume=str(tmp_path / f"step={stop}.ckpt"), **kwargs)
        assert resumed.seen == whole.seen[stop:], stop
        for a, b in zip(whole.parameters(), resumed.parameters()):
            assert torch.equal(a, b), stop


def test_trainer_test_and_predict_see_every_test_example_in_order(npz, tmp_path):
    class Shown(Recorder):
        def test_step(self, batch, batch_idx):
            self.seen.append(batch["index"].tolist())

        def predict_step(self, batch, batch_idx):
            return batch["index"]

    module = Shown()
    trainer = L.Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.test(module, ImageData(npz, batch_size=8), verbose=False)
    assert sum(module.seen, []) == list(range(20))
    assert torch.cat(trainer.predict(module, ImageData(npz, batch_size=8))).tolist() == list(range(20))


@pytest.mark.parametrize("resumed", [False, True])
def test_processes_share_the_batches_of_a_single_one(npz, resumed):
    dataset = ImageData(npz).train_dataset

    def loader(batch_size, replicas, rank):
        sampler = EpochSampler(dataset, shuffle=True, num_replicas=replicas, rank=rank)
        sampler.set_epoch(2)
        loader = ResumableLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=as_it_is)
        if resumed:
            loader.load_state_dict({"epoch": 2, "batches": 3})
        return loader

    whole = batches(loader(8, 1, 0))
    ours = [a + b for a, b in zip(batches(loader(4, 2, 0)), batches(loader(4, 2, 1)))]
    assert [sorted(b) for b in ours] == [sorted(b) for b in whole]
    assert len(loader(4, 2, 0)) == len(loader(4, 2, 1)) == 7


def test_an_uneven_share_is_filled_from_the_start():
    shares = [list(EpochSampler(range(7), num_replicas=3, rank=r)) for r in range(3)]
    assert shares == [[0, 3, 6], [1, 4, 0], [2, 5, 1]]


def test_lightning_does_not_replace_the_sampler(npz):
    from torch.utils.data.distributed import DistributedSampler

    assert isinstance(ImageData(npz).train_dataloader().sampler, DistributedSampler)


def test_seeds_and_epochs_do_not_share_orders():
    orders = {(s, e): None for s in range(3) for e in range(3)}
    for s, e in orders:
        sampler = EpochSampler(range(50), shuffle=True, seed=s)
        sampler.set_epoch(e)
        orders[s, e] = tuple(sampler)
    assert len(set(orders.values())) == 9


# Arguments, imports


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("name", "./not/there.npz"),
        ("name", ""),
        ("batch_size", 0),
        ("image_size", 0),
        ("channels", 2),
        ("val", 1.0),
        ("max_train", 0),
        ("noise", "symetric"),
        ("noise_rate", 1.5),
        ("mean", [0.5, 0.5]),
        ("std", 0.0),
        ("crops", 2),  # without augment
        ("crops", -1),
        ("seed", -1),
        ("image_key", "nothing"),
        ("label_key", "nothing"),
    ],
)
def test_a_bad_argument_is_named(argument, value):
    with pytest.raises(ConfigurationError, match=argument):
        ImageData(**({"name": "digits"} | {argument: value})).setup()


def test_a_noise_rate_without_a_kind_of_noise_is_refused():
    with pytest.raises(ConfigurationError, match="noise"):
        ImageData(noise_rate=0.4)


def test_one_example_is_a_dict_without_a_batch_dimension():
    dataset = ImageTensors(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4))
    assert {k: tuple(v.shape) for k, v in dataset[2].items()} == {"image": (1, 8, 8), "label": (), "index": ()}


def test_importing_does_not_import_what_it_does_not_need():
    code = "import sys, effdl.data.images; sys.exit(any(m in sys.modules for m in ('diffusers', 'datasets', 'timm')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parent).returncode == 0


def test_num_classes_links_to_a_model_before_setup():
    from jsonargparse import ArgumentParser

    class Model:
        def __init__(self, num_classes: int = 2):
            self.num_classes = num_classes

    parser = ArgumentParser()
    parser.add_class_arguments(Model, "model")
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
    config = parser.parse_args(["--data=effdl.data.images.ImageData", "--data.max_train=20"])
    assert parser.instantiate(config).model.num_classes == 10

"""effdl.data.images: the batches, the sizes, the splits, the noise, the arguments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch

from effdl.core.errors import ConfigurationError
from effdl.data.images import ImageData, ImageTensors
from effdl.data.noise import CIFAR10_CONFUSIONS
from tests.data.images_parts import batches

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

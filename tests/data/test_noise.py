"""elr: label-noise makers and indexed data sets."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from effdl.core.errors import ConfigurationError
from effdl.data.indexed import IndexedDataset
from effdl.data.noise import (
    CIFAR10_CONFUSIONS,
    CIFAR100_CONFUSIONS,
    asymmetric_noise,
    next_in_group,
    symmetric_noise,
)


def test_symmetric_noise_draws_from_all_classes():
    labels = torch.arange(10).repeat(2000)
    noisy = symmetric_noise(labels, 0.4, 10, seed=3)
    wrong = noisy != labels
    assert abs(wrong.float().mean().item() - 0.4 * 9 / 10) < 0.01
    assert noisy.dtype == labels.dtype
    assert torch.bincount(noisy[wrong]).min() > 0.8 * wrong.sum() / 10


def test_symmetric_noise_touches_exactly_the_share():
    # With a class number the labels cannot have, every touched place shows (probability 1e-3 of a repeat of it).
    labels = torch.full((50,), 1000)
    assert (symmetric_noise(labels, 0.3, 999) != labels).sum() == 15
    assert torch.equal(symmetric_noise(labels, 0.0, 10), labels)


def test_noise_has_its_own_generator():
    labels = torch.arange(10).repeat(20)
    before = torch.get_rng_state()
    a, b, c = (symmetric_noise(labels, 0.5, 10, seed=s) for s in (1, 1, 2))
    asymmetric_noise(labels, 0.5, CIFAR10_CONFUSIONS, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(labels, torch.arange(10).repeat(20))


def test_asymmetric_noise_cifar10():
    labels = torch.arange(10).repeat(100)
    noisy = asymmetric_noise(labels, 0.4, CIFAR10_CONFUSIONS, seed=0)
    for true in range(10):
        now = noisy[labels == true]
        wrong = CIFAR10_CONFUSIONS.get(true)
        assert (now == true).sum() == (100 if wrong is None else 60)
        if wrong is not None:
            assert (now == wrong).sum() == 40
    assert CIFAR10_CONFUSIONS == {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}  # horse (7) is untouched
    assert torch.equal(asymmetric_noise(labels, 0.0, CIFAR10_CONFUSIONS), labels)


def test_asymmetric_noise_cifar100_stays_in_the_superclass():
    assert sorted(CIFAR100_CONFUSIONS) == sorted(CIFAR100_CONFUSIONS.values()) == list(range(100))
    for fine in range(100):  # five steps go once round the superclass
        ring = [fine]
        for _ in range(5):
            ring.append(CIFAR100_CONFUSIONS[ring[-1]])
        assert ring[5] == fine
        assert len(set(ring)) == 5
    # aquatic mammals: beaver 4, dolphin 30, otter 55, seal 72, whale 95
    assert [CIFAR100_CONFUSIONS[c] for c in (4, 30, 55, 72, 95)] == [30, 55, 72, 95, 4]
    assert next_in_group([0, 0, 1, 1]) == {0: 1, 1: 0, 2: 3, 3: 2}


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda y: symmetric_noise(y, 1.2, 10), "rate"),
        (lambda y: symmetric_noise(y, 0.2, 1), "num_classes"),
        (lambda y: symmetric_noise(y.float(), 0.2, 10), "labels"),
        (lambda y: asymmetric_noise(y, -0.1, CIFAR10_CONFUSIONS), "rate"),
        (lambda y: asymmetric_noise(y, 0.1, {}), "confusions"),
    ],
)
def test_bad_arguments(call, name):
    with pytest.raises(ConfigurationError, match=name):
        call(torch.arange(10))


def data(n: int = 12) -> TensorDataset:
    return TensorDataset(torch.arange(n).float(), torch.arange(n) % 3)


def test_indexed_dataset_survives_shuffling_and_workers_of_a_loader():
    loader = DataLoader(IndexedDataset(data()), batch_size=5, shuffle=True)
    for x, y, index in loader:
        assert torch.equal(x.long(), index)
        assert torch.equal(y, index % 3)


def test_indexed_dataset_numbers_a_subset_as_its_parent():
    inner = Subset(Subset(data(), [11, 3, 5, 7]), [3, 0])
    indexed = IndexedDataset(inner)
    assert [indexed[i][2] for i in range(2)] == [7, 11]
    assert indexed[-1][2] == 11
    assert (len(indexed), indexed.num_examples) == (2, 12)
    before = Subset(IndexedDataset(data()), [7, 11])
    assert [before[i][2] for i in range(2)] == [7, 11]
    own = IndexedDataset(inner, own_positions=True)
    assert [own[i][2] for i in range(2)] == [0, 1]
    assert own.num_examples == 2


def test_indexed_dataset_takes_dicts_and_whole_batches():
    class Cached(Dataset):
        calls = 0

        def __len__(self):
            return 6

        def __getitem__(self, i):
            raise AssertionError("the batch path was not taken")

        def __getitems__(self, positions):
            self.calls += 1
            return [{"image": torch.tensor(float(p)), "label": p % 2} for p in positions]

    cached = Cached()
    batch = next(iter(DataLoader(IndexedDataset(cached), batch_size=4)))
    assert batch["index"].tolist() == [0, 1, 2, 3]
    assert cached.calls == 1


def test_indexed_dataset_refuses_bare_tensors():
    with pytest.raises(TypeError, match="tuples"):
        IndexedDataset(torch.arange(3))[0]

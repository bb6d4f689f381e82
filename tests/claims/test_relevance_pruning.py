"""relevance-pruning, claim 7: filters of a digits CNN are removed without fine-tuning, by five criteria."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from effdl.compression.relevance_pruning import prune_filters, reference_samples

pytestmark = pytest.mark.slow
SEEDS = range(8)
CRITERIA = {
    "composite": {},
    "zplus": {"rule": "zplus"},
    "random": {"criterion": "random"},
    "gradient": {"criterion": "gradient"},
    "weight": {"criterion": "weight"},
    "taylor": {"criterion": "taylor"},
}
CLASSES = (1, 4, 7)


def digits(seed):
    """8x8 images in [0, 1]; 1297 to train on, 500 to test."""
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1297], order[1297:]
    return x[train], y[train], x[test], y[test]


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def train(net, x, y, seed, epochs=8):
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    g = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=g).split(32):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    return net.eval()


class Restricted(nn.Module):
    """The logits of some classes alone."""

    def __init__(self, net, classes):
        super().__init__()
        self.net, self.classes = net, list(classes)

    def forward(self, x):
        return self.net(x)[:, self.classes]


def task(x, y, classes):
    """The samples of some classes, numbered anew."""
    chosen = torch.isin(y, torch.tensor(classes))
    return x[chosen], torch.searchsorted(torch.tensor(classes), y[chosen])


@torch.no_grad()
def accuracy(net, x, y):
    return 100 * (net(x).argmax(-1) == y).float().mean().item()


def pruned_accuracy(state, classes, data, sparsity, settings, seed):
    net = network(seed)
    net.load_state_dict(state)
    x, y, x_test, y_test = data
    if len(classes) < 10:
        net = Restricted(net, classes)
    (x, y), (x_test, y_test) = task(x, y, classes), task(x_test, y_test, classes)
    inputs, labels = reference_samples([(x, y)], 10)
    prune_filters(net.eval(), inputs, labels, sparsity, history=False, seed=seed, **settings)
    return accuracy(net, x_test, y_test)


TASKS = {("10 classes", 0.6): tuple(range(10)), ("3 classes", 0.6): CLASSES, ("3 classes", 0.8): CLASSES}


@pytest.fixture(scope="module")
def means():
    """(task, sparsity) to criterion to mean test accuracy over the seeds; the table is printed."""
    began = time.perf_counter()
    table = {key: {name: [] for name in CRITERIA} for key in TASKS}
    dense = []
    for seed in SEEDS:
        data = digits(seed)
        net = train(network(seed), *data[:2], seed)
        dense.append(accuracy(net, *data[2:]))
        for (name, sparsity), classes in TASKS.items():
            for criterion, settings in CRITERIA.items():
                got = pruned_accuracy(net.state_dict(), classes, data, sparsity, settings, seed)
                table[name, sparsity][criterion].append(got)
    print(f"dense {statistics.mean(dense):.1f} ± {statistics.stdev(dense):.1f}, {time.perf_counter() - began:.0f} s")
    for key, rows in table.items():
        print(key, {c: f"{statistics.mean(v):.1f} ± {statistics.stdev(v):.1f}" for c, v in rows.items()})
    return {key: {c: statistics.mean(values) for c, values in rows.items()} for key, rows in table.items()}


def at_least(key, other, margin, marks=()):
    return pytest.param(key, other, margin, id=f"{key[0]}, {key[1]:.0%}: {other} {margin:+}", marks=marks)


TEN, THREE, FEW = TASKS
missed = pytest.mark.xfail(strict=True, reason="8 points asked, 3.1 measured (80.0 to 76.9); see the results")


@pytest.mark.parametrize(
    ("key", "other", "margin"),
    [
        at_least(TEN, "random", 15), at_least(THREE, "random", 15), at_least(FEW, "random", 15),
        at_least(TEN, "gradient", 8, missed), at_least(THREE, "gradient", 8), at_least(FEW, "gradient", 8),
        at_least(THREE, "weight", -1), at_least(FEW, "weight", -1),
        at_least(TEN, "zplus", 10),  # the composite keeps classes apart
    ],
)  # fmt: skip
def test_claim_07_relevance_keeps_accuracy_without_finetuning(means, key, other, margin):
    assert means[key]["composite"] >= means[key][other] + margin

"""trained-rank-pruning, claim 6: its network splits without loss where a normally trained one breaks."""

from __future__ import annotations

import copy
import statistics
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from torch import nn

from effdl.callbacks import TrainedRankPruningCallback
from effdl.core.factorize import factorize, multiply_adds
from tests.claims.shuffled import Shuffled
from tests.support import load_npz, real_data

pytestmark = pytest.mark.slow


class Plain(LightningModule):
    """Cross-entropy, SGD with momentum 0.9 and weight decay 1e-4; the rate falls by a cosine."""

    def __init__(self, network, rate, steps):
        super().__init__()
        self.network, self.rate, self.steps = network, rate, steps

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.rate, momentum=0.9, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(network, rate, data, epochs, callbacks=()):
    module = Plain(network, rate, epochs * len(data))
    Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    ).fit(module, data)  # fmt: skip
    return module.network.eval()


@torch.no_grad()
def accuracy(network, x, y):
    hits = [(network(part).argmax(-1) == labels).float() for part, labels in zip(x.split(500), y.split(500))]
    return 100 * torch.cat(hits).mean().item()


def table(name, rows):
    for label, values in rows.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{name} | {label} | {statistics.mean(values):.2f} ± {spread:.2f} | {[round(v, 2) for v in values]}")


def compare(make, rate, data, epochs, test, seeds, **kwargs):
    """TRP and the same training without it, both split at the ranks that TRP found."""
    rows = {key: [] for key in ("TRP", "TRP split", "plain", "plain split", "rank", "parameters", "MACs", "seconds")}
    for seed in seeds:
        begin = time.perf_counter()
        torch.manual_seed(seed)
        start = make()
        callback = TrainedRankPruningCallback(decompose=False, **kwargs)
        dense = fit(copy.deepcopy(start), rate, data(seed), epochs, [callback])
        small = callback.finalize(dense)
        plain = fit(copy.deepcopy(start), rate, data(seed), epochs)
        cut = factorize(plain, callback.ranks, callback.scheme)
        networks = {"TRP": dense, "TRP split": small, "plain": plain, "plain split": cut}
        for key, network in networks.items():
            rows[key].append(accuracy(network, *test))
        rows["rank"].append(statistics.mean(row["rank"] for row in callback.rows.values()))
        count = lambda net: sum(p.numel() for p in net.parameters())  # noqa: E731
        rows["parameters"].append(count(dense) / count(small))
        macs = [sum(multiply_adds(net, (test[0][:1],)).values()) for net in (dense, small)]
        rows["MACs"].append(macs[0] / macs[1])
        rows["seconds"].append(time.perf_counter() - begin)
        print(seed, {key: round(values[-1], 2) for key, values in rows.items()}, callback.ranks, flush=True)
    return rows


def three_convolutions():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip


@pytest.mark.parametrize("scheme", ["channel", "spatial"])
def test_must_06_digits_split_without_loss_where_a_plain_network_breaks(scheme):
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1297], order[1297:]
    data = lambda seed: Shuffled(x[train], y[train], 64, seed)  # noqa: E731
    rows = compare(three_convolutions, 0.05, data, 15, (x[test], y[test]), (0, 1, 2), scheme=scheme, every=5)
    table(f"digits, {scheme}", rows)
    for before, after in zip(rows["TRP"], rows["TRP split"]):
        assert after >= before - 1
    for before, after in zip(rows["plain"], rows["plain split"]):
        assert after <= before - 30


class Block(nn.Module):
    """Two 3x3 convolutions; the shortcut has no parameters."""

    def __init__(self, inputs, planes, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, planes, 3, stride, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False), nn.BatchNorm2d(planes)
        self.stride, self.pad = stride, (planes - inputs) // 2

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        short = x[:, :, :: self.stride, :: self.stride]
        return F.relu(out + F.pad(short, (0, 0, 0, 0, self.pad, self.pad)))


class ResNet20(nn.Module):
    """He et al.'s network for CIFAR-10."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for stage, (inputs, planes, stride) in {1: (16, 16, 1), 2: (16, 32, 2), 3: (32, 64, 2)}.items():
            blocks = [Block(inputs, planes, stride), Block(planes, planes, 1), Block(planes, planes, 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def trained_resnet20():
    network = ResNet20()
    network.load_state_dict(load_file(real_data("cifar10_resnet20_jpeg.safetensors")), strict=True)
    return network


def cifar10(seeds, epochs, **kwargs):
    raw = load_npz("cifar10.npz")
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = lambda v: (torch.tensor(v).permute(0, 3, 1, 2).float() / 255 - mean) / std  # noqa: E731
    x, y = images(raw["x_train"]), torch.tensor(raw["y_train"].astype(np.int64))
    test = images(raw["x_test"]), torch.tensor(raw["y_test"].astype(np.int64))
    data = lambda seed: Shuffled(x, y, 128, seed, flip=True)  # noqa: E731
    rows = compare(trained_resnet20, 0.03, data, epochs, test, seeds, **kwargs)
    table(f"CIFAR-10, ResNet-20 {kwargs}", rows)
    return rows


def test_must_06_cifar10_beats_one_shot_svd_at_equal_ranks():
    rows = cifar10((0, 1), 3, keep_energy=0.95, every=20)
    for trained, one_shot in zip(rows["TRP split"], rows["plain split"]):
        assert trained >= one_shot + 5

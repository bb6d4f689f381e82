"""maestro, checks 4-7: components are those of the SVD and of PCA, ranks are found, prefixes are ordered networks."""

from __future__ import annotations

import math
import statistics
import time

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from sklearn.datasets import load_digits
from torch import nn

from effdl.callbacks import MaestroCallback
from effdl.compression.maestro import Prefix, RankSampler, deploy, importance
from effdl.core.factorize import factorize

pytestmark = pytest.mark.slow


class Map(LightningModule):
    """A network under a loss of (network(x), y); Adam with a rate that falls by a cosine, or SGD with momentum."""

    def __init__(self, network, loss, rate, steps=0, momentum=None):
        super().__init__()
        self.network, self.loss, self.rate, self.steps, self.momentum = network, loss, rate, steps, momentum

    def training_step(self, batch, batch_idx):
        return self.loss(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        if self.momentum is not None:
            return torch.optim.SGD(self.parameters(), self.rate, momentum=self.momentum)
        optimizer = torch.optim.Adam(self.parameters(), self.rate)
        if not self.steps:
            return optimizer
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps, eta_min=self.rate / 10)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Batches:
    """``count`` batches an epoch from ``draw(generator)``."""

    def __init__(self, draw, count, seed):
        self.draw, self.count, self.generator = draw, count, torch.Generator().manual_seed(seed)

    def __len__(self):
        return self.count

    def __iter__(self):
        return (self.draw(self.generator) for _ in range(self.count))


def fit(module, loader, epochs, *callbacks):
    Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    ).fit(module, loader)  # fmt: skip
    return module.network.eval()


def with_singular_values(values, out, inputs, seed):
    g = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(size, len(values), generator=g))[0] for size in (out, inputs))
    return u * torch.tensor(values) @ v.mT


def recover(target, ordered, steps, draw, seed):
    """A pair from random factors, trained on squared loss; ``ordered``: by ordered dropout."""
    out, inputs = target.shape
    torch.manual_seed(seed)
    rank = min(out, inputs)
    pair = nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, out, bias=False))
    prefix = Prefix(pair)
    prefix.attach()
    sampler = RankSampler("per_layer", {"pair": rank}, seed)
    optimizer = torch.optim.Adam(pair.parameters(), 0.02)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1 ** (1 / steps))
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x, y = draw(g)
        prefix.show(sampler.draw()["pair"] if ordered else None)
        optimizer.zero_grad()
        (pair(x) - y).square().sum(1).mean().backward()
        optimizer.step()
        schedule.step()
    prefix.show()
    return prefix


def product(prefix, rank):
    return (prefix.second[:, :rank] @ prefix.first[:rank]).detach()


def test_must_04_components_are_those_of_the_svd():
    values = (5.0, 4.0, 3.0, 2.0, 1.0, 0.5)
    target = with_singular_values(values, 6, 6, 0)
    u, s, vh = torch.linalg.svd(target)

    def draw(g):
        x = torch.randn(128, 6, generator=g)
        return x, x @ target.mT

    errors = {}
    for ordered in (True, False):
        begin = time.perf_counter()
        prefix = recover(target, ordered, 6000, draw, 0)
        cut = [u[:, :j] * s[:j] @ vh[:j] for j in range(1, 7)]
        errors[ordered] = [float((product(prefix, j + 1) - w).norm() / w.norm()) for j, w in enumerate(cut)]
        print(f"ordered={ordered}: {[f'{e:.4f}' for e in errors[ordered]]}, {time.perf_counter() - begin:.0f} s")
        norms = (prefix.second.norm(dim=0) * prefix.first.norm(dim=1)).detach()
        if ordered:
            print("component norms:", [f"{n:.4f}" for n in norms])
            assert torch.allclose(norms, torch.tensor(values), rtol=0.01)
    assert max(errors[True]) < 0.05
    assert errors[False][-1] < 0.01
    assert min(errors[False][:5]) > 0.2


def test_must_05_a_linear_autoencoder_is_pca():
    g = torch.Generator().manual_seed(1)
    mixing = with_singular_values((3.0, 2.5, 2.0, 1.5, 1.0, 0.7, 0.4, 0.2), 8, 8, 1)
    x = torch.randn(4096, 8, generator=g) @ mixing
    x = x - x.mean(0)
    _, s, vh = torch.linalg.svd(x, full_matrices=False)

    def draw(g):
        rows = x[torch.randint(0, len(x), (256,), generator=g)]
        return rows, rows

    prefix = recover(torch.eye(8), True, 8000, draw, 0)
    for j in range(1, 8):
        best = float((x - x @ vh[:j].mT @ vh[:j]).square().sum(1).mean())
        ours = float((x - x @ product(prefix, j).mT).square().sum(1).mean())
        print(f"rank {j}: PCA {best:.4f}, prefix {ours:.4f}, ratio {ours / best:.4f}")
        assert ours <= 1.02 * best


class Ranks(Callback):
    """The rank of the only pair after each epoch."""

    def __init__(self, method):
        self.method, self.history, self.importance = method, [], None

    def on_train_epoch_end(self, trainer, pl_module):
        (prefix,) = self.method.prefixes.values()
        self.history.append(prefix.rank)
        self.importance = importance(prefix.first, prefix.second)


@pytest.mark.parametrize("weight", [3e-3, 1e-2, 3e-2, 1e-3, 0.0])
def test_must_06_the_true_rank_is_found(weight):
    target = with_singular_values((6.2, 4.0, 1.9), 10, 8, 2)

    def draw(g):
        x = torch.randn(64, 8, generator=g)
        return x, x @ target.mT

    torch.manual_seed(0)
    module = Map(nn.Sequential(nn.Linear(8, 10, bias=False)), nn.functional.mse_loss, 0.01, momentum=0.9)
    method = MaestroCallback(weight, threshold=1e-3, calibration_batches=0, smallest=False)
    fit(module, Batches(draw, 100, 0), 30, method, watch := Ranks(method))
    print(f"lambda {weight:g}: ranks {watch.history}, importance {[f'{v:.2g}' for v in watch.importance]}")
    assert watch.history == sorted(watch.history, reverse=True)
    if weight == 0:
        assert watch.history[-1] == 8
        assert watch.importance[3] <= 0.33
    elif weight == 1e-3:
        assert 3 <= watch.history[-1] <= 4
    else:
        assert watch.history[-1] == 3


def digits():
    raw = load_digits()
    x, y = torch.tensor(raw.data, dtype=torch.float32) / 16, torch.tensor(raw.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return (x[order[:1297]], y[order[:1297]]), (x[order[1297:]], y[order[1297:]])


class Shuffled:
    """Batches of 32 in an order that is a function of (seed, epoch)."""

    def __init__(self, x, y, seed):
        self.x, self.y, self.generator = x, y, torch.Generator().manual_seed(seed)

    def __len__(self):
        return -(-len(self.x) // 32)

    def __iter__(self):
        order = torch.randperm(len(self.x), generator=self.generator)
        return ((self.x[rows], self.y[rows]) for rows in order.split(32))


def mlp(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


SHARES = (0.25, 0.5, 0.75, 1.0)


def test_must_07_prefixes_are_networks_in_order():
    (x, y), (x_test, y_test) = digits()
    loss, found = nn.functional.cross_entropy, {}
    full = {"0": 64, "2": 64, "4": 10}
    score = lambda net: 100 * (net(x_test).argmax(-1) == y_test).float().mean().item()  # noqa: E731
    at = lambda share: {name: math.ceil(share * rank) for name, rank in full.items()}  # noqa: E731
    for seed in (0, 1, 2):
        plain = fit(Map(mlp(seed), loss, 1e-3), Shuffled(x, y, seed), 60)
        rows = {"one-shot SVD": [score(factorize(plain, at(share))) for share in SHARES]}
        for sampler in ("across_layers", "per_layer"):
            begin = time.perf_counter()
            method = MaestroCallback(0.0, sampler=sampler, smallest=False, calibration_batches=0, seed=seed)
            network = fit(Map(mlp(seed), loss, 1e-3), Shuffled(x, y, seed), 60, method)
            rows[sampler] = [score(deploy(network, at(share))[0]) for share in SHARES]
            found.setdefault(f"{sampler}, seconds", []).append([time.perf_counter() - begin])
        for name, values in rows.items():
            found.setdefault(name, []).append(values)
    mean = {}
    for name, runs in found.items():
        mean[name] = [statistics.mean(values) for values in zip(*runs)]
        spread = [statistics.stdev(values) for values in zip(*runs)]
        print(f"{name} | " + " | ".join(f"{m:.1f} ± {s:.1f}" for m, s in zip(mean[name], spread)))
    ours, one_shot = mean["across_layers"], mean["one-shot SVD"]
    for sampler in ("across_layers", "per_layer"):
        assert all(b >= a - 0.5 for a, b in zip(mean[sampler], mean[sampler][1:])), sampler
    assert ours[0] >= one_shot[0] + 5
    assert ours[1] >= one_shot[1] + 5
    assert mean["per_layer"][1] > one_shot[1]

"""instaflow's claims: reflow straightens, one step suffices after it, and the coupling is what does it.

Run: ``EFFDL_DATA=... pytest -m slow tests/claims/test_instaflow.py -s``; the tables are in docs/results.md.
"""

from __future__ import annotations

import copy
import math
import time

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from effdl.data.loading import ResumableLoader, as_it_is
from effdl.diffusion.instaflow import PairTable, ReflowModule, ReflowPairs, euler, straightness
from tests.support import BARE, load_npz

pytestmark = pytest.mark.slow
QUIET = {**BARE, "limit_val_batches": 0}


class Tensors(torch.utils.data.Dataset):
    """Images and labels, fetched as whole batches."""

    def __init__(self, image: Tensor, label: Tensor) -> None:
        self.image, self.label = image, label

    def __len__(self) -> int:
        return len(self.label)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        return {"image": self.image[rows], "label": self.label[rows]}

    def loader(self, batch_size: int, seed: int) -> ResumableLoader:
        order = {"shuffle": True, "seed": seed, "drop_last": True}
        return ResumableLoader(self, batch_size=batch_size, collate_fn=as_it_is, **order)


def fit(module: ReflowModule, data, steps: int) -> ReflowModule:
    where = {"datamodule": data} if isinstance(data, ReflowPairs) else {"train_dataloaders": data}
    Trainer(max_steps=steps, **QUIET).fit(module, **where)
    module.model.eval()
    return module


def adam(rate: float):
    return lambda parameters: torch.optim.Adam(parameters, rate)


def cosine(steps: int):
    wave = lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))  # noqa: E731
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, wave)


def summary(title: str, rows: dict[str, list[float]]) -> None:
    print(f"\n{title}")
    for name, values in rows.items():
        print(f"  {name:28s} {np.mean(values):.4f} ± {np.std(values):.4f}   {np.round(values, 4).tolist()}")


# --- must show (c), (d): eight classes of two antipodal modes in the plane ----------------------------------------

CLASSES, RADIUS, ITERATIONS = 8, 2.0, 3000


class Plane(nn.Module):
    """A 128-wide MLP on (x, t, class)."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        inner = [layer for _ in range(2) for layer in (nn.Linear(width, width), nn.SiLU())]
        self.net = nn.Sequential(nn.Linear(3 + CLASSES, width), nn.SiLU(), *inner, nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return self.net(torch.cat([x, t[:, None], F.one_hot(c, CLASSES).to(x)], 1))


def modes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Class k: a coin's toss between the two points at angle pi k / 8 and opposite, with noise of 0.1."""
    g = torch.Generator().manual_seed(seed)
    label = torch.arange(count) % CLASSES
    side = 2 * torch.randint(2, (count,), generator=g) - 1
    angle = math.pi * label / CLASSES
    x = RADIUS * side[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return x + 0.1 * torch.randn(count, 2, generator=g), label


def energy_distance(a: Tensor, b: Tensor, label: Tensor) -> float:
    """2 E|A - B| - E|A - A'| - E|B - B'|, averaged over the classes."""
    total = 0.0
    for k in range(CLASSES):
        x, y = a[label == k], b[label == k]
        total += (2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()).item()
    return total / CLASSES


@torch.no_grad()
def judge(network: nn.Module, seed: int) -> dict[str, float]:
    real, label = modes(4000, seed + 1000)
    x0 = torch.randn(4000, 2, generator=torch.Generator().manual_seed(seed + 2000))
    velocity = lambda x, t: network(x, t, label)  # noqa: E731
    return {
        "N=1": energy_distance(euler(velocity, x0, 1), real, label),
        "N=50": energy_distance(euler(velocity, x0, 50), real, label),
        "S": straightness(velocity, x0, 50).item(),
    }


def toy(seed: int, folder) -> dict[str, dict[str, float]]:
    torch.manual_seed(seed)
    table = {"shape": [2], "conditions": CLASSES, "count": 20_000, "steps": 50, "dtype": "float32", "block": 2000}
    table |= {"batch_size": 256, "val": 0.0, "seed": seed}

    def trained(network: nn.Module, stage: str, data) -> ReflowModule:
        recipe = {"optimizer": adam(1e-3), "scheduler": cosine(ITERATIONS), "seed": seed}
        return fit(ReflowModule(network, stage=stage, **recipe), data, ITERATIONS)

    start = time.process_time()  # a busy machine does not lengthen it
    flow = trained(Plane(), "flow", Tensors(*modes(20_000, seed)).loader(256, seed))
    reflow = trained(flow.model, "reflow", ReflowPairs(folder / "pairs", flow.model, **table))
    distill = trained(reflow.model, "distill", ReflowPairs(folder / "pairs2", reflow.model, **table))
    seconds = time.process_time() - start
    shuffle(folder / "pairs", seed)
    shuffled = trained(flow.model, "reflow", ReflowPairs(folder / "pairs", flow.model, **table))
    found = {name: judge(m.model, seed) for name, m in
             {"1-flow": flow, "2-flow": reflow, "distilled": distill, "shuffled": shuffled}.items()}  # fmt: skip
    return found | {"time": {"seconds": seconds}}


def shuffle(path, seed: int) -> None:
    """Give every noise somebody else's end point, of whatever class."""
    table = PairTable(path, writable=True)
    table.x1[:] = table.x1[np.random.default_rng(seed).permutation(len(table))]
    table.x1.flush()


SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    found = [toy(seed, tmp_path_factory.mktemp("toy")) for seed in SEEDS]
    rows = {f"{name}, {key}": [run[name][key] for run in found] for name in found[0] for key in found[0][name]}
    summary("energy distance and straightness, 8 classes x 2 modes", rows)
    return found


def test_must_c_reflow_makes_one_step_enough(toys):
    for run in toys:
        one, two, distilled = run["1-flow"], run["2-flow"], run["distilled"]
        assert two["N=1"] <= 0.1 * one["N=1"]
        assert two["S"] <= 0.1 * one["S"]
        assert distilled["N=1"] <= two["N=1"] + 0.01
        assert two["N=50"] < 0.05
        assert run["time"]["seconds"] <= 60


def test_must_d_shuffled_pairs_lose_the_gain(toys):
    for run in toys:
        assert run["shuffled"]["N=1"] >= run["1-flow"]["N=1"] * 0.9
        assert run["shuffled"]["N=1"] > 10 * run["2-flow"]["N=1"]


# --- must show (g): MNIST at 16 x 16 ------------------------------------------------------------------------------


def digits(split: str, count: int) -> tuple[Tensor, Tensor]:
    data = load_npz("mnist.npz")
    x = torch.from_numpy(data[f"x_{split}"][:count]).float()[:, None] / 127.5 - 1
    return F.interpolate(F.pad(x, (2, 2, 2, 2), value=-1.0), scale_factor=0.5, mode="area"), torch.from_numpy(
        data[f"y_{split}"][:count].astype(np.int64)
    )


class Judge(nn.Module):
    """A small classifier, whose 64 features measure distance as Inception's do in FID."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(),
            nn.Linear(512, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def trained_judge(x: Tensor, y: Tensor) -> Judge:
    torch.manual_seed(123)
    judge = Judge()
    optimizer = torch.optim.Adam(judge.parameters(), 2e-3)
    g = torch.Generator().manual_seed(0)
    for _ in range(1500):
        rows = torch.randint(len(x), (128,), generator=g)
        optimizer.zero_grad()
        F.cross_entropy(judge(x[rows]), y[rows]).backward()
        optimizer.step()
    return judge.eval()


@torch.no_grad()
def frechet(judge: Judge, a: Tensor, b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) over the features."""
    from scipy.linalg import sqrtm

    fa, fb = (judge.features(x).double().numpy() for x in (a, b))
    ca, cb = np.cov(fa.T), np.cov(fb.T)
    return float(((fa.mean(0) - fb.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real))


def mnist(seed: int, folder, judge: Judge, train: tuple, test: tuple, steps: int = 1000) -> dict[str, float]:
    from effdl.tasks.tiny import tiny_unet

    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = tiny_unet(16, 1, num_classes=10, seed=seed, **blocks)
    common = {"optimizer": adam(2e-3), "scheduler": cosine(steps), "seed": seed}
    start = time.perf_counter()
    flow = fit(ReflowModule(unet, stage="flow", **common), Tensors(*train).loader(64, seed), steps)
    pairs = ReflowPairs(folder, flow.model, conditions=10, count=4000, val=0.0, seed=seed, block=250)
    reflow = fit(ReflowModule(copy.deepcopy(flow.model), stage="reflow", **common), pairs, steps)
    found = {"seconds": time.perf_counter() - start}
    labels = torch.arange(2000) % 10
    for name, module in {"1-flow": flow, "2-flow": reflow}.items():
        for n in (1, 25):
            images = torch.cat([module.sample(part, steps=n, seed=i) for i, part in enumerate(labels.split(250))])
            found[f"{name}, N={n}"] = frechet(judge, images, test[0])
        x0 = torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(5))
        found[f"{name}, S"] = straightness(lambda x, t, m=module: m(x, t, labels[:64]), x0, 25).item()
    return found


def test_must_g_mnist_one_step_after_reflow(tmp_path):
    train, test = digits("train", 20_000), digits("test", 2000)
    judge = trained_judge(*train)
    accuracy = (judge(test[0]).argmax(1) == test[1]).float().mean().item()
    assert accuracy > 0.95
    found = [mnist(seed, tmp_path / str(seed), judge, train, test) for seed in (0, 1)]
    summary("Fréchet distance of features, MNIST 16 x 16", {key: [run[key] for run in found] for key in found[0]})
    for run in found:
        assert run["2-flow, N=1"] < run["1-flow, N=1"]
        assert run["2-flow, S"] < run["1-flow, S"]

"""meal-v2: teachers that know more lift a trained student above hard labels on the same pictures (checks 7 and 8)."""

from __future__ import annotations

import time
from functools import cache, partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import TensorDataset

from effdl import ImageClassifier, MEALV2ImageClassifier
from effdl.data.loading import ResumableLoader
from tests.support import load_npz

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*untrained", "ignore:.*weight_decay")]
SEEDS = (0, 1, 2)
SMALL, BATCH, EPOCHS = 2000, 64, 12
WIDE, NARROW = (32, 64, 64), (16, 32, 32)


@cache
def images() -> dict[str, TensorDataset]:
    """CIFAR-10 averaged to 16x16, standardised: 10,000 training images, the first 2,000 of them, 2,000 test images."""
    data = load_npz("cifar10.npz")

    def part(split: str, count: int | None = None) -> TensorDataset:
        x = torch.from_numpy(data[f"x_{split}"][:count]).permute(0, 3, 1, 2).float() / 255
        return TensorDataset(
            (nn.functional.avg_pool2d(x, 2) - 0.47) / 0.25, torch.from_numpy(data[f"y_{split}"][:count]).long()
        )

    return {"all": part("train"), "small": part("train", SMALL), "test": part("test")}


def network(widths: tuple[int, ...], seed: int) -> nn.Sequential:
    """Three convolutions, the side halved twice, and a linear head; the wide one with BatchNorm."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(zip((3, *widths), widths)):
        norm = nn.BatchNorm2d(b) if widths is WIDE else nn.Identity()
        layers += [nn.Conv2d(a, b, 3, padding=1), norm, nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i < 2 else [nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(widths[-1], 10))


def fit(module: ImageClassifier, data: str, epochs: int, seed: int) -> nn.Module:
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, ResumableLoader(images()[data], batch_size=BATCH, shuffle=True, seed=seed))
    return module.model.eval()


def pretrained(widths: tuple[int, ...], seed: int, data: str, epochs: int) -> nn.Module:
    """An ordinary training from random weights: teachers one cycle up to 0.1, students at 0.03."""
    optimizer = partial(torch.optim.SGD, lr=0.03, momentum=0.9, weight_decay=5e-4 if widths is WIDE else 0.0)
    steps = epochs * -(-len(images()[data]) // BATCH)
    cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=steps)
    scheduler = cycle if widths is WIDE else None
    module = ImageClassifier(network(widths, seed), 10, optimizer=optimizer, scheduler=scheduler)
    return fit(module, data, epochs, seed)


def tuning(weight_decay: float = 0.0) -> dict:
    """Of every fine-tuning, with hard and with soft labels: SGD 0.03, down to zero along a cosine."""
    return {
        "optimizer": partial(torch.optim.SGD, lr=0.03, momentum=0.9, weight_decay=weight_decay),
        "scheduler": partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=EPOCHS),
    }


@torch.no_grad()
def score(model: nn.Module) -> dict[str, float]:
    x, y = images()["test"].tensors
    logits = model.eval()(x)
    return {
        "accuracy": 100 * (logits.argmax(1) == y).float().mean().item(),
        "nll": nn.functional.cross_entropy(logits, y).item(),
    }


@cache
def run(seed: int) -> dict[str, dict[str, float]]:
    """Test accuracy [%] and NLL of every arm."""
    began = time.perf_counter()
    teachers = [pretrained(WIDE, 100 + 10 * seed + i, "all", 7) for i in range(2)]
    same_data = [pretrained(WIDE, 200 + 10 * seed + i, "small", 12) for i in range(2)]
    start = pretrained(NARROW, seed, "small", 12).state_dict()
    found = {f"teacher {i}": score(t) for i, t in enumerate(teachers)}
    found["same-data teacher"] = score(same_data[0])

    def student(trained: bool = True) -> nn.Module:
        model = network(NARROW, 50 + seed)
        if trained:
            model.load_state_dict(start)
        return model

    def meal(trained: bool = True, weight_decay: float = 0.0, given=teachers, **kwargs) -> dict[str, float]:
        module = MEALV2ImageClassifier(
            student(trained), 10, teachers=given, discriminator_k=2, **tuning(weight_decay), **kwargs
        )
        before = time.perf_counter()
        result = score(fit(module, "small", EPOCHS, 300 + seed))
        return {**result, "seconds": time.perf_counter() - before}

    found["student"] = score(student())
    before = time.perf_counter()
    found["hard labels"] = score(fit(ImageClassifier(student(), 10, **tuning()), "small", EPOCHS, 300 + seed))
    found["hard labels"]["seconds"] = time.perf_counter() - before
    found["MEAL"] = meal()
    found["MEAL, weight decay 1e-4"] = meal(weight_decay=1e-4)
    found["MEAL, from scratch"] = meal(trained=False)
    found["MEAL, without D"] = meal(adversarial=None)
    found["MEAL, cooperative"] = meal(adversarial="cooperative")
    found["MEAL, d_lr 1e-4"] = meal(d_lr=1e-4)
    found["MEAL, same-data teachers"] = meal(given=same_data)
    found["all"] = {"seconds": time.perf_counter() - began}
    print(f"seed {seed}", {arm: {k: round(v, 2) for k, v in row.items()} for arm, row in found.items()}, flush=True)
    return found


@cache
def table() -> dict[str, dict[str, np.ndarray]]:
    """Quantities by arm over the seeds; printed once."""
    runs = [run(seed) for seed in SEEDS]
    found = {arm: {key: np.array([r[arm][key] for r in runs]) for key in runs[0][arm]} for arm in runs[0]}
    for arm, quantities in found.items():
        print(
            f"{arm:26}", {key: f"{v.mean():.2f} ± {v.std():.2f} {v.round(2).tolist()}" for key, v in quantities.items()}
        )
    return found


def mean(arm: str, quantity: str = "accuracy") -> float:
    return float(table()[arm][quantity].mean())


def test_must_07_soft_labels_of_better_teachers_beat_hard_labels():
    assert mean("teacher 0") > mean("hard labels") + 3
    assert mean("MEAL") >= mean("hard labels") + 1
    assert mean("MEAL", "nll") < mean("hard labels", "nll")


def test_must_07_from_random_weights_it_is_much_weaker():
    assert mean("MEAL, from scratch") <= mean("MEAL") - 3


def test_must_08_weight_decay_hardly_counts():
    assert abs(mean("MEAL, weight decay 1e-4") - mean("MEAL")) < 0.5

"""The networks of ``python -m benchmarks quality``: one architecture, trained in each of the house's ways."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from lightning import LightningModule, Trainer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.cifar import folder as real_data
from effdl.core.deploy import deploy
from effdl.core.random import generator, preserved_rng
from effdl.data.loading import ResumableLoader
from effdl.diffusion.instaflow import ReflowModule, ReflowPairs
from effdl.diffusion.prodiff import ProDiffModule
from effdl.diffusion.ptq4dm import Settings, quantize_unet
from effdl.tasks.diffusion import DiffusionModule
from effdl.tasks.tiny import tiny_unet

SIDE, CLASSES, BATCH = 14, 10, 64
UPDATES, DISTILL, ROUND = 1000, 600, 300
PAIRS, TEACHER_STEPS = 5000, 16
QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
         "enable_model_summary": False}  # fmt: skip


def digits(split: str) -> tuple[Tensor, Tensor]:
    """MNIST at 14 x 14 in [-1, 1], ``[N, 1, 14, 14]``, and its classes."""
    import numpy as np

    with np.load(real_data() / "mnist.npz", allow_pickle=False) as data:
        images = torch.from_numpy(data[f"x_{split}"]).float()[:, None] / 127.5 - 1
        return F.avg_pool2d(images, 2), torch.from_numpy(data[f"y_{split}"].astype(np.int64))


class Digits(torch.utils.data.Dataset):
    """Images and classes, fetched as whole batches."""

    def __init__(self) -> None:
        self.image, self.label = digits("train")

    def __len__(self) -> int:
        return len(self.label)

    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        return {"image": self.image[rows], "label": self.label[rows]}

    def loader(self, seed: int) -> ResumableLoader:
        return ResumableLoader(self, batch_size=BATCH, collate_fn=_as_it_is, shuffle=True, seed=seed, drop_last=True)


def _as_it_is(batch: Any) -> Any:
    return batch


class Judge(nn.Module):
    """A small classifier, whose 64 features measure distance as Inception's do in FID."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 16, 64), nn.ReLU(),
        )  # fmt: skip
        self.features.num_features = 64
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def trained_judge(folder: Path) -> Judge:
    """Trained once, on the training images; its test accuracy is printed."""
    with preserved_rng():
        torch.manual_seed(123)
        judge = Judge()
    path = folder / "judge.safetensors"
    if path.is_file():
        judge.load_state_dict(load_file(path))
        return judge.eval()
    (x, y), (test, classes) = digits("train"), digits("test")
    optimizer, draw = torch.optim.Adam(judge.parameters(), 2e-3), generator(0)
    with torch.enable_grad():
        for _ in range(2000):
            rows = torch.randint(len(x), (128,), generator=draw)
            optimizer.zero_grad()
            F.cross_entropy(judge(x[rows]), y[rows]).backward()
            optimizer.step()
    accuracy = (judge.eval()(test).argmax(1) == classes).float().mean()
    print(f"judge: {100 * accuracy:.1f} % of the test images", flush=True)
    save_file(judge.state_dict(), path)
    return judge


class Networks(nn.Module):
    """What one seed trained; by name, each a U-Net ``(x, t, class_labels)``."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleDict()
        self.teacher: Any = None
        self.students: dict[int, Any] = {}
        self.flows: dict[str, ReflowModule] = {}
        self.seconds: dict[str, float] = {}

    def __getitem__(self, name: str) -> nn.Module:
        return self.nets[name]

    def velocity(self, name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """``v(x, t, labels)``, noise at t = 0."""
        return self.flows[name]


def unet(seed: int) -> nn.Module:
    """The one architecture: 165,000 parameters, convolutions alone."""
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return tiny_unet(SIDE, 1, num_classes=CLASSES, seed=seed, **blocks)


def recipe(steps: int, seed: int) -> dict[str, Any]:
    """Adam at 2e-3, down to zero along a cosine."""
    wave = lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1)))  # noqa: E731
    return {
        "optimizer": lambda parameters: torch.optim.Adam(parameters, 2e-3),
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, wave), "seed": seed,
    }  # fmt: skip


def train_all(folder: Path, seed: int) -> Networks:
    """Every network of a seed; weights in ``folder`` are read, not trained again."""
    folder.mkdir(parents=True, exist_ok=True)
    made, data = Networks(), Digits()

    def fitted(name: str, module: LightningModule, steps: int, pairs: Any = None) -> Any:
        path, began = folder / f"{name}.safetensors", time.perf_counter()
        if path.is_file():
            module.model.load_state_dict(load_file(path))
        else:
            where = {"datamodule": pairs} if pairs is not None else {"train_dataloaders": data.loader(seed)}
            with torch.enable_grad():
                Trainer(max_steps=steps, **QUIET).fit(module, **where)
            save_file(module.model.state_dict(), path)
        made.seconds[name] = time.perf_counter() - began
        print(f"seed {seed}: {name}, {made.seconds[name]:.0f} s", flush=True)
        return module.eval()

    noise = fitted("noise", DiffusionModule(unet(seed), **recipe(UPDATES, seed)), UPDATES).model
    made.nets["noise"], made.nets["int8"] = noise, _eight_bits(noise, seed)
    _flows(made, fitted, folder, seed)
    _students(made, fitted, seed)
    return made.eval()


def _eight_bits(network: nn.Module, seed: int) -> nn.Module:
    """Weights and activations of eight bits, in integer kernels; calibrated along twenty DDIM steps."""
    small = copy.deepcopy(network)
    labels = {"class_labels": torch.arange(CLASSES)}
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    quantize_unet(small, scheduler, Settings(steps=20, num_samples=512, seed=seed), condition=labels)
    return deploy(small, "torch-int8")


def _flows(made: Networks, fitted: Callable[..., Any], folder: Path, seed: int) -> None:
    table = {"conditions": CLASSES, "count": PAIRS, "val": 0.0, "seed": seed, "block": 250, "batch_size": BATCH}
    common = recipe(UPDATES, seed)
    flow = fitted("flow", ReflowModule(unet(seed), stage="flow", **common), UPDATES)
    pairs = ReflowPairs(folder / "pairs", flow.model, steps=25, **table)
    reflow = fitted("reflow", ReflowModule(copy.deepcopy(flow.model), stage="reflow", **common), UPDATES, pairs)
    pairs = ReflowPairs(folder / "pairs2", reflow.model, steps=10, **table)
    start = copy.deepcopy(reflow.model)
    distilled = fitted("distilled", ReflowModule(start, stage="distill", **recipe(DISTILL, seed)), DISTILL, pairs)
    made.flows = {"flow": flow, "reflow": reflow, "distilled": distilled}
    made.nets.update({name: module.model for name, module in made.flows.items()})


def _students(made: Networks, fitted: Callable[..., Any], seed: int) -> None:
    """A teacher of sixteen calls that says x_0; students of eight, four, two and one, each taught by the one before."""
    common = {"steps": TEACHER_STEPS, "schedule": "cosine", "loss": "l1"}
    teacher = ProDiffModule(unet(seed), **common, **recipe(UPDATES, seed))
    made.teacher = before = fitted("x0", teacher, UPDATES)
    calls = TEACHER_STEPS
    while calls > 1:
        calls //= 2
        student = ProDiffModule(
            stage="distill", teacher=before, time_scale=TEACHER_STEPS // calls, **common, **recipe(ROUND, seed)
        )
        made.students[calls] = before = fitted(f"student{calls}", student, ROUND)

"""CIFAR-10 and its trained ResNets, from the folder that ``EFFDL_DATA`` names (default ``../shared/data``)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def folder() -> Path:
    """The real data; raises where it is missing."""
    path = Path(os.environ.get("EFFDL_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (path / "cifar10.npz").is_file():
        raise SystemExit(f"{path} holds no cifar10.npz: set EFFDL_DATA")
    return path


class Shortcut(nn.Module):
    """Option A of He et al.: every second pixel, new channels of zeros on both sides."""

    def __init__(self, grows: bool) -> None:
        super().__init__()
        self.grows = grows

    def forward(self, x: Tensor) -> Tensor:
        if not self.grows:
            return x
        extra = x.shape[1] // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, extra, extra))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = Shortcut(inputs != outputs)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    """6n + 2 layers of 16, 32 and 64 channels."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        widths = [(16, 16, 1), (16, 32, 2), (32, 64, 2)]
        for number, (inputs, outputs, stride) in enumerate(widths, 1):
            first = Block(inputs, outputs, stride)
            rest = [Block(outputs, outputs, 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{number}", nn.Sequential(first, *rest))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean((2, 3)))


def resnet(layers: int = 20, trained: bool = True) -> ResNet:
    """ResNet-20 or -56, with the weights fine-tuned on these images."""
    network = ResNet((layers - 2) // 6)
    if trained:
        network.load_state_dict(load_file(folder() / f"cifar10_resnet{layers}_jpeg.safetensors"))
    return network


class Classifier(lightning.LightningModule):
    """Cross-entropy with SGD, one cycle: a module that has never heard of effdl."""

    def __init__(self, network: nn.Module | None = None, lr: float = 0.02) -> None:
        super().__init__()
        self.model, self.lr = network if network is not None else resnet(), lr

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val/accuracy", (self(x).argmax(1) == y).float().mean(), batch_size=len(y))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps, pct_start=0.2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Cifar(lightning.LightningDataModule):
    """Training batches flipped, in an order of (seed, epoch); the 2,000 test images.

    Args:
        images: how many of the 10,000 training images.
        batch_size: of training; validation takes 500.
    """

    def __init__(self, images: int = 10_000, batch_size: int = 100) -> None:
        super().__init__()
        self.images, self.batch_size = images, batch_size
        with np.load(folder() / "cifar10.npz", allow_pickle=False) as data:
            self.train = _pictures(data["x_train"][:images]), torch.from_numpy(data["y_train"][:images]).long()
            self.test = _pictures(data["x_test"]), torch.from_numpy(data["y_test"]).long()

    def train_dataloader(self) -> Any:
        torch_seed = torch.initial_seed() % 2**31
        return torch.utils.data.DataLoader(_Flipped(*self.train, self.batch_size, torch_seed), batch_size=None)

    def val_dataloader(self) -> Any:
        batches = list(zip(self.test[0].split(500), self.test[1].split(500)))
        return torch.utils.data.DataLoader(batches, batch_size=None)


class _Flipped(torch.utils.data.IterableDataset):
    def __init__(self, x: Tensor, y: Tensor, batch: int, seed: int) -> None:
        self.x, self.y, self.batch = x, y, batch
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.x) // self.batch

    def __iter__(self) -> Any:
        order = torch.randperm(len(self.x), generator=self.generator)
        for rows in order[: len(self) * self.batch].view(-1, self.batch):
            flip = torch.rand(len(rows), generator=self.generator).lt(0.5).view(-1, 1, 1, 1)
            yield torch.where(flip, self.x[rows].flip(-1), self.x[rows]), self.y[rows]


def _pictures(images: np.ndarray) -> Tensor:
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)

"""Modules that have never heard of effdl, and the tiny data they train on."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as new
import torch
from torch import nn
from torch.utils.data import Dataset

from effdl.core.batch import logits_of, unpack
from effdl.data.loading import ResumableLoader


class Pictures(Dataset):
    """Thirty-two fixed 8x8 pictures in three classes, as ``(x, y)``."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(7)
        self.y = torch.randint(0, 3, (32,), generator=g)
        self.x = torch.randn(32, 3, 8, 8, generator=g) + self.y.view(-1, 1, 1, 1) * 0.5

    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[i], self.y[i]


def pictures(batch_size: int = 4) -> ResumableLoader:
    """Eight batches of four, in an order that is a function of (seed, epoch)."""
    return ResumableLoader(Pictures(), batch_size=batch_size, shuffle=True, seed=3)


def network(plain: bool = False) -> nn.Module:
    """Convolutions, pooling and a head; ``plain``: without BatchNorm and Dropout, so that batches may be split."""
    norm, drop = (nn.Identity(), nn.Identity()) if plain else (nn.BatchNorm2d(8), nn.Dropout(0.2))
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), norm, nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), drop, nn.Linear(8, 3),
    )  # fmt: skip


def classifier(base: type = new.LightningModule) -> type:
    """The same plain LightningModule on ``lightning`` or ``pytorch_lightning``."""

    class ForeignClassifier(base):  # type: ignore[misc, valid-type]
        def __init__(self, model: nn.Module | None = None, plain: bool = False, lr: float = 0.05) -> None:
            super().__init__()
            self.model = network(plain) if model is None else model
            self.lr = lr

        def forward(self, x: Any) -> Any:
            return self.model(x)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, y, *_ = unpack(batch)
            out = logits_of(self(x))
            loss = nn.functional.cross_entropy(out.flatten(0, -2), (y if y is not None else x).flatten())
            self.log("train/loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            x, y, *_ = unpack(batch)
            out = logits_of(self(x))
            hit = out.argmax(-1).flatten() == (y if y is not None else x).flatten()
            self.log("val/accuracy", hit.float().mean())

        test_step = validation_step

        def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return logits_of(self(unpack(batch).inputs))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.7)]

    return ForeignClassifier


ForeignClassifier = classifier()

"""The tiny runs that the contract suite drives: a distillation in two rounds, of ``ProDiffModule`` and of the mixin."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from effdl.core.contract import ContractExample
from effdl.core.random import generator
from effdl.data.loading import ResumableLoader


def example() -> ContractExample:
    """From eight calls to four to two."""
    from effdl.core.random import preserved_rng
    from effdl.diffusion.prodiff import ProDiffModule

    with preserved_rng():
        torch.manual_seed(0)
        teacher = ProDiffModule(
            {"bins": 8, "condition": 8, "channels": 8, "layers": 2}, {"classes": 3, "frames": 8, "width": 8}, steps=8
        )
        torch.nn.init.normal_(teacher.model.output.weight, std=0.1)  # zero at the start teaches nothing
    return ContractExample(
        kwargs={"stage": "distill", "teacher": teacher, "steps": 8, "rounds": 2, "optimizer": sgd},
        bad={
            "denoiser": [3, teacher.model], "encoder": [3, teacher.encoder], "stage": "student",
            "teacher": [3, None, "nowhere"], "steps": [1, 4], "time_scale": [1, 3, 8], "rounds": [0, 4],
            "schedule": ["cosin", "cosine"], "loss": "l2", "reduction": "sum", "seed": -1,
            "optimizer": ContractExample.ANY, "scheduler": ContractExample.ANY,
        },
        data=frames,
        example_input=lambda module: (torch.randn(2, 1, 8, 8), torch.tensor([0, 2]), torch.randn(2, 8, 8)),
    )  # fmt: skip


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Not Adam, which makes a full step of the rounding errors where the gradient is zero."""
    return torch.optim.SGD(parameters, 0.05)


def frames(batch_size: int = 4) -> Any:
    """Batches (mel, label)."""
    mels = torch.rand(32, 1, 8, 8, generator=generator(0)) * 2 - 1
    return ResumableLoader(
        torch.utils.data.TensorDataset(mels, torch.arange(32) % 3), batch_size=batch_size, shuffle=True
    )


class Decoder(nn.Module):
    """Two convolutions, the label and the class, for 3-channel images; says clean data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.time, self.label = nn.Linear(1, 8), nn.Embedding(3, 8)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        hidden = self.time(t[:, None].to(x.dtype) / 8) + self.label(condition)
        return self.last(torch.tanh(self.first(x) + hidden[:, :, None, None]))


class Decoding(LightningModule):
    """Somebody's decoder, trained on what the noise hides."""

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = Decoder() if model is None else model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch[0], batch[1]
        return nn.functional.l1_loss(self.model(0.5 * x, torch.zeros_like(y), y).float(), x)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def mixin_example() -> ContractExample:
    """Somebody's decoder of small images, from eight calls to four to two."""
    from effdl.core.random import preserved_rng
    from effdl.diffusion.progressive_distill import ProgressiveDistillMixin

    class Mine(ProgressiveDistillMixin, Decoding):
        pass

    with preserved_rng():
        torch.manual_seed(1)
        teacher, other = Decoder(), nn.Linear(2, 2)
    kwargs = {"teacher": teacher, "steps": 8, "rounds": 2}
    return ContractExample(
        kwargs=kwargs,
        bad={
            "teacher": [3, None, other], "steps": [1, 6], "time_scale": [1, 3, 8], "rounds": [0, 4],
            "schedule": "cosin", "reduction": "sum", "seed": -1,
        },
        module=lambda: Mine(**kwargs),
        rebuild=lambda _bare: Decoding(),
        example_input=lambda _module: (torch.randn(2, 3, 8, 8), torch.tensor([0, 2]), torch.tensor([0, 1])),
    )  # fmt: skip

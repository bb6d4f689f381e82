"""ptq4dm for the contract suite: a denoiser of eight-pixel pictures on somebody's module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effdl.core.contract import ContractExample
from effdl.core.export import product
from effdl.core.quantized import quantized_weights

ARGUMENTS = {"steps": 4, "num_samples": 8, "batch_size": 4, "calibration_batches": 1}


class Denoiser(nn.Module):
    """(B, 3, 8, 8) and times (B,) to (B, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.time = nn.Linear(1, 8)
        self.norm = nn.GroupNorm(2, 8)

    def forward(self, x: Tensor, t: Tensor | None = None) -> Tensor:
        t = torch.zeros(len(x), device=x.device) if t is None else t
        hidden = self.enter(x) + self.time(t.to(x.dtype)[:, None] / 1000)[:, :, None, None]
        return self.leave(torch.nn.functional.silu(self.norm(hidden)))


class _Pictures(torch.utils.data.Dataset):
    """Pictures with a label for each of their rows, so that a classifier's module takes them too."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        stream = torch.Generator().manual_seed(i)
        return torch.randn(3, 8, 8, generator=stream), torch.randint(0, 8, (3, 8), generator=stream)


def _data(batch_size: int) -> Any:
    from effdl.data.loading import ResumableLoader

    return ResumableLoader(_Pictures(), batch_size=batch_size, shuffle=True, seed=3)


def _module() -> Any:
    from diffusers import DDPMScheduler
    from lightning.pytorch import LightningModule

    class Foreign(LightningModule):
        """Learns to take one fixed pattern away; nothing is drawn, so that two processes can equal one."""

        def __init__(self) -> None:
            super().__init__()
            self.model, self.noise_scheduler, self.lr = Denoiser(), DDPMScheduler(), 0.05

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, pattern = batch[0], batch[0].roll(1, 1)
            return torch.nn.functional.mse_loss(self.model(0.7 * x + 0.7 * pattern), pattern)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", self.training_step(batch, batch_idx))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)

    return Foreign()


def _finished(pl_module: Any) -> nn.Module:
    """The network with its codes; made once more where the module is as a checkpoint has it."""
    from effdl.callbacks._quantized_report import plain_copy
    from effdl.diffusion.ptq4dm import Settings, quantize_unet

    network = product(pl_module)
    if not quantized_weights(network):
        network = plain_copy(network)
        how = Settings(steps=4, num_samples=8, batch_size=4)
        quantize_unet(network, pl_module.noise_scheduler, how, images=torch.zeros(1, 3, 8, 8))
    return network


def contract_example() -> ContractExample:
    """Made here, lest the callback's file be long."""
    from diffusers import DDPMScheduler

    g = torch.Generator().manual_seed(5)
    inputs = (torch.randn(4, 3, 8, 8, generator=g), torch.tensor([0, 100, 500, 999]))
    return ContractExample(
        kwargs={**ARGUMENTS, "scheduler": DDPMScheduler()},
        module=_module,
        data=_data,
        example_input=lambda module: inputs,
        finished=_finished,
        bad={
            "bits": [8, (8, 1), (9, 8), (8, 8, 8)],
            "steps": [0, None, 2.5],
            "scheduler": ["DDIM", 3],
            "num_samples": [0, 3],
            "batch_size": [0, 9],
            "mu": [-0.1, 1.1],
            "sigma": [0, float("nan")],
            "guidance": -1.0,
            "p": 0.5,
            "split_shortcut": 1,
            "quantize_matmul": "yes",
            "site": "middle",
            "adaround": "yes",
            "iterations": 0,
            "seed": -1,
            "calibration_batches": [0, 2.5],
            "targets": ["no.such.layer", 3],
            "exclude": "no.such.layer",
        },
        second={"steps": 3},
    )

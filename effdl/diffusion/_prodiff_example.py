"""The tiny run of ``ProDiffModule`` that the contract suite drives: a distillation in two rounds."""

from __future__ import annotations

from typing import Any

import torch

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

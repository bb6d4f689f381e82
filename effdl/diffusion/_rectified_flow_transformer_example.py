"""The tiny run of ``RectifiedFlowModule`` that the contract suite drives."""

from __future__ import annotations

from typing import Any

import torch

from effdl.core.contract import ContractExample
from effdl.core.random import generator
from effdl.data.loading import ResumableLoader

SIZE, CHANNELS, TOKENS, WIDTH = 4, 4, 3, 8


def example() -> ContractExample:
    """An MM-DiT of two blocks on thirty-two random latents with text embeddings."""
    from effdl.tasks.tiny import tiny_sd3_transformer

    width = {"num_attention_heads": 2, "caption_projection_dim": 16, "joint_attention_dim": WIDTH}
    transformer = tiny_sd3_transformer(SIZE, CHANNELS, pooled_projection_dim=WIDTH, **width)
    return ContractExample(
        kwargs={"model": transformer, "qk_norm": True, "steps": 2, "shift": 3.0, "optimizer": sgd},
        bad={
            "model": 3, "density": ["gamma", "logit_normal(0, 0)", "mode(1.76)", "mode(a)", "mode(1, 2)"],
            "convention": "sd3", "shift": [0.0, -1.0], "steps": [0, 1.5], "dropout": [1.0, -0.1],
            "null_label": [-1, 0.5, 3], "qk_norm": "rms", "seed": -1,
            "optimizer": ContractExample.ANY, "scheduler": ContractExample.ANY,
        },
        data=embedded,
        example_input=lambda module: (
            torch.randn(2, CHANNELS, SIZE, SIZE), torch.randn(2, TOKENS, WIDTH), torch.randn(2, WIDTH),
            torch.tensor([1000.0, 500.0]),
        ),
    )  # fmt: skip


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Not Adam, which makes a full step of the rounding errors where the gradient is zero (a key's bias)."""
    return torch.optim.SGD(parameters, 0.05)


class Embedded(torch.utils.data.Dataset):
    """Latents with the embeddings of their captions."""

    def __init__(self) -> None:
        draw = generator(0)
        text = {"encoder_hidden_states": (TOKENS, WIDTH), "pooled_projections": (WIDTH,)}
        shapes = {"image": (CHANNELS, SIZE, SIZE), **text}
        self.columns = {name: torch.randn(32, *shape, generator=draw) for name, shape in shapes.items()}

    def __len__(self) -> int:
        return 32

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {name: column[i] for name, column in self.columns.items()}


def embedded(batch_size: int = 4) -> Any:
    """Batches of a dict."""
    return ResumableLoader(Embedded(), batch_size=batch_size, shuffle=True)

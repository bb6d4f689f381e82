"""Time and peak memory of three ways to differentiate through all sampling steps of a diffusion model.

The adjoint ODE of ``AdjointDPMModule`` (states stored, or integrated back too) and checkpointing each network call
against plain backpropagation, in real training steps: a ``UNet2DModel`` of 177,000 parameters at 16x16, whose weights
are optimised, four images, Euler. ``rows`` are as ``overhead.table`` prints them; the ratios are to backpropagation
through as many steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.race import Make, peak_bytes, race, ratios
from effdl.diffusion.adjoint_dpm import AdjointDPMModule, AdjointSampler

IMAGES, STEPS = 4, (10, 50)


class Backprop(AdjointSampler):
    """Keeps the activations of every call."""

    forward = AdjointSampler.backprop


class Checkpointed(Backprop):
    """Keeps the states, and makes the activations of one call at a time again."""

    def _slope(self, rebuild: Callable) -> Callable[..., Tensor]:
        slope = super()._slope(rebuild)
        return lambda s, y, *inputs: checkpoint(slope, s, y, *inputs, use_reentrant=False)


class Compared(AdjointDPMModule):
    """The module with another sampler."""

    kind: type[AdjointSampler] = AdjointSampler

    @property
    def sampler(self) -> AdjointSampler:
        made = super().sampler
        made.__class__ = self.kind
        return made


WAYS: dict[str, tuple[type[AdjointSampler], dict[str, Any]]] = {
    "backprop": (Backprop, {}),
    "checkpointing": (Checkpointed, {}),
    "adjoint": (AdjointSampler, {}),
    "adjoint, recompute": (AdjointSampler, {"state": "recompute"}),
}


def maker(way: str, steps: int, size: int) -> Make:
    """Makes (module, callbacks) of one run."""
    kind, settings = WAYS[way]

    def make() -> tuple[Any, list[Any]]:
        from effdl.tasks.tiny import tiny_unet

        module = Compared(
            tiny_unet(size, 3), lambda images, batch: images.square().mean(), optimise=["weights"],
            num_examples=IMAGES, steps=steps, solver="euler", optimizer=_sgd, **settings,
        )  # fmt: skip
        module.kind = kind
        return module, []

    return make


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 1e-5)


def rows(
    pairs: int, batch: int, steps: tuple[int, ...] = STEPS, size: int = 16, memory: bool = True
) -> list[dict[str, Any]]:
    """One dict per way and number of steps: ratios to backpropagation, median steps in ms, peak bytes of both.

    Args:
        pairs: training steps of each way, in turns.
        batch: images per step; at most four are taken, because backpropagation keeps so much.
        steps: numbers of sampling steps.
        size: side of the images.
        memory: peak resident memory of one training step each, in child processes; best before anything was computed.
    """
    data = {"index": torch.arange(min(batch, IMAGES))}
    peaks: dict[tuple[str, int], int | None] = {}
    for n in steps if memory else ():
        peaks |= {(way, n): peak_bytes(maker(way, n, size), data, steps=1) for way in WAYS}
    results = []
    for n in steps:
        times = race({way: maker(way, n, size) for way in WAYS}, data, pairs)
        for way in WAYS:
            row = {"name": f"{way}, {n} steps", "model": "tiny U-Net", **ratios(times, way, "backprop")}
            memory_of = {"peak_bytes": peaks.get((way, n)), "bare_peak_bytes": peaks.get(("backprop", n))}
            results.append(row | {"target": None, "met": None} | memory_of)
    return results


if __name__ == "__main__":
    from benchmarks.__main__ import aligned
    from benchmarks.overhead import table

    print(aligned(table(rows(5, IMAGES))))

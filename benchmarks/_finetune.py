"""Fine-tuning a U-Net: the step and the optimizer's memory of SaRA and of peft's LoRA over those of all weights.

A class-unconditional ``UNet2DModel`` (64, 128 channels, attention at half resolution) on 16x16 images, AdamW. LoRA of
rank 8 in the attention projections; SaRA with as many trained numbers as that, and with 20 % of all weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import nn

from benchmarks.race import Make, peak_bytes, race, ratios

PROJECTIONS = ["to_q", "to_k", "to_v", "to_out.0"]


class Memory(lightning.Callback):
    """Bytes of gradients and of the optimizer's state, and how many numbers train."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.seen["trained"] = sum(p.numel() for p in parameters if p.grad is not None)
        self.seen["gradient_bytes"] = sum(p.grad.nbytes for p in parameters if p.grad is not None)

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        state = [value for kept in trainer.optimizers[0].state.values() for value in kept.values()]
        self.seen["optimizer_bytes"] = sum(value.nbytes for value in state if isinstance(value, torch.Tensor))


def unet() -> nn.Module:
    from effdl.tasks.tiny import tiny_unet

    return tiny_unet(16, 3, block_out_channels=(64, 128)).train()


def low_rank(network: nn.Module, rank: int = 8) -> nn.Module:
    """peft's adapters in the attention projections; everything else is frozen."""
    from peft import LoraConfig, inject_adapter_in_model

    network.requires_grad_(False)
    return inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=PROJECTIONS), network)


def run(
    change: Callable[[nn.Module], Any], callbacks: Callable[[], list[Any]], memory: Memory
) -> tuple[Any, list[Any]]:
    """(module, callbacks) of one training."""
    from effdl.tasks.diffusion import DiffusionModule

    network = unet()
    change(network)
    module = DiffusionModule(network, optimizer=partial(torch.optim.AdamW, lr=1e-4))
    return module, [*callbacks(), memory]


def nothing(network: nn.Module) -> None: ...


def finetune(pairs: int, batch: int, memory: bool = True) -> list[dict[str, Any]]:
    """Rows ``NAME / all weights``: ratios of the step's time as in ``benchmarks.race.ratios``; ``trained`` numbers,
    ``gradient_bytes``, ``optimizer_bytes`` and (with ``memory``) ``peak_bytes``, each also as ``bare_...``."""
    try:
        adapted = low_rank(unet())
    except ImportError:
        return [{"name": "LoRA: peft is not installed (pip install 'effdl[peft]')"}]
    from effdl.callbacks import SaRACallback

    numbers = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    few = numbers / sum(p.numel() for p in unet().parameters())
    # the second selection is one step of a run, and is left out
    sara = {share: lambda share=share: [SaRACallback(fraction=share, reselect=None)] for share in (few, 0.2)}
    seen = {name: Memory() for name in ("bare", "LoRA, rank 8", f"SaRA, {few:.1%}", "SaRA, 20%")}
    how = [(nothing, list), (low_rank, list), (nothing, sara[few]), (nothing, sara[0.2])]
    makers: dict[str, Make] = {name: partial(run, *each, seen[name]) for name, each in zip(seen, how)}
    image = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    data = {"image": image}
    # before the first step here, see peak_bytes
    peaks = {name: peak_bytes(copy.copy(make), data) if memory else None for name, make in makers.items()}
    times = race(makers, data, pairs)
    rows = []
    for name in list(seen)[1:]:
        row = {"name": f"{name} / all weights", **ratios(times, name, "bare")}
        for prefix, which in (("", name), ("bare_", "bare")):
            told = seen[which].seen | {"peak_bytes": peaks[which]}
            row |= {f"{prefix}{key}": value for key, value in told.items()}
        rows.append(row)
    return rows


def table(results: list[dict[str, Any]]) -> list[list[str]]:
    """For printing: a header and a row per result, memory in MB against that of all weights."""
    keys = ("gradient_bytes", "optimizer_bytes", "peak_bytes")
    lines = [["fine-tuning", "median", "minimum", "cpu", "step ms", "bare ms", "trained", "gradients MB",
              "optimizer MB", "peak MB"]]  # fmt: skip
    for r in results:
        if "median" not in r:
            lines.append([r["name"], *[""] * 9])
            continue
        ratio = [f"{r[key]:.3f}" for key in ("median", "minimum", "cpu")]
        times = [f"{r[key]:.1f}" for key in ("step_ms", "bare_ms")]
        known = [r[key] is not None and r[f"bare_{key}"] is not None for key in keys]
        sizes = [f"{r[k] / 1e6:.2f} / {r[f'bare_{k}'] / 1e6:.2f}" if ok else "" for k, ok in zip(keys, known)]
        lines.append([r["name"], *ratio, *times, f"{r['trained']:,} / {r['bare_trained']:,}", *sizes])
    return lines

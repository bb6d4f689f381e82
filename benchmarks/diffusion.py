"""Diffusion in ratios: ``python -m benchmarks diffusion [--rows PART ...]``.

- samplers: whole samplings of the house over diffusers' own pipelines with the same network, noise and steps (<= 1.03);
- adjoint: AdjointDPM's training step over plain backpropagation and over checkpointing, and peak memory;
- fine-tuning: a step of SaRA and of LoRA over that of all weights, and optimizer memory;
- int8: the 8-bit U-Net over the fp32 one.
"""

from __future__ import annotations

from typing import Any

from benchmarks import _adjoint, _finetune, overhead, peers, samplers

PARTS = ("samplers", "adjoint", "fine-tuning", "int8")


def measure(pairs: int, batch: int, parts: list[str] | None = None, memory: bool = True) -> dict[str, list[Any]]:
    """The rows of each part. Memory is measured in child processes, before anything is computed here."""
    unknown = set(parts or ()) - set(PARTS)
    if unknown:
        raise SystemExit(f"no part {sorted(unknown)}; there are {list(PARTS)}")
    chosen, found = parts or PARTS, {}
    if "adjoint" in chosen:
        found["adjoint"] = _adjoint.rows(pairs, batch, memory=memory)
    if "fine-tuning" in chosen:
        found["fine-tuning"] = _finetune.finetune(pairs, batch, memory)
    if "samplers" in chosen:
        found["samplers"] = [*samplers.unconditional(pairs, batch), *samplers.text_to_image(pairs, batch)]
    if "int8" in chosen:
        found["int8"] = samplers.eight_bits(pairs, batch)
    return found


def tables(found: dict[str, list[Any]]) -> list[list[list[str]]]:
    """For printing: one table per part."""
    makers = {"adjoint": overhead.table, "fine-tuning": _finetune.table}
    return [makers.get(part, peers.table)(rows) for part, rows in found.items()]

"""What a distillation shows at its end: both networks' sizes, and their samples side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from effdl.core.capture import evaluating
from effdl.core.random import generator
from effdl.core.report import measure
from effdl.core.solvers import sample_loop
from effdl.diffusion._figures import first_rows

SHOWN, STEPS = 10, 25


def describe(module: Any) -> dict[str, Any]:
    """The teacher's column of the final table, and the number of compared pairs of every feature."""
    arguments: dict[str, Any] = {}
    if module.example is not None:
        noisy, timesteps, condition = module.example
        arguments = _moved({"args": (noisy, timesteps), "kwargs": condition}, module.device)
    before = {"name": "teacher", **measure(module.teacher.on(module.device), **arguments)}
    if (loss := getattr(module._trainer, "callback_metrics", {}).get("koala/val_teacher")) is not None:
        before["metrics"] = {"val/loss": float(loss)}
    return {"before": before, **{f"pairs_{feature}": len(pairs) for feature, pairs in module.pairs.items()}}


def _moved(value: Any, device: torch.device) -> Any:
    return tree_map(lambda it: it.to(device) if isinstance(it, Tensor) else it, value)


@torch.no_grad()
def draw_beside(module: Any, path: Path) -> Path | None:
    """Teacher above, student below: one column per condition of a validation batch; ``None`` without one."""
    if module.example is None:
        return None
    noisy, _, condition = module.example
    condition = _moved(first_rows(condition, SHOWN), module.device)
    noise = torch.randn(noisy[:SHOWN].shape, generator=generator(0)).to(module.device)
    rows = [_sampled(module, net, noise, condition) for net in (module.teacher.on(module.device), module.model)]
    if rows[0].shape[1] not in (1, 3):
        return None
    from torchvision.utils import make_grid, save_image

    grid = make_grid(torch.cat(rows).float().cpu().clamp(-1, 1), nrow=len(noise), value_range=(-1, 1), normalize=True)
    zoom = max(1, 64 // rows[0].shape[-1])
    save_image(grid.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2), path)
    return path


def _sampled(module: Any, network: nn.Module, noise: Tensor, condition: dict[str, Any]) -> Tensor:
    scheduler = type(module.noise_scheduler).from_config(module.noise_scheduler.config)
    with evaluating(network):
        latents = sample_loop(lambda x, t: network(x, t, **condition)[0].float(), noise, scheduler, STEPS, generator(0))
    return module.surroundings.decode_images(latents)

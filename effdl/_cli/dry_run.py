"""``effdl run NAME --dry-run``: what a run would touch and cost, from its real set-up and its first few steps.

Nothing is written. The module is thrown away after the steps that were timed.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from rich.table import Table

from effdl._cli import recipe
from effdl._cli.engine import RecipeCLI, participants
from effdl._cli.run import RUNS, quiet
from effdl._cli.terminal import console
from effdl.core.errors import ConfigurationError
from effdl.core.export import product
from effdl.core.report import count_parameters
from effdl.core.schedules import total_steps

STEPS, SECONDS = 6, 20.0
NOTHING_WRITTEN = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
}


class _Enough(Exception):
    """Raised out of the loop when the steps are timed: what is attached then undoes itself."""


class _Probe(Callback):
    """Listens to the first steps; the last of the callbacks, so that a step's end is everybody's."""

    def __init__(self, types: Mapping[str, str]) -> None:
        self.types, self.times, self.found = types, [], {}
        self.began = self.start = time.perf_counter()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.found = {
            "steps": total_steps(trainer),
            "batches": trainer.num_training_batches,
            "epochs": trainer.max_epochs,
            "replaced": _replaced(self.types, pl_module),
            "matched": {
                type(c).__name__: list(c.matched(pl_module)) for c in trainer.callbacks if hasattr(c, "matched")
            },
            **count_parameters(product(pl_module)),
        }
        self.began = time.perf_counter()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if batch_idx > 0:
            self.times.append(now - self.start)
        if len(self.times) >= STEPS or now - self.began > SECONDS:
            raise _Enough
        self.start = now


def _replaced(types: Mapping[str, str], module: torch.nn.Module) -> dict[str, str]:
    """Layers whose class is no longer what it was before the callbacks' set-up."""
    now = {name: type(layer).__name__ for name, layer in module.named_modules() if name}
    changed = {name: f"{types.get(name, 'nothing')} -> {kind}" for name, kind in now.items() if types.get(name) != kind}
    # what lies inside a new layer is its own affair
    return {name: text for name, text in changed.items() if name.rpartition(".")[0] not in changed}


def dry_run(name: str, overrides: list[str]) -> None:
    """Print matched layers, steps and cost of each stage.

    Raises:
        ConfigurationError: whatever would stop the run before its first steps.
    """
    quiet()
    slug, path = recipe.locate(name)
    folders: dict[str, Path] = {}
    for stage in recipe.stages_of(recipe.read(path), overrides):
        if waits := [needed for needed in stage.needs() if needed not in folders]:
            console().print(f"Stage {stage.name}: starts from stage {', '.join(waits)}, which has not run yet.")
            continue
        stage = stage.resolved(folders)
        folder = RUNS / slug / "stages" / f"{stage.name}-{stage.digest()}"
        if (folder / "report.json").is_file():
            folders[stage.name] = folder
            console().print(f"Stage {stage.name}: finished before, in {folder}")
        else:
            _print(stage, probe(stage))


def probe(stage: recipe.Stage) -> dict[str, Any]:
    """Set a stage up, time a few steps, stop."""
    cli = RecipeCLI(stage, folder=None, trainer=NOTHING_WRITTEN)
    probe = _Probe({name: type(layer).__name__ for name, layer in cli.model.named_modules()})
    cli.trainer.callbacks.append(probe)
    with contextlib.suppress(_Enough):
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    if not probe.found:
        raise ConfigurationError("The run has no training steps: its data is empty, or max_epochs or max_steps is 0.")
    # the first steps warm caches up
    times = probe.times[2:] or probe.times
    step = statistics.median(times) if times else math.nan
    batch_steps = probe.found["steps"] * cli.trainer.accumulate_grad_batches
    parts = {type(part).__name__: part.paper.title for part in participants(cli) if getattr(part, "paper", None)}
    return {**probe.found, "parts": parts, "step_seconds": step, "seconds": batch_steps * step}


def _print(stage: recipe.Stage, found: Mapping[str, Any]) -> None:
    table = Table(show_header=False, title=f"Stage {stage.name}" if stage.name else None, title_justify="left")
    for name, title in found["parts"].items():
        table.add_row(name, title)
    for name, layers in found["matched"].items():
        table.add_row(f"{name} acts on", _listed(layers))
    if found["replaced"]:
        table.add_row("layers replaced", _listed([f"{name}: {text}" for name, text in found["replaced"].items()]))
    table.add_row("parameters", f"{found['parameters']:,}")
    table.add_row("optimizer steps", f"{found['steps']:,.0f}")
    table.add_row("batches per epoch", f"{found['batches']:,}")
    table.add_row("time of a step", f"{1000 * found['step_seconds']:.0f} ms, measured without validation")
    table.add_row("training in all, about", f"{found['seconds'] / 60:.1f} min")
    console().print(table)


def _listed(names: list[str], most: int = 12) -> str:
    more = f"\n... and {len(names) - most} more" if len(names) > most else ""
    return f"{len(names)} layers\n" + "\n".join(names[:most]) + more

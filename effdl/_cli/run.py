"""``effdl run``: stages, run folders, training, and what is written at the end.

``runs/SLUG/version_N`` holds ``config.yaml``, ``metrics.csv``, ``report.json``, ``figures/``, ``model/``, ``last.ckpt``
and ``citations.bib``. A stage before the last lies in ``runs/SLUG/stages/NAME-DIGEST``, where later runs of the same
config find it finished, or go on with it.
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import logging
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from effdl._cli import recipe
from effdl._cli.engine import LAST, RecipeCLI, participants
from effdl._cli.terminal import console, rank
from effdl.core.errors import ConfigurationError
from effdl.core.export import product, save_model
from effdl.core.report import (
    ForwardProbe,
    draw_curves,
    environment,
    measure,
    print_report,
    read_metrics,
    write_report,
)

RUNS = Path("runs")
_FOLDER_VARIABLE = "EFFDL_RUN_FOLDER"
_NO_NEWS = (
    ".*does not have many workers.*",
    ".*exists and is not empty.*",
    ".*GPU available but not used.*",
    ".*callbacks used to create the checkpoint need to be provided.*",
    r"(?s).*deprecated in v4\.49.*",  # LightningCLI's calls of jsonargparse
    "(?s).*JsonargparseDeprecationWarning.*",
    ".*LeafSpec.*",
)


def run(name: str | None, overrides: list[str], resume: str | None) -> Path:
    """Run a recipe and return its run folder.

    Raises:
        ConfigurationError: whatever the user can put right.
    """
    quiet()
    if resume is not None:
        return _resume(Path(resume), name, overrides)
    slug, path = recipe.locate(name or "")
    stages = recipe.stages_of(recipe.read(path), overrides)
    if len(stages) > 1 and any(key == "print_config" for key, _ in recipe.pairs(overrides)):
        _print_configs(stages)
    folders: dict[str, Path] = {}
    for stage in stages[:-1]:
        folders[stage.name] = _cached(slug, stage.resolved(folders))
    folder = claim(RUNS / slug)
    try:
        return execute(stages[-1].resolved(folders), slug, folder)
    except BaseException:
        _discard(folder)
        raise


def _resume(folder: Path, name: str | None, overrides: list[str]) -> Path:
    config, checkpoint = folder / "config.yaml", folder / LAST
    if not config.is_file() or not checkpoint.is_file():
        raise ConfigurationError(f"--resume {folder}: a run folder with config.yaml and {LAST} is expected.")
    slug = folder.resolve().parent.name
    if name is not None and recipe.locate(name)[0] != slug:
        raise ConfigurationError(f"--resume {folder} is a run of {slug!r}, not of {name!r}: leave the name out.")
    (stage,) = recipe.stages_of(recipe.read(config), overrides)
    return execute(stage, slug, folder, checkpoint)


def _print_configs(stages: list[recipe.Stage]) -> None:
    """``--print_config`` of every stage, a YAML document each; ends the program, as the option does."""
    for stage in stages:
        print(f"--- # stage {stage.name}")
        with contextlib.suppress(SystemExit):
            RecipeCLI(stage)
    raise SystemExit(0)


def _cached(slug: str, stage: recipe.Stage) -> Path:
    """The folder of a finished stage, which is run (or gone on with) where it is not there yet."""
    folder = RUNS / slug / "stages" / f"{stage.name}-{stage.digest()}"
    if (folder / "report.json").is_file():
        console().print(f"Stage {stage.name}: finished before, in {folder}")
        return folder
    console().print(f"Stage {stage.name}: {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / LAST
    return execute(stage, slug, folder, checkpoint if checkpoint.is_file() else None)


def execute(stage: recipe.Stage, slug: str, folder: Path, checkpoint: Path | None = None) -> Path:
    """Train one stage into ``folder`` and write what it leaves."""
    began = datetime.datetime.now(datetime.UTC)
    cli = RecipeCLI(stage, folder)
    watch = Watch()
    cli.trainer.callbacks.insert(0, watch)
    papers = cite(cli)
    if cli.trainer.is_global_zero:
        (folder / "config.yaml").write_text(cli.config_text(), encoding="utf-8")
        (folder / "citations.bib").write_text("".join(f"{paper.bibtex}\n" for paper in papers), encoding="utf-8")
        if checkpoint is not None:
            _keep_metrics(cli.trainer.loggers, folder, checkpoint)
    start = time.perf_counter()
    cli.trainer.fit(
        cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True if checkpoint else None
    )
    seconds = time.perf_counter() - start
    if cli.trainer.is_global_zero:
        report = finish(cli, watch, folder)
        report = {
            "slug": slug,
            "stage": stage.name,
            "seed": cli.config.get("seed_everything"),
            "started": began.isoformat(timespec="seconds"),
            "resumed": checkpoint is not None,
            "seconds": {"training": seconds, "all": (datetime.datetime.now(datetime.UTC) - began).total_seconds()},
            "command": sys.argv,
            "environment": environment(),
            "papers": [paper.key for paper in papers],
            **report,
        }
        write_report(folder / "report.json", report)
        print_report(report, console())
        console().print(f"Run folder: {folder}")
    cli.trainer.strategy.barrier("effdl_finished")
    return folder


def finish(cli: RecipeCLI, watch: Watch, folder: Path) -> dict[str, Any]:
    """Model folder, methods' reports and figures; the measurements of the finished model."""
    kind = save_model(cli.model, folder / "model", preprocessing(cli.datamodule, watch.inputs))
    methods: dict[str, Any] = {}
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    curves: list[str] = []
    for part in participants(cli):
        paper = getattr(part, "paper", None)
        slug = paper.slug if paper else type(part).__name__
        if callable(getattr(part, "report", None)):
            methods[slug] = dict(part.report())
            curves += methods[slug].pop("curves", [])
        if callable(getattr(part, "figures", None)):
            part.figures(figures)
    metrics = folder / "metrics.csv"
    if metrics.is_file():
        names = curves or [name for name in read_metrics(metrics) if _worth_drawing(name)]
        draw_curves(metrics, figures / "training.png", names, title=folder.parent.name)
    final = {"name": "final", "metrics": _final_metrics(cli.trainer), **measure_finished(cli, watch)}
    for method in methods.values():
        after = method.pop("after", {})
        final = {**final, **after, "metrics": {**final["metrics"], **after.get("metrics", {})}}
    return {
        "steps": cli.trainer.global_step,
        "epochs": cli.trainer.current_epoch,
        "model": {"class": type(product(cli.model)).__name__, "folder": "model", "kind": kind},
        "result": final,
        "methods": methods,
    }


def preprocessing(data: Any, inputs: tuple[tuple, dict[str, Any]] | None) -> dict[str, Any]:
    """What timm should know of the images: their size, and the normalisation where the data module tells it."""
    image = inputs[0][0] if inputs and inputs[0] else None
    if not isinstance(image, torch.Tensor) or image.dim() != 4:
        return {}
    known = {}
    for name in ("mean", "std"):
        value = getattr(data, name, None)
        value = (value,) if isinstance(value, (int, float)) else value
        if isinstance(value, (tuple, list)) and len(value) in (1, image.shape[1]):
            known[name] = tuple(map(float, value))
    return {"input_size": tuple(image.shape[1:]), **known}


def measure_finished(cli: RecipeCLI, watch: Watch) -> dict[str, Any]:
    """``core.report.measure`` of the finished network, on the device that trained it."""
    network, device = product(cli.model), cli.trainer.strategy.root_device
    if watch.inputs is None:
        return measure(network)
    network.to(device)
    try:
        return measure(network, *watch.inputs)
    finally:
        network.to("cpu")


def _final_metrics(trainer: Any) -> dict[str, float]:
    """The last value of everything logged, per-step values left out where there is an epoch's."""
    names = [name for name in trainer.callback_metrics if not name.endswith("_step")]
    return {name: float(trainer.callback_metrics[name]) for name in sorted(names)}


def _worth_drawing(name: str) -> bool:
    return not name.startswith(("train", "lr-")) and not name.endswith("_step")


class Watch(Callback):
    """Remembers one example of what the network was called with, for latency and export."""

    def __init__(self) -> None:
        self.probe: ForwardProbe | None = None

    @property
    def inputs(self) -> tuple[tuple, dict[str, Any]] | None:
        return self.probe.inputs if self.probe else None

    def _listen(self, trainer: Any, pl_module: Any) -> None:
        self.probe = self.probe or ForwardProbe(product(pl_module))

    on_fit_start = on_validation_start = on_test_start = _listen

    def _stop(self, *args: Any, **kwargs: Any) -> None:
        if self.probe is not None:
            self.probe.remove()

    on_train_end = teardown = on_exception = _stop


def claim(parent: Path) -> Path:
    """A new ``version_N``, chosen by rank 0; its child processes read it from the environment."""
    if rank() > 0:  # where no launcher of ours told us: never created, only rank 0 writes
        return Path(os.environ.get(_FOLDER_VARIABLE) or parent / f"rank_{rank()}")
    parent.mkdir(parents=True, exist_ok=True)
    taken = [int(p.name[8:]) for p in parent.glob("version_*") if p.name[8:].isdigit()]
    number = max(taken, default=-1) + 1
    while True:
        folder = parent / f"version_{number}"
        try:
            folder.mkdir()
            break
        except FileExistsError:  # another run was faster
            number += 1
    os.environ[_FOLDER_VARIABLE] = str(folder.resolve())
    return folder


def _discard(folder: Path) -> None:
    """Remove a claimed folder in which nothing was trained."""
    if {path.name for path in folder.glob("*")} <= {"config.yaml", "citations.bib"}:
        shutil.rmtree(folder, ignore_errors=True)


def _keep_metrics(loggers: list[Any], folder: Path, checkpoint: Path) -> None:
    """Rows of ``metrics.csv`` from before the checkpoint: the logger starts its file anew."""
    path = folder / "metrics.csv"
    if not path.is_file() or not loggers:
        return
    state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    done = state["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{k: v for k, v in row.items() if v != ""} for row in csv.DictReader(file)]
    loggers[0].experiment.metrics.extend({**row, "step": int(row["step"])} for row in rows if int(row["step"]) < done)
    loggers[0].save()


def cite(cli: RecipeCLI) -> list[Any]:
    """The papers behind the parts of a run, printed as BibTeX."""
    papers = [getattr(part, "paper", None) for part in participants(cli)]
    papers = list(dict.fromkeys(paper for paper in papers if paper is not None))
    if papers and cli.trainer.is_global_zero:
        console().print("This run uses:")
        for paper in papers:
            console().print(paper.bibtex, highlight=False, markup=False, soft_wrap=True)
    return papers


def quiet() -> None:
    """Lightning's remarks on hardware and folders are no news to somebody who runs a recipe."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _NO_NEWS:
        warnings.filterwarnings("ignore", message)

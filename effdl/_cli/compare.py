"""``effdl compare``: several methods on one model, data, budget and seeds, through the recipes' engine."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

from effdl import catalog
from effdl._cli import recipe
from effdl._cli.engine import RecipeCLI
from effdl._cli.run import quiet
from effdl._cli.terminal import console
from effdl.comparison import BASELINE, Build, run_all
from effdl.core.errors import ConfigurationError, check, suggest

#: Where model, data and budget come from unless --config names another file.
BASE = "gradual-pruning"
OWN = ("seeds", "output", "metric", "mode")
OUTPUT = Path("runs") / "compare"


def compare(names: list[str], overrides: list[str]) -> Path:
    """Run what is missing, print the table, return the folder.

    Args:
        names: slugs or class names of methods.
        overrides: ``--model...``, ``--data...``, ``--trainer...`` for all; ``--SLUG.argument=value`` for one method;
            ``--sparsity=.9`` (any argument of a method) for all that take it; ``--seeds=3``, ``--output=FOLDER``,
            ``--metric=val/accuracy``, ``--mode=max``.

    Raises:
        ConfigurationError: whatever the user can put right.
    """
    quiet()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    entries = {catalog.find(name).slug: catalog.find(name) for name in names}
    if not entries:
        raise ConfigurationError("effdl compare: name the methods first; `effdl list` shows all.")
    own, shared, single = _sorted(recipe.pairs(overrides), entries)
    (base,) = recipe.stages_of({k: v for k, v in recipe.read(recipe.locate(BASE)[1]).items() if k != "method"}, shared)
    stages = {BASELINE: base}
    stages |= {slug: _stage(base, entry, single.pop(slug, {})) for slug, entry in entries.items()}
    for stage in stages.values():  # every argument is looked at before anything is trained
        RecipeCLI(stage, folder=None)

    def build(name: str, seed: int) -> Build:
        stage = stages[name]
        seeded = recipe.Stage(stage.name, stage.config, [*stage.overrides, f"--seed_everything={seed}"])
        cli = RecipeCLI(seeded, folder=None, trainer={"enable_progress_bar": False, "enable_model_summary": False})
        return Build(cli.trainer, cli.model, cli.datamodule)

    count = own.get("seeds", "3")
    check(count.isdigit() and int(count) > 0, "--seeds", count, "a positive number")
    folder = Path(own.get("output") or OUTPUT)
    identities = {name: stage.digest() for name, stage in stages.items()}
    found = run_all(identities, build, range(int(count)), folder, own.get("metric"), own.get("mode"))
    console().print(found.table())
    console().print(f"{folder / 'compare.json'}, {folder / 'pareto.png'}")
    return folder


def _sorted(
    given: list[tuple[str, list[str]]], entries: dict[str, Any]
) -> tuple[dict[str, str], list[str], dict[str, dict[str, str]]]:
    """Our own options, overrides for every run, and arguments of single methods."""
    own: dict[str, str] = {}
    shared: list[str] = []
    single: dict[str, dict[str, str]] = {slug: {} for slug in entries}
    takes = {slug: recipe.arguments_of(catalog.load(entry)) for slug, entry in entries.items()}
    for key, words in given:
        first, _, rest = key.partition(".")
        value = recipe.value_of(words) or ""
        if key in OWN:
            own[key] = value
        elif first in entries and rest:
            single[first][rest] = value
        elif first in ("model", "data", "trainer", "config"):
            shared += words
        elif takers := [slug for slug in entries if key in takes[slug]]:
            for slug in takers:
                single[slug].setdefault(key, value)
        else:
            known = [
                *OWN,
                *entries,
                "model",
                "data",
                "trainer",
                "config",
                *(a for names in takes.values() for a in names),
            ]
            raise ConfigurationError(f"--{key} belongs to none of these methods. {suggest(first, known)}".strip())
    return own, shared, single


def _stage(base: recipe.Stage, entry: Any, arguments: dict[str, str]) -> recipe.Stage:
    """The shared config with one method in it; what the method cannot do without comes from its recipe."""
    if entry.kind == "callback":
        cls = catalog.load(entry)
        init = _required(cls, entry.slug, arguments)
        config = {**base.config, "method": {"class_path": recipe.full_name(entry.name), "init_args": init}}
        return recipe.Stage(entry.slug, config, [*base.overrides, *_options("method", arguments)])
    if entry.kind == "mixin" and entry.concrete:
        config = recipe.merge(base.config, {})
        config["model"] = {**config["model"], "class_path": recipe.full_name(entry.concrete)}
        return recipe.Stage(entry.slug, config, [*base.overrides, *_options("model", arguments)])
    raise ConfigurationError(f"{entry.slug} is a {entry.kind}: it trains a model of its own, not one that is compared.")


def _options(part: str, arguments: dict[str, str]) -> list[str]:
    return [f"--{part}.{key}={value}" for key, value in arguments.items()]


def _required(cls: type, slug: str, given: dict[str, str]) -> dict[str, Any]:
    """The recipe's values of arguments that have no default and were not given."""
    files = recipe.recipe_files()
    method = recipe.read(files[slug]).get("method") or {} if slug in files else {}
    known = method.get("init_args") or {} if method.get("class_path", "").endswith(f".{cls.__name__}") else {}
    parameters = inspect.signature(cls).parameters.values()
    missing = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return {name: known[name] for name in missing if name in known and name not in given}

"""``effdl copy``: a recipe to edit, as effdl's own file or as a plain LightningCLI config."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

from effdl._cli import recipe
from effdl.core.errors import ConfigurationError

HOW = """\
# Plain LightningCLI form of the effdl recipe {slug}. Run it with:
#   python train.py fit --config {file}
# where train.py is
#   from lightning.pytorch.cli import LightningCLI
#   LightningCLI(subclass_mode_model=True, subclass_mode_data=True, auto_configure_optimizers=False)
"""


def copy_recipe(name: str, plain: bool, folder: Path = Path()) -> list[Path]:
    """Write the recipe into ``folder`` (a staged one in plain form: one file per stage).

    Raises:
        ConfigurationError: unknown name, or a file of the name is there.
    """
    slug, source = recipe.locate(name)
    if not plain:
        return [_write(folder / f"{slug}.yaml", source.read_text(encoding="utf-8"))]
    written = []
    for stage in recipe.stages_of(recipe.read(source), []):
        target = folder / (f"{slug}-{stage.name}.yaml" if stage.name else f"{slug}.yaml")
        text = HOW.format(slug=slug, file=target.name) + _header(source)
        for needed in stage.needs():
            text += f"# Replace the paths below runs/{needed} by those of your run of {slug}-{needed}.yaml.\n"
        config = stage.resolved({needed: Path("runs") / needed for needed in stage.needs()}).config
        written.append(_write(target, text + yaml.safe_dump(plain_config(config), sort_keys=False)))
    return written


def plain_config(config: recipe.Config) -> recipe.Config:
    """The method among ``trainer.callbacks``, and what effdl links from data to model written out."""
    config = copy.deepcopy(config)
    method = config.pop("method", None)
    if method is not None:
        trainer = config.setdefault("trainer", {})
        callbacks = trainer.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        first = next((i for i, c in enumerate(callbacks) if "WeightAveraging" in _class_path(c)), len(callbacks))
        trainer["callbacks"] = [*callbacks[:first], method, *callbacks[first:]]
    if isinstance(config.get("model"), dict) and (linked := _linked(config)):
        config["model"]["init_args"] = {**(config["model"].get("init_args") or {}), **linked}
    return config


def _class_path(value: Any) -> str:
    return value.get("class_path", "") if isinstance(value, dict) else str(value)


def _linked(config: recipe.Config) -> dict[str, Any]:
    """What the model would be given from the data module, which has to be made to know it."""
    stage = recipe.Stage("", config)
    names = recipe.links(stage)
    if not names:
        return {}
    from jsonargparse import ArgumentParser
    from lightning.pytorch import LightningDataModule

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    data = parser.instantiate_classes(parser.parse_object({"data": config["data"]})).data
    accepted = recipe.arguments_of(recipe.class_of(stage, "model"))
    return {name: getattr(data, name) for name in names if name in accepted}


def _header(source: Path) -> str:
    """The comment at the top of a recipe."""
    lines = source.read_text(encoding="utf-8").splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "".join(f"{line}\n" for line in lines[:end])


def _write(path: Path, text: str) -> Path:
    if path.exists():
        raise ConfigurationError(f"{path} exists and is not overwritten: move it away first.")
    path.write_text(text, encoding="utf-8")
    return path

"""Recipes as data: where they are, bare names, merged files, stages and the overrides that address them.

A recipe is a LightningCLI config (``seed_everything``, ``trainer``, ``model``, ``data``) plus

``method:``
    ``class_path``/``init_args`` of one callback, appended to ``trainer.callbacks``.
``stages:``
    named configs that run in order, each laid over the rest of the file; ``${stage.NAME.model}`` in a later one is
    the model folder of a finished one (``.checkpoint`` its last checkpoint, ``.folder`` its run folder).

Overrides ``--trainer.max_epochs=3`` go to every stage, ``--method...`` to those that have a method, and
``--stages.NAME.trainer.max_epochs=3`` to that stage alone.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import effdl
from effdl import catalog
from effdl.core.errors import ConfigurationError, suggest

Config = dict[str, Any]
PARTS = ("model", "data", "method")
LINKED = ("num_classes", "num_examples", "vocab_size")
_REFERENCE = re.compile(r"\$\{stage\.([\w-]+)\.(model|checkpoint|folder)\}")


@dataclass(frozen=True)
class Stage:
    """One config to run. ``name`` is ``""`` for a recipe without stages."""

    name: str
    config: Config
    overrides: list[str] = field(default_factory=list)

    def needs(self) -> list[str]:
        """Names of the stages whose results this one starts from."""
        return list(dict.fromkeys(name for name, _ in _REFERENCE.findall(json.dumps([self.config, self.overrides]))))

    def resolved(self, folders: Mapping[str, Path]) -> Stage:
        """With every reference replaced by the path in the folder of a finished stage."""

        def path(match: re.Match) -> str:
            name, what = match.groups()
            if name not in folders:
                raise ConfigurationError(f"{match[0]} names no earlier stage. {suggest(name, folders)}")
            ends = {"model": "model", "checkpoint": "last.ckpt", "folder": ""}
            return str(folders[name] / ends[what])

        def replace(value: Any) -> Any:
            if isinstance(value, str):
                return _REFERENCE.sub(path, value)
            if isinstance(value, Mapping):
                return {key: replace(item) for key, item in value.items()}
            return [replace(item) for item in value] if isinstance(value, list) else value

        return Stage(self.name, replace(self.config), replace(self.overrides))

    def digest(self) -> str:
        """What a finished stage is remembered under: its config, its overrides and the version of effdl."""
        text = json.dumps([self.config, self.overrides, effdl.__version__], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def recipe_files() -> dict[str, Path]:
    """Recipe name to file."""
    folder = catalog.source_folder("effdl.recipes")
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))} if folder else {}


def locate(name: str) -> tuple[str, Path]:
    """Slug and file of a recipe: a YAML file, a recipe's name, or a class name or slug of a method.

    Raises:
        ConfigurationError: nothing of that name; close ones are listed.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise ConfigurationError(f"{name} is not a file. `effdl copy NAME` writes a recipe to start from.")
        return path.stem, path
    files = recipe_files()
    if name in files:
        return name, files[name]
    known = [*files, *(word for entry in catalog.entries() for word in (entry.slug, entry.name))]
    if name not in known:
        raise ConfigurationError(f"No recipe is called {name!r}. {suggest(name, known)} `effdl list` shows all.")
    slug = catalog.find(name).slug
    if slug not in files:
        raise ConfigurationError(f"{slug} has no recipe; give a YAML file.")
    return slug, files[slug]


def read(path: Path) -> Config:
    """A YAML file as a dict, bare class names written out.

    Raises:
        ConfigurationError: not YAML, or not a mapping.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ConfigurationError(f"{path} is not a recipe: a mapping with model, data, trainer, method is expected.")
    return with_full_names(config)


def full_name(name: str) -> str:
    """The dotted path of a bare public name; anything else as it is."""
    return catalog.class_paths().get(name, name)


def with_full_names(value: Any, key: str = "") -> Any:
    """``value`` with the bare names of effdl's own classes written out, wherever a class is named."""
    if isinstance(value, dict):
        return {name: with_full_names(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [with_full_names(item, key) for item in value]
    if isinstance(value, str) and key in ("class_path", "callbacks", *PARTS):
        return full_name(value)
    return value


def merge(base: Config, over: Config) -> Config:
    """``over`` laid over ``base``; another ``class_path`` drops the init_args that belonged to the old one."""
    if "class_path" in base and over.get("class_path", base["class_path"]) != base["class_path"]:
        return copy.deepcopy(over)
    merged = copy.deepcopy(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


def pairs(tokens: list[str]) -> list[tuple[str, list[str]]]:
    """``["--a.b=1", "--c", "2"]`` as ``[("a.b", ["--a.b=1"]), ("c", ["--c", "2"])]``.

    Raises:
        ConfigurationError: a word that belongs to no option.
    """
    found: list[tuple[str, list[str]]] = []
    for token in tokens:
        if token.startswith("--"):
            found.append((token[2:].partition("=")[0].rstrip("+"), [token]))
        elif found and "=" not in found[-1][1][0] and len(found[-1][1]) == 1:
            found[-1][1].append(token)
        else:
            raise ConfigurationError(f"{token!r} is not an override: write --key=value, e.g. --trainer.max_epochs=3.")
    return found


def value_of(words: list[str]) -> str | None:
    """The value in ``["--key=value"]`` or ``["--key", "value"]``."""
    return words[1] if len(words) == 2 else words[0].partition("=")[2] or None


def _named(key: str, words: list[str]) -> list[str]:
    """An override with the bare class name in its value written out."""
    value = value_of(words)
    if value and (key in (*PARTS, "trainer.callbacks") or key.endswith("class_path")):
        return [word.replace(value, full_name(value)) for word in words]
    return words


def stages_of(config: Config, overrides: list[str]) -> list[Stage]:
    """The configs of a recipe in the order in which they run, each with the overrides that concern it.

    Raises:
        ConfigurationError: a stage without a name, two of one name, an override for an unknown stage.
    """
    given = pairs(overrides)
    for key, words in given:
        if key == "config":
            config = merge(config, read(Path(value_of(words) or "")))
    base = {key: value for key, value in config.items() if key != "stages"}
    parts = config.get("stages") or [{"name": ""}]
    names = [part.get("name") if isinstance(part, dict) else None for part in parts]
    if None in names or len(set(names)) != len(names):
        raise ConfigurationError(f"stages: every stage needs a name of its own, got {names}.")
    own: dict[str, list[str]] = {name: [] for name in names}
    for key, words in given:
        first, _, rest = key.partition(".")
        if first == "stages":
            name, _, inner = rest.partition(".")
            if not name or name not in own:
                raise ConfigurationError(f"--{key}: the recipe has no such stage. {suggest(name, filter(None, names))}")
            own[name] += _named(inner, [words[0].replace(f"stages.{name}.", "", 1), *words[1:]])
        elif key != "config":
            for name, part in zip(names, parts):
                if first != "method" or "method" in base or "method" in part:
                    own[name] += _named(key, words)
            if first == "method" and not any("method" in part for part in (base, *parts)) and key != "method":
                raise ConfigurationError(f"--{key}: this recipe has no method: its model is one. Try --model.{rest}.")
    return [
        Stage(name, merge(base, {key: value for key, value in part.items() if key != "name"}), own[name])
        for name, part in zip(names, parts)
    ]


def class_of(stage: Stage, part: str) -> type | None:
    """The class that a stage's ``model``, ``data`` or ``method`` names, as far as it can be imported."""
    value = stage.config.get(part)
    name = value.get("class_path") if isinstance(value, dict) else value
    for key, words in pairs(stage.overrides):
        if key in (part, f"{part}.class_path"):
            name = value_of(words)
    module, _, cls = full_name(name if isinstance(name, str) else "").rpartition(".")
    try:
        return getattr(importlib.import_module(module), cls, None) if module else None
    except ImportError:
        return None


def arguments_of(cls: type | None) -> list[str]:
    """Names of a class's constructor arguments, its bases' included."""
    names: list[str] = []
    for base in cls.__mro__ if cls else []:
        names += inspect.signature(base.__init__).parameters if "__init__" in vars(base) else []
    return [name for name in dict.fromkeys(names) if name not in ("self", "args", "kwargs")]


def links(stage: Stage) -> list[str]:
    """Arguments that the model takes from the data module, because that has an attribute of the name.

    Raises:
        ConfigurationError: an override sets one of them, which the link would silently ignore.
    """
    data = class_of(stage, "data")
    active = [name for name in LINKED if data is not None and _has(data, name)]
    given = {key.replace("init_args.", "") for key, _ in pairs(stage.overrides)}
    for name in active:
        if f"model.{name}" in given:
            raise ConfigurationError(
                f"--model.{name} would be ignored: it comes from the data module ({data.__name__}.{name}). Drop it."
            )
    return active


def _has(cls: type, name: str) -> bool:
    """Whether instances have the attribute: a property, or set in a constructor."""
    constructors = [vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)]
    return hasattr(cls, name) or any(name in getattr(init, "__code__", cls).co_names for init in constructors[:-1])

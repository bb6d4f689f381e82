"""A parser's complaint of many lines as one line that names the option, the value and the nearest fix."""

from __future__ import annotations

import re
from typing import Any

from effdl._cli.recipe import PARTS, Stage, arguments_of, class_of
from effdl.core.errors import suggest

_KEY = re.compile(r'Parser key "([\w.]+)"')
_VALUE = re.compile(r"Given value: (?:NestedArg\(key='[\w.]+', val='(.*)'\)|(?!Namespace)(.{1,80}))")
_CAUSES = (
    r"Option '[\w.]+' is not accepted",
    r"the following arguments are required: .*",
    r"module '[\w.]+' has no attribute '\w+'",
    r"No module named '[\w.]+'",
    r"does not correspond to a subclass of \w+",
    r"Expected a dot import path string",
    r"Expected a <class '[\w.]+'>",
    r"Expected .*? literal.*|Expected a Literal.*",
)


def explain(message: str, stage: Stage, parser: Any) -> str:
    """One line for jsonargparse's ``message`` about a stage's config and overrides."""
    where = f"stage {stage.name}: " if stage.name else ""
    if found := re.search(r"[Uu]nrecognized arguments: (\S+)", message):
        word = found[1].partition("=")[0]
        known = [option for option in getattr(parser, "_option_string_actions", {}) if option.startswith("--")]
        return f"{where}{word} is not an option. {suggest(word, known)}".strip()
    key = _nested_key(_KEY.findall(message))
    if nested := re.search(r"Given value: NestedArg\(key='([\w.]+)'", message):
        key = f"{key.partition('.')[0]}.{nested[1]}"
    if found := re.search(r"class_path '([\w.]+)':\s+Option '([\w.]+)' is not accepted", message):
        part = key.partition(".")[0]
        return f"{where}--{part}.{found[2]} is not an argument of {found[1]}. {_near(part, found[2], stage)}".strip()
    causes = [" ".join(found[0].split()) for pattern in _CAUSES for found in re.finditer(pattern, message)]
    causes = list(dict.fromkeys(cause for cause in causes if "NoneType" not in cause))
    value = next((next(filter(None, found)) for found in _VALUE.findall(message) if any(found)), "")
    told = " or ".join(causes) or " ".join(message.partition("Given value")[0].split())
    option = f"--{key}" + (f"={value.partition('. Got')[0]}" if value else "") if key else ""
    return f"{where}{option}: {told}." if option else f"{where}{told}."


def _nested_key(keys: list[str]) -> str:
    """``["model", "optimizer", "lr"]`` as ``model.optimizer.lr``; a key that repeats its parent counts once."""
    path = ""
    for key in keys:
        if path and not key.startswith(f"{path}.") and not path.endswith(key):
            path = f"{path}.{key}"
        elif not path.endswith(key):
            path = key
    return path


def _near(part: str, word: str, stage: Stage) -> str:
    """Close names among the constructor arguments of the class that a part of the stage names."""
    return suggest(word, arguments_of(class_of(stage, part)) if part in PARTS else [])

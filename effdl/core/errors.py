"""Errors that say which argument, which value, the valid range and the nearest fix."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import Any


class ConfigurationError(ValueError):
    """The user's configuration cannot work. Raised before anything was changed."""


class MissingExtraError(ConfigurationError, ImportError):
    """An optional package is needed; the message names the extra that brings it."""


def check(condition: bool, argument: str, value: Any, valid: str, fix: str = "") -> None:
    """Raise :class:`ConfigurationError` unless ``condition`` holds.

    Example::

        check(0 <= sparsity < 1, "sparsity", sparsity, "0 <= sparsity < 1", "0.9 removes 90 % of the weights")
    """
    if not condition:
        raise ConfigurationError(f"{argument}={value!r} is not valid: expected {valid}." + (f" {fix}" if fix else ""))


def check_number(argument: str, value: Any, low: float, high: float, *, closed: str = "[]", fix: str = "") -> None:
    """Raise unless ``value`` is a finite real number in the interval; ``closed`` is its brackets, e.g. ``"[)"``."""
    valid = f"a number in {closed[0]}{low:g}, {high:g}{closed[1]}"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
    above = is_number and (value >= low if closed[0] == "[" else value > low)
    below = is_number and (value <= high if closed[1] == "]" else value < high)
    check(bool(above and below), argument, value, valid, fix)


def check_integer(argument: str, value: Any, low: int, high: int | None = None, fix: str = "") -> None:
    """Raise unless ``value`` is an ``int`` with ``low <= value <= high`` (``bool`` is refused)."""
    ok = isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high)
    check(ok, argument, value, f"an integer >= {low}" + (f" and <= {high}" if high is not None else ""), fix)


def check_choice(argument: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise unless ``value`` is one of ``choices``; a near miss is suggested."""
    choices = list(choices)
    if value not in choices:
        fix = suggest(value, choices) if isinstance(value, str) else ""
        check(False, argument, value, "one of " + ", ".join(map(repr, choices)), fix)


def suggest(name: str, candidates: Iterable[str], count: int = 3) -> str:
    """``"Did you mean 'a', 'b'?"``, or an empty string when nothing is near."""
    near = difflib.get_close_matches(str(name), list(dict.fromkeys(map(str, candidates))), n=count, cutoff=0.5)
    return f"Did you mean {', '.join(map(repr, near))}?" if near else ""


def require(package: str, extra: str) -> ModuleType:
    """Import an optional package, or say which extra installs it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingExtraError(
            f"{package!r} is needed here and not installed: pip install 'effdl[{extra}]'."
        ) from error

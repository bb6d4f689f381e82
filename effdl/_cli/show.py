"""``effdl list``, ``effdl show`` and ``effdl doctor``: what can be said without importing torch is said without."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import os
import re
import sys
from pathlib import Path

from rich.table import Table

from effdl import catalog
from effdl._cli.recipe import recipe_files
from effdl._cli.terminal import console


def list_methods() -> None:
    """One row per public class."""
    table = Table("slug", "name", "kind", "family", "paper")
    for entry in catalog.entries():
        paper = f"{entry.paper.title} ({entry.paper.year})" if entry.paper else entry.summary
        table.add_row(entry.slug, entry.name, entry.kind, entry.family, paper)
    console().print(table)


def show(name: str) -> None:
    """Documentation, arguments and citation of a method's classes."""
    found = catalog.find(name)
    group = [found] if name == found.name else catalog.of_slug(found.slug)
    out = console()
    for entry in group:
        signature, text = describe(entry)
        out.rule(f"[bold]{entry.name}[/bold]  {entry.kind}, {entry.family}")
        out.print(f"from {_public_module(entry)} import {entry.name}\n", markup=False, highlight=False)
        out.print(f"{entry.name}{signature}\n", markup=False)
        out.print(text, markup=False, highlight=False)
        if entry.concrete:
            out.print(f"\nMixed in already, for recipes: {entry.concrete}", markup=False)
        for row, reason in entry.contract_exceptions.items():
            out.print(f"\nDoes not meet {row} of the contract: {reason}", markup=False)
    if found.slug in recipe_files():
        out.print(f"\nRecipe: effdl run {found.slug}   (effdl copy {found.slug} writes it here)")
    if found.paper:
        out.print("\nCitation:\n" + found.paper.bibtex, markup=False, highlight=False)


def _public_module(entry: catalog.Entry) -> str:
    package = "effdl.callbacks" if entry.module.startswith("effdl.callbacks.") else "effdl"
    return package if entry.name in importlib.import_module(package)._EXPORTS else entry.module


def describe(entry: catalog.Entry) -> tuple[str, str]:
    """Signature and docstring of a class, read from its source; inherited constructors are imported."""
    node = next(n for n in catalog.syntax(entry).body if isinstance(n, ast.ClassDef) and n.name == entry.name)
    text = ast.get_docstring(node) or ""
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is None:
        return str(inspect.signature(catalog.load(entry))), text
    return f"({_signature(init.args)})", text


def _signature(arguments: ast.arguments) -> str:
    """One argument per line, with annotation and default; ``self`` left out."""
    required = [None] * (len(arguments.args) - len(arguments.defaults))
    named = list(zip(arguments.args, [*required, *arguments.defaults]))[1:]
    keyword = list(zip(arguments.kwonlyargs, arguments.kw_defaults))
    texts = [ast.unparse(arg) + (f" = {ast.unparse(default)}" if default else "") for arg, default in named]
    if arguments.vararg or keyword:
        texts.append(f"*{arguments.vararg.arg if arguments.vararg else ''}")
    texts += [ast.unparse(arg) + (f" = {ast.unparse(default)}" if default else "") for arg, default in keyword]
    if arguments.kwarg:
        texts.append(f"**{ast.unparse(arguments.kwarg)}")
    return "".join(f"\n    {text}," for text in texts) + ("\n" if texts else "")


def extras() -> dict[str, list[str]]:
    """Extra name to the packages it brings, from effdl's own metadata."""
    found: dict[str, list[str]] = {}
    for requirement in importlib.metadata.requires("effdl") or []:
        package, _, marker = requirement.partition(";")
        if extra := re.search(r"extra == ['\"]([\w-]+)['\"]", marker):
            found.setdefault(extra[1], []).append(re.split(r"[\s<>=!~\[]", package.strip())[0])
    return found


def version_of(package: str) -> str:
    """Installed version, or ``"missing"``."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def doctor() -> None:
    """Packages, extras, hub and devices of this installation."""
    import torch

    from effdl.core import hub

    out = console()
    packages = ("effdl", "torch", "torchvision", "lightning", "timm", "diffusers", "transformers", "datasets")
    table = Table("what", "state", show_header=False)
    table.add_row("python", f"{sys.version.split()[0]} ({sys.executable})")
    for package in packages:
        table.add_row(package, version_of(package))
    for extra, names in extras().items():
        names = [name for name in names if name != "effdl"]
        if names:
            state = ", ".join(f"{name} {version_of(name)}" for name in names)
            advice = f"  -> pip install 'effdl[{extra}]'" if "missing" in state else ""
            table.add_row(f"extra {extra}", state + advice)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("devices", ", ".join([*gpus, f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"]))
    reached = "reachable" if not hub.offline() and hub.reachable() else "not reachable: local files and the cache only"
    table.add_row("hub", f"{hub.endpoint()}: {reached}")
    table.add_row("recipes", ", ".join(recipe_files()) or "none")
    table.add_row("runs", str(Path("runs").resolve()))
    out.print(table)

"""The list of methods, read from the source with ``ast``: ``effdl list`` imports neither torch nor Lightning.

A method is a public class with its own ``paper = Paper(...)`` (literal arguments), or ``paper = PAPER`` where ``PAPER``
is such a literal at the top of the same file or of the file it is imported from. ``paper = None`` lists a class
that belongs to no paper. A family is a folder of ``effdl/`` that holds neither machinery nor stock parts.

Example::

    from effdl import catalog

    print([entry.slug for entry in catalog.entries()])
    pruning = catalog.create("gradual-pruning", sparsity=0.9)

``python -m effdl.catalog README.md`` rewrites the table of methods between the markers of that file.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from effdl.core.errors import ConfigurationError, suggest
from effdl.core.paper import Paper

NOT_FAMILIES = {"core", "tasks", "data", "callbacks", "recipes"}
MARKERS = ("<!-- methods:start -->", "<!-- methods:end -->")


@dataclass(frozen=True)
class Entry:
    """One public class of one method.

    Args:
        slug: the method, the same in file, recipe, test and logged keys.
        name: of the class.
        kind: ``"callback"``, ``"mixin"``, ``"module"`` (by the suffix of the name) or ``"class"``.
        family: folder of the method's mathematics under ``effdl/``.
        module: dotted, where the class is defined.
        summary: first line of its docstring.
        paper: ``None`` for a class of the house that belongs to no paper.
        contract_exceptions: contract row to the reason why the class does not meet it.
        concrete: of a mixin, the class of the same file that has it mixed in, or ``""``.
    """

    slug: str
    name: str
    kind: str
    family: str
    module: str
    summary: str
    paper: Paper | None
    contract_exceptions: dict[str, str] = field(default_factory=dict, hash=False)
    concrete: str = ""

    @property
    def class_path(self) -> str:
        """As a configuration file names the class."""
        return f"{self.module}.{self.name}"


def source_folder(package: str) -> Path | None:
    """Where a package's sources lie, also in an editable install; its parents alone are imported."""
    spec = importlib.util.find_spec(package)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


@cache
def families() -> dict[str, Path]:
    """Family name to folder."""
    folders = sorted(path.parent for path in Path(__file__).parent.glob("*/__init__.py"))
    return {path.name: path for path in folders if path.name not in NOT_FAMILIES and not path.name.startswith("_")}


def _sources(folder: Path | None, package: str) -> Iterator[tuple[str, Path]]:
    """``(dotted module, file)`` of the public files of one folder."""
    for path in sorted(folder.glob("*.py")) if folder else []:
        if not path.name.startswith("_"):
            yield f"{package}.{path.stem}", path


def _family_of(slug: str) -> str:
    """The folder under ``effdl/`` that holds a callback's mathematics."""
    stem = slug.replace("-", "_")
    return next((name for name, folder in families().items() if (folder / f"{stem}.py").is_file()), "general")


def _assigned(body: list[ast.stmt], name: str) -> ast.expr | None:
    """The value of ``name = value`` or ``name: type = value`` in a class or module body."""
    for statement in body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return getattr(statement, "value", None)
    return None


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _imported(tree: ast.Module, name: str) -> ast.expr | None:
    """The module-level literal that ``from effdl.family.stem import name`` brings in."""
    for statement in tree.body:
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("effdl."):
            for alias in statement.names:
                if (alias.asname or alias.name) == name:
                    folder = source_folder(statement.module.rpartition(".")[0])
                    path = folder / f"{statement.module.rpartition('.')[2]}.py" if folder else None
                    return _assigned(_tree(path).body, alias.name) if path and path.is_file() else None
    return None


def _paper(node: ast.ClassDef, tree: ast.Module, path: Path) -> Paper | None:
    """The class's own paper; raises :class:`LookupError` when the class declares none."""
    value = _assigned(node.body, "paper")
    if value is None:
        raise LookupError(node.name)
    if isinstance(value, ast.Constant) and value.value is None:
        return None
    if isinstance(value, ast.Name):
        value = _assigned(tree.body, value.id) or _imported(tree, value.id)
    if not isinstance(value, ast.Call):
        raise ConfigurationError(f"{path.name}: {node.name}.paper is not a literal Paper(...) that ast can read.")
    return Paper(
        *[ast.literal_eval(argument) for argument in value.args],
        **{keyword.arg: ast.literal_eval(keyword.value) for keyword in value.keywords if keyword.arg},
    )


def _kind(name: str) -> str:
    return next((kind for kind in ("callback", "mixin", "module") if name.lower().endswith(kind)), "class")


def _concrete(mixin: str, tree: ast.Module) -> str:
    """The public class of the same file that has the mixin among its bases."""
    for node in tree.body:
        bases = [base.id for base in getattr(node, "bases", []) if isinstance(base, ast.Name)]
        if mixin in bases and not node.name.startswith("_") and _kind(node.name) != "mixin":
            return node.name
    return ""


def _entries_of(module: str, path: Path, family: str | None) -> Iterator[Entry]:
    tree = _tree(path)
    for node in tree.body:
        if not isinstance(node, ast.ClassDef) or node.name.startswith("_"):
            continue
        try:
            paper = _paper(node, tree, path)
        except LookupError:
            continue
        exceptions = _assigned(node.body, "contract_exceptions")
        kind = _kind(node.name)
        slug = paper.slug if paper else path.stem.replace("_", "-")
        yield Entry(
            slug=slug,
            name=node.name,
            kind=kind,
            family=family or _family_of(slug),
            module=module,
            summary=(ast.get_docstring(node) or "").partition("\n")[0].strip(),
            paper=paper,
            contract_exceptions=ast.literal_eval(exceptions) if exceptions is not None else {},
            concrete=_concrete(node.name, tree) if kind == "mixin" else "",
        )


@cache
def entries() -> tuple[Entry, ...]:
    """Every public method class: callbacks before the classes of the families, each in the order of its file."""
    found: list[Entry] = []
    for module, path in _sources(source_folder("effdl.callbacks"), "effdl.callbacks"):
        found += _entries_of(module, path, None)
    for family, folder in families().items():
        for module, path in _sources(folder, f"effdl.{family}"):
            found += _entries_of(module, path, family)
    return tuple(sorted(found, key=lambda entry: (entry.paper is None, entry.family, entry.slug)))


@cache
def class_paths() -> dict[str, str]:
    """Public class name to dotted path, of everything a configuration file may name: methods, tasks and data."""
    packages = ["effdl.callbacks", *(f"effdl.{family}" for family in families()), "effdl.tasks", "effdl.data"]
    names: dict[str, str] = {}
    for package in packages:
        for module, path in _sources(source_folder(package), package):
            for node in _tree(path).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    names.setdefault(node.name, f"{module}.{node.name}")
    return names


def of_slug(slug: str) -> tuple[Entry, ...]:
    """The classes of one method, what attaches first."""
    return tuple(entry for entry in entries() if entry.slug == slug)


def find(name: str) -> Entry:
    """The entry with this class name, or of this slug the one that its recipe runs, else the slug's first.

    Raises:
        ConfigurationError: unknown; close names are listed.
    """
    for entry in entries():
        if entry.name == name:
            return entry
    if group := of_slug(name):
        run = _classes_of_recipe(name) if len(group) > 1 else ()
        return next((entry for entry in group if {entry.name, entry.concrete} & set(run)), group[0])
    known = [known for entry in entries() for known in (entry.slug, entry.name)]
    raise ConfigurationError(f"No method is called {name!r}. {suggest(name, known)} `effdl list` shows all.")


def _classes_of_recipe(slug: str) -> list[str]:
    """The last names of all class paths in a recipe, the first one first."""
    folder = source_folder("effdl.recipes")
    recipe = None if folder is None else folder / f"{slug}.yaml"
    text = recipe.read_text(encoding="utf-8") if recipe is not None and recipe.is_file() else ""
    return [path.rpartition(".")[2] for path in re.findall(r"^\s*class_path:\s*([\w.]+)", text, re.MULTILINE)]


def syntax(entry: Entry) -> ast.Module:
    """The syntax tree of the file that defines the class.

    Raises:
        ConfigurationError: its package has no folder of sources.
    """
    package, _, stem = entry.module.rpartition(".")
    folder = source_folder(package)
    if folder is None:
        raise ConfigurationError(f"{package} has no source folder to read {entry.name} from: install effdl with pip.")
    return _tree(folder / f"{stem}.py")


def load(entry: Entry) -> type:
    """Import the class."""
    return getattr(importlib.import_module(entry.module), entry.name)


def create(name: str, **kwargs: Any) -> Any:
    """The timm-style factory: an instance of a slug's first public class, or of the class with this name.

    A mixin gives its named concrete class (``create("elr", ...)`` is ``ELRImageClassifier(...)``).

    Raises:
        ConfigurationError: the name is unknown, or names a mixin without a concrete class.

    Example::

        trainer = Trainer(callbacks=[effdl.create("gradual-pruning", sparsity=0.9)])
    """
    entry = find(name)
    if entry.kind != "mixin":
        return load(entry)(**kwargs)
    if not entry.concrete:
        raise ConfigurationError(f"{entry.name} is a mixin: class Mine({entry.name}, YourLightningModule).")
    return getattr(importlib.import_module(entry.module), entry.concrete)(**kwargs)


def method_table() -> str:
    """The README's table in markdown: one row per paper, its classes together."""
    rows = ["| method | what attaches | family | paper |", "|---|---|---|---|"]
    for slug in dict.fromkeys(entry.slug for entry in entries() if entry.paper):
        group = of_slug(slug)
        paper = group[0].paper
        title = f"[{paper.title}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else paper.title
        classes = ", ".join(f"`{entry.name}`" for entry in group)
        rows.append(f"| `{slug}` | {classes} | {group[0].family} | {title} ({paper.year}) |")
    return "\n".join(rows)


def with_table(text: str) -> str:
    """``text`` with the current table between its markers.

    Raises:
        ConfigurationError: the markers are missing.
    """
    before, start, rest = text.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not start or not end:
        raise ConfigurationError(f"The file has no {MARKERS[0]} ... {MARKERS[1]}.")
    return f"{before}{start}\n{method_table()}\n{end}{after}"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        page = Path(argument)
        page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")

"""The catalogue: what ``ast`` reads is what an import finds."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import textwrap

import pytest

from effdl import catalog
from effdl.core.errors import ConfigurationError
from effdl.core.paper import Paper
from tests.support import ROOT, in_fresh_process

FILE = '''
"""A method."""
from effdl.core.paper import Paper

PAPER = Paper(slug="my-slug", title="T", authors=("A, B",), year=2020)

class FooMixin:
    """Does foo.

    And more.
    """
    paper = PAPER
    contract_exceptions = {"C3": "because"}

class FooImageClassifier(FooMixin, object):
    """Concrete."""

class FooCallback:
    paper: Paper | None = Paper("my-slug", "T", authors=("A, B",), year=2020, arxiv="1")

class _Hidden:
    paper = PAPER

class House:
    """Belongs to no paper."""
    paper = None
'''


@pytest.fixture
def entries(tmp_path):
    path = tmp_path / "my_slug.py"
    path.write_text(textwrap.dedent(FILE))
    return {entry.name: entry for entry in catalog._entries_of("effdl.training.my_slug", path, "training")}


def test_reads_literals_without_import(entries):
    assert list(entries) == ["FooMixin", "FooCallback", "House"]
    mixin = entries["FooMixin"]
    assert (mixin.slug, mixin.kind, mixin.summary, mixin.concrete) == (
        "my-slug", "mixin", "Does foo.", "FooImageClassifier",
    )  # fmt: skip
    assert mixin.paper == Paper(slug="my-slug", title="T", authors=("A, B",), year=2020)
    assert mixin.contract_exceptions == {"C3": "because"}
    assert entries["FooCallback"].kind == "callback"
    assert entries["FooCallback"].paper.arxiv == "1"
    assert entries["House"].slug == "my-slug"
    assert entries["House"].paper is None


def test_paper_that_is_not_literal_is_refused(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("class Bad:\n    paper = make_paper\n")
    with pytest.raises(ConfigurationError, match=r"Bad\.paper"):
        list(catalog._entries_of("effdl.training.bad", path, "training"))


def imported_entries() -> dict[str, type]:
    """Every public class with its own ``paper``, found by importing all methods."""
    found = {}
    for package in ["effdl.callbacks", *(f"effdl.{family}" for family in catalog.families())]:
        for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
            if info.name.startswith("_"):
                continue
            module = importlib.import_module(f"{package}.{info.name}")
            for name, cls in vars(module).items():
                own = inspect.isclass(cls) and cls.__module__ == module.__name__ and "paper" in vars(cls)
                if own and not name.startswith("_"):
                    found[f"{module.__name__}.{name}"] = cls
    return found


def test_ast_view_is_the_imported_view():
    imported = imported_entries()
    listed = {entry.class_path: entry for entry in catalog.entries()}
    assert listed.keys() == imported.keys()
    for path, entry in listed.items():
        cls = imported[path]
        assert catalog.load(entry) is cls
        assert entry.paper == cls.paper
        assert entry.contract_exceptions == vars(cls).get("contract_exceptions", {})
        assert entry.summary == (inspect.getdoc(cls) or "").partition("\n")[0]


def test_slug_names_its_files():
    """One slug: the family's file is called so, and the callback's or another class's file begins there."""
    for entry in catalog.entries():
        stem = entry.slug.replace("-", "_")
        if entry.paper is None:
            assert entry.module.endswith(f".{stem}")
        else:
            assert (catalog.families()[entry.family] / f"{stem}.py").is_file()


def test_unknown_name_suggests_close_ones(monkeypatch, entries):
    monkeypatch.setattr(catalog, "entries", lambda: tuple(entries.values()))
    assert catalog.find("my-slug").name == "FooMixin"
    assert catalog.find("FooCallback").name == "FooCallback"
    with pytest.raises(ConfigurationError, match="my-slug"):
        catalog.find("my-slugg")


def test_create_of_a_mixin_without_concrete_class(monkeypatch, entries):
    import dataclasses

    mixin = dataclasses.replace(entries["FooMixin"], concrete="")
    monkeypatch.setattr(catalog, "entries", lambda: (mixin,))
    with pytest.raises(ConfigurationError, match="class Mine"):
        catalog.create("my-slug")


def test_syntax_of_a_class_without_sources_is_refused(entries):
    import dataclasses

    lost = dataclasses.replace(entries["FooCallback"], module="effdl.nowhere.my_slug")
    with pytest.raises(ConfigurationError, match="effdl.nowhere has no source folder to read FooCallback"):
        catalog.syntax(lost)


def test_table_is_written_between_markers():
    start, end = catalog.MARKERS
    text = f"before\n{start}\nold\n{end}\nafter"
    assert catalog.with_table(text) == f"before\n{start}\n{catalog.method_table()}\n{end}\nafter"
    with pytest.raises(ConfigurationError, match="methods:start"):
        catalog.with_table("nothing")


def test_readme_is_current():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text == catalog.with_table(text), "run: python -m effdl.catalog README.md"


def test_listing_imports_neither_torch_nor_lightning():
    code = (
        "import sys, effdl.catalog as c; c.entries(); c.class_paths(); print({'torch', 'lightning'} & set(sys.modules))"
    )
    assert in_fresh_process(code).strip() == "set()"


def test_a_slug_means_the_class_that_its_recipe_runs():
    assert catalog.find("rectified-flow-transformer").name == "RectifiedFlowModule"
    assert catalog.find("elr").name == "ELRLossMixin"
    assert catalog.find("sam").name == "SAMCallback"
    assert catalog.find("QKNormCallback").slug == "rectified-flow-transformer"

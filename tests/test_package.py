"""The wheel installs whole, names are exported lazily, and no floor of the house is bypassed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import ROOT


def run(*command: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **kwargs)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The project's wheel, unpacked into an empty folder by pip."""
    wheels, target, source = (tmp_path_factory.mktemp(n) for n in ("wheels", "target", "source"))
    for name in ("effdl", "callbacks", "recipes", "pyproject.toml", "README.md", "LICENSE"):
        run("cp", "-r", str(ROOT / name), str(source))
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    made = run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(wheels), str(source))
    assert made.returncode == 0, made.stderr
    (wheel,) = wheels.glob("effdl-*.whl")
    put = run(*pip, "install", "--no-deps", "--target", str(target), str(wheel))
    assert put.returncode == 0, put.stderr
    return target


def test_every_module_imports_from_the_installed_wheel(installed, tmp_path):
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import importlib, pkgutil, effdl\n"
        "assert effdl.__file__.startswith(sys.argv[1]), effdl.__file__\n"
        "names = [m.name for m in pkgutil.walk_packages(effdl.__path__, 'effdl.')]\n"
        "[importlib.import_module(n) for n in names]\n"
        "from importlib.resources import files\n"
        "assert (files('effdl.recipes') / 'gradual-pruning.yaml').is_file()\n"
        "assert (files('effdl') / 'py.typed').is_file()\n"
        "print(len(names), 'effdl.callbacks.gradual_pruning' in names)\n"
    )
    done = run(sys.executable, "-S", "-c", f"import site; site.addsitedir({site_packages()!r})\n" + program,
               str(installed), cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    count, has_callbacks = done.stdout.split()
    sources = [p for folder in ("effdl", "callbacks", "recipes") for p in (ROOT / folder).rglob("*.py")]
    assert int(count) == len(sources) - 1  # effdl/__init__.py itself
    assert has_callbacks == "True"


def site_packages() -> str:
    import torch

    return str(next(p for p in map(str, sys.path) if torch.__file__.startswith(p + "/") and "site-packages" in p))


def test_importing_effdl_does_not_import_torch():
    start = time.perf_counter()
    done = run(sys.executable, "-c", "import effdl, effdl.callbacks, sys; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr
    assert time.perf_counter() - start < 5


def test_every_lazy_name_resolves():
    import effdl
    import effdl.callbacks

    for package in (effdl, effdl.callbacks):
        for name in package.__all__:
            assert getattr(package, name).__name__ == name
        assert sorted(package.__all__) == sorted(package._EXPORTS)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        effdl.Nothing  # noqa: B018


def test_imports_only_go_down():
    tool = Path(sys.executable).parent / "lint-imports"
    done = run("bash", str(ROOT / "tools" / "lint_imports"), str(tool))
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout

"""The command line, as the tests call it."""

from __future__ import annotations

from effdl.cli import main


def run(*arguments: str) -> int:
    return main(["run", "tiny.yaml", *arguments])


def fails(capsys, *arguments: str) -> str:
    """The one line on stderr of a command that ends with exit code 2."""
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("effdl")
    return lines[0]

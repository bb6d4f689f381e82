"""Where the commands print."""

from __future__ import annotations

import os
import sys

from rich.console import Console


def rank() -> int:
    """Of this process, as a launcher tells it."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)


def console() -> Console:
    """As wide as the terminal; a file or a pipe gets whole lines. Only the first process speaks."""
    return Console(width=None if sys.stdout.isatty() else 160, quiet=rank() > 0)

"""Where the commands print."""

from __future__ import annotations

import sys

from rich.console import Console


def console() -> Console:
    """As wide as the terminal; a file or a pipe gets whole lines."""
    return Console(width=None if sys.stdout.isatty() else 160)

"""What every test file shares: golden numbers, real data, small networks that have never heard of effdl."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


def golden(slug: str) -> dict:
    """The official numbers of one method."""
    return json.loads((ROOT / "tests" / "golden" / f"{slug}.json").read_text())


def real_data(name: str) -> Path:
    """A file of the real-data folder (``EFFDL_DATA``, default ``../shared/data``); skips where it is absent."""
    path = Path(os.environ.get("EFFDL_DATA", ROOT.parent / "shared" / "data")) / name
    if not path.exists():
        pytest.skip(f"needs {name} in EFFDL_DATA")
    return path


def load_npz(name: str) -> dict[str, np.ndarray]:
    """A real-data ``.npz`` as a dict of arrays."""
    with np.load(real_data(name), allow_pickle=False) as data:
        return {key: data[key] for key in data.files}

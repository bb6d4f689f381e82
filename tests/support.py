"""What every test file shares: golden numbers, real data, small networks that have never heard of effdl."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
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


@contextlib.contextmanager
def unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No proxy, nothing probed yet, and an endpoint that refuses; the offline flags come back as they were."""
    import datasets.config
    import huggingface_hub.constants as constants

    from effdl.core import hub

    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "")
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in hub._PACKAGES and module is not None and "HF_HUB_OFFLINE" in vars(module):
            monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    probe = hub.reachable  # a test may put another in its place
    probe.cache_clear()
    try:
        yield
    finally:
        probe.cache_clear()

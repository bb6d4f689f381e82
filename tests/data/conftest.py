"""What the tests of image data share: a small data set, as arrays and as a file."""

from __future__ import annotations

import numpy as np
import pytest


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (60, 12, 12, 3), dtype=np.uint8),
        "y_train": np.arange(60) % 5,
        "x_test": rng.integers(0, 256, (20, 12, 12, 3), dtype=np.uint8),
        "y_test": np.arange(20) % 5,
    }


@pytest.fixture
def npz(tmp_path, arrays) -> str:
    np.savez(tmp_path / "some.npz", **arrays)
    return str(tmp_path / "some.npz")

"""One recipe on the tiny parts, in a folder of its own."""

from __future__ import annotations

import pytest
import yaml

CONFIG = {
    "seed_everything": 1,
    "trainer": {"max_epochs": 2, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False},
    "model": {"class_path": "tests.cli.parts.TinyModule", "init_args": {"width": 5}},
    "data": {"class_path": "tests.cli.parts.TinyData"},
    "method": {"class_path": "tests.cli.parts.TinyCallback", "init_args": {"sparsity": 0.9}},
}


@pytest.fixture
def config() -> dict:
    return yaml.safe_load(yaml.safe_dump(CONFIG))


@pytest.fixture
def here(tmp_path, monkeypatch, config):
    """The current folder, with ``tiny.yaml`` in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text("# A header.\n" + yaml.safe_dump(config, sort_keys=False))
    return tmp_path

"""What every test file shares: golden numbers, real data, small networks that have never heard of effdl."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
BARE = {**QUIET, "num_sanity_val_steps": 0, "enable_checkpointing": False}  # steps, and nothing beside them


def quiet_trainer(*callbacks, **options):
    """A Trainer on the CPU that prints nothing, and writes checkpoints where a callback says when."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return Trainer(callbacks=list(callbacks), **{**QUIET, "enable_checkpointing": saves, **options})


def quiet_fit(module, train, *callbacks, val=None, ckpt_path=None, **options):
    """``fit`` by a :func:`quiet_trainer`, which is returned; ``ckpt_path`` is opened with ``weights_only``."""
    trainer = quiet_trainer(*callbacks, **options)
    trainer.fit(module, train, val, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


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


def offline_hub(monkeypatch: pytest.MonkeyPatch, loader: str, error: Exception) -> None:
    """The hub has been found out of reach, and ``loader`` (a dotted path), asked all the same, fails with ``error``."""

    def fail(*names: str) -> None:
        raise error

    monkeypatch.setattr("effdl.core.hub.reachable", lambda: False)
    monkeypatch.setattr("effdl.core.hub.go_offline", lambda: None)
    monkeypatch.setattr("effdl.core.hub.offline", lambda: True)
    monkeypatch.setattr(loader, fail)


def in_fresh_process(code: str, *arguments: str | Path, timeout: float = 300) -> str:
    """What a new interpreter prints that runs ``code`` with these ``sys.argv[1:]``; it must end well."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_ranks(module: str, folder: Path, timeout: float = 300) -> None:
    """``module.run(rank, folder)`` in two gloo processes joined already; what they say is in files of ``folder``."""
    command = [sys.executable, "-m", "tests.ranks", module, str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def check_quantized_artifact(model, make_fresh, inputs: tuple, folder: Path) -> None:
    """What every quantiser's finished model must hold: few distinct codes, no float weight left in memory or on disk,
    the promised size, and the same outputs when reopened, also in a process that has never heard of effdl.

    Args:
        model: the finished network with quantised layers.
        make_fresh: makes the stock architecture, with any weights.
        inputs: of ``model``, two examples or more.
        folder: to write into.
    """
    import torch
    from safetensors.torch import load_file

    from effdl.core.export import export_program, save_model
    from effdl.core.quantized import load_quantized, quantized_weights
    from effdl.core.quantizers import grouped

    records = quantized_weights(model)
    assert records, "nothing is quantised"
    for name, record in records.items():
        assert record.codes.unique().numel() <= 2**record.bits, name
        groups = grouped(record.dequantize(), record.layout)
        assert max(row.unique().numel() for row in groups) <= 2**record.bits, name
    assert not records.keys() & {name for name, _ in model.named_parameters()}, "a float master is left"
    assert save_model(model, folder / "artifact") == "quantized"
    stored = load_file(folder / "artifact" / "model.safetensors")
    plain = {name for name in make_fresh().state_dict() if name not in records}
    shapes = {tuple(record.shape) for record in records.values()}
    left = [n for n, t in stored.items() if n not in plain and t.is_floating_point() and tuple(t.shape) in shapes]
    assert not left, f"float weights in the file: {left}"
    payload = sum(tensor.nbytes for name, tensor in stored.items() if name not in plain)
    tables = sum(table.nbytes for record in records.values() for table in record.tables().values())
    assert payload <= sum(r.bits * r.codes.numel() / 8 for r in records.values()) * 1.02 + tables + 8 * len(records)
    model.eval()
    with torch.no_grad():
        expected = model(*inputs)
        reopened = load_quantized(make_fresh(), folder / "artifact").eval()(*inputs)
    torch.testing.assert_close(reopened, expected, rtol=0, atol=1e-5)
    export_program(model, inputs, folder / "model.pt2")
    torch.save({"inputs": inputs, "expected": expected}, folder / "case.pt")
    # forked off a process that has imported torch and nothing of effdl, once for all the checks of a session
    bare = multiprocessing.get_context("forkserver")
    bare.set_forkserver_preload(["torch", "torch._dynamo"])
    with ProcessPoolExecutor(1, mp_context=bare) as pool:
        pool.submit(_open_without_effdl, folder / "model.pt2", folder / "case.pt").result(timeout=300)


def _open_without_effdl(program: Path, case: Path) -> None:
    import torch

    told = torch.load(case, weights_only=True)
    got = torch.export.load(program).module()(*told["inputs"])
    assert "effdl" not in sys.modules
    torch.testing.assert_close(got, told["expected"], rtol=0, atol=1e-5)


def trained_on_digits(model, seed: int, epochs: int):
    """A classifier trained on scikit-learn's digits with Adam, in eval mode; training images and labels in the split's
    order, and held-out ones: ``(model, (x, y), (x, y))``.
    """
    import torch
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    g = torch.Generator().manual_seed(seed)
    train, test = torch.randperm(len(x), generator=g).tensor_split([1297])
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for rows in train[torch.randperm(len(train), generator=g)[:1280]].view(20, 64):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval(), (x[train], y[train]), (x[test], y[test])

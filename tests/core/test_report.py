"""core.report: measurements that do not disturb, strict JSON, tables and curves."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from effdl.core import report


def test_counts_shared_parameters_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight.fill_(1)[0] = 0
    assert report.count_parameters(model) == {"parameters": 16, "nonzero": 12}


def test_compressed_bytes_see_zeros():
    model = nn.Linear(200, 200)
    dense = report.compressed_bytes(model)
    assert 0.8 * 4 * 200 * 201 < dense < 4.2 * 200 * 201
    with torch.no_grad():
        model.weight[:, 20:] = 0
    assert report.compressed_bytes(model) < 0.2 * dense


def test_latency_restores_flags_and_counts_one_example():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    model[1].eval()
    mean = model[0].running_mean.clone()
    numbers = report.measure(model, (torch.randn(6, 3),))
    assert numbers["latency_ms"] > 0
    assert [m.training for m in model] == [True, False]
    assert torch.equal(model[0].running_mean, mean)
    assert set(numbers) == {"parameters", "nonzero", "stored_bytes", "latency_ms"}
    assert "latency_ms" not in report.measure(model)


def test_first_example_cuts_the_batch_dimension_only():
    inputs = ({"x": torch.zeros(4, 3)}, [torch.zeros(4)], torch.zeros(2, 2), 5)
    mapping, listed, other, number = report.first_example(inputs)
    assert mapping["x"].shape == (1, 3)
    assert listed[0].shape == (1,)
    assert other.shape == (2, 2)
    assert number == 5
    assert report.first_example(torch.zeros(4, 2)).shape == (1, 2)


def test_json_is_strict(tmp_path):
    path = tmp_path / "deep" / "report.json"
    value = {"t": torch.tensor(1.5), "a": np.arange(2), "nan": float("nan"), "path": tmp_path, 3: (np.float32(2), None)}
    report.write_report(path, value)
    read = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert read == {"t": 1.5, "a": [0, 1], "nan": None, "path": str(tmp_path), "3": [2.0, None]}
    assert list(path.parent.iterdir()) == [path]


def test_environment_names_versions():
    found = report.environment()
    assert found["versions"]["torch"] == torch.__version__.partition("+")[0] or found["versions"]["torch"]
    json.dumps(found, allow_nan=False)


def printed(content: dict) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    report.print_report(content, console)
    return console.export_text()


def test_final_table_has_both_states():
    before = {"name": "dense", "metrics": {"val/accuracy": 0.97}, "parameters": 1000, "stored_bytes": 2_500_000}
    after = {"name": "pruned", "metrics": {"val/accuracy": torch.tensor(0.96)}, "parameters": 1000, "nonzero": 100}
    layers = {"conv1": {"weights": 500, "sparsity": 0.9}}
    text = printed({"methods": {"x": {"before": before, "layers": layers, "steps": 7}}, "result": after})
    for expected in ("dense", "pruned", "0.97", "0.96", "1,000", "2.50 MB", "conv1", "0.9", "x: steps = 7"):
        assert expected in text


def test_metrics_are_ordered_and_named_once():
    names = ["train/loss", "train/loss_step", "x/s", "train/loss_epoch", "val/acc", "val/l_epoch"]
    assert report._in_order(names) == ["val/acc", "val/l_epoch", "x/s", "train/loss"]


def test_final_table_without_a_method():
    text = printed({"result": {"name": "final", "metrics": {"val/loss": float("nan")}, "latency_ms": 1.234}})
    assert "1.23 ms" in text


def test_curves(tmp_path):
    metrics = tmp_path / "metrics.csv"
    metrics.write_text("epoch,step,a/sparsity,val/acc\n0,1,0.1,\n0,2,0.2,0.5\n1,4,,0.6\n")
    assert report.read_metrics(metrics) == {"a/sparsity": [(1, 0.1), (2, 0.2)], "val/acc": [(2, 0.5), (4, 0.6)]}
    target = report.draw_curves(metrics, tmp_path / "figures" / "training.png", ["a/sparsity", "val/acc", "missing"])
    assert target.read_bytes()[:4] == b"\x89PNG"
    assert report.draw_curves(metrics, tmp_path / "none.png", ["missing"]) is None

"""effdl.compare and ``effdl compare``: same budget for all, resumable, a failure is a row, who dominates whom."""

from __future__ import annotations

import functools
import json

import pytest
from lightning.pytorch import Callback, LightningDataModule
from torch import nn
from torch.utils.data import DataLoader

import effdl
from effdl import comparison
from effdl.cli import main
from effdl.core.errors import ConfigurationError
from effdl.core.pareto import dominates, judge
from tests.contract.foreign import ForeignClassifier, Pictures


class Halves(Callback):
    """The finished network has half of its weights."""

    def on_train_end(self, trainer, pl_module):
        for module in pl_module.modules():
            if isinstance(module, nn.Linear):
                module.weight.data[::2] = 0


class Breaks(Callback):
    def on_train_start(self, trainer, pl_module):
        raise RuntimeError("no such luck")


class Interrupts(Callback):
    def on_train_start(self, trainer, pl_module):
        raise KeyboardInterrupt


class Data(LightningDataModule):
    def loader(self):
        return DataLoader(Pictures(), batch_size=8)

    train_dataloader = val_dataloader = loader


TRAINER = {"max_steps": 4, "accelerator": "cpu"}


def run(folder, methods, **kwargs):
    kwargs = {"seeds": 2, "trainer": TRAINER, "progress": False, **kwargs}
    return effdl.compare(ForeignClassifier, Data(), methods, folder=folder, **kwargs)


def test_a_foreign_module_a_failing_method_and_the_files(tmp_path):
    methods = {"halves": Halves, "breaks": Breaks, "gradual-pruning": {"sparsity": 0.5, "stop": 0.5}}
    found = run(tmp_path, methods)
    rows = {row["name"]: row for row in found.rows}
    assert list(rows) == ["nothing", *methods]
    assert rows["breaks"]["errors"] == {0: "RuntimeError: no such luck", 1: "RuntimeError: no such luck"}
    assert "metric" not in rows["breaks"]
    assert rows["breaks"]["dominated_by"] == []
    assert len(rows["halves"]["metric"]["values"]) == 2
    assert rows["nothing"]["sparsity"]["mean"] < 0.01 < rows["halves"]["sparsity"]["mean"]
    assert rows["gradual-pruning"]["sparsity"]["mean"] == pytest.approx(0.5, abs=0.1)
    assert rows["halves"]["stored_bytes"]["mean"] < rows["nothing"]["stored_bytes"]["mean"]
    assert rows["nothing"]["latency_ms"]["mean"] > 0
    document = json.loads((tmp_path / "compare.json").read_text())
    assert document["seeds"] == [0, 1]
    assert [row["name"] for row in document["methods"]] == list(rows)
    assert (tmp_path / "pareto.png").stat().st_size > 5000
    assert "no such luck" in str(list(found.table().columns[-1].cells))


def test_the_same_start_and_data_for_every_method(tmp_path):
    seen = {}

    class Looks(Callback):
        def __init__(self, name):
            self.name = name

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            first = next(pl_module.parameters()).detach().sum().item() if batch_idx == 0 else None
            seen.setdefault((self.name, batch_idx), (first, float(batch[0].sum())))

    run(tmp_path, {name: functools.partial(Looks, name) for name in "ab"}, seeds=1)
    assert len(seen) == 8
    assert all(seen["a", i] == seen["b", i] for i in range(4))


def test_interrupted_it_goes_on_with_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(tmp_path, {"halves": Halves, "stops": Interrupts})
    assert sorted(path.name.split("-seed")[0] for path in (tmp_path / "runs").iterdir()) == ["halves", "nothing"]
    built = []
    original = comparison._measured
    monkeypatch.setattr(comparison, "_measured", lambda build: built.append(1) or original(build))
    found = run(tmp_path, {"halves": Halves, "stops": Halves})
    assert len(built) == 4  # of six: nothing and halves with seed 0 were there
    assert all(len(row["metric"]["values"]) == 2 for row in found.rows)
    run(tmp_path, {"halves": Halves}, trainer={**TRAINER, "max_steps": 2})
    assert len(built) == 8  # another budget is another comparison


def test_other_arguments_of_a_partial_are_another_run():
    def make(name, *, sparsity=0.5):
        return []

    settings = [(("a",), 0.5), (("a",), 0.9), (("b",), 0.5)]
    names = [comparison._stable(functools.partial(make, *args, sparsity=value)) for args, value in settings]
    assert len(set(names)) == 3
    assert comparison._stable(functools.partial(make, "a", sparsity=0.5)) == names[0]


def test_a_method_that_is_a_module(tmp_path):
    class Other(ForeignClassifier):
        pass

    found = run(tmp_path, {"other": Other}, seeds=[7])
    assert [len(row["metric"]["values"]) for row in found.rows] == [1, 1]


def measured(metric, sparsity, stored, latency):
    return {"metrics": {"val/acc": metric}, "sparsity": sparsity, "stored_bytes": stored, "latency_ms": latency,
            "latency_before_ms": 1.0, "parameters": 1, "seconds": 1.0}  # fmt: skip


def test_who_dominates_whom(tmp_path):
    runs = {
        "dense": [measured(0.9, 0.0, 100, 1.0)],
        "better": [measured(0.9, 0.5, 50, 1.04)],  # a latency within 5 % is equal
        "slower": [measured(0.9, 0.5, 50, 1.10)],
        "other": [measured(0.8, 0.9, 10, 1.0)],
        "failed": [{"seed": 0, "error": "x"}],
    }
    rows = {row["name"]: row for row in judge(runs, tmp_path, None, None).rows}
    assert {name: row["dominated_by"] for name, row in rows.items()} == {
        "dense": ["better"], "better": [], "slower": ["better"], "other": [], "failed": [],
    }  # fmt: skip
    assert not dominates(rows["better"], rows["dense"], "min") or rows["better"]["metric"] == rows["dense"]["metric"]
    assert judge({"a": [{**measured(1, 0, 1, 1), "metrics": {"val/loss": 1.0}}]}, tmp_path, None, None).mode == "min"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"methods": {}}, "methods"),
        ({"methods": ["gradual-prunin"]}, "gradual-pruning"),
        ({"methods": {"gradual-pruning": {"sparsity": 2}}}, "sparsity"),
        ({"methods": ["elr"]}, "elr is a mixin"),
        ({"methods": {"nothing": Halves}}, "nothing"),
        ({"methods": {"halves": Halves}, "seeds": 0}, "seeds"),
        ({"methods": {"halves": Halves}, "mode": "best"}, "mode"),
    ],
)
def test_errors_before_anything_is_trained(tmp_path, kwargs, message):
    with pytest.raises(ConfigurationError, match=message):
        run(tmp_path, **{"seeds": 1, **kwargs})
    assert not list(tmp_path.glob("runs/*"))


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--model.model=test_resnet", "--seeds=1"]
    assert main(["compare", "gradual-pruning", "sam", "--sparsity=0.7", "--gradual-pruning.stop=0", *small]) == 0
    rows = json.loads((tmp_path / "runs/compare/compare.json").read_text())["methods"]
    assert [row["name"] for row in rows] == ["nothing", "gradual-pruning", "sam"]
    assert [row["errors"] for row in rows] == [{}, {}, {}]
    assert rows[1]["sparsity"]["mean"] > 0.65
    assert "pareto.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gradual-prunin"], "gradual-pruning"),
        (["gradual-pruning", "--sparsty=.5"], "sparsity"),
        (["gradual-pruning", "--sparsity=5"], "sparsity"),
        (["instaflow"], "module"),
        ([], "name the methods"),
        (["sam", "--seeds=no"], "seeds"),
    ],
)
def test_errors_of_the_command(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()

"""effdl run, export, list, show, and the process from outside."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from effdl.cli import main
from tests.cli.commands import fails, run
from tests.support import ROOT

# ---- run -------------------------------------------------------------------------------------------------------


def test_a_run_leaves_its_folder(here, capsys):
    assert run("--method.sparsity=.75", "--model.optimizer=torch.optim.Adam", "--model.optimizer.lr=0.01") == 0
    folder = here / "runs" / "tiny" / "version_0"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "citations.bib", "config.yaml", "figures", "last.ckpt", "metrics.csv", "model", "report.json",
    }  # fmt: skip
    report = json.loads((folder / "report.json").read_text())
    assert report["seed"] == 1
    assert report["steps"] == 8
    assert report["environment"]["versions"]["torch"]
    assert report["methods"]["tiny"]["before"]["parameters"] == 51
    assert report["result"]["name"] == "smaller"
    assert report["result"]["parameters"] == 8 * 5 + 5 + 5 * 3 + 3
    assert report["result"]["latency_ms"] > 0
    assert "val/accuracy" in report["result"]["metrics"]
    assert report["papers"] == ["doe2021tiny"]
    assert {path.name for path in (folder / "figures").iterdir()} == {"tiny.txt", "training.png"}
    state = load_file(folder / "model" / "model.safetensors")
    last = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    assert {f"model.{name}" for name in state} == set(last)
    printed = capsys.readouterr().out
    for expected in ("@misc{doe2021tiny", "dense", "smaller", "0.75", "1.2 kB", "steps seen = 8"):
        assert expected in printed


def test_a_second_run_overwrites_nothing(here):
    assert run("--trainer.max_epochs=1") == 0
    first = {path: path.stat().st_mtime_ns for path in (here / "runs" / "tiny" / "version_0").rglob("*")}
    assert main(["run", "runs/tiny/version_0/config.yaml", "--trainer.max_epochs=1"]) == 0
    assert run("--trainer.max_epochs=1") == 0
    assert (here / "runs" / "tiny" / "version_1" / "report.json").is_file()
    assert first == {path: path.stat().st_mtime_ns for path in (here / "runs" / "tiny" / "version_0").rglob("*")}


def test_resume_goes_on_in_the_same_folder(here):
    assert run("--trainer.max_epochs=4") == 0
    with pytest.raises(InterruptedError):
        run("--method.fail=interrupt", "--trainer.max_epochs=4")
    whole, broken = (here / "runs" / "tiny" / f"version_{i}" for i in (0, 1))
    assert not (broken / "report.json").exists()
    assert main(["run", "--resume", str(broken), "--method.fail=null"]) == 0
    states = [torch.load(folder / "last.ckpt", weights_only=True) for folder in (whole, broken)]
    assert states[0]["global_step"] == states[1]["global_step"] == 16
    for name, value in states[0]["state_dict"].items():
        assert torch.equal(value, states[1]["state_dict"][name])
    rows = [list(csv.DictReader((folder / "metrics.csv").open())) for folder in (whole, broken)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]
    assert [row["val/accuracy"] for row in rows[0]] == [row["val/accuracy"] for row in rows[1]]
    assert json.loads((broken / "report.json").read_text())["resumed"] is True
    assert not (here / "runs" / "tiny" / "version_2").exists()


def test_resume_refuses_what_is_no_run(here, capsys):
    assert "run folder" in fails(capsys, "run", "--resume", str(here))
    assert run("--trainer.max_epochs=1") == 0
    (here / "other.yaml").write_text((here / "tiny.yaml").read_text())
    assert "of 'tiny'" in fails(capsys, "run", "other.yaml", "--resume", "runs/tiny/version_0")


def test_a_module_may_be_the_method(here, config, capsys):
    del config["method"]
    config["model"]["class_path"] = "tests.cli.parts.TinyMethodModule"
    (here / "tiny.yaml").write_text(yaml.safe_dump(config))
    assert run("--trainer.max_epochs=1") == 0
    assert "doe2020tinymodule" in capsys.readouterr().out


def test_method_comes_before_a_weight_average(here, monkeypatch):
    from effdl._cli import engine, recipe

    (stage,) = recipe.stages_of(recipe.read(here / "tiny.yaml"), ["--trainer.callbacks=EMAWeightAveraging"])
    names = [type(callback).__name__ for callback in engine.RecipeCLI(stage).trainer.callbacks]
    assert names.index("TinyCallback") < names.index("EMAWeightAveraging")


def test_a_run_by_steps_ends_with_a_checkpoint(here):
    assert run("--trainer.max_steps=6", "--trainer.max_epochs=-1", "--trainer.limit_val_batches=0") == 0
    last = torch.load(here / "runs" / "tiny" / "version_0" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 6


def test_own_checkpoints_and_loggers_stand_beside_ours(here):
    assert run(
        "--trainer.max_epochs=1",
        "--trainer.callbacks=ModelCheckpoint",
        "--trainer.logger=CSVLogger",
        "--trainer.logger.save_dir=own",
    ) == 0  # fmt: skip
    folder = here / "runs" / "tiny" / "version_0"
    assert (folder / "last.ckpt").is_file()
    assert list((folder / "checkpoints").glob("epoch=0*.ckpt"))
    assert (here / "own" / "lightning_logs" / "version_0" / "metrics.csv").is_file()


# ---- dry run ---------------------------------------------------------------------------------------------------


def test_dry_run_shows_layers_steps_and_cost(here, capsys):
    assert run("--dry-run", "--trainer.max_epochs=50", "--trainer.callbacks=tests.cli.parts.SwapCallback") == 0
    printed = capsys.readouterr().out
    for expected in ("A tiny method", "model.0", "2 layers", "model.1: ReLU -> Tanh", "63", "200", "min"):
        assert expected in printed
    assert not (here / "runs").exists()


# ---- export ----------------------------------------------------------------------------------------------------


def test_export_opens_without_effdl(here, capsys):
    assert run("--trainer.max_epochs=1") == 0
    assert main(["export", "runs/tiny/version_0", "--format", "model,program"]) == 0
    folder = here / "runs" / "tiny" / "version_0"
    exported = load_file(folder / "export" / "model" / "model.safetensors")
    trained = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(value, exported[name]) for name, value in trained.items())
    program = torch.export.load(folder / "export" / "model.pt2").module()
    assert program(torch.randn(5, 8)).shape == (5, 3)
    assert "largest difference to the model 0.0e+00" in capsys.readouterr().out


def test_export_of_a_module_that_only_trains(here, capsys):
    assert run("--trainer.max_epochs=1", "--model=tests.cli.parts.NoValidation") == 0
    assert main(["export", "runs/tiny/version_0"]) == 0
    folder = here / "runs" / "tiny" / "version_0"
    weights = [load_file(path / "model.safetensors") for path in (folder / "model", folder / "export" / "model")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert "inputs are not known" in fails(capsys, "export", "runs/tiny/version_0", "--format=program")


def test_export_of_onnx_and_of_a_moved_checkpoint(here, capsys):
    pytest.importorskip("onnxruntime")
    assert run("--trainer.max_epochs=1") == 0
    moved = here / "moved.ckpt"
    moved.write_bytes((here / "runs" / "tiny" / "version_0" / "last.ckpt").read_bytes())
    assert "No config.yaml" in fails(capsys, "export", str(moved))
    assert main(["export", str(moved), "--format=onnx", "--config=tiny.yaml", "--output=out"]) == 0
    assert (here / "out" / "model.onnx").is_file()
    assert "'onxx'" in fails(capsys, "export", str(moved), "--format=onxx")
    (here / "wide.yaml").write_text((here / "tiny.yaml").read_text().replace("width: 5", "width: 6"))
    assert "does not fit" in fails(capsys, "export", str(moved), "--config=wide.yaml")


# ---- list, show, doctor ----------------------------------------------------------------------------------------


def test_list_and_show(capsys):
    from effdl import catalog

    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    for entry in catalog.entries():
        assert entry.name in printed
    for entry in catalog.entries()[:3]:
        assert main(["show", entry.slug]) == 0
        shown = capsys.readouterr().out
        assert f"import {entry.name}" in shown
        if entry.paper:
            assert "@" in shown
            assert entry.paper.title in " ".join(shown.split())


def test_doctor(capsys, monkeypatch):
    from effdl.core import hub

    monkeypatch.setattr(hub, "reachable", lambda: False)
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for expected in ("torch", "extra onnx", "devices", "not reachable"):
        assert expected in printed


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip()
    assert main([]) == 0


# ---- from outside ----------------------------------------------------------------------------------------------


def test_exit_code_of_the_process(tmp_path):
    command = [sys.executable, "-m", "effdl.cli", "run", "nothing.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("effdl: nothing.yaml is not a file")
    assert len(done.stderr.strip().splitlines()) == 1


def test_list_answers_at_once():
    resource = pytest.importorskip("resource")  # not on Windows
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "effdl.cli", "list"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) < 1.0  # processor time: 0.2 s; importing Lightning alone takes 4 s


@pytest.mark.ddp
def test_two_processes_share_one_folder(here):
    command = [sys.executable, "-m", "effdl.cli", "run", "tiny.yaml", "--trainer.devices=2", "--trainer.strategy=ddp"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (here / "runs" / "tiny").iterdir()] == ["version_0"]
    report = json.loads((here / "runs" / "tiny" / "version_0" / "report.json").read_text())
    assert report["steps"] == 4

"""The commands, in process; exit codes and speed once from outside."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import subprocess
import sys
import time
import warnings

import pytest
import torch
import yaml
from safetensors.torch import load_file

from effdl.cli import main
from tests.support import ROOT


def run(*arguments: str) -> int:
    return main(["run", "tiny.yaml", *arguments])


def fails(capsys, *arguments: str) -> str:
    """The one line on stderr of a command that ends with exit code 2."""
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("effdl")
    return lines[0]


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


# ---- stages ----------------------------------------------------------------------------------------------------


@pytest.fixture
def staged(here, config):
    teacher = {"name": "teacher", "model": config.pop("model")}
    student = {
        "name": "student",
        "model": {
            "class_path": "tests.cli.parts.TinyModule",
            "init_args": {"width": 5, "start_from": "${stage.teacher.model}"},
        },
        "method": config.pop("method"),
    }
    config["trainer"]["max_epochs"] = 1
    (here / "tiny.yaml").write_text(yaml.safe_dump({**config, "stages": [teacher, student]}))
    return here


def test_stages_run_in_order_and_are_cached(staged, capsys):
    assert run("--model.optimizer=torch.optim.SGD", "--stages.student.model.optimizer.lr=0.0") == 0
    (teacher,) = (staged / "runs" / "tiny" / "stages").iterdir()
    student = staged / "runs" / "tiny" / "version_0"
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (teacher, student)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert json.loads((teacher / "report.json").read_text())["stage"] == "teacher"
    written = (teacher / "report.json").stat().st_mtime_ns
    assert run("--model.optimizer=torch.optim.SGD", "--method.sparsity=.5") == 0
    assert "finished before" in capsys.readouterr().out
    assert (teacher / "report.json").stat().st_mtime_ns == written
    assert run("--stages.teacher.trainer.max_epochs=2") == 0
    assert len(list((staged / "runs" / "tiny" / "stages").iterdir())) == 2


def test_a_broken_stage_goes_on(staged, capsys):
    from tests.cli.parts import TinyModule

    assert run("--dry-run") == 0
    assert "starts from stage teacher" in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TinyModule, "on_train_epoch_start", lambda self: 1 / (1 - self.current_epoch))
        with pytest.raises(ZeroDivisionError):
            run("--stages.teacher.trainer.max_epochs=2")
    assert run("--stages.teacher.trainer.max_epochs=2") == 0
    (teacher,) = (staged / "runs" / "tiny" / "stages").iterdir()
    report = json.loads((teacher / "report.json").read_text())
    assert report["resumed"] is True
    assert report["epochs"] == 2


def test_print_config_shows_every_stage_and_runs_none(staged, capsys):
    with contextlib.suppress(SystemExit):
        run("--print_config", "--stages.teacher.trainer.max_epochs=7")
    teacher, student = yaml.safe_load_all(capsys.readouterr().out)
    assert (teacher["trainer"]["max_epochs"], student["trainer"]["max_epochs"]) == (7, 1)
    assert student["model"]["init_args"]["start_from"] == "${stage.teacher.model}"
    assert not (staged / "runs").exists()


# ---- dry run ---------------------------------------------------------------------------------------------------


def test_dry_run_shows_layers_steps_and_cost(here, capsys):
    assert run("--dry-run", "--trainer.max_epochs=50", "--trainer.callbacks=tests.cli.parts.SwapCallback") == 0
    printed = capsys.readouterr().out
    for expected in ("A tiny method", "model.0", "2 layers", "model.1: ReLU -> Tanh", "63", "200", "min"):
        assert expected in printed
    assert not (here / "runs").exists()


# ---- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--method.sparsty=.95", "'sparsity'"),
        ("--method.sparsity=abc", "--method.sparsity=abc: Expected a <class 'float'>"),
        ("--method.sparsity=7", "sparsity=7.0 is not valid: expected a number in [0, 1]"),
        ("--method.fail=configuration", "fail='configuration' is not valid: expected nothing."),
        ("--model.num_classes=7", "--model.num_classes would be ignored"),
        ("--model.optimizer.lrr=1", "--model.optimizer.lrr=1: Option 'lrr' is not accepted"),
        ("--trainer.max_epoch=3", "'--trainer.max_epochs'"),
        ("--trainer.accelerator=gpus", "invalid accelerator"),
        ("--model=tests.cli.parts.Nope", "no attribute 'Nope'"),
        ("--method=tests.cli.parts.TinyData", "subclass of Callback"),
        ("--data=null", "required: num_classes"),
        ("stray", "'stray' is not an override"),
    ],
)
def test_user_errors_are_one_line_and_code_2(here, capsys, override, expected):
    assert expected in fails(capsys, "run", "tiny.yaml", override)
    assert not list((here / "runs" / "tiny").glob("version_*"))


def test_a_stated_link_must_agree(here, config, capsys):
    config["model"]["init_args"]["num_classes"] = 3
    (here / "tiny.yaml").write_text(yaml.safe_dump(config))
    assert run("--trainer.max_epochs=1") == 0
    assert "the data module has 4" in fails(capsys, "run", "tiny.yaml", "--data.classes=4")


def test_other_exceptions_stay_tracebacks(here):
    with pytest.raises(RuntimeError, match="a bug"):
        run("--method.fail=crash")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["lst"], "'list'"),
        (["run"], "name a method"),
        (["run", "gradual-prunning"], "Did you mean"),
        (["run", "--dry-run"], "name a method"),
        (["run", "--dry-run", "--resume=x"], "from a name"),
        (["show"], "NAME"),
        (["show", "nothing-like-it-xyz"], "effdl list"),
        (["list", "--all"], "'--all'"),
        (["export", "nothing.ckpt"], "not a checkpoint"),
    ],
)
def test_wrong_commands(capsys, arguments, expected):
    assert expected in fails(capsys, *arguments)


# ---- copy ------------------------------------------------------------------------------------------------------


def test_copy_does_not_overwrite(here, capsys):
    (here / "sub").mkdir()
    os.chdir(here / "sub")
    assert main(["copy", "../tiny.yaml"]) == 0
    assert (here / "sub" / "tiny.yaml").read_text() == (here / "tiny.yaml").read_text()
    assert "exists" in fails(capsys, "copy", "../tiny.yaml")


def test_plain_copy_runs_in_a_plain_lightning_cli(here):
    from lightning.pytorch.cli import LightningCLI

    (here / "sub").mkdir()
    os.chdir(here / "sub")
    assert main(["copy", "--plain", "../tiny.yaml"]) == 0
    text = (here / "sub" / "tiny.yaml").read_text()
    assert "# A header." in text
    config = yaml.safe_load(text)
    assert "method" not in config
    assert config["model"]["init_args"]["num_classes"] == 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning remarks on the arguments of the process that runs the tests
        cli = LightningCLI(
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            args=["fit", "--config", "tiny.yaml", "--trainer.max_epochs=1", "--trainer.logger=false"],
        )
    assert cli.trainer.callbacks[0].steps == 4


def test_plain_copy_of_stages(staged):
    (staged / "sub").mkdir()
    os.chdir(staged / "sub")
    assert main(["copy", "--plain", "../tiny.yaml"]) == 0
    student = (staged / "sub" / "tiny-student.yaml").read_text()
    assert "Replace the paths below runs/teacher" in student
    assert yaml.safe_load(student)["model"]["init_args"]["start_from"] == "runs/teacher/model"
    assert "method" not in yaml.safe_load((staged / "sub" / "tiny-teacher.yaml").read_text())


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
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "effdl.cli", "list"], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 1.0  # 0.2 s on a quiet machine; importing Lightning alone takes 4 s


@pytest.mark.ddp
def test_two_processes_share_one_folder(here):
    command = [sys.executable, "-m", "effdl.cli", "run", "tiny.yaml", "--trainer.devices=2", "--trainer.strategy=ddp"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (here / "runs" / "tiny").iterdir()] == ["version_0"]
    report = json.loads((here / "runs" / "tiny" / "version_0" / "report.json").read_text())
    assert report["steps"] == 4

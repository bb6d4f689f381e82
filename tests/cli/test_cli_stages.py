"""effdl run with stages; effdl copy."""

from __future__ import annotations

import contextlib
import json
import os
import warnings

import pytest
import torch
import yaml
from safetensors.torch import load_file

from effdl.cli import main
from tests.cli.commands import fails, run

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

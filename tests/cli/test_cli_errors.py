"""effdl: what a user gets wrong is one line and exit code 2."""

from __future__ import annotations

import pytest
import yaml

from tests.cli.commands import fails, run


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

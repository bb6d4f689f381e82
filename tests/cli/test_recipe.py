"""Recipes as data: names, merging, overrides, stages, links."""

from __future__ import annotations

import pytest
import yaml

from effdl import catalog
from effdl._cli import recipe
from effdl.core.errors import ConfigurationError

STAGED = {
    "trainer": {"max_epochs": 1},
    "data": {"class_path": "tests.cli.parts.TinyData"},
    "stages": [
        {"name": "teacher", "model": {"class_path": "tests.cli.parts.TinyModule", "init_args": {"width": 4}}},
        {
            "name": "student",
            "model": {
                "class_path": "tests.cli.parts.TinyModule",
                "init_args": {"start_from": "${stage.teacher.model}"},
            },
            "method": {"class_path": "tests.cli.parts.TinyCallback"},
        },
    ],
}


def test_names_are_located(here, monkeypatch):
    assert recipe.locate("tiny.yaml")[0] == "tiny"
    with pytest.raises(ConfigurationError, match="is not a file"):
        recipe.locate("nothing.yaml")
    monkeypatch.setattr(recipe, "recipe_files", lambda: {"gradual-pruning": here / "tiny.yaml"})
    assert recipe.locate("gradual-pruning") == ("gradual-pruning", here / "tiny.yaml")
    with pytest.raises(ConfigurationError, match="Did you mean 'gradual-pruning'"):
        recipe.locate("gradual-prunning")


def test_method_without_recipe_says_so(monkeypatch):
    monkeypatch.setattr(recipe, "recipe_files", dict)
    with pytest.raises(ConfigurationError, match="has no recipe"):
        recipe.locate("PruningCallback")


def test_bare_names_are_written_out(monkeypatch):
    monkeypatch.setattr(catalog, "class_paths", lambda: {"Mine": "effdl.x.Mine"})
    config = {"model": {"class_path": "Mine", "init_args": {"model": "Mine2"}}, "trainer": {"callbacks": ["Mine"]}}
    full = recipe.with_full_names(config)
    assert full["model"] == {"class_path": "effdl.x.Mine", "init_args": {"model": "Mine2"}}
    assert full["trainer"]["callbacks"] == ["effdl.x.Mine"]
    assert recipe.stages_of({}, ["--model=Mine"])[0].overrides == ["--model=effdl.x.Mine"]
    (stage,) = recipe.stages_of({"method": {}}, ["--method.class_path", "Mine"])
    assert stage.overrides == ["--method.class_path", "effdl.x.Mine"]


def test_another_class_drops_the_old_arguments():
    base = {"model": {"class_path": "A", "init_args": {"width": 1}}, "trainer": {"max_epochs": 1, "devices": 1}}
    over = {"model": {"class_path": "B", "init_args": {"depth": 2}}, "trainer": {"max_epochs": 3}}
    assert recipe.merge(base, over) == {
        "model": {"class_path": "B", "init_args": {"depth": 2}},
        "trainer": {"max_epochs": 3, "devices": 1},
    }
    assert recipe.merge(base, {"model": {"init_args": {"depth": 2}}})["model"]["init_args"] == {"width": 1, "depth": 2}


def test_yaml_errors_are_one_line(tmp_path):
    (tmp_path / "a.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(ConfigurationError, match="not valid YAML") as error:
        recipe.read(tmp_path / "a.yaml")
    assert "\n" not in str(error.value)
    (tmp_path / "b.yaml").write_text("- 1")
    with pytest.raises(ConfigurationError, match="mapping"):
        recipe.read(tmp_path / "b.yaml")


def test_overrides_are_options():
    assert recipe.pairs(["--a.b=1", "--c", "-2"]) == [("a.b", ["--a.b=1"]), ("c", ["--c", "-2"])]
    for words in (["3"], ["--a=1", "3"], ["--a", "1", "2"]):
        with pytest.raises(ConfigurationError, match="not an override"):
            recipe.pairs(words)


def test_stages_inherit_and_overrides_find_their_stage():
    overrides = ["--trainer.max_epochs=3", "--stages.teacher.trainer.devices=2", "--method.sparsity=.5", "--x", "1"]
    teacher, student = recipe.stages_of(STAGED, overrides)
    assert teacher.config["data"] == student.config["data"] == STAGED["data"]
    assert "name" not in teacher.config
    assert "stages" not in teacher.config
    assert teacher.overrides == ["--trainer.max_epochs=3", "--trainer.devices=2", "--x", "1"]
    assert student.overrides == ["--trainer.max_epochs=3", "--method.sparsity=.5", "--x", "1"]
    assert teacher.needs() == []
    assert student.needs() == ["teacher"]


@pytest.mark.parametrize(
    ("override", "match"),
    [("--stages.techer.trainer.devices=2", "'teacher'"), ("--stages=3", "no such stage")],
)
def test_unknown_stage(override, match):
    with pytest.raises(ConfigurationError, match=match):
        recipe.stages_of(STAGED, [override])


def test_method_override_where_the_model_is_the_method():
    with pytest.raises(ConfigurationError, match=r"--model\.sparsity"):
        recipe.stages_of({"model": {}}, ["--method.sparsity=1"])


def test_stage_names_are_unique():
    for names in ([None], ["a", "a"]):
        with pytest.raises(ConfigurationError, match="name of its own"):
            recipe.stages_of({"stages": [{"name": name} if name else {} for name in names]}, [])


def test_references_become_paths(tmp_path):
    _, student = recipe.stages_of(STAGED, ["--stages.student.model.width=${stage.teacher.checkpoint}"])
    resolved = student.resolved({"teacher": tmp_path})
    assert resolved.config["model"]["init_args"]["start_from"] == str(tmp_path / "model")
    assert resolved.overrides == [f"--model.width={tmp_path / 'last.ckpt'}"]
    with pytest.raises(ConfigurationError, match="no earlier stage"):
        student.resolved({"teachers": tmp_path})


def test_digest_follows_config_and_overrides():
    one, _ = recipe.stages_of(STAGED, [])
    same, _ = recipe.stages_of(yaml.safe_load(yaml.safe_dump(STAGED)), [])
    other, _ = recipe.stages_of(STAGED, ["--trainer.max_epochs=2"])
    assert one.digest() == same.digest() != other.digest()


def test_config_files_are_merged(here):
    (here / "more.yaml").write_text("trainer: {max_epochs: 7}")
    (stage,) = recipe.stages_of(recipe.read(here / "tiny.yaml"), ["--config=more.yaml", "--trainer.devices=1"])
    assert stage.config["trainer"]["max_epochs"] == 7
    assert stage.overrides == ["--trainer.devices=1"]


def test_links_and_what_they_would_ignore(config):
    assert recipe.links(recipe.Stage("", config)) == ["num_classes"]
    assert recipe.links(recipe.Stage("", config, ["--data=tests.cli.parts.Nothing"])) == []
    for override in ("--model.num_classes=3", "--model.init_args.num_classes=3"):
        with pytest.raises(ConfigurationError, match=r"num_classes would be ignored.*TinyData"):
            recipe.links(recipe.Stage("", config, [override]))

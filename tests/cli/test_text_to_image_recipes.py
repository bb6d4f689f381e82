"""The recipes text-to-image and text-to-image-lora: a short run of one, and a dry run of the other from its model."""

from __future__ import annotations

import yaml

from effdl.cli import main
from tests.support import ROOT

SHORT = [
    "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1", "--data.max_train=128",
    "--trainer.enable_progress_bar=false", "--stages.train.model.steps=2",
]  # fmt: skip


def test_the_tiny_recipe_runs_and_the_full_size_one_starts_from_its_model(tmp_path, monkeypatch, capsys):
    from diffusers import StableDiffusionPipeline

    monkeypatch.chdir(tmp_path)
    assert main(["run", "text-to-image", *SHORT]) == 0
    folder = tmp_path / "runs" / "text-to-image" / "version_0"
    command = ["run", "text-to-image-lora", "--dry-run", f"--model.model={folder}/model", "--data.name=digits"]
    assert main([*command, "--data.prompt=null", "--data.image_size=16"]) == 0
    assert "15,000" in capsys.readouterr().out.rpartition("optimizer steps")[2]
    assert (folder / "figures" / "samples.png").is_file()
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "model")
    stages = list((tmp_path / "runs" / "text-to-image" / "stages").glob("autoencoder-*"))
    first = StableDiffusionPipeline.from_pretrained(stages[0] / "model")
    assert first.vae.config.scaling_factor == pipeline.vae.config.scaling_factor != 0.18215


def test_the_full_size_recipe_differs_in_values_alone():
    tiny, full = (yaml.safe_load((ROOT / "recipes" / f"text-to-image{end}.yaml").read_text()) for end in ("", "-lora"))
    assert full["model"]["class_path"] == tiny["stages"][1]["model"]["class_path"]
    assert full["data"]["class_path"] == tiny["data"]["class_path"]

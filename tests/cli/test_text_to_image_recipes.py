"""The recipes text-to-image and text-to-image-lora: a short run of one, and a dry run of the other from its model."""

from __future__ import annotations

import subprocess
import sys

import yaml

from tests.support import ROOT

SHORT = [
    "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1", "--data.max_train=128",
    "--trainer.enable_progress_bar=false", "--stages.train.model.steps=2",
]  # fmt: skip
SCRIPT = """
import sys
from effdl._cli.run import run
from effdl._cli.dry_run import dry_run
folder = run("text-to-image", sys.argv[1:], None)
model = f"--model.model={folder}/model"
dry_run("text-to-image-lora", [model, "--data.name=digits", "--data.prompt=null", "--data.image_size=16"])
"""


def test_the_tiny_recipe_runs_and_the_full_size_one_starts_from_its_model(tmp_path):
    from diffusers import StableDiffusionPipeline

    command = [sys.executable, "-c", SCRIPT, *SHORT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "15,000" in done.stdout.rpartition("optimizer steps")[2]
    folder = tmp_path / "runs" / "text-to-image" / "version_0"
    assert (folder / "figures" / "samples.png").is_file()
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "model")
    stages = list((tmp_path / "runs" / "text-to-image" / "stages").glob("autoencoder-*"))
    first = StableDiffusionPipeline.from_pretrained(stages[0] / "model")
    assert first.vae.config.scaling_factor == pipeline.vae.config.scaling_factor != 0.18215


def test_the_full_size_recipe_differs_in_values_alone():
    tiny, full = (yaml.safe_load((ROOT / "recipes" / f"text-to-image{end}.yaml").read_text()) for end in ("", "-lora"))
    assert full["model"]["class_path"] == tiny["stages"][1]["model"]["class_path"]
    assert full["data"]["class_path"] == tiny["data"]["class_path"]

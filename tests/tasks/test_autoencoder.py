"""effdl.tasks.autoencoder: a pipeline's VAE learns to reconstruct, finds its scale, and is saved in the pipeline."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from diffusers import AutoencoderKL
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from effdl.core.errors import ConfigurationError
from effdl.tasks import tiny
from effdl.tasks.autoencoder import AutoencoderModule
from effdl.tasks.text_to_image import TextToImageModule
from tests.tasks.text_to_image_parts import data, fit, same

adam = partial(torch.optim.Adam, lr=0.005)


def test_it_learns_finds_the_scale_and_saves_the_pipeline(tmp_path):
    pipeline = tiny.tiny_stable_diffusion_3(16)
    module = AutoencoderModule(pipeline, optimizer=adam)
    images = next(iter(data().train_dataloader()))["image"]

    def error() -> float:
        with torch.no_grad():
            return float((module(images)[0] - images).abs().mean())

    before, network = error(), [p.clone() for p in pipeline.transformer.parameters()]
    fit(module, tmp_path, max_steps=40, limit_val_batches=1, logger=CSVLogger(tmp_path))
    assert error() < 0.7 * before
    assert all(torch.equal(a, b) for a, b in zip(network, pipeline.transformer.parameters()))
    assert {name.split(".")[0] for name in module.state_dict()} == {"model"}
    module.save_pretrained(tmp_path / "pipe")
    started = TextToImageModule(str(tmp_path / "pipe"))
    mean, std = started.surroundings.image_moments(data().train_dataset.__getitems__(range(16))["image"])
    latents = started.surroundings.draw_latents(mean, torch.zeros_like(std))
    assert abs(float(latents.std()) - 1) < 0.02
    assert abs(float(latents.mean())) < 0.02
    module.figures(tmp_path)
    assert (tmp_path / "reconstructions.png").is_file()
    assert list(tmp_path.rglob("reconstructions/*.png"))


def test_resumed_it_is_the_uninterrupted_run_and_checkpoints_open_in_the_vae(tmp_path):
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, resumed = (AutoencoderModule(tiny.tiny_stable_diffusion(16), optimizer=adam) for _ in range(2))
    fit(whole, tmp_path, callbacks=[saving])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(resumed, tmp_path, ckpt_path=str(tmp_path / "step=1.ckpt"), precision="32-true")
    assert same(whole.state_dict(), resumed.state_dict())
    state = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"]
    vae = AutoencoderKL.from_config(whole.model.config)
    vae.load_state_dict({name.removeprefix("model."): value for name, value in state.items()}, strict=True)


def test_half_precision(tmp_path):
    module = AutoencoderModule("tiny-xl")
    trainer = fit(module, tmp_path, precision="bf16-mixed", max_steps=1)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


@pytest.mark.parametrize(
    ("argument", "kwargs"),
    [("model", {"model": tiny.tiny_ddpm(8)}), ("kl_weight", {"kl_weight": -1.0}), ("seed", {"seed": -1})],
)
def test_a_bad_argument_is_named(argument, kwargs):
    with pytest.raises(ConfigurationError, match=argument):
        AutoencoderModule(**kwargs)

"""effdl.tasks.diffusion: sampling, saving as a diffusers pipeline, opening."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler

from effdl.core.errors import ConfigurationError
from effdl.tasks.diffusion import DiffusionModule, stream
from effdl.tasks.tiny import tiny_condition_unet, tiny_ddpm, tiny_stable_diffusion, tiny_unet
from tests.tasks.diffusion_parts import CONFIG, fit, images, loader, same

# Sampling


def test_samples_are_images_and_a_function_of_the_seed():
    module = DiffusionModule(tiny_unet(8)).train()
    before = torch.get_rng_state()
    a, b, c = module.sample(3, steps=4), module.sample(3, steps=4), module.sample(3, steps=4, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert a.shape == (3, 3, 8, 8)
    assert a.dtype == torch.float32
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert module.model.training


def test_an_oracle_network_samples_the_data():
    """A network that always answers with one image (prediction="sample") draws that image."""
    truth = images(1)

    class Oracle(torch.nn.Module):
        config = tiny_unet(8).config

        def forward(self, x, t):
            return truth.expand_as(x)

    scheduler = DDIMScheduler()
    module = DiffusionModule(Oracle(), noise_scheduler=scheduler, prediction="sample")
    assert torch.allclose(module.sample(2, steps=10), truth.expand(2, -1, -1, -1), atol=1e-4)


def test_another_scheduler_and_fewer_steps():
    module = DiffusionModule(tiny_unet(8))
    ddim = DDIMScheduler.from_config(module.noise_scheduler.config)
    assert not torch.equal(module.sample(2, steps=3), module.sample(2, steps=3, noise_scheduler=ddim))


def test_class_conditional_samples():
    module = DiffusionModule(tiny_unet(8, num_classes=3))
    out = module.sample(steps=2, labels=[0, 1, 2])
    assert out.shape == (3, 3, 8, 8)
    assert not torch.equal(out, module.sample(steps=2, labels=[1, 1, 1]))


def test_guidance_moves_away_from_the_empty_prompt_as_the_pipeline_does():
    pipeline = tiny_stable_diffusion()
    module = DiffusionModule(pipeline)
    kwargs = {"steps": 2, "prompts": "a cat"}
    plain, guided = module.sample(1, **kwargs), module.sample(1, guidance=3.0, **kwargs)
    assert plain.shape == (1, 3, 32, 32)
    assert not torch.allclose(plain, guided)
    empty = module.sample(1, steps=2, prompts="")
    assert torch.allclose(module.sample(1, guidance=0.0, **kwargs), empty, atol=1e-5)
    latents = torch.randn(1, 4, 8, 8, generator=stream([0], "cpu"))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a cat", num_inference_steps=2, guidance_scale=3.0, latents=latents, output_type="pt", negative_prompt=""
    ).images
    assert torch.allclose(theirs, (guided / 2 + 0.5).clamp(0, 1), atol=1e-4)


def test_predict_draws_for_the_conditions_of_the_batches(tmp_path):
    module = DiffusionModule(tiny_unet(8, num_classes=3))
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    module._sample = lambda count, condition, seed: condition["class_labels"]
    assert torch.cat(trainer.predict(module, loader(2))).tolist() == [0, 1, 2, 0] * 2


@pytest.mark.parametrize(
    ("argument", "kwargs"),
    [
        ("count", {"count": 0}),
        ("steps", {"steps": 0}),
        ("labels", {"labels": [1]}),
        ("prompts", {"prompts": "a cat"}),
        ("guidance", {"guidance": 2.0}),
        ("guidance", {"guidance": -1.0}),
    ],
)
def test_sampling_refuses_what_the_network_cannot_do(argument, kwargs):
    with pytest.raises(ConfigurationError, match=argument):
        DiffusionModule(CONFIG).sample(**kwargs)


# Saving and loading


def test_saved_as_a_pipeline_that_diffusers_opens_and_so_do_we(tmp_path):
    module = DiffusionModule(tiny_unet(8), prediction="v_prediction")
    fit(module, tmp_path)
    module.save_pretrained(tmp_path / "pipe")
    opened = DDPMPipeline.from_pretrained(tmp_path / "pipe", low_cpu_mem_usage=False)
    assert same(opened.unet, module.model)
    assert opened.scheduler.config.prediction_type == "v_prediction"
    again = DiffusionModule.from_pretrained(tmp_path / "pipe")
    assert again.prediction == "v_prediction"
    assert again.model.training
    assert torch.allclose(again.sample(2, steps=3), module.sample(2, steps=3), atol=1e-4)


def test_a_stable_diffusion_stays_one(tmp_path):
    from diffusers import StableDiffusionPipeline

    module = DiffusionModule(tiny_stable_diffusion())
    module.save_pretrained(tmp_path)
    opened = StableDiffusionPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert same(opened.unet, module.model)
    assert type(DiffusionModule(str(tmp_path)).pipeline).__name__ == "StableDiffusionPipeline"


def test_a_network_without_pipeline_saves_and_opens(tmp_path):
    module = DiffusionModule(tiny_condition_unet(), noise_scheduler=DDIMScheduler(beta_end=0.01))
    module.save_pretrained(tmp_path)
    again = DiffusionModule(str(tmp_path))
    assert same(again.model, module.model)
    assert type(again.noise_scheduler) is DDIMScheduler
    assert again.noise_scheduler.config.beta_end == 0.01
    with pytest.raises(ConfigurationError, match="pipeline"):
        _ = module.pipeline


def test_the_folder_of_a_network_opens(tmp_path):
    net = tiny_unet(8)
    net.save_pretrained(tmp_path)
    assert same(DiffusionModule(str(tmp_path)).model, net)


def test_two_modules_of_one_pipeline_do_not_share_their_network():
    pipeline = tiny_ddpm(8)
    a = DiffusionModule(pipeline)
    b = copy.deepcopy(a)
    assert b.pipeline.unet is b.model
    assert a.pipeline.unet is a.model is pipeline.unet
    assert b.model is not a.model


def test_the_callers_scheduler_is_left_alone():
    scheduler = DDPMScheduler()
    DiffusionModule(CONFIG, noise_scheduler=scheduler, prediction="sample")
    assert scheduler.config.prediction_type == "epsilon"

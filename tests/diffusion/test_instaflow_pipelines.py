"""instaflow: pipelines in and out."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils.data import DataLoader

from effdl.core.errors import ConfigurationError
from effdl.diffusion.instaflow import CONVENTIONS, FlowSource, ReflowModule, ReflowPairs
from effdl.tasks.tiny import (
    tiny_clip_text_model,
    tiny_clip_tokenizer,
    tiny_sd3_transformer,
    tiny_stable_diffusion,
    tiny_unet,
)
from tests.diffusion.instaflow_parts import fit, plane


def test_text_pipeline_from_pairs_to_a_stock_pipeline(tmp_path):
    from diffusers import StableDiffusionPipeline

    prompts = ["a fox", "a crow", "a cat"]
    tiny_stable_diffusion(16).save_pretrained(tmp_path / "sd")
    data = ReflowPairs(tmp_path / "pairs", str(tmp_path / "sd"), prompts, count=6, steps=2, batch_size=2, val=0.0)
    module = ReflowModule(str(tmp_path / "sd"), convention="diffusers")
    fit(module, data, max_epochs=1)
    assert data.guidance == 6.0
    assert module.record()["guidance"] == 6.0
    module.save_pretrained(str(tmp_path / "reflowed"))
    record = json.loads((tmp_path / "reflowed" / "reflow.json").read_text())
    assert (record["k"], record["stage"], record["convention"]) == (2, "reflow", [1000.0, True, -1.0])

    noise = torch.randn(3, 4, 4, 4)
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "reflowed")
    for name, value in stock.unet.state_dict().items():
        assert torch.equal(value, module.model.state_dict()[name])
    stock.set_progress_bar_config(disable=True)
    images = stock(prompts, latents=noise, num_inference_steps=20, guidance_scale=1.0, output_type="latent").images
    ours = FlowSource(str(tmp_path / "reflowed")).solve(noise, prompts, steps=20)
    assert (images - ours).abs().max() < 0.02 * (ours - noise).abs().max()  # the stock grid begins at sigma = 0.999

    distilled = ReflowModule(str(tmp_path / "reflowed"), stage="distill")
    assert distilled.source.convention == CONVENTIONS["diffusers"]
    assert distilled.record()["k"] == 2
    assert distilled.sample(prompts, steps=1).shape == (3, 3, 16, 16)


def test_sd3_pipeline(tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    text = [CLIPTextModelWithProjection(tiny_clip_text_model().config) for _ in range(2)]
    width = 2 * text[0].config.projection_dim
    pipeline = StableDiffusion3Pipeline(
        transformer=tiny_sd3_transformer(4, joint_attention_dim=width, pooled_projection_dim=width),
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=tiny_stable_diffusion(16).vae,
        text_encoder=text[0], tokenizer=tiny_clip_tokenizer(), text_encoder_2=text[1],
        tokenizer_2=tiny_clip_tokenizer(), text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    source, noise = FlowSource(pipeline), torch.randn(2, 4, 4, 4)
    assert not source.is_diffusion
    ours = source.solve(noise, ["a fox", "a crow"], steps=4, guidance=2.0)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"latents": noise, "guidance_scale": 2.0, "output_type": "latent", "height": 16, "width": 16}
    stock = pipeline(["a fox", "a crow"], sigmas=[1.0, 0.75, 0.5, 0.25], num_inference_steps=4, **arguments).images
    torch.testing.assert_close(ours, stock, atol=1e-4, rtol=1e-4)
    module = ReflowModule(pipeline, online_steps=2, guidance=2.0)
    module.training_step({"prompt": ["a fox", "a crow"]}, 0).backward()  # no images are needed
    module.save_pretrained(str(tmp_path))
    without = dict.fromkeys(["text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor"])
    again = StableDiffusion3Pipeline.from_pretrained(tmp_path, **without)
    assert all(torch.equal(v, module.model.state_dict()[k]) for k, v in again.transformer.state_dict().items())


def test_pairs_of_a_diffusion_pipeline_are_its_own_dpm_solver(tmp_path):
    """Our loop against the stock pipeline under DPM-Solver, guided, from the same latents."""
    from diffusers import DPMSolverMultistepScheduler

    pipeline, prompts = tiny_stable_diffusion(16), ["a fox", "a crow"]
    noise = torch.randn(2, 4, 4, 4)
    ours = FlowSource(pipeline).solve(noise, prompts, steps=5, guidance=6.0)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(prompts, latents=noise, num_inference_steps=5, guidance_scale=6.0, output_type="latent").images
    torch.testing.assert_close(ours, stock, atol=1e-4, rtol=1e-4)


def test_class_conditional_unet_round_trip(tmp_path):
    from diffusers import UNet2DModel

    module = ReflowModule(tiny_unet(8, 1, num_classes=3), stage="flow")
    batch = {"image": torch.randn(4, 1, 8, 8), "label": torch.arange(4) % 3}
    fit(module, DataLoader([batch] * 2, batch_size=None), max_epochs=1)
    module.save_pretrained(str(tmp_path / "flow"))
    stock = UNet2DModel.from_pretrained(tmp_path / "flow")
    assert all(torch.equal(v, module.model.state_dict()[k]) for k, v in stock.state_dict().items())
    data = ReflowPairs(tmp_path / "pairs", str(tmp_path / "flow"), conditions=3, count=8, steps=2, batch_size=4)
    fit(ReflowModule(str(tmp_path / "flow")), data, max_epochs=1)
    labels = torch.tensor([0, 1, 2])
    assert torch.equal(module.sample(labels, seed=1), module.sample(labels, seed=1))
    assert module.sample(labels).shape == (3, 1, 8, 8)
    with pytest.raises(ConfigurationError, match="guidance"):
        module.sample(labels, guidance=1.5)


def test_must_h_a_distilled_net_is_sampled_with_its_own_number_of_steps():
    module = ReflowModule(plane(), stage="distill", steps=2)
    noise, labels, calls = torch.randn(3, 2), torch.arange(3), []
    module.model.register_forward_hook(lambda *args: calls.append(1))
    module.sample(labels, noise, strict=True)
    assert len(calls) == 2
    with pytest.warns(UserWarning, match="distilled for steps=2"):
        module.sample(labels, noise, steps=1)
    with pytest.raises(ConfigurationError, match="steps=1"):
        module.sample(labels, noise, steps=1, strict=True)


def test_labels_where_text_is_wanted_are_refused():
    module = ReflowModule(tiny_stable_diffusion(16), stage="flow")
    batch = {"image": torch.randn(2, 3, 16, 16), "label": torch.tensor([0, 1])}
    with pytest.raises(ConfigurationError, match="prompt"):
        module.training_step(batch, 0)
    assert torch.isfinite(module.training_step(batch | {"prompt": ["a", "b"]}, 0))

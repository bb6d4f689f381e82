"""rectified-flow-transformer: diffusers' Flux transformer and pipeline, of the stock classes, as a flow to train."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from effdl.core.errors import ConfigurationError
from effdl.core.random import generator, preserved_rng
from effdl.diffusion._draws import Draws
from effdl.diffusion._flow_schedulers import sigma_grid
from effdl.diffusion._flux import image_ids, pack, unpack
from effdl.diffusion._rectified_flow_transformer_conditions import drop, empty, text_layout
from effdl.diffusion._source import FlowSource
from effdl.diffusion.rectified_flow_transformer import LogitNormal, RectifiedFlowModule, add_qk_norm, shift_time
from effdl.tasks.tiny import tiny_clip_text_model, tiny_clip_tokenizer, tiny_t5_encoder, tiny_t5_tokenizer, tiny_vae
from tests.support import BARE

CHANNELS, WIDTH, POOLED = 4, 64, 32


def transformer(**config) -> FluxTransformer2DModel:
    with preserved_rng():
        torch.manual_seed(0)
        return FluxTransformer2DModel(**{
            "in_channels": 4 * CHANNELS, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
            "num_attention_heads": 2, "joint_attention_dim": WIDTH, "pooled_projection_dim": POOLED,
            "axes_dims_rope": (4, 6, 6), **config,
        })  # fmt: skip


def pipeline(shift: float = 3.0, **config) -> FluxPipeline:
    made = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(shift=shift), tiny_vae(16, scaling_factor=0.3611, shift_factor=0.1159),
        tiny_clip_text_model(), tiny_clip_tokenizer(), tiny_t5_encoder(WIDTH), tiny_t5_tokenizer(),
        transformer(**config),
    )  # fmt: skip
    made.default_sample_size = 4
    return made


def embedded(count: int = 2, height: int = 4, width: int = 6) -> dict[str, torch.Tensor]:
    draw = generator(1)
    return {
        "latents": torch.randn(count, CHANNELS, height, width, generator=draw),
        "encoder_hidden_states": torch.randn(count, 5, WIDTH, generator=draw),
        "pooled_projections": torch.randn(count, POOLED, generator=draw),
    }


def stock(network, latents, t, batch, guidance=None) -> torch.Tensor:
    """A call of the transformer as the stock pipeline prepares it."""
    count, channels, height, width = latents.shape
    output = network(
        hidden_states=FluxPipeline._pack_latents(latents, count, channels, height, width),
        encoder_hidden_states=batch["encoder_hidden_states"], pooled_projections=batch["pooled_projections"],
        timestep=t, guidance=guidance, txt_ids=torch.zeros(batch["encoder_hidden_states"].shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, "cpu", torch.float32),
        return_dict=False,
    )[0]  # fmt: skip
    return FluxPipeline._unpack_latents(output, 8 * height, 8 * width, 8)


def trained(module: RectifiedFlowModule, batch, **kwargs) -> RectifiedFlowModule:
    torch.manual_seed(0)
    Trainer(max_steps=2, **BARE, **kwargs).fit(module, DataLoader([batch] * 2, batch_size=None))
    return module


def test_packing_and_addresses_are_the_stock_pipelines():
    x = torch.randn(2, CHANNELS, 4, 6)
    assert torch.equal(pack(x), FluxPipeline._pack_latents(x, 2, CHANNELS, 4, 6))
    assert torch.equal(unpack(pack(x), 4, 6), x)
    assert torch.equal(image_ids(4, 6), FluxPipeline._prepare_latent_image_ids(2, 2, 3, "cpu", torch.float32))
    with pytest.raises(ConfigurationError, match="even"):
        pack(torch.randn(1, 4, 3, 4))


@pytest.mark.parametrize("distilled", [False, True], ids=["schnell", "dev"])
def test_a_step_is_the_papers_equation_on_packed_latents(distilled: bool):
    module = RectifiedFlowModule(transformer(guidance_embeds=distilled), shift=3.0, dropout=0.0)
    batch = embedded()
    loss = module.training_step(batch, 4)
    draws = Draws(0, 0, 4)
    noise, t = draws.noise(batch["latents"].shape), shift_time(LogitNormal().sample(2, draws.stream(0)), 3.0)
    z = (1 - t[:, None, None, None]) * batch["latents"] + t[:, None, None, None] * noise
    told = torch.full((2,), 3.5) if distilled else None
    velocity = stock(module.model, z, t, batch, told)
    torch.testing.assert_close(loss, (velocity - (noise - batch["latents"])).square().mean())
    other = module.training_step(batch | {"guidance": torch.tensor([1.0, 7.0])}, 4)
    velocity = stock(module.model, z, t, batch, torch.tensor([1.0, 7.0]) if distilled else None)
    torch.testing.assert_close(other, (velocity - (noise - batch["latents"])).square().mean())
    assert (other == loss) == (not distilled)
    bare = {name: value for name, value in batch.items() if name == "latents"}
    with pytest.raises(ConfigurationError, match="pooled_projections"):
        module.training_step(bare, 0)


def test_what_is_dropped_keeps_its_guidance():
    condition = {k: v for k, v in embedded(400).items() if k != "latents"} | {"guidance": torch.full((400,), 2.0)}
    assert text_layout(FlowSource(pipeline())) is None  # one piece: SD3's layout is not Flux's
    left = drop(condition, torch.rand(400, 3, generator=generator(0)), 0.25, None, None)
    lost = left["pooled_projections"].eq(0).all(1)
    assert lost.float().mean().item() == pytest.approx(0.25, abs=0.07)
    assert torch.equal(lost, left["encoder_hidden_states"].eq(0).flatten(1).all(1))
    assert torch.equal(left["guidance"], condition["guidance"])
    assert torch.equal(empty(condition, None)["guidance"], condition["guidance"])


@torch.no_grad()
def test_a_saved_transformer_opens_and_samples_with_stock_classes(tmp_path):
    module = RectifiedFlowModule(transformer(guidance_embeds=True), shift=2.0, steps=3)
    with torch.enable_grad():
        trained(module, embedded(), precision="bf16-mixed")
    module.save_pretrained(tmp_path)
    network = FluxTransformer2DModel.from_pretrained(tmp_path)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert scheduler.config.shift == 2.0
    batch, noise = embedded(), torch.randn(2, CHANNELS, 4, 6)
    condition = {name: batch[name] for name in ("encoder_hidden_states", "pooled_projections")}
    condition["guidance"] = torch.tensor([1.0, 4.0])
    scheduler.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3])  # as FluxPipeline asks for them
    torch.testing.assert_close(sigma_grid(3, 2.0, flux=True), scheduler.sigmas, rtol=0, atol=1e-6)
    z = noise
    for t in scheduler.timesteps:
        velocity = stock(network, z, t.expand(2) / 1000, batch, condition["guidance"])
        z = scheduler.step(velocity, t, z, return_dict=False)[0]
    torch.testing.assert_close(module.sample(condition, noise), z, rtol=0, atol=1e-5)
    again = RectifiedFlowModule(str(tmp_path), steps=3)
    assert again.shift == 2.0
    assert torch.equal(again.sample(condition, noise), module.sample(condition, noise))
    with pytest.raises(ConfigurationError, match="noise"):
        module.sample(condition)  # rotary positions know no size


@pytest.mark.parametrize("distilled", [False, True], ids=["schnell", "dev"])
def test_a_pipeline_from_prompts(tmp_path, distilled: bool):
    module = RectifiedFlowModule(pipeline(guidance_embeds=distilled), steps=3)
    assert module.shift == 3.0  # the pipeline's
    batch = {"image": torch.randn(2, 3, 16, 16).clamp(-1, 1), "prompt": ["a fox", "a crow"]}
    trained(module, batch)
    module.save_pretrained(tmp_path)
    made = FluxPipeline.from_pretrained(tmp_path)
    made.set_progress_bar_config(disable=True)
    noise = torch.randn(2, CHANNELS, 4, 4)
    null = empty(module.source.encode(["", ""], "cpu"), None)
    negative = {"negative_prompt_embeds": null["encoder_hidden_states"],
                "negative_pooled_prompt_embeds": null["pooled_projections"], "true_cfg_scale": 4.0}  # fmt: skip
    given = {"latents": pack(noise), "height": 16, "width": 16, "num_inference_steps": 3, "output_type": "pt"}
    for guidance, more in ((1.0, {}), (4.0, negative)):
        theirs = made(batch["prompt"], **given, **more).images
        ours = module.sample(batch["prompt"], noise, guidance=guidance)
        torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, rtol=0, atol=2e-4)
    assert module.sample(["a fox"]).shape == (1, 3, 16, 16)


def test_a_shift_by_the_number_of_tokens_must_become_a_number(tmp_path):
    made = pipeline()
    made.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    with pytest.raises(ConfigurationError, match=r"shift=None.*number of tokens"):
        RectifiedFlowModule(made)
    RectifiedFlowModule(made, shift=1.65).save_pretrained(tmp_path)
    saved = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler").config
    assert (saved.shift, saved.use_dynamic_shifting) == (1.65, False)


def test_its_queries_and_keys_are_normalised_already():
    network = transformer()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert add_qk_norm(network).delta == 0
    assert RectifiedFlowModule(network, qk_norm=True).model.state_dict().keys() == before.keys()

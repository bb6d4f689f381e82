"""rectified-flow-transformer: what a step computes, what is dropped, what is saved."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DModel,
)
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from effdl.core.errors import ConfigurationError
from effdl.core.random import generator
from effdl.diffusion._denoiser import CONVENTIONS
from effdl.diffusion._draws import Draws
from effdl.diffusion._rectified_flow_transformer_conditions import TextLayout, drop, empty, text_layout
from effdl.diffusion._rectified_flow_transformer_example import embedded
from effdl.diffusion._source import FlowSource
from effdl.diffusion.instaflow import ReflowModule
from effdl.diffusion.rectified_flow_transformer import VALIDATION_TIMES, Mode, RectifiedFlowModule
from effdl.tasks.tiny import tiny_ddpm, tiny_sd3_transformer, tiny_stable_diffusion, tiny_stable_diffusion_3, tiny_unet
from tests.support import BARE


class Plane(nn.Module):
    """A velocity in the plane that remembers what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen = nn.Linear(3, 2), []

    def forward(self, z, label, c):
        self.seen.append((z, label, c))
        return self.net(torch.cat([z, label[:, None] / 1000], 1))


def points(count: int = 8) -> dict[str, torch.Tensor]:
    return {"image": torch.randn(count, 2, generator=generator(0)), "label": torch.arange(count) % 3}


# --- a step ------------------------------------------------------------------------------------------------------


def test_a_step_is_the_papers_equation():
    module = RectifiedFlowModule(Plane(), density="mode(1.29)", shift=3.0, null_label=9, dropout=0.5)
    batch, state = points(512), torch.get_rng_state()
    loss = module.training_step(batch, 4)
    assert torch.equal(state, torch.get_rng_state())
    draws = Draws(0, 0, 4)
    noise, t = draws.noise((512, 2)), Mode(1.29).sample(512, draws.stream(0))
    t = (3 * t / (1 + 2 * t))[:, None]  # the density, then the shift
    z, label, condition = module.model.seen[-1]
    torch.testing.assert_close(z, (1 - t) * batch["image"] + t * noise)
    torch.testing.assert_close(label, 1000 * t[:, 0])
    velocity = module.model.net(torch.cat([z, t], 1))
    torch.testing.assert_close(loss, (velocity - (noise - batch["image"])).square().mean())  # and no weight
    lost = condition == 9
    assert 0.4 < lost.float().mean() < 0.6
    assert torch.equal(condition[~lost], batch["label"][~lost])
    assert not torch.equal(module.training_step(batch, 5), loss)
    assert torch.equal(module.training_step(batch, 4), loss)
    kept = RectifiedFlowModule(Plane(), dropout=0.5)  # no null label: nothing to drop to
    kept.training_step(batch, 0)
    assert torch.equal(kept.model.seen[-1][2], batch["label"])


def test_two_processes_draw_what_one_does(monkeypatch):
    import effdl.diffusion._draws as draws

    module, one = RectifiedFlowModule(Plane()), Draws(3, 1, 2)
    times = module.times(one, 8)
    monkeypatch.setattr(draws, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(draws, "rank", lambda rank=rank: rank)
        assert torch.equal(module.times(one, 4), times[rank::2])


def test_times_and_loss_are_wide_in_half_precision():
    module = RectifiedFlowModule(tiny_unet(8, 1), density="logit_normal(6, 1)").bfloat16()
    seen = []
    module.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["timestep"]), with_kwargs=True)
    loss = module.training_step({"image": torch.randn(8, 1, 8, 8).bfloat16()}, 0)
    assert loss.dtype == torch.float32
    assert seen[0].dtype == torch.float32
    assert len(seen[0].unique()) == 8  # bf16 would have made these few


def test_validation_is_the_loss_at_eight_fixed_times():
    module = RectifiedFlowModule(Plane())
    batch = points()
    loaders = DataLoader([batch], batch_size=None)
    logged = Trainer(max_epochs=1, **BARE)
    logged.fit(module, loaders, loaders)
    logged = Trainer(**BARE).validate(module, loaders, verbose=False)[0]
    noise, expected = Draws(0, -1, 0).noise((8, 2)), []
    for k, time in enumerate(VALIDATION_TIMES):
        assert time == (2 * k + 1) / 16
        z = (1 - time) * batch["image"] + time * noise
        velocity = module(z, torch.full((8,), time), None)
        expected.append((velocity - (noise - batch["image"])).square().mean().item())
        assert logged[f"rectified-flow-transformer/loss_t{time:.4f}"] == pytest.approx(expected[-1], rel=1e-5)
    assert logged["val/loss"] == pytest.approx(sum(expected) / 8, rel=1e-5)


def test_compiled_network_and_accumulation():
    module = RectifiedFlowModule(Plane())
    module.model.compile(backend="eager")
    trainer = Trainer(max_epochs=1, accumulate_grad_batches=4, **BARE)
    trainer.fit(module, DataLoader([points()] * 8, batch_size=None))
    assert trainer.global_step == 2
    assert set(module.state_dict()) == {"model.net.weight", "model.net.bias"}


# --- conditions --------------------------------------------------------------------------------------------------


def test_encoders_drop_out_one_by_one():
    pipeline = tiny_stable_diffusion_3(16)
    layout = text_layout(FlowSource(pipeline))
    tokens, width = pipeline.tokenizer_max_length, pipeline.text_encoder.config.hidden_size
    assert layout == TextLayout(tokens, width, width, pipeline.text_encoder.config.projection_dim)
    condition = FlowSource(pipeline).encode(["a fox"], "cpu")
    condition = {name: torch.ones(2000, *value.shape[1:]) for name, value in condition.items()}
    uniform = torch.rand(2000, 3, generator=generator(0))
    left = drop(condition, uniform, 0.1, None, layout)
    sequence, pooled = left["encoder_hidden_states"], left["pooled_projections"]
    parts = [sequence[:, :tokens, :width], sequence[:, :tokens, width : 2 * width], sequence[:, tokens:]]
    for k, part in enumerate(parts):
        rows = part.flatten(1)
        assert ((rows == 0).all(1) | (rows == 1).all(1)).all()
        assert (rows[:, 0] == 0).float().mean().item() == pytest.approx(0.464, abs=0.03)
        if k < 2:
            half = pooled[:, k * layout.pooled : (k + 1) * layout.pooled]
            assert torch.equal(half[:, 0], rows[:, 0])
    everything = torch.stack([part.flatten(1).sum(1) == 0 for part in parts]).all(0) & (pooled.sum(1) == 0)
    assert everything.float().mean().item() == pytest.approx(0.1, abs=0.02)
    whole = drop(condition, uniform, 0.1, None, None)  # unknown layout: all or nothing
    assert torch.equal(whole["pooled_projections"][:, 0], (uniform[:, 0] >= 0.1).float())
    assert not any(value.any() for value in empty(condition, None).values())
    assert drop(None, uniform, 0.1, None, None) is None
    assert empty(torch.arange(3), None) is None
    assert empty(torch.arange(3), 7).tolist() == [7, 7, 7]


def test_published_transformers_have_their_layout():
    wide = tiny_sd3_transformer(joint_attention_dim=4096, pooled_projection_dim=2048)
    assert text_layout(FlowSource(wide)) == TextLayout(77, 768, 1280, 768)
    assert text_layout(FlowSource(tiny_sd3_transformer())) is None


# --- networks in and out -----------------------------------------------------------------------------------------


def rollout(network, scheduler: FlowMatchEulerDiscreteScheduler, noise, steps: int, **condition) -> torch.Tensor:
    """The loop that every stock pipeline of flows runs."""
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        out = network(noise, timestep=t.expand(len(noise)), return_dict=False, **condition)[0]
        noise = scheduler.step(out, t, noise, return_dict=False)[0]
    return noise


def trained(module: RectifiedFlowModule, batch) -> RectifiedFlowModule:
    Trainer(max_steps=2, **BARE).fit(module, DataLoader([batch] * 2, batch_size=None))
    return module


@torch.no_grad()
def test_class_conditional_unet(tmp_path):
    module = RectifiedFlowModule(tiny_unet(8, 1, num_classes=4), null_label=3, shift=3.0, steps=5)
    with torch.enable_grad():
        trained(module, {"image": torch.randn(4, 1, 8, 8), "label": torch.arange(4) % 3})
    module.save_pretrained(tmp_path)
    stock = UNet2DModel.from_pretrained(tmp_path)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert scheduler.config.shift == 3.0
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    ours = module.sample(labels, noise)
    torch.testing.assert_close(ours, rollout(stock, scheduler, noise, 5, class_labels=labels), rtol=0, atol=1e-5)
    guided = module.sample(labels, noise, steps=1, guidance=5.0)
    t = torch.ones(2)
    null, conditional = module(noise, t, torch.tensor([3, 3])), module(noise, t, labels)
    torch.testing.assert_close(guided, noise - (null + 5 * (conditional - null)), rtol=0, atol=1e-5)
    again = RectifiedFlowModule(str(tmp_path), null_label=3, steps=5)
    assert again.shift == 3.0  # as the scheduler says
    assert torch.equal(again.sample(labels, seed=1), module.sample(labels, seed=1))
    record = json.loads((tmp_path / "reflow.json").read_text())
    assert record["density"] == "LogitNormal(mean=0.0, std=1.0)"
    flow = ReflowModule(str(tmp_path))  # reflow goes on from here
    assert flow.source.convention == CONVENTIONS["diffusers"]
    torch.testing.assert_close(flow.sample(labels, noise, steps=1), module.sample(labels, noise, steps=1))
    flow.save_pretrained(str(tmp_path / "reflowed"))
    with pytest.raises(ConfigurationError, match="guidance"):
        RectifiedFlowModule(tiny_unet(8, 1, num_classes=4)).sample(labels, guidance=5.0)


def test_unconditional_pipeline_samples_by_itself(tmp_path):
    module = trained(RectifiedFlowModule(tiny_ddpm(8, 1), shift=2.0), {"image": torch.randn(4, 1, 8, 8)})
    module.save_pretrained(tmp_path)
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(2, generator=generator(5), num_inference_steps=4, output_type="np").images
    ours = module.sample(noise=torch.randn(2, 1, 8, 8, generator=generator(5)), steps=4)
    ours = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=0, atol=1e-5)


def test_mm_dit_with_qk_norm_loads_as_a_stock_one(tmp_path):
    network = tiny_sd3_transformer(4, joint_attention_dim=8, pooled_projection_dim=8)
    module = RectifiedFlowModule(network, qk_norm=True, shift=3.0, steps=3)
    assert network.config.qk_norm is None  # the user's own is not touched
    trained(module, next(iter(embedded())))
    module.save_pretrained(tmp_path)
    stock = SD3Transformer2DModel.from_pretrained(tmp_path)
    condition = {"encoder_hidden_states": torch.randn(2, 3, 8), "pooled_projections": torch.randn(2, 8)}
    noise = torch.randn(2, 4, 4, 4)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    with torch.no_grad():
        theirs = rollout(stock, scheduler, noise, 3, **condition)
    torch.testing.assert_close(module.sample(condition, noise), theirs, rtol=0, atol=1e-5)
    small = module.sample(condition, torch.randn(2, 4, 2, 2))  # the table of positions is cropped
    assert small.shape == (2, 4, 2, 2)
    with pytest.raises(ValueError, match="pos_embed_max_size"):
        module.sample(condition, torch.randn(2, 4, 16, 16))


def test_sd3_pipeline_from_prompts(tmp_path):
    module = RectifiedFlowModule(tiny_stable_diffusion_3(16), steps=3)
    assert module.shift == 3.0  # the pipeline's
    batch = {"image": torch.randn(2, 3, 16, 16).clamp(-1, 1), "prompt": ["a fox", "a crow"]}
    trained(module, batch)
    module.save_pretrained(tmp_path)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path)
    assert pipeline.scheduler.config.shift == 3.0
    pipeline.set_progress_bar_config(disable=True)
    noise, null = torch.randn(2, 4, 4, 4), empty(module.source.encode(["", ""], "cpu"), None)
    negative = {"negative_prompt_embeds": null["encoder_hidden_states"],
                "negative_pooled_prompt_embeds": null["pooled_projections"]}  # fmt: skip
    for guidance in (1.0, 5.0):
        given = {"latents": noise, "guidance_scale": guidance, "height": 16, "width": 16, "num_inference_steps": 3}
        theirs = pipeline(batch["prompt"], **given, **(negative if guidance > 1 else {}), output_type="pt").images
        ours = module.sample(batch["prompt"], noise, guidance=guidance)
        torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, rtol=0, atol=2e-4)


def test_diffusion_pipeline_becomes_a_flow(tmp_path):
    module = RectifiedFlowModule(tiny_stable_diffusion(16), shift=2.0)
    module.training_step({"latents": torch.randn(2, 4, 4, 4), "encoder_hidden_states": torch.randn(2, 16, 32)}, 0)
    with pytest.raises(ConfigurationError, match="prompt"):
        module.training_step({"image": torch.randn(2, 3, 16, 16), "label": torch.tensor([0, 1])}, 0)
    trained(module, {"image": torch.randn(2, 3, 16, 16), "prompt": ["a", "b"]})
    module.save_pretrained(tmp_path)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert pipeline.scheduler.config.flow_shift == 2.0
    pipeline.set_progress_bar_config(disable=True)
    noise, given = torch.randn(1, 4, 4, 4), {"num_inference_steps": 40, "guidance_scale": 1.0}
    theirs = pipeline(["a fox"], latents=noise, output_type="pt", **given).images
    ours = (module.sample(["a fox"], noise, steps=40) / 2 + 0.5).clamp(0, 1)
    assert (ours - theirs).abs().max() < 0.02  # its grid begins at 0.999
    assert RectifiedFlowModule(str(tmp_path)).shift == 2.0


def test_another_convention_of_time_and_other_settings_are_refused(tmp_path):
    ReflowModule(tiny_unet(8, 1), stage="flow", convention="instaflow").save_pretrained(str(tmp_path))
    with pytest.raises(ConfigurationError, match="convention"):
        RectifiedFlowModule(str(tmp_path))
    module, other = RectifiedFlowModule(Plane()), RectifiedFlowModule(Plane(), density="uniform")
    saved = Trainer(max_steps=1, **BARE)
    saved.fit(module, DataLoader([points()], batch_size=None))
    saved.save_checkpoint(tmp_path / "a.ckpt")
    resumed = Trainer(max_steps=2, **BARE)
    with pytest.raises(ConfigurationError, match="density"):
        resumed.fit(other, DataLoader([points()], batch_size=None), ckpt_path=tmp_path / "a.ckpt", weights_only=True)

"""effdl.tasks.tiny: the real classes and folder layouts, small, offline, reproducible."""

from __future__ import annotations

import logging

import pytest
import torch

from effdl.tasks import tiny

logging.getLogger("diffusers").setLevel(logging.ERROR)


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


MODELS = {
    "tiny_unet": "UNet2DModel",
    "tiny_condition_unet": "UNet2DConditionModel",
    "tiny_sd3_transformer": "SD3Transformer2DModel",
    "tiny_vae": "AutoencoderKL",
    "tiny_clip_text_model": "CLIPTextModel",
    "tiny_clip_text_model_with_projection": "CLIPTextModelWithProjection",
    "tiny_t5_encoder": "T5EncoderModel",
    "tiny_gpt2": "GPT2LMHeadModel",
    "tiny_llama": "LlamaForCausalLM",
}


@pytest.mark.parametrize("maker", MODELS)
def test_models_are_the_real_classes_and_small(maker):
    model = getattr(tiny, maker)()
    assert type(model).__name__ == MODELS[maker]
    assert type(model).__module__.split(".")[0] in ("diffusers", "transformers")
    assert 30_000 < sum(p.numel() for p in model.parameters()) < 400_000


@pytest.mark.parametrize("maker", MODELS)
def test_weights_are_a_function_of_the_seed_and_the_global_stream_stays(maker):
    before = torch.get_rng_state()
    a, b, c = (getattr(tiny, maker)(seed=s) for s in (3, 3, 4))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not all(torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters()))


def test_unet_takes_sizes_channels_classes_and_further_configuration():
    unet = tiny.tiny_unet(16, channels=1, num_classes=10, norm_num_groups=4)
    x = torch.randn(2, 1, 16, 16, generator=generator())
    with torch.no_grad():
        three, seven = (unet(x, 5, class_labels=torch.full((2,), label)).sample for label in (3, 7))
    assert three.shape == x.shape
    assert not torch.equal(three, seven)
    assert unet.config.norm_num_groups == 4


def test_ddpm_pipeline_opens_from_its_folder_and_draws_the_same(tmp_path):
    from diffusers import DiffusionPipeline

    pipeline = quiet(tiny.tiny_ddpm(16))
    pipeline.save_pretrained(tmp_path)
    opened = quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert type(opened).__name__ == "DDPMPipeline"
    ours, theirs = (
        p(num_inference_steps=2, output_type="np", generator=generator()).images for p in (pipeline, opened)
    )
    assert ours.shape == (1, 16, 16, 3)
    # loaded weights are a file mapped into memory: equal numbers, not aligned, so other kernels and a last-digit error
    assert abs(ours - theirs).max() < 1e-5


PIPELINES = {
    "tiny_stable_diffusion": "StableDiffusionPipeline",
    "tiny_stable_diffusion_2": "StableDiffusionPipeline",
    "tiny_stable_diffusion_xl": "StableDiffusionXLPipeline",
    "tiny_stable_diffusion_3": "StableDiffusion3Pipeline",
    "tiny_stable_diffusion_3 without t5": "StableDiffusion3Pipeline",
}


@pytest.mark.parametrize("kind", PIPELINES)
def test_pipelines_open_from_their_folder_and_draw_the_same(kind, tmp_path):
    import diffusers

    maker, _, without = kind.partition(" ")
    absent = {"text_encoder_3": None, "tokenizer_3": None} if without else {}
    pipeline = quiet(getattr(tiny, maker)(**({"t5": False} if without else {})))
    pipeline.save_pretrained(tmp_path)
    for part in ("model_index.json", "tokenizer/tokenizer_config.json", "scheduler/scheduler_config.json"):
        assert (tmp_path / part).exists()
    assert (tmp_path / "text_encoder_3").exists() == (kind == "tiny_stable_diffusion_3")
    opened = quiet(getattr(diffusers, PIPELINES[kind]).from_pretrained(tmp_path, **absent))
    kwargs = {"num_inference_steps": 2, "output_type": "pt"}
    ours, theirs = (p("a cat", generator=generator(), **kwargs).images for p in (pipeline, opened))
    assert ours.shape == (1, 3, 32, 32)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert not torch.allclose(ours, pipeline("a dog", generator=generator(), **kwargs).images, atol=1e-5)


def test_pipelines_take_longer_prompts():
    for maker in (tiny.tiny_stable_diffusion, tiny.tiny_stable_diffusion_xl, tiny.tiny_stable_diffusion_3):
        pipeline = maker(text_length=32)
        ids = pipeline.tokenizer("a photo of the digit three", padding="max_length", return_tensors="pt").input_ids
        assert pipeline.text_encoder(ids).last_hidden_state.shape == (1, 32, 32)
        assert pipeline.tokenizer.decode(ids[0], skip_special_tokens=True) == "a photo of the digit three"


def test_t5_tokenizer_writes_ascii_and_ends_with_its_end():
    tokenizer = tiny.tiny_t5_tokenizer()
    ids = tokenizer("A cat, no. 3!").input_ids
    assert ids[-1] == tokenizer.eos_token_id == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "A cat, no. 3!"
    assert len(tokenizer) <= tiny.tiny_t5_encoder().config.vocab_size


def test_tokenizer_writes_any_text_and_marks_start_and_end():
    tokenizer = tiny.tiny_clip_tokenizer()
    ids = tokenizer("für a cat", padding="max_length", return_tensors="pt").input_ids
    assert ids.shape == (1, tiny.TEXT_LENGTH)
    assert ids[0, 0] == tokenizer.bos_token_id == 512
    assert ids[0, -1] == tokenizer.eos_token_id == 513
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "für a cat"
    assert len(tokenizer) == tiny.tiny_clip_text_model().config.vocab_size


def test_sd3_transformer_uses_both_conditions_and_the_time():
    transformer = tiny.tiny_sd3_transformer()
    x, text, pooled = (torch.randn(s, generator=generator()) for s in ((2, 4, 8, 8), (2, 16, 32), (2, 32)))
    time = torch.tensor([10.0, 500.0])

    def run(text, pooled, time):
        with torch.no_grad():
            return transformer(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=time).sample

    out = run(text, pooled, time)
    assert out.shape == x.shape
    for other in (run(-text, pooled, time), run(text, -pooled, time), run(text, pooled, time + 1)):
        assert not torch.equal(out, other)


@pytest.mark.parametrize("maker", ["tiny_gpt2", "tiny_llama"])
def test_language_models_know_nothing_yet_and_save(maker, tmp_path):
    from transformers import AutoModelForCausalLM

    model = getattr(tiny, maker)(vocab_size=100, block_size=32)
    ids = torch.randint(100, (4, 32), generator=generator())
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    assert abs(loss - torch.log(torch.tensor(100.0))) < 0.1
    model.save_pretrained(tmp_path)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.allclose(opened(ids).logits, model(ids).logits, atol=1e-5)

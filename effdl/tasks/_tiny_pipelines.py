"""Tiny Stable Diffusion pipelines of the real classes, in the kinds that text-to-image training knows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from effdl.tasks._tiny_parts import (
    TEXT_LENGTH,
    TEXT_WIDTH,
    tiny_clip_text_model,
    tiny_clip_text_model_with_projection,
    tiny_clip_tokenizer,
    tiny_condition_unet,
    tiny_sd3_transformer,
    tiny_t5_encoder,
    tiny_t5_tokenizer,
    tiny_vae,
)

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

# Stable Diffusion's noise schedule, in all of its U-Net versions
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def tiny_stable_diffusion(
    sample_size: int = 32, seed: int = 0, text_length: int = TEXT_LENGTH, **unet: Any
) -> StableDiffusionPipeline:
    """A ``StableDiffusionPipeline`` (U-Net, VAE, CLIP text model and tokenizer, PNDM schedule) for square images.

    Args:
        sample_size: side of the images, a multiple of 8; latents are a quarter of it.
        seed: of the weights.
        text_length: tokens of a prompt; each is a letter (spaces are none), and start and end count too.
        unet: further or other entries of the U-Net's configuration.

    Example::

        image = tiny_stable_diffusion()("a cat", num_inference_steps=2, output_type="pt").images    # (1, 3, 32, 32)
    """
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler(**SCHEDULE, skip_prk_steps=True)
    return _stable_diffusion(scheduler, sample_size, seed, text_length, **unet)


def tiny_stable_diffusion_2(
    sample_size: int = 32, seed: int = 0, text_length: int = TEXT_LENGTH, **unet: Any
) -> StableDiffusionPipeline:
    """What :func:`tiny_stable_diffusion` makes, as Stable Diffusion 2.x is: linear projections, heads per resolution,
    a DDIM schedule, and the prediction of v."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(**SCHEDULE, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False)
    unet = {"use_linear_projection": True, "attention_head_dim": (2, 4)} | unet
    return _stable_diffusion(scheduler, sample_size, seed, text_length, **unet)


def _stable_diffusion(
    scheduler: Any, sample_size: int, seed: int, text_length: int, **unet: Any
) -> StableDiffusionPipeline:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=tiny_vae(sample_size, seed=seed),
        text_encoder=tiny_clip_text_model(seed, text_length),
        tokenizer=tiny_clip_tokenizer(text_length),
        unet=tiny_condition_unet(sample_size // 4, seed=seed, **unet),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_stable_diffusion_xl(
    sample_size: int = 32, seed: int = 0, text_length: int = TEXT_LENGTH, **unet: Any
) -> StableDiffusionXLPipeline:
    """A ``StableDiffusionXLPipeline``: two text encoders and tokenizers, a U-Net that is told the pooled text and the
    sizes of the image, an Euler schedule. Arguments as in :func:`tiny_stable_diffusion`.

    Example::

        image = tiny_stable_diffusion_xl()("a cat", num_inference_steps=2, output_type="pt").images
    """
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    time_width = 8
    defaults = {
        "use_linear_projection": True,
        "attention_head_dim": (2, 4),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": time_width,
        "projection_class_embeddings_input_dim": TEXT_WIDTH + 6 * time_width,
    }
    width = 2 * TEXT_WIDTH
    return StableDiffusionXLPipeline(
        vae=tiny_vae(sample_size, seed=seed, scaling_factor=0.13025),
        text_encoder=tiny_clip_text_model(seed, text_length),
        text_encoder_2=tiny_clip_text_model_with_projection(seed + 1, text_length),
        tokenizer=tiny_clip_tokenizer(text_length),
        tokenizer_2=tiny_clip_tokenizer(text_length),
        unet=tiny_condition_unet(sample_size // 4, cross_attention_dim=width, seed=seed, **(defaults | unet)),
        scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading"),
        add_watermarker=False,
    )


def tiny_stable_diffusion_3(
    sample_size: int = 32, seed: int = 0, text_length: int = TEXT_LENGTH, t5: bool = True, **transformer: Any
) -> StableDiffusion3Pipeline:
    """A ``StableDiffusion3Pipeline``: an MM-DiT that predicts a velocity, two CLIP text encoders with projection,
    a T5 encoder, a flow-matching schedule with shift 3.

    Args:
        sample_size: side of the images, a multiple of 8; latents are a quarter of it.
        seed: of the weights.
        text_length: tokens of a prompt for CLIP; each is a letter (spaces are none), and start and end count too.
        t5: with the third text encoder; without one the pipeline puts zeros in its place, and its folder is opened by
            ``from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)``.
        transformer: further or other entries of the transformer's configuration.

    Example::

        image = tiny_stable_diffusion_3()("a cat", num_inference_steps=2, output_type="pt").images
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    width = 2 * TEXT_WIDTH
    defaults = {"joint_attention_dim": width, "pooled_projection_dim": width}
    return StableDiffusion3Pipeline(
        transformer=tiny_sd3_transformer(sample_size // 4, seed=seed, **(defaults | transformer)),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(sample_size, seed=seed, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=tiny_clip_text_model_with_projection(seed, text_length),
        tokenizer=tiny_clip_tokenizer(text_length),
        text_encoder_2=tiny_clip_text_model_with_projection(seed + 1, text_length),
        tokenizer_2=tiny_clip_tokenizer(text_length),
        text_encoder_3=tiny_t5_encoder(width, seed) if t5 else None,
        tokenizer_3=tiny_t5_tokenizer(text_length) if t5 else None,
    )

"""Tiny models and pipelines of the real diffusers and transformers classes, made offline.

For tests, recipes and notebooks: the classes, the tokenizer and the folder layout are those of the full-size models,
with at most a few hundred thousand random parameters. The same ``seed`` gives the same weights, and making one leaves
the global random streams alone.

Example::

    pipeline = tiny_stable_diffusion()
    pipeline.save_pretrained("tiny-sd")                       # opens with StableDiffusionPipeline.from_pretrained
    pipeline("a photo of a cat", num_inference_steps=2).images[0]
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from effdl.core.random import preserved_rng

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,
        DDPMPipeline,
        SD3Transformer2DModel,
        StableDiffusionPipeline,
        UNet2DConditionModel,
        UNet2DModel,
    )
    from transformers import CLIPTextModel, CLIPTokenizer, GPT2LMHeadModel, LlamaForCausalLM

T = TypeVar("T")

TEXT_LENGTH = 16
TEXT_WIDTH = 32


def _make(cls: Callable[..., T], seed: int, *args: Any, **kwargs: Any) -> T:
    with preserved_rng():
        torch.manual_seed(seed)
        return cls(*args, **kwargs).eval()


def _merge(defaults: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {**defaults, **overrides}


# Diffusion over pixels


def tiny_unet(
    sample_size: int = 32, channels: int = 3, num_classes: int | None = None, seed: int = 0, **config: Any
) -> UNet2DModel:
    """A ``UNet2DModel``: 177,000 parameters, attention at half resolution.

    Args:
        sample_size: side of the images, even.
        channels: of the images.
        num_classes: makes it class-conditional (``class_labels=``).
        seed: of the weights.
        config: further or other entries of the UNet2DModel's configuration.

    Example::

        noise = tiny_unet(16)(torch.randn(2, 3, 16, 16), timestep=10).sample
    """
    from diffusers import UNet2DModel

    defaults = {
        "sample_size": sample_size,
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "num_class_embeds": num_classes,
    }
    return _make(UNet2DModel, seed, **_merge(defaults, config))


def tiny_ddpm(
    sample_size: int = 32, channels: int = 3, num_classes: int | None = None, seed: int = 0, **config: Any
) -> DDPMPipeline:
    """A ``DDPMPipeline`` around :func:`tiny_unet`, with the 1000-step linear schedule of DDPM.

    diffusers has no pipeline that passes class labels to a UNet: a class-conditional one saves, loads and trains, and
    is sampled by ``DiffusionModule.sample(labels=...)``.

    Example::

        tiny_ddpm(16).save_pretrained("tiny-ddpm")
    """
    from diffusers import DDPMPipeline, DDPMScheduler

    return DDPMPipeline(tiny_unet(sample_size, channels, num_classes, seed, **config), DDPMScheduler())


# Stable Diffusion


def tiny_clip_tokenizer() -> CLIPTokenizer:
    """A ``CLIPTokenizer`` whose tokens are single bytes: any text, 514 tokens, length 16.

    Example::

        tiny_clip_tokenizer()("a cat", padding="max_length", return_tensors="pt").input_ids     # (1, 16)
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:  # by way of files, which every version of transformers reads
        Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=TEXT_LENGTH)


def tiny_clip_text_model(seed: int = 0) -> CLIPTextModel:
    """A ``CLIPTextModel`` for :func:`tiny_clip_tokenizer`: (B, 16) ids to (B, 16, 32); 34,000 parameters."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=514,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )
    return _make(CLIPTextModel, seed, config)


def tiny_vae(sample_size: int = 32, channels: int = 3, seed: int = 0) -> AutoencoderKL:
    """An ``AutoencoderKL``: (B, 3, S, S) images to (B, 4, S/4, S/4) latents; 62,000 parameters.

    Untrained it neither keeps nor scales anything; use it to see that things run, not how they look.
    """
    from diffusers import AutoencoderKL

    return _make(
        AutoencoderKL,
        seed,
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=sample_size,
    )


def tiny_condition_unet(
    sample_size: int = 8, channels: int = 4, cross_attention_dim: int = TEXT_WIDTH, seed: int = 0, **config: Any
) -> UNet2DConditionModel:
    """A ``UNet2DConditionModel``: Stable Diffusion's blocks, two resolutions, 203,000 parameters.

    Example::

        unet = tiny_condition_unet()
        unet(torch.randn(2, 4, 8, 8), 10, encoder_hidden_states=torch.randn(2, 16, 32)).sample
    """
    from diffusers import UNet2DConditionModel

    defaults = {
        "sample_size": sample_size,
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 2,  # Stable Diffusion's name for the number of heads
        "cross_attention_dim": cross_attention_dim,
    }
    return _make(UNet2DConditionModel, seed, **_merge(defaults, config))


def tiny_stable_diffusion(sample_size: int = 32, seed: int = 0) -> StableDiffusionPipeline:
    """A ``StableDiffusionPipeline`` (U-Net, VAE, CLIP text model and tokenizer, PNDM schedule) for square images.

    Args:
        sample_size: side of the images, a multiple of 8; latents are a quarter of it.
        seed: of the weights.

    Example::

        image = tiny_stable_diffusion()("a cat", num_inference_steps=2, output_type="pt").images    # (1, 3, 32, 32)
    """
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    return StableDiffusionPipeline(
        vae=tiny_vae(sample_size, seed=seed),
        text_encoder=tiny_clip_text_model(seed),
        tokenizer=tiny_clip_tokenizer(),
        unet=tiny_condition_unet(sample_size // 4, seed=seed),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_sd3_transformer(
    sample_size: int = 8, channels: int = 4, seed: int = 0, **config: Any
) -> SD3Transformer2DModel:
    """An ``SD3Transformer2DModel`` (MM-DiT): two joint blocks of width 32, 78,000 parameters.

    Example::

        transformer = tiny_sd3_transformer()
        transformer(
            torch.randn(2, 4, 8, 8), encoder_hidden_states=torch.randn(2, 16, 32),
            pooled_projections=torch.randn(2, 32), timestep=torch.tensor([10, 500]),
        ).sample
    """
    from diffusers import SD3Transformer2DModel

    defaults = {
        "sample_size": sample_size,
        "in_channels": channels,
        "out_channels": channels,
        "patch_size": 2,
        "num_layers": 2,
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "joint_attention_dim": TEXT_WIDTH,
        "caption_projection_dim": 32,
        "pooled_projection_dim": TEXT_WIDTH,
        "pos_embed_max_size": sample_size,
    }
    return _make(SD3Transformer2DModel, seed, **_merge(defaults, config))


# Language


def tiny_gpt2(vocab_size: int = 256, block_size: int = 128, seed: int = 0, **config: Any) -> GPT2LMHeadModel:
    """A ``GPT2LMHeadModel``: 2 layers of width 64, no dropout, 125,000 parameters with 256 tokens.

    Args:
        vocab_size: number of tokens; ``TextData.vocab_size``.
        block_size: longest context.
        seed: of the weights.
        config: further or other entries of the GPT2Config.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    defaults = {"vocab_size": vocab_size, "n_positions": block_size, "n_embd": 64, "n_layer": 2, "n_head": 4}
    defaults |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return _make(GPT2LMHeadModel, seed, GPT2Config(**_merge(defaults, config)))


def tiny_llama(vocab_size: int = 256, block_size: int = 128, seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """A ``LlamaForCausalLM``: 2 layers of width 64, two key-value heads for four, gated MLP; 119,000 parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    defaults = {"vocab_size": vocab_size, "max_position_embeddings": block_size, "hidden_size": 64}
    defaults |= {"intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    defaults |= {"bos_token_id": 0, "eos_token_id": 0}
    return _make(LlamaForCausalLM, seed, LlamaConfig(**_merge(defaults, config)))

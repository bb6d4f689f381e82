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

from typing import TYPE_CHECKING, Any

from effdl.tasks._tiny_parts import (
    TEXT_LENGTH,
    TEXT_WIDTH,
    make,
    merge,
    tiny_clip_text_model,
    tiny_clip_text_model_with_projection,
    tiny_clip_tokenizer,
    tiny_condition_unet,
    tiny_sd3_transformer,
    tiny_t5_encoder,
    tiny_t5_tokenizer,
    tiny_vae,
)
from effdl.tasks._tiny_pipelines import (
    tiny_stable_diffusion,
    tiny_stable_diffusion_2,
    tiny_stable_diffusion_3,
    tiny_stable_diffusion_xl,
)

if TYPE_CHECKING:
    from diffusers import DDPMPipeline, UNet2DModel
    from transformers import GPT2LMHeadModel, LlamaForCausalLM

__all__ = [
    "TEXT_LENGTH",
    "TEXT_WIDTH",
    "tiny_clip_text_model",
    "tiny_clip_text_model_with_projection",
    "tiny_clip_tokenizer",
    "tiny_condition_unet",
    "tiny_ddpm",
    "tiny_gpt2",
    "tiny_llama",
    "tiny_sd3_transformer",
    "tiny_stable_diffusion",
    "tiny_stable_diffusion_2",
    "tiny_stable_diffusion_3",
    "tiny_stable_diffusion_xl",
    "tiny_t5_encoder",
    "tiny_t5_tokenizer",
    "tiny_unet",
    "tiny_vae",
]


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
    return make(UNet2DModel, seed, **merge(defaults, config))


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
    return make(GPT2LMHeadModel, seed, GPT2Config(**merge(defaults, config)))


def tiny_llama(vocab_size: int = 256, block_size: int = 128, seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """A ``LlamaForCausalLM``: 2 layers of width 64, two key-value heads for four, gated MLP; 119,000 parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    defaults = {"vocab_size": vocab_size, "max_position_embeddings": block_size, "hidden_size": 64}
    defaults |= {"intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    defaults |= {"bos_token_id": 0, "eos_token_id": 0}
    return make(LlamaForCausalLM, seed, LlamaConfig(**merge(defaults, config)))

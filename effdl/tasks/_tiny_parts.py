"""Parts of the tiny pipelines: tokenizers, text encoders, autoencoder and networks of the real classes."""

from __future__ import annotations

import json
import string
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from effdl.core.random import preserved_rng

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

T = TypeVar("T")

TEXT_LENGTH = 16
TEXT_WIDTH = 32


def make(cls: Callable[..., T], seed: int, *args: Any, **kwargs: Any) -> T:
    with preserved_rng():
        torch.manual_seed(seed)
        return cls(*args, **kwargs).eval()


def merge(defaults: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {**defaults, **overrides}


def tiny_clip_tokenizer(length: int = TEXT_LENGTH) -> CLIPTokenizer:
    """A ``CLIPTokenizer`` whose tokens are single bytes: any text, 514 tokens, cut and padded to ``length``.

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
        return CLIPTokenizer.from_pretrained(folder, model_max_length=length)


def tiny_clip_text_model(seed: int = 0, length: int = TEXT_LENGTH) -> CLIPTextModel:
    """A ``CLIPTextModel`` for :func:`tiny_clip_tokenizer`: (B, L) ids to (B, L, 32); 34,000 parameters."""
    from transformers import CLIPTextModel

    return make(CLIPTextModel, seed, _clip_config(length))


def tiny_clip_text_model_with_projection(seed: int = 0, length: int = TEXT_LENGTH) -> CLIPTextModelWithProjection:
    """A ``CLIPTextModelWithProjection``, as Stable Diffusion XL and 3 have: (B, L) ids to (B, 32) pooled."""
    from transformers import CLIPTextModelWithProjection

    return make(CLIPTextModelWithProjection, seed, _clip_config(length))


def _clip_config(length: int) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=length,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )


def tiny_t5_tokenizer(length: int = TEXT_LENGTH) -> T5Tokenizer:
    """A ``T5Tokenizer`` (unigram) whose pieces are printable ASCII characters; 101 tokens, others unknown."""
    from transformers import T5Tokenizer

    letters = "\u2581" + string.ascii_letters + string.digits + string.punctuation
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *((letter, -5.0) for letter in letters)]
    # the longest text of a pipeline is its own max_sequence_length
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=max(length, 512))


def tiny_t5_encoder(width: int = 2 * TEXT_WIDTH, seed: int = 0) -> T5EncoderModel:
    """A ``T5EncoderModel`` for :func:`tiny_t5_tokenizer`: (B, L) ids to (B, L, width); 31,000 parameters."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=128, d_model=width, d_kv=16, d_ff=width, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    return make(T5EncoderModel, seed, config)


def tiny_vae(sample_size: int = 32, channels: int = 3, seed: int = 0, **config: Any) -> AutoencoderKL:
    """An ``AutoencoderKL``: (B, 3, S, S) images to (B, 4, S/4, S/4) latents; 62,000 parameters.

    Untrained it neither keeps nor scales anything; use it to see that things run, not how they look.
    """
    from diffusers import AutoencoderKL

    defaults = {
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "sample_size": sample_size,
    }
    return make(AutoencoderKL, seed, **merge(defaults, config))


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
    return make(UNet2DConditionModel, seed, **merge(defaults, config))


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
    return make(SD3Transformer2DModel, seed, **merge(defaults, config))

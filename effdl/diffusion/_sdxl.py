"""What Stable Diffusion XL's U-Net is told besides image and time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from effdl.core.errors import ConfigurationError
from effdl.core.teacher import Frozen

PROMPT_KEYS = ("prompt", "caption", "text")


@torch.no_grad()
def sdxl_condition(pipeline: Any, batch: Any, size: tuple[int, int], like: Tensor) -> dict[str, Any]:
    """``encoder_hidden_states`` (B, L, D) and ``added_cond_kwargs`` (pooled text (B, P), time ids (B, 6)).

    Args:
        pipeline: a ``StableDiffusionXLPipeline`` whose two text encoders read the prompts; ``None`` where the batch
            carries what they would make.
        batch: a dict with ``prompt`` (list of strings), or with ``encoder_hidden_states`` and ``text_embeds``; perhaps
            with ``time_ids``: original height and width, crop's top and left, height and width trained at.
        size: of the images, for time ids that the batch has not.
        like: a tensor on the device and of the dtype wanted.

    Raises:
        ConfigurationError: neither prompts nor embeddings, or prompts without a pipeline.
    """
    batch = batch if isinstance(batch, Mapping) else {}
    prompts = next((batch[key] for key in PROMPT_KEYS if key in batch), None)
    if "encoder_hidden_states" in batch and "text_embeds" in batch:
        text, pooled = batch["encoder_hidden_states"], batch["text_embeds"]
    elif prompts is not None and hasattr(pipeline, "encode_prompt"):
        for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
            if encoder is not None:
                Frozen(encoder).on(like)
        text, _, pooled, _ = pipeline.encode_prompt(
            list(prompts), device=like.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    else:
        wanted = "'prompt' (with a pipeline), or 'encoder_hidden_states' and 'text_embeds'"
        raise ConfigurationError(f"the network wants text: {wanted} in the batch, which has {sorted(batch)}.")
    ids = batch.get("time_ids")
    if ids is None:
        ids = torch.tensor([[*size, 0, 0, *size]], device=like.device).expand(len(text), -1)
    added = {"text_embeds": pooled.to(like), "time_ids": ids.to(like)}
    return {"encoder_hidden_states": text.to(like), "added_cond_kwargs": added}

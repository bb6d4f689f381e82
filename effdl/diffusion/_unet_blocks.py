"""The blocks of a diffusion network, numbered, and a forward pass that stops after one of them.

A U-Net counts as guided-diffusion does: block 1 is the first convolution; each residual layer with its attention is a
block, a down-sampler one of its own; then the middle block; then the output blocks, each read after its layers, an
up-sampler belonging to the last of its level. A transformer's blocks are its layers, their image tokens folded back to
the grid.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effdl.core.errors import ConfigurationError, check_integer


class Block(NamedTuple):
    """One block: ``kind`` is ``"input"``, ``"middle"`` or ``"output"``, ``layers`` the names of its modules in the
    order in which they run; the last one's output is the block's."""

    kind: str
    layers: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.layers[-1]


def list_blocks(network: nn.Module) -> list[Block]:
    """The blocks of a ``UNet2DModel``, ``UNet2DConditionModel`` or network of ``transformer_blocks``, block 1 first.

    Raises:
        ConfigurationError: another network, or U-Net blocks with image skips (``SkipDownBlock2D``).
    """
    if hasattr(network, "transformer_blocks"):
        return [Block("middle", (f"transformer_blocks.{i}",)) for i in range(len(network.transformer_blocks))]
    if not all(hasattr(network, part) for part in ("conv_in", "down_blocks", "mid_block", "up_blocks")):
        raise ConfigurationError(
            f"model={type(network).__name__} has no blocks to read: expected a UNet2DModel, a UNet2DConditionModel or "
            "a network with transformer_blocks."
        )
    blocks = [Block("input", ("conv_in",))]
    for level, down in enumerate(network.down_blocks):
        _check_plain(down)
        blocks += [Block("input", layers) for layers in _layers(down, f"down_blocks.{level}")]
        if down.downsamplers:
            blocks.append(Block("input", (f"down_blocks.{level}.downsamplers.0",)))
    if network.mid_block is not None:
        blocks.append(Block("middle", ("mid_block",)))
    for level, up in enumerate(network.up_blocks):
        _check_plain(up)
        parts = _layers(up, f"up_blocks.{level}")
        if up.upsamplers:
            parts[-1] = (*parts[-1], f"up_blocks.{level}.upsamplers.0")
        blocks += [Block("output", layers) for layers in parts]
    return blocks


def _check_plain(level: nn.Module) -> None:
    if hasattr(level, "skip_conv") or not hasattr(level, "resnets"):
        name = type(level).__name__
        raise ConfigurationError(f"model with {name} is read by no rule here: Down/Up, Attn and CrossAttn blocks are.")


def _layers(level: nn.Module, prefix: str) -> list[tuple[str, ...]]:
    attentions = getattr(level, "attentions", None) or []
    return [
        (f"{prefix}.resnets.{i}", *([f"{prefix}.attentions.{i}"] if len(attentions) else []))
        for i in range(len(level.resnets))
    ]


def default_block(blocks: list[Block]) -> int:
    """First third of the decoder, ``n_in + 1 + max(1, round(5/18 n_out))``: the paper's 24 of 37. In a network without
    a decoder the same share of its depth."""
    outputs = sum(block.kind == "output" for block in blocks)
    before = len(blocks) - outputs
    return before + max(1, round(5 / 18 * outputs)) if outputs else max(1, round(24 / 37 * len(blocks)))


def features_of(
    network: nn.Module,
    x: Tensor,
    t: Tensor,
    condition: dict[str, Any],
    wanted: Collection[int],
    added: Mapping[int, Tensor] | None = None,
) -> dict[int, Tensor]:
    """Outputs of the wanted blocks (1-based), fp32 ``[B, C, H, W]``; nothing after the last of them runs.

    Args:
        network: as :func:`list_blocks` takes it.
        x: noisy images or latents ``[B, C, H, W]``, cast to the network's dtype.
        t: timesteps ``[B]``.
        condition: keyword arguments of the network's forward (``class_labels``, ``encoder_hidden_states`` ...).
        wanted: block numbers.
        added: of a U-Net: what is added to the outputs of its input blocks, ``{number: [B, C, h, w]}``, resized to
            their sides.

    Example::

        features = features_of(unet, noisy, t, {}, [5])[5]
    """
    last, found = max(wanted), {}
    x = x.to(_dtype(network))
    for number, output in enumerate(_walk(network, x, t, condition, last, added or {}), start=1):
        if number in wanted:
            found[number] = output.float()
        if number == last:
            break
    return found


def _dtype(network: nn.Module) -> torch.dtype:
    return next(p.dtype for p in network.parameters() if p.is_floating_point())


def _walk(
    network: Any, x: Tensor, t: Tensor, condition: dict[str, Any], last: int, added: Mapping[int, Tensor]
) -> Iterator[Tensor]:
    if hasattr(network, "transformer_blocks"):
        return _walk_transformer(network, x, t, condition, last)
    return _walk_unet(network, x, t, condition, added)


def _walk_unet(
    unet: Any, x: Tensor, t: Tensor, condition: dict[str, Any], added: Mapping[int, Tensor]
) -> Iterator[Tensor]:
    """Output after output, as the stock forward computes them."""
    text = condition.get("encoder_hidden_states")
    if unet.config.center_input_sample:
        x = 2 * x - 1
    emb = _embedding(unet, x, t, condition)
    if hasattr(unet, "process_encoder_hidden_states"):
        text = unet.process_encoder_hidden_states(text, condition.get("added_cond_kwargs", {}))
    x = _fed(unet.conv_in(x), added.get(1))
    skips = [x]
    yield x
    for down in unet.down_blocks:
        for i in range(len(down.resnets)):
            x = _fed(_layer(down, i, x, emb, text), added.get(len(skips) + 1))
            skips.append(x)
            yield x
        for sampler in down.downsamplers or ():
            x = _fed(sampler(x, emb) if _takes_time(sampler) else sampler(x), added.get(len(skips) + 1))
            skips.append(x)
            yield x
    if unet.mid_block is not None:
        x = unet.mid_block(x, emb) if text is None else unet.mid_block(x, emb, encoder_hidden_states=text)
        yield x
    for up in unet.up_blocks:
        last = len(up.resnets) - 1
        for i in range(last + 1):
            x = _layer(up, i, torch.cat([x, skips.pop()], 1), emb, text)
            if i == last:
                for sampler in up.upsamplers or ():
                    size = {"output_size": skips[-1].shape[2:]} if not _takes_time(sampler) else {"temb": emb}
                    x = sampler(x, **size)
            yield x


def _layer(level: Any, i: int, x: Tensor, emb: Tensor, text: Tensor | None) -> Tensor:
    x = level.resnets[i](x, emb)
    attentions = getattr(level, "attentions", None)
    if not attentions:
        return x
    if getattr(level, "has_cross_attention", False):
        return attentions[i](x, encoder_hidden_states=text, return_dict=False)[0]
    return attentions[i](x)


def _fed(x: Tensor, added: Tensor | None) -> Tensor:
    if added is None:
        return x
    return x + F.interpolate(added, size=x.shape[2:], mode="bilinear", align_corners=False).to(x.dtype)


def _takes_time(sampler: nn.Module) -> bool:
    return hasattr(sampler, "time_emb_proj")  # a residual block as a sampler


def _embedding(unet: Any, x: Tensor, t: Tensor, condition: dict[str, Any]) -> Tensor:
    labels = condition.get("class_labels")
    if not hasattr(unet, "get_time_embed"):  # UNet2DModel
        emb = unet.time_embedding(unet.time_proj(t).to(x.dtype))
        if unet.class_embedding is None:
            return emb
        labels = unet.time_proj(labels) if unet.config.class_embed_type == "timestep" else labels
        return emb + unet.class_embedding(labels).to(x.dtype)
    emb = unet.time_embedding(unet.get_time_embed(sample=x, timestep=t), None)
    if (of_class := unet.get_class_embed(sample=x, class_labels=labels)) is not None:
        emb = torch.cat([emb, of_class], -1) if unet.config.class_embeddings_concat else emb + of_class
    added = condition.get("added_cond_kwargs", {})
    more = unet.get_aug_embed(emb=emb, encoder_hidden_states=condition.get("encoder_hidden_states"),
                              added_cond_kwargs=added)  # fmt: skip
    emb = emb if more is None else emb + more
    return emb if unet.time_embed_act is None else unet.time_embed_act(emb)


def _walk_transformer(network: Any, x: Tensor, t: Tensor, condition: dict[str, Any], last: int) -> Iterator[Tensor]:
    """A shallow copy that ends after layer ``last`` runs its stock forward; the layers' outputs are caught."""
    caught: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        caught.append(output[-1] if isinstance(output, tuple) else output)  # SD3: (text tokens, image tokens)

    short = copy.copy(network)
    short._modules = {**network._modules, "transformer_blocks": nn.ModuleList(network.transformer_blocks[:last])}
    handles = [block.register_forward_hook(keep) for block in short.transformer_blocks]
    try:
        short(x, timestep=t, return_dict=False, **condition)
    finally:
        for handle in handles:
            handle.remove()
    patch = network.config.patch_size
    grid = x.shape[-2] // patch, x.shape[-1] // patch
    return (tokens.transpose(1, 2).unflatten(2, grid) for tokens in caught)


def number_of(blocks: list[Block], block: int | str, argument: str = "block") -> int:
    """A block's number: of a number itself, or of the name of one of its layers."""
    if isinstance(block, str):
        found = [number for number, entry in enumerate(blocks, start=1) if block in entry.layers]
        if not found:
            names = ", ".join(entry.name for entry in blocks)
            raise ConfigurationError(f"{argument}={block!r} is not valid: expected a number or one of {names}.")
        return found[0]
    check_integer(argument, block, 1, len(blocks), "Block 1 is the first convolution.")
    return block

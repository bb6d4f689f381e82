"""The two matrix products of attention with quantised operands: q k^T, and probabilities times v.

Each of the four operands has one fixed range (:mod:`effdl.core.input_quantizers`); the softmax between the products
stays float. It holds for every attention module of diffusers whose processor asks
``torch.nn.functional.scaled_dot_product_attention`` (``AttnProcessor2_0``, its default, and most others): inside the
module that function is computed as its two products. Records stand beside those of layers::

    records = {"mid_block.attentions.0": QuantizedMatmuls.of([query, key, probability, value])}
    quantize_(unet, weights, records)           # core.quantized: saved, reopened and removed with the layers' codes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from effdl.core.errors import ConfigurationError
from effdl.core.input_quantizers import QuantizedInput
from effdl.core.steps import Handle

OPERANDS = ("query", "key", "probability", "value")
Take = Callable[[int, Tensor], Tensor]
_BUFFERS = ("matmul_scale", "matmul_zero_point")


@dataclass(frozen=True)
class QuantizedMatmuls(QuantizedInput):
    """The ranges of an attention module's four operands, in the order of :data:`OPERANDS`.

    Args:
        scale: float32 [4], and ``zero_point`` int32 [4].
        bits: 2 to 8, of all four.
    """

    def count(self) -> int:
        return len(OPERANDS)

    @classmethod
    def of(cls, records: list[QuantizedInput]) -> QuantizedMatmuls:
        """One record of four, of equal bits."""
        scale = torch.cat([record.scale for record in records])
        return cls(scale, torch.cat([record.zero_point for record in records]), records[0].bits)


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    """diffusers' attention modules, by name."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "set_processor") and hasattr(m, "processor")}


def attend(
    take: Take,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` as two products, of what ``take(i, operand)`` makes of the operands."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    query, key, value = take(0, query), take(1, key), take(3, value)
    scores = torch.matmul(query, key.transpose(-2, -1)).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        masks = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, float("-inf")) if masks else scores + attn_mask
    probability = dropout(scores.softmax(-1), dropout_p).to(value.dtype)
    return torch.matmul(take(2, probability), value)


class Operands(TorchFunctionMode):
    """Inside, attention is computed by :func:`attend`."""

    def __init__(self, take: Take) -> None:
        super().__init__()
        self.take = take

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is scaled_dot_product_attention:
            return attend(self.take, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def watch_matmuls(attention: nn.Module, take: Take) -> Handle:
    """Until the handle is removed, the module's operands pass through ``take``."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        with Operands(take):
            return type(attention).forward(attention, *args, **kwargs)

    attention.forward = forward
    return Handle(lambda: attention.__dict__.pop("forward", None))


# ---- in a model --------------------------------------------------------------------------------------------------


def check_attention(name: str, module: nn.Module) -> None:
    """Raise unless the module's products can be quantised."""
    if not hasattr(module, "set_processor"):
        raise ConfigurationError(f"{name} ({type(module).__name__}) is no attention module of diffusers.")


def install_matmuls(attention: nn.Module, record: QuantizedMatmuls) -> None:
    """Both products see their operands through the record from now on: a class swap and two buffers."""
    device = next((tensor.device for tensor in (*attention.parameters(), *attention.buffers())), None)
    for key, tensor in zip(_BUFFERS, (record.scale, record.zero_point)):
        attention.register_buffer(key, tensor.to(device))
    if "_effdl_matmuls" not in attention.__dict__:
        base = type(attention)
        attention.__class__ = type(f"Quantized{base.__name__}", (base,), {"_effdl_base": base, "forward": _forward})
    attention.__dict__["_effdl_matmuls"] = record.bits


def remove_matmuls(attention: nn.Module) -> None:
    """The stock module again."""
    if attention.__dict__.pop("_effdl_matmuls", None) is None:
        return
    for key in _BUFFERS:
        attention._buffers.pop(key, None)
    attention.__class__ = type(attention)._effdl_base


def matmuls_of(module: nn.Module) -> QuantizedMatmuls | None:
    """The record of a module's products, if they are quantised."""
    bits = module.__dict__.get("_effdl_matmuls")
    return None if bits is None else QuantizedMatmuls(*(module._buffers[key] for key in _BUFFERS), bits)


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    scale, zero = (self._buffers[key] for key in _BUFFERS)
    top = 2 ** self.__dict__["_effdl_matmuls"] - 1

    def take(i: int, x: Tensor) -> Tensor:
        codes = (x.float() / scale[i]).round().add(zero[i]).clamp(0, top)
        return ((codes - zero[i]) * scale[i]).to(x.dtype)

    with Operands(take):
        return type(self)._effdl_base.forward(self, *args, **kwargs)

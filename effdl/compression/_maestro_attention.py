"""maestro: attention with four Linear projections of its own, in place of ``nn.MultiheadAttention``'s fused weight."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from effdl.core.surgery import disable_transformer_fast_path, replace_modules


class SplitAttention(nn.Module):
    """``nn.MultiheadAttention`` with ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj`` as layers that are called.

    Same arguments, same outputs; each projection can then be replaced. ``bias_k``/``bias_v`` and ``add_zero_attn`` are
    not supported (:func:`can_split`).

    Example::

        attention = SplitAttention(nn.MultiheadAttention(64, 4, batch_first=True))
        output, weights = attention(x, x, x)
    """

    #: What ``nn.TransformerEncoderLayer`` asks before its fused path, which reads ``in_proj_weight``.
    in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = attention.embed_dim, attention.num_heads
        self.head_dim, self.dropout = attention.head_dim, attention.dropout
        self.batch_first = attention.batch_first
        if attention._qkv_same_embed_dim:
            weights = attention.in_proj_weight.detach().chunk(3)
        else:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            weights = [getattr(attention, name).detach() for name in names]
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.detach().chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (_linear(w, b) for w, b in zip(weights, biases))
        out = attention.out_proj
        self.out_proj = _linear(out.weight.detach(), None if out.bias is None else out.bias.detach())

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``: [B, L, E] with ``batch_first``, else [L, B, E], or [L, E] without a batch."""
        single = query.dim() == 2
        if single:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        parts = (self.q_proj(query), self.k_proj(key), self.v_proj(value))
        q, k, v = (x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for x in parts)
        mask = self._mask(q, attn_mask, key_padding_mask)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.mT / math.sqrt(self.head_dim)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            mixed = F.dropout(weights, dropout) @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if single:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _mask(self, q: Tensor, attn_mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """One additive mask, broadcast to [B, heads, L, S]; of boolean ones True means: not this key."""
        mask = None
        if attn_mask is not None:
            mask = _additive(attn_mask, q.dtype)
            mask = mask.unflatten(0, (q.shape[0], self.num_heads)) if mask.dim() == 3 else mask
        if padding is not None:
            padding = _additive(padding, q.dtype)[:, None, None]
            mask = padding if mask is None else mask + padding
        return mask


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out, inputs = weight.shape
    own = {"device": weight.device, "dtype": weight.dtype}
    linear = skip_init(nn.Linear, inputs, out, bias=bias is not None, **own)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear


def can_split(attention: nn.Module) -> bool:
    """Whether :class:`SplitAttention` computes what this layer does."""
    return type(attention) is nn.MultiheadAttention and attention.bias_k is None and not attention.add_zero_attn


def split_attention(model: nn.Module, names: list[str] | None = None) -> nn.Module:
    """Replace the named ``nn.MultiheadAttention`` layers (all, by default) by :class:`SplitAttention`, in place."""
    modules = dict(model.named_modules())
    if names is None:
        names = [name for name, module in modules.items() if name and can_split(module)]
    if names:
        replace_modules(model, {name: modules[name] for name in names}, lambda _, layer: SplitAttention(layer))
        disable_transformer_fast_path(model)
    return model

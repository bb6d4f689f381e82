"""RMS-normalised queries and keys in a stock network: the insertion that lets attention train in bf16.

Source: Esser et al. (arXiv 2403.03206), section 5.3.2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from effdl.core.errors import check
from effdl.core.select import NothingMatched, Targets, select_modules
from effdl.core.surgery import SurgeryReport, count_parameters, dtype_of

EPS = 1e-6
HONOURED = ("AttnProcessor2_0", "JointAttnProcessor2_0", "FusedJointAttnProcessor2_0")  # they call the norms
STREAMS = {"to_q": ("norm_q", "norm_k"), "add_q_proj": ("norm_added_q", "norm_added_k")}  # image, text


def add_qk_norm(model: nn.Module, targets: Targets = None, exclude: Targets = None) -> SurgeryReport:
    """Put an RMSNorm with a gain per channel of a head, started at 1, on queries and keys, in place.

    diffusers' ``Attention`` (U-Nets, MM-DiT; the text stream's too) and timm's. Names, order and configuration
    (``qk_norm="rms_norm"``) are those of a network that was built with it, so an SD3 transformer saves and loads as a
    stock one; a U-Net has no such entry: rebuild it with this function before its weights are loaded. A layer that has
    norms already is left alone. A trained network needs a short fine-tuning afterwards.

    ``logit = q k / sqrt(d) <= sqrt(d) max|g_q| max|g_k|`` whatever the weights: no growth, no overflow.

    Args:
        model: changed in place.
        targets, exclude: attention layers by name glob or type; default all of them.

    Returns:
        The names of the changed layers and the parameter counts.

    Raises:
        ConfigurationError: no attention of these kinds; an attention processor that would not call the norms.

    Example::

        transformer = SD3Transformer2DModel(...)
        add_qk_norm(transformer).delta              # 4 gains of head_dim per block
    """
    layers = select_modules(model, targets, exclude, default=("Attention", "FluxAttention"))
    layers = {name: layer for name, layer in layers.items() if _is_attention(layer)}
    if not layers:
        raise NothingMatched("targets: no attention layer of diffusers' or timm's kind is among the chosen ones.")
    bare = {name: layer for name, layer in layers.items() if not _has_norms(layer)}
    for name, layer in bare.items():
        _check_processor(name, layer)
    before = count_parameters(model)
    for layer in bare.values():
        _insert(layer)
    for part in model.modules():
        configurable = "qk_norm" in (getattr(part, "config", None) or {}) and hasattr(part, "register_to_config")
        if configurable and all(_has_norms(layer) for layer in _attentions(part)):
            part.register_to_config(qk_norm="rms_norm")
    return SurgeryReport(tuple(bare), before, count_parameters(model))


def _attentions(model: nn.Module) -> Iterable[nn.Module]:
    return (layer for layer in model.modules() if _is_attention(layer))


def _is_timm(layer: nn.Module) -> bool:
    return all(hasattr(layer, name) for name in ("q_norm", "k_norm", "head_dim"))


def _is_attention(layer: nn.Module) -> bool:
    return _is_timm(layer) or all(hasattr(layer, name) for name in ("norm_q", "norm_k", "to_q", "heads"))


def _has_norms(layer: nn.Module) -> bool:
    if _is_timm(layer):
        return not isinstance(layer.q_norm, nn.Identity)
    return layer.norm_q is not None


def _check_processor(name: str, layer: nn.Module) -> None:
    processor = getattr(layer, "processor", None)
    known = processor is None or type(processor).__name__ in HONOURED
    check(known, "model", f"{name} with {type(processor).__name__}", f"an attention processor among {HONOURED}",
          "Others leave the norms out: model.set_attn_processor(AttnProcessor2_0()).")  # fmt: skip


def _insert(layer: nn.Module) -> None:
    if _is_timm(layer):
        layer.q_norm, layer.k_norm = (_norm(layer, layer.qkv, layer.head_dim) for _ in range(2))
        return
    width = getattr(layer, "inner_dim", None) or layer.to_q.out_features
    head_dim = width // layer.heads
    for projection, names in STREAMS.items():
        like = getattr(layer, projection, None)
        if like is not None:
            for name in names:
                setattr(layer, name, _norm(layer, like, head_dim))
    _put_before(layer, STREAMS["to_q"], "to_q")


def _norm(layer: nn.Module, like: nn.Module, head_dim: int) -> nn.Module:
    """On the device and of the dtype of the projection, and frozen where that is."""
    if _is_timm(layer):
        norm: nn.Module = nn.RMSNorm(head_dim, eps=EPS)
    else:
        from diffusers.models.normalization import RMSNorm

        norm = RMSNorm(head_dim, eps=EPS)
    weight = next(like.parameters())  # of the projection, or of the first of the two that replaced it
    norm = norm.to(device=weight.device, dtype=dtype_of(like)).train(layer.training)
    return norm.requires_grad_(weight.requires_grad)


def _put_before(layer: Any, names: tuple[str, ...], other: str) -> None:
    """Order among the children, and so among the parameters, as in a layer built with norms."""
    children = layer._modules
    later = list(children)[list(children).index(other) :]
    for name in [*names, *(child for child in later if child not in names)]:
        children[name] = children.pop(name)

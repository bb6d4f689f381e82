"""PowerNorm (slug ``powernorm``): the passes over the tokens; ``powernorm.py`` has the equations and the state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

HALF = (torch.float16, torch.bfloat16)  # statistics of these are taken in float32


def upcast(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALF else x


def _group_factor(x: Tensor, group_num: int, eps: float) -> Tensor:
    """1 / sqrt(mean of x^2 per token and group + eps); [..., C] -> [..., G, 1]."""
    return (x.square().unflatten(-1, (group_num, -1)).mean(-1, keepdim=True) + eps).rsqrt()


def _times_factor(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else (x.unflatten(-1, (factor.shape[-2], -1)) * factor).flatten(-2)


def group_scale(x: Tensor, group_num: int, eps: float = 1e-5) -> Tensor:
    """Divide every token by the quadratic mean of each of its ``group_num`` channel groups.

    Args:
        x: [..., C], floating point; C a multiple of ``group_num``.
        group_num: groups G, in the paper the attention heads.
        eps: added to the mean square.
    """
    return _times_factor(x, _group_factor(x, group_num, eps))


def power_norm(
    x: Tensor,
    running_phi: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    group_num: int | None = 1,
    eps: float = 1e-5,
    group_eps: float = 1e-5,
) -> Tensor:
    """The inference form: group scaling, then one multiply-add per channel.

    Args:
        x: [..., C]; computed in float32 where it is half precision, returned in its own dtype.
        running_phi: [C], the running mean square.
        weight, bias: gamma and beta [C], or ``None``.
        group_num: groups of the group scaling, ``None`` for none.

    Example::

        y = power_norm(torch.randn(2, 7, 8), running_phi=torch.ones(8), group_num=2)
    """
    work = upcast(x)
    scaled = work if group_num is None else group_scale(work, group_num, group_eps)
    return _affine(scaled, (running_phi + eps).rsqrt(), weight, bias).to(x.dtype)


def _affine(scaled: Tensor, inverse: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    coefficient = inverse if weight is None else inverse * weight
    return scaled * coefficient if bias is None else torch.addcmul(bias.to(scaled.dtype), scaled, coefficient)


class PowerFunction(torch.autograd.Function):
    """One training pass over tokens [N, C]. ``layer`` owns the running state; only x and [N, G] are kept besides."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, valid: Tensor | None, layer: Any):
        work = upcast(x)
        factor = None if layer.group_num is None else _group_factor(work, layer.group_num, layer.group_eps)
        scaled = _times_factor(work, factor)
        squares, forward_moment, backward_moment = layer.observe(scaled, valid)
        ctx.layer, ctx.squares, ctx.nu = layer, squares, None
        ctx.inverse = (forward_moment + layer.eps).rsqrt()
        ctx.inverse_backward = (backward_moment + layer.eps).rsqrt()
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(x, factor, weight, valid)
        return _affine(scaled, ctx.inverse, weight, bias).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor):
        x, factor, weight, valid = ctx.saved_tensors
        layer, inverse = ctx.layer, ctx.inverse
        scaled = _times_factor(upcast(x), factor)
        grad_y, reached = grad_y.to(scaled.dtype), scaled
        if valid is not None and layer.mask_backward:
            grad_y = grad_y * valid
        if valid is not None and layer.statistics_skip_padding:
            reached = scaled * valid
        dot = (grad_y * scaled).sum(0)
        nu = PowerFunction._nu(ctx, dot if weight is None else dot * weight, scaled, valid)

        grad = grad_y * (ctx.inverse_backward if weight is None else ctx.inverse_backward * weight)
        grad.addcmul_(reached, nu * inverse * ctx.inverse_backward, value=-1)
        if factor is not None:  # d x^ / d x of the group scaling
            grouped, parts = (tensor.unflatten(-1, (factor.shape[-2], -1)) for tensor in (grad, scaled))
            along = (grouped * parts).mean(-1, keepdim=True)
            grouped.addcmul_(parts, along, value=-1).mul_(factor)
        grad_weight = None if weight is None else (dot * inverse).to(weight.dtype)
        grad_bias = None if ctx.bias_dtype is None else grad_y.sum(0).to(ctx.bias_dtype)
        return grad.to(x.dtype), grad_weight, grad_bias, None, None

    @staticmethod
    def _nu(ctx: Any, dot: Tensor, scaled: Tensor, valid: Tensor | None) -> Tensor:
        """nu of this step. The state moves on at the first backward through a graph only: a second one
        (``retain_graph=True``) sees the same nu."""
        layer, skip = ctx.layer, ctx.layer.statistics_skip_padding
        count = len(scaled) if valid is None or not skip else valid.sum()
        if layer.mode == "vanilla":
            return layer.mean_over_tokens(dot * ctx.inverse, count)
        if ctx.nu is None:
            squares = ctx.squares if valid is None or skip else scaled.square().sum(0)
            sums = torch.stack((dot * ctx.inverse, squares * ctx.inverse.square()))
            ctx.nu = layer.advance_nu(*layer.mean_over_tokens(sums, count))
        return ctx.nu

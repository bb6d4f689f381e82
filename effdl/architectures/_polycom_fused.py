"""polycom: the arithmetic of the two activations, and their closed-form backward passes (private to ``polycom``).

Arguments are checked by the public functions in ``polycom.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def wide(tensor: Tensor) -> Tensor:
    """Powers lose bf16's digits and overflow fp16: at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def poly_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    h, a = F.relu(wide(x)), wide(weight)
    y = a[0] * h
    for p in range(1, len(a)):  # Horner's scheme: with a_1 = 1 alone it is relu(x) to the bit, however large x
        y = (y + a[p]) * h
    return (y + wide(bias)[0]).to(x.dtype)


def _rstd(power: Tensor, eps: float, norm: str, dim: int) -> Tensor:
    square = power.square()
    total = square.mean(dim, keepdim=True) if norm == "rms" else square.sum(dim, keepdim=True)
    return torch.rsqrt(total + eps)


def poly_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, norm: str, dim: int) -> tuple[Tensor, Tensor]:
    """``(y, rstd)``, ``rstd [r, ...]`` with ``dim`` of size 1: the r norms of a row, first power first."""
    u, a = wide(x), wide(weight).flip(0)
    y, power, rstd = wide(bias)[0], u, []
    for p in range(len(a)):
        power = power * u if p else u
        rstd.append(_rstd(power, eps, norm, dim))
        y = y + a[p] * rstd[p] * power
    return y.to(x.dtype), torch.stack(rstd)


class FusedPolyReLU(torch.autograd.Function):
    """Keeps ``x`` alone; the powers are computed again. Can be differentiated twice."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return poly_relu(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        x, weight = ctx.saved_tensors
        u, g, a = wide(x), wide(grad_y), wide(weight).flip(0)
        h, order = F.relu(u), len(a)
        slope, power, grad_a = a[-1] * order, g, []
        for p in range(order, 1, -1):
            slope = slope * h + (p - 1) * a[p - 2]
        for _ in range(order):
            power = power * h  # g h^p
            grad_a.append(power.sum())
        grad_x = g * slope * (u > 0)
        return grad_x.to(x.dtype), torch.stack(grad_a).flip(0).to(weight.dtype), g.sum().reshape(1).to(weight.dtype)


class FusedPolyNorm(torch.autograd.Function):
    """Keeps ``x`` and ``rstd``. With ``n_p = x^p rstd_p``, ``c_p = <g, n_p>`` and ``D = H`` ("rms") or 1 ("l2"):

    ``dx = sum_p a_p p rstd_p x^(p-1) (g - n_p c_p / D)``, ``da_p = sum over rows c_p``, ``da_0 = sum g``.
    Can be differentiated twice.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, norm: str, dim: int) -> tuple[Tensor, Tensor]:
        return poly_norm(x, weight, bias, eps, norm, dim)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, _, *ctx.settings = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, output[1])

    @staticmethod
    def backward(ctx, grad_y: Tensor, _):
        x, weight, rstds = ctx.saved_tensors
        eps, norm, dim = ctx.settings
        u, g, a = wide(x), wide(grad_y), wide(weight).flip(0)
        size = x.shape[dim] if norm == "rms" else 1
        grad_x, below, power, grad_a = 0, None, u, []
        for p in range(1, len(a) + 1):
            # a second derivative must see how the norm depends on x
            rstd = _rstd(power, eps, norm, dim) if torch.is_grad_enabled() else rstds[p - 1]
            n = power * rstd
            c = (g * n).sum(dim, keepdim=True)
            grad_a.append(c.sum())
            term = a[p - 1] * p * rstd * (g - n * (c / size))
            grad_x = grad_x + (term if below is None else term * below)
            below, power = power, power * u
        grad_weight = torch.stack(grad_a).flip(0).to(weight.dtype)
        return grad_x.to(x.dtype), grad_weight, g.sum().reshape(1).to(weight.dtype), None, None, None

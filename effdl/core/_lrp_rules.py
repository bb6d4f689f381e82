"""Rules of Layer-wise Relevance Propagation: how an affine layer hands the relevance of its outputs to its inputs.

Symbols: a input, w weights, b bias, z = sum_i a_i w_ij + b_j, R_j relevance of output j, s = R / z. Sum over inputs i:

    epsilon       R_i = sum_j  a_i w_ij / (z_j + eps sign z_j)  R_j
    alpha-beta    R_i = sum_j (alpha (a_i w_ij)^+ / sum_i (a_i w_ij)^+ - beta (a_i w_ij)^- / sum_i (a_i w_ij)^-)  R_j
    z+            alpha = 1, beta = 0
    zB            R_i = sum_j (x_i w_ij - l w_ij^+ - h w_ij^-) / sum_i (...)  R_j       pixels in [l, h]

Bach et al. 2015 (epsilon, alpha-beta), Montavon et al. 2017 (z+, zB). Each is evaluated as a * (s transported back).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from effdl.core.errors import check, check_number

TINY = 1e-9


@dataclass(frozen=True)
class Affine:
    """A layer as ``z = linear(a, weight) + shift``; ``linear`` is linear in both, ``shift`` broadcasts to z."""

    linear: Callable[[Tensor, Tensor], Tensor]
    weight: Tensor
    shift: Tensor | None = None

    def at(self, a: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """z without shift, and what transports s = R / z back: the transposed layer."""
        with torch.enable_grad():
            a = a.detach().requires_grad_()
            z = self.linear(a, self.weight if weight is None else weight)
        return z.detach(), lambda s: torch.autograd.grad(z, a, s)[0]

    def scaled(self, scale: Tensor, shift: Tensor, dim: int = 0) -> Affine:
        """Followed by a per-channel ``z -> scale z + shift`` (a BatchNorm in eval mode); ``dim``: outputs of weight."""
        along = [1] * self.weight.dim()
        along[dim] = -1
        old = 0 if self.shift is None else self.shift * scale
        return Affine(self.linear, self.weight * scale.reshape(-1).view(along), old + shift)


class Rule(Protocol):
    """Relevance of the inputs ``a`` from the relevance of the outputs, both in the shape of what they belong to."""

    def __call__(self, layer: Affine, a: Tensor, relevance: Tensor) -> Tensor: ...


def signed(z: Tensor, eps: Tensor | float) -> Tensor:
    """``z + eps sign(z)``, with sign(0) = 1: never zero."""
    return z + torch.where(z < 0, -1.0, 1.0).to(z.dtype) * eps


@dataclass(frozen=True)
class Epsilon:
    """The epsilon rule; ``relative``: eps is a share of each sample's mean |z|. With eps -> 0: gradient x input."""

    eps: float = TINY
    relative: bool = False

    def __post_init__(self) -> None:
        check_number("eps", self.eps, 0, 1, closed="(]", fix="0.01 is usual for Linear layers, relative to mean |z|.")

    def __call__(self, layer: Affine, a: Tensor, relevance: Tensor) -> Tensor:
        z, back = layer.at(a)
        z = z if layer.shift is None else z + layer.shift
        eps: Tensor | float = self.eps
        if self.relative:
            eps = (self.eps * z.abs().mean(tuple(range(1, z.dim())), keepdim=True)).clamp_min(TINY)
        return a * back(relevance / signed(z, eps))


@dataclass(frozen=True)
class AlphaBeta:
    """The alpha-beta rule without bias; ``AlphaBeta()`` is z+ (alpha 1, beta 0), also right for negative inputs."""

    alpha: float = 1.0
    beta: float = 0.0
    eps: float = TINY

    def __post_init__(self) -> None:
        check_number("alpha", self.alpha, 1, 1e3)
        consistent = abs(self.alpha - 1 - self.beta) < 1e-12
        check(consistent, "beta", self.beta, f"alpha - 1 = {self.alpha - 1:g}", "Else relevance is not conserved.")
        check_number("eps", self.eps, 0, 1, closed="(]")

    def __call__(self, layer: Affine, a: Tensor, relevance: Tensor) -> Tensor:
        up, down = layer.weight.clamp_min(0), layer.weight.clamp_max(0)
        terms = [(a.clamp_min(0), up, down)]
        if bool((a < 0).any()):
            terms.append((a.clamp_max(0), down, up))
        result = self.alpha * self._share(layer, [(x, w) for x, w, _ in terms], relevance)
        if self.beta:
            result = result - self.beta * self._share(layer, [(x, w) for x, _, w in terms], relevance, -1.0)
        return result

    def _share(self, layer: Affine, terms: list, relevance: Tensor, sign: float = 1.0) -> Tensor:
        parts = [(x, *layer.at(x, w)) for x, w in terms]
        s = relevance / (sum(z for _, z, _ in parts) + sign * self.eps)
        return sum(x * back(s) for x, _, back in parts)


@dataclass(frozen=True)
class ZBox:
    """The zB rule of a first layer, whose inputs are pixels in [low, high] (after normalisation)."""

    low: float
    high: float
    eps: float = TINY

    def __post_init__(self) -> None:
        check_number("low", self.low, -1e6, 1e6)
        check_number("high", self.high, -1e6, 1e6)
        check(self.low < self.high, "high", self.high, f"more than low={self.low}")

    def __call__(self, layer: Affine, a: Tensor, relevance: Tensor) -> Tensor:
        up, down = layer.weight.clamp_min(0), layer.weight.clamp_max(0)
        parts = [
            (x, sign, *layer.at(x, w))
            for x, sign, w in (
                (a, 1.0, layer.weight),
                (torch.full_like(a, self.low), -1.0, up),
                (torch.full_like(a, self.high), -1.0, down),
            )
        ]
        s = relevance / signed(sum(sign * z for _, sign, z, _ in parts), self.eps)
        return sum(sign * x * back(s) for x, sign, _, back in parts)


@dataclass(frozen=True)
class Composite:
    """Which rule each kind of layer gets.

    Args:
        conv, linear: rules of convolutions and of Linear layers (also with a BatchNorm folded in).
        other: rule of averages, sums and BatchNorms on their own: proportional to the summands.
        first: rule of the layer that sees the network's input, ``None``: as any other.
        layers: rules of single layers by module-name glob or type; they win.
    """

    conv: Rule = field(default_factory=AlphaBeta)
    linear: Rule = field(default_factory=lambda: Epsilon(0.01, relative=True))
    other: Rule = field(default_factory=Epsilon)
    first: Rule | None = None
    layers: tuple[tuple[str | type[nn.Module], Rule], ...] = ()


#: By name. ``composite`` keeps classes apart; z+ in the Linear layers as well (``zplus``) does not.
COMPOSITES: dict[str, Composite] = {
    "composite": Composite(),
    "zplus": Composite(linear=AlphaBeta()),
    "epsilon": Composite(conv=Epsilon(), linear=Epsilon()),
    "alpha2-beta1": Composite(conv=AlphaBeta(2.0, 1.0)),
}

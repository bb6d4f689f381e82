"""pdp: Parameter-free Differentiable Pruning is All You Need (Cho, Adya, Naik 2023, arXiv 2305.11203).

While it trains, a network sees its weights through soft masks that are computed from the weights themselves. Of the n
entries of a tensor W at prune ratio r, let W_h be the (1 - r) n largest in magnitude and W_l the rest:

    t = (min |W_h| + max |W_l|) / 2                               halfway between the last kept and the first pruned
    [z(w), m(w)] = softmax([t^2, w^2] / tau)                      so m(w) = sigmoid((w^2 - t^2) / tau)
    w_hat = m(w) w                                                is what the forward pass uses
    d w_hat / d w = m + (2 w^2 / tau) m (1 - m)                   with t held constant

The second term of the derivative is largest at |w| = t and pushes undecided weights off the boundary. No weight is set
to zero before the end, so a pruned one can return.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effdl.compression.gradual_pruning import Granularity
from effdl.core.errors import check, check_number
from effdl.core.masks import n_m_mask
from effdl.core.selection import group_neighbours, neighbours


def last_kept(numel: int, sparsity: float) -> int:
    """Place of the last kept of ``numel`` >= 2 magnitudes in descending order; one at least stays, one goes."""
    return min(max(int((1.0 - sparsity) * numel) - 1, 0), numel - 2)


@dataclass(frozen=True)
class Ramp:
    """The share of the full target that holds at a step: ``min(1, epsilon (e - s + 1))`` in the paper's epochs.

    Args:
        start: s, in optimizer steps; dense before it.
        stop: the share is 1 from about here, ``epsilon = every / (stop - start)``.
        every: length of an "epoch", in optimizer steps.

    Raises:
        ConfigurationError: ``stop`` < ``start``.
    """

    start: int
    stop: int
    every: int

    def __post_init__(self) -> None:
        check(self.stop >= self.start, "stop", self.stop, f"a point not before start={self.start} (in steps)")

    def interval(self, step: int) -> int:
        """e - s; negative before ``start``."""
        return (step - self.start) // self.every

    def share(self, step: int) -> float:
        """In [0, 1]; 0 before ``start``, one interval's worth of the way at it."""
        done = (self.interval(step) + 1) * self.every
        return min(1.0, max(done, 0) / max(self.stop - self.start, 1))


def layer_sparsities(magnitudes: Sequence[Tensor], sparsity: float) -> tuple[float, list[float]]:
    """Global budget: the magnitude below which a share ``sparsity`` of all entries lies, and each tensor's share below.

    Args:
        magnitudes: |w| (or norms of groups) of each tensor, any shapes.
        sparsity: R in [0, 1).

    Example::

        threshold, shares = layer_sparsities([w.abs() for w in weights], 0.9)
    """
    check_number("sparsity", sparsity, 0, 1, closed="[)")
    flat = torch.cat([m.detach().reshape(-1) for m in magnitudes])
    place = min(int((1.0 - sparsity) * flat.numel()), flat.numel() - 1)
    threshold = flat.kthvalue(flat.numel() - place).values
    below = torch.stack([(m < threshold).sum() for m in magnitudes]).tolist()
    return float(threshold), [count / m.numel() for count, m in zip(below, magnitudes)]


class SoftMasked(torch.autograd.Function):
    """``(m w, m)`` of a weight and thresholds (0-dimensional, or one per entry); no gradient reaches the thresholds."""

    @staticmethod
    def forward(weight: Tensor, threshold: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        mask = (weight * weight).sub_(threshold * threshold).mul_(1.0 / temperature).sigmoid_()
        return mask * weight, mask

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        weight, threshold, ctx.temperature = inputs
        seen, mask = output
        ctx.mark_non_differentiable(mask)
        ctx.save_for_backward(weight, threshold, seen, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, None, None]:
        weight, threshold, seen, mask = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted, so the mask must depend on the weight
            mask = torch.sigmoid((weight * weight - threshold * threshold) / ctx.temperature)
            seen = mask * weight
            return (mask + (2.0 / ctx.temperature) * seen * (weight - seen)) * grad, None, None
        # (2 w^2 / tau) m (1 - m) = (2 / tau) (m w) (w - m w)
        return (weight - seen).mul_(seen).mul_(2.0 / ctx.temperature).add_(mask).mul_(grad), None, None


@dataclass(frozen=True)
class Groups:
    """What competes for being kept: single weights, whole output channels, or the weights of each group of M.

    Args:
        unit: unstructured, channel, or N:M, of which N stay.
        transposed: input features come first (HF ``Conv1D``, transposed convolutions).
    """

    unit: Granularity
    transposed: bool = False

    @classmethod
    def parse(cls, granularity: str, transposed: bool = False) -> Groups:
        """Raises ConfigurationError for anything but ``"unstructured"``, ``"channel"`` and ``"N:M"``."""
        unit = Granularity.parse(granularity)
        check(unit.kind != "block", "granularity", granularity, "'unstructured', 'channel' or 'N:M' (like '2:4')")
        return cls(unit, transposed)

    @property
    def outputs(self) -> int:
        return 1 if self.transposed else 0

    @property
    def inputs(self) -> int:
        return 0 if self.transposed else 1

    def squares(self, weight: Tensor) -> Tensor:
        """w^2, or the sum of it over an output channel: [C, 1, ...]."""
        if self.unit.kind != "channel":
            return weight * weight
        return (weight * weight).sum([d for d in range(weight.dim()) if d != self.outputs], keepdim=True)

    def magnitudes(self, weight: Tensor) -> Tensor:
        """|w| or the norms of the channels, detached, in float32 at least."""
        work = full(weight.detach())
        return self.squares(work).sqrt() if self.unit.kind == "channel" else work.abs()

    def pair(self, weight: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The last kept and the first pruned magnitude, broadcastable to the weight; N:M has its own in each group."""
        magnitudes = self.magnitudes(weight)
        if self.unit.kind == "n:m":
            return group_neighbours(magnitudes, *self.unit.sizes, dim=self.inputs)
        kept, pruned = neighbours(magnitudes, index).unbind()
        return kept, pruned

    def threshold(self, weight: Tensor, index: Tensor) -> Tensor:
        """t, detached."""
        kept, pruned = self.pair(weight, index)
        return (kept + pruned) * 0.5

    def soft(self, weight: Tensor, index: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """``(m w, m)``: the gradient of the first runs through w and m, not through t. Of channels m is [C, 1, ...]."""
        work, t = full(weight), self.threshold(weight, index)
        if self.unit.kind != "channel":
            return SoftMasked.apply(work, t, temperature)
        mask = torch.sigmoid((self.squares(work) - t * t) / temperature)
        return work * mask, mask

    def hard(self, weight: Tensor, index: Tensor) -> Tensor:
        """Bool mask of the weight's shape where m >= 1/2; among equals of a group of M the first stay."""
        magnitudes = self.magnitudes(weight)
        if self.unit.kind == "n:m":
            n, m = self.unit.sizes
            return n_m_mask(magnitudes, m - n, m, dim=self.inputs)
        # m >= 1/2 is |w| >= t; compared with the kept neighbour of t no rounding of t can let another weight in
        return (magnitudes >= neighbours(magnitudes, index)[0]).expand(weight.shape)


@dataclass
class PrunedWeight:
    """How one weight is seen: the state behind ``core.reweight``.

    Args:
        groups: what competes.
        count: number of competitors (entries, channels).
        sparsity: R_l, the final ratio.
        temperature: tau.

    Example::

        state = PrunedWeight(Groups.parse("unstructured"), layer.weight.numel(), sparsity=0.9, temperature=1e-4)
        state.set_share(1.0, layer.weight.device)
        handle = reweight(layer, "weight", state.seen)
    """

    groups: Groups
    count: int
    sparsity: float
    temperature: float

    def set_share(self, share: float, device: torch.device) -> None:
        """How much of the final ratio holds now; N:M blends its mask in instead, ``1 - share (1 - m)``."""
        # tensors, so that torch.compile meets new values and not new constants
        self.index = torch.tensor(last_kept(self.count, share * self.sparsity), device=device)
        self.share = torch.tensor(share, device=device) if self.groups.unit.kind == "n:m" else None

    def seen(self, raw: Tensor) -> Tensor:
        """What the forward pass uses, in the dtype of the raw weight."""
        masked = self.groups.soft(raw, self.index, self.temperature)[0]
        if self.share is not None:
            masked = torch.lerp(full(raw), masked, self.share.to(masked.dtype))
        return masked.to(raw.dtype)

    def hard(self, raw: Tensor) -> Tensor:
        """Bool mask, ``True`` where m >= 1/2."""
        return self.groups.hard(raw, self.index)

    @torch.no_grad()
    def told(self, raw: Tensor) -> Tensor:
        """``[share of m < 1/2, share of 0.01 < m < 0.99]``: what would be pruned now, and what is undecided."""
        mask = self.groups.soft(raw, self.index, self.temperature)[1]
        return torch.stack([(mask < 0.5).float().mean(), ((mask > 0.01) & (mask < 0.99)).float().mean()])


def full(weight: Tensor) -> Tensor:
    """In float32 at least: in bfloat16 w^2 / tau has three digits, and the order at the threshold breaks."""
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()


def soft_mask(weight: Tensor, sparsity: float, temperature: float, granularity: str = "unstructured") -> Tensor:
    """m of a weight, of its shape, in float32 at least; differentiable, with t constant.

    Args:
        weight: at least two entries (channels), floating point.
        sparsity: r in [0, 1]; N:M has its own.
        temperature: tau > 0 in units of w^2 (of a channel's squared norm).
        granularity: ``"unstructured"``, ``"channel"``, or ``"N:M"``: of M consecutive input weights N stay.

    Raises:
        ConfigurationError: an argument outside its range, or too few entries.

    Example::

        mask = soft_mask(layer.weight, sparsity=0.9, temperature=1e-4)
        seen = mask * layer.weight
    """
    check_number("temperature", temperature, 0, float("inf"), closed="()")
    groups, work = Groups.parse(granularity), full(weight)
    t = groups.threshold(weight, _index(groups, weight, sparsity))
    return torch.sigmoid((groups.squares(work) - t * t) / temperature).expand(weight.shape)


def soft_masked(weight: Tensor, sparsity: float, temperature: float, granularity: str = "unstructured") -> Tensor:
    """``soft_mask(w) w``, what the forward pass uses, at half of its cost; arguments as in :func:`soft_mask`."""
    check_number("temperature", temperature, 0, float("inf"), closed="()")
    groups = Groups.parse(granularity)
    return groups.soft(weight, _index(groups, weight, sparsity), temperature)[0].to(weight.dtype)


def hard_mask(weight: Tensor, sparsity: float, granularity: str = "unstructured") -> Tensor:
    """Bool mask, ``True`` where m >= 1/2; arguments as in :func:`soft_mask`."""
    groups = Groups.parse(granularity)
    return groups.hard(weight, _index(groups, weight, sparsity))


def _index(groups: Groups, weight: Tensor, sparsity: float) -> Tensor:
    check_number("sparsity", sparsity, 0, 1)
    count = weight.shape[groups.outputs] if groups.unit.kind == "channel" else weight.numel()
    check(count >= 2, "weight", tuple(weight.shape), "at least two entries (channels) to choose from")
    return torch.tensor(last_kept(count, sparsity), device=weight.device)

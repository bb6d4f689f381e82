"""gradual-pruning: To prune, or not to prune (Zhu & Gupta 2017, arXiv 1710.01878).

Sparsity rises along a cubic ramp while the network trains, so that it heals between prunings (equation 1 of the paper):

    s(t) = s_f + (s_i - s_f) (1 - (t - t0) / (n dt))^p      for t0 <= t <= t_end = t0 + n dt

At each of the n + 1 updates the k = max(1, round(N (1 - s))) largest |W| of a tensor stay.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from effdl.core.errors import ConfigurationError, check, check_integer, check_number, suggest
from effdl.core.masks import block_mask, channel_mask, global_top_k_masks, keep_count, n_m_mask, top_k_mask
from effdl.core.select import Weight, named


@dataclass(frozen=True)
class Granularity:
    """What is kept or pruned as one: read from ``"unstructured"``, ``"channel"``, ``"2:4"`` or ``"4x1"``."""

    kind: str
    sizes: tuple[int, int] = (1, 1)

    @classmethod
    def parse(cls, text: str) -> Granularity:
        """Raises ConfigurationError for anything else, and for N:M without 0 < N < M."""
        if text in ("unstructured", "channel"):
            return cls(text)
        found = re.fullmatch(r"(\d+)([:x])(\d+)", text) if isinstance(text, str) else None
        valid = "'unstructured', 'channel', 'N:M' (like '2:4') or 'HxW' (blocks, like '4x1')"
        check(found is not None, "granularity", text, valid)
        a, b = int(found[1]), int(found[3])  # type: ignore[index]
        is_n_m = found[2] == ":"  # type: ignore[index]
        check(0 < a < b if is_n_m else min(a, b) >= 1, "granularity", text, valid)
        return cls("n:m" if is_n_m else "block", (a, b))

    @property
    def n_m_sparsity(self) -> float | None:
        """N / M for N:M, where the final sparsity is no choice."""
        return self.sizes[0] / self.sizes[1] if self.kind == "n:m" else None


@dataclass(frozen=True)
class SparsitySchedule:
    """The ramp of equation 1.

    Args:
        initial: s_i in [0, 1), reached by a jump at ``begin``.
        final: s_f in [0, 1).
        begin: t0 in optimizer steps.
        updates: n; 0 prunes to ``final`` once, at ``begin``.
        frequency: dt in optimizer steps.
        power: p; 3 prunes fast first and slowly at the end, 1 is linear.

    Raises:
        ConfigurationError: a value outside its range, or ``initial`` > ``final``.

    Example::

        schedule = SparsitySchedule(initial=0.0, final=0.9, begin=0, updates=10, frequency=100)
        schedule.sparsity(500)     # 0.7875
        schedule.is_update(500)    # True
    """

    initial: float
    final: float
    begin: int
    updates: int
    frequency: int
    power: float = 3.0

    def __post_init__(self) -> None:
        check_number("initial_sparsity", self.initial, 0, 1, closed="[)")
        check_number("sparsity", self.final, 0, 1, closed="[)")
        check(self.initial <= self.final, "initial_sparsity", self.initial, f"at most sparsity={self.final}")
        check_integer("start", self.begin, 0)
        check_integer("updates", self.updates, 0)
        check_integer("every", self.frequency, 1)
        check_number("power", self.power, 0, 100, closed="(]")

    @property
    def end(self) -> int:
        """t_end, the step of the last update."""
        return self.begin + self.updates * self.frequency

    def sparsity(self, step: int) -> float:
        """s(t); 0 before the ramp."""
        if step < self.begin:
            return 0.0
        if step >= self.end:
            return self.final
        left = (1.0 - (step - self.begin) / (self.updates * self.frequency)) ** self.power
        return self.initial * left + self.final * (1.0 - left)  # equation 1, exact at both ends

    def is_update(self, step: int) -> bool:
        """Whether masks are recomputed at this step."""
        return self.begin <= step <= self.end and (step - self.begin) % self.frequency == 0


def magnitude(weight: Weight) -> Tensor:
    """Scores |W|, in float32 at least.

    Raises:
        RuntimeError: a NaN or an infinity, which have no rank.
    """
    scores = weight.data.abs()
    if not bool(torch.isfinite(scores).all()):
        raise RuntimeError(f"{weight.name} has NaN or infinite entries and cannot be ranked for pruning.")
    return scores if scores.dtype == torch.float64 else scores.float()


def magnitude_masks(
    weights: Sequence[Weight],
    sparsity: float | dict[str, float],
    *,
    granularity: str = "unstructured",
    scope: str = "local",
    pooling: str = "avg",
) -> dict[str, Tensor]:
    """Bool masks of one pruning update, ``True`` where a weight stays.

    Args:
        weights: the tensors to prune.
        sparsity: share of zeros, or one per weight name.
        granularity: ``"unstructured"``, ``"channel"`` (whole output channels), ``"N:M"`` (of M consecutive input
            weights the N smallest go) or ``"HxW"`` (blocks of a 2-D weight).
        scope: ``"local"`` gives every tensor its own k, ``"global"`` one threshold for all (unstructured only).
        pooling: how |W| is pooled in a block, ``"avg"`` or ``"max"``.

    Example::

        masks = magnitude_masks(select_weights(model), 0.9)
    """
    unit = Granularity.parse(granularity)
    want = {w.name: sparsity[w.name] if isinstance(sparsity, dict) else sparsity for w in weights}
    scores = {w.name: magnitude(w) for w in weights}
    if scope == "global":
        keep = sum(keep_count(s.numel(), want[name]) for name, s in scores.items())
        if len(set(want.values())) == 1:
            keep = keep_count(sum(s.numel() for s in scores.values()), next(iter(want.values())))
        return dict(zip(scores, global_top_k_masks(list(scores.values()), keep)))
    masks = {}
    for weight in weights:
        score, share = scores[weight.name], want[weight.name]
        inputs, outputs = (0, 1) if weight.transposed else (1, 0)
        if unit.kind == "n:m":
            masks[weight.name] = n_m_mask(score, *unit.sizes, dim=inputs)
        elif unit.kind == "channel":
            masks[weight.name] = channel_mask(score, keep_count(score.shape[outputs], share), dim=outputs)
        elif unit.kind == "block":
            masks[weight.name] = block_mask(score, share, unit.sizes, pooling)
        else:
            masks[weight.name] = top_k_mask(score, keep_count(score.numel(), share))
    return masks


def storage_bits(numel: int, nonzero: int, bits: int = 32) -> dict[str, int]:
    """The paper's accounting of a sparse tensor: bit-mask (N + nnz b) and CSR with 5-bit relative indices."""
    return {"dense": numel * bits, "bitmask": numel + nonzero * bits, "csr5": nonzero * (bits + 5)}


def to_sparse(weight: Tensor, layout: str = "csr") -> Tensor:
    """A pruned 2-D weight in a sparse layout of torch: ``"csr"`` or ``"semi_structured"`` (2:4, CUDA half types).

    Raises:
        ConfigurationError: the weight is not 2-D, or the layout is unknown.
    """
    check(weight.dim() == 2, "weight", tuple(weight.shape), "a 2-D tensor")
    check(layout in ("csr", "semi_structured"), "layout", layout, "'csr' or 'semi_structured'")
    if layout == "csr":
        return weight.detach().to_sparse_csr()
    return torch.sparse.to_sparse_semi_structured(weight.detach())


def check_sparsity(sparsity: Any, initial: Any, unit: Granularity, layers: dict[str, float] | None) -> None:
    """Raise ConfigurationError for an illegal final, initial or per-layer sparsity."""
    fixed = unit.n_m_sparsity
    if fixed is not None:
        check(sparsity in (None, fixed), "sparsity", sparsity, f"None or {fixed}, which N:M means")
    else:
        check_number("sparsity", sparsity, 0, 1, closed="[)", fix="0.9 removes nine weights of ten.")
    check_number("initial_sparsity", initial, 0, 1, closed="[)")
    final = sparsity if fixed is None else fixed
    check(initial <= final, "initial_sparsity", initial, f"at most sparsity={final}")
    check(layers is None or isinstance(layers, dict), "layer_sparsity", layers, "a dict of name pattern to sparsity")
    check(not layers or fixed is None, "layer_sparsity", layers, f"None where N:M means {fixed} everywhere")
    for pattern, share in (layers or {}).items():
        check_number(f"layer_sparsity[{pattern!r}]", share, 0, 1, closed="[)")


def layer_shares(
    weights: Sequence[Weight], ramp: SparsitySchedule, step: int, layers: dict[str, float] | None = None
) -> dict[str, float]:
    """Each weight's share of zeros at a step: the ramp, scaled to end at the weight's own sparsity in ``layers``."""

    def scaled(final: float) -> SparsitySchedule:
        return replace(ramp, initial=ramp.initial * (final / ramp.final) if ramp.final else 0.0, final=final)

    own = {w.name: next((s for p, s in (layers or {}).items() if named(p, w.name)), ramp.final) for w in weights}
    return {name: scaled(final).sparsity(step) for name, final in own.items()}


def check_patterns(layers: dict[str, float] | None, weights: Sequence[Weight]) -> None:
    """Raise ConfigurationError for a pattern of ``layer_sparsity`` that fits no selected weight."""
    for pattern in layers or {}:
        if not any(named(pattern, w.name) for w in weights):
            near = suggest(pattern, [w.name for w in weights])
            raise ConfigurationError(f"layer_sparsity: pattern {pattern!r} matches no selected weight. {near}")


def divisible(weights: Sequence[Weight], m: int) -> list[Weight]:
    """Weights whose input dimension groups of ``m`` fill; the others stay dense, and a warning names them.

    Raises:
        ConfigurationError: none is left.
    """
    fits = [w for w in weights if w.data.shape[0 if w.transposed else 1] % m == 0]
    left = [w.name for w in weights if w not in fits]
    if not fits:
        raise ConfigurationError(f"granularity: no selected weight has an input dimension divisible by {m}.")
    if left:
        warnings.warn(f"Dense, as their input dimension is not divisible by {m}: {', '.join(left)}", stacklevel=2)
    return fits

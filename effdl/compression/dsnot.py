"""dsnot: Dynamic Sparse No Training (Zhang et al., ICLR 2024, arXiv 2310.08915).

A pretrained network's linear layers y = W x are sparsified from a few calibration sequences, and each row's mask is
then rewired (grow one entry, prune one) until the row's expected output is what it was: no gradients, and the weights
that stay keep their values.

    e_ij  = W_ij E[x_j]                  what an entry contributes to the expected output
    eps_i = sum over pruned j of e_ij    expected dense minus sparse output of row i
    grow:   the pruned entry with the largest (eps > 0) or smallest (eps < 0) e_ij / Var[x_j]^p
    prune:  the kept entry of smallest Wanda score |W_ij| ||x_j|| among those whose e_ij has the sign of -eps_i

E[x_j] is on the scale of a whole sequence's sum, as in the authors' code, and so is the threshold on eps.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from effdl.compression._dsnot_masks import (
    check_groups,
    magnitude_mask,
    row_mask,
    sparsegpt,
    sparsegpt_scores,
    wanda_scores,
)
from effdl.compression._dsnot_refine import Refined, refine
from effdl.core.blocks import LINEAR, find_blocks
from effdl.core.blockwise import Block, run_blocks
from effdl.core.errors import check, check_choice, check_integer, check_number
from effdl.core.input_statistics import InputStatistics, in_features, input_statistics
from effdl.core.masks import n_m_mask
from effdl.core.select import NothingMatched, Targets, Weight, as_list, matches, named, select_weights

__all__ = ["Refined", "Settings", "Sparsified", "refine", "row_mask", "selected", "sparsify", "wanda_scores"]

SAMPLE = 256  # tokens on which a layer's output error is told


@dataclass(frozen=True)
class Settings:
    """How masks are chosen.

    Args:
        sparsity: share of zeros s in [0, 1); may be left out with ``nm``.
        nm: ``(N, M)``: N zeros in each M consecutive inputs, instead of free places.
        init: initial mask: ``"wanda"``, ``"magnitude"`` or ``"sparsegpt"``. Per output row; but where nothing is
            refined, magnitude has one threshold for the matrix, and SparseGPT also updates the weights that stay.
        refine: rewire the initial mask (DSnoT); ``False`` leaves it.
        cycles: at most this many swaps per row.
        threshold: rows with |eps| at or below it are left, in units of the output summed over a sequence.
        power: p, how much a channel's variance counts in what is grown.
        same_sign: a row stops rather than let eps change its sign.
        expectation: E[x] as mean over sequences of the ``"sum"`` over tokens (the authors' code), or as the ``"mean"``
            over all tokens (then the threshold is divided by the mean length); they differ where lengths do.
        skip: patterns of layers that keep their initial mask.
        preset: ``"release"``: the defaults of the authors' code, ``same_sign=False, skip=("mlp",)``. At a few hundred
            inputs per row that is worse than no refinement: eps overshoots, and the swaps grow.

    Raises:
        ConfigurationError: a value out of range; ``sparsity`` that is not N/M.
    """

    sparsity: float | None = None
    nm: Sequence[int] | None = None
    init: str = "wanda"
    refine: bool = True
    cycles: int = 50
    threshold: float = 0.1
    power: float = 1.0
    same_sign: bool = True
    expectation: str = "sum"
    skip: str | Sequence[str] | None = None
    preset: str | None = None

    def __post_init__(self) -> None:
        if self.nm is None:
            check_number("sparsity", self.sparsity, 0, 1, closed="[)", fix="0.5 removes every other weight.")
        else:
            whole = isinstance(self.nm, (tuple, list)) and len(self.nm) == 2 and all(type(v) is int for v in self.nm)
            check(whole and 0 < self.nm[0] < self.nm[1], "nm", self.nm, "(N, M) with 0 < N < M, such as (2, 4)")
            share = self.nm[0] / self.nm[1]
            check(
                self.sparsity in (None, share), "sparsity", self.sparsity, f"None or {share}, which nm={self.nm} means"
            )
        check_choice("init", self.init, ("wanda", "magnitude", "sparsegpt"))
        for name in ("refine", "same_sign"):
            check(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        check_integer("cycles", self.cycles, 1)
        check_number("threshold", self.threshold, 0, float("inf"), closed="[)")
        check_number("power", self.power, 0, 10)
        check_choice("expectation", self.expectation, ("sum", "mean"))
        patterns = isinstance(self.skip, (str, list, tuple, type(None)))
        patterns = patterns and all(isinstance(p, str) for p in as_list(self.skip))
        check(patterns, "skip", self.skip, "a name pattern or a list of these")
        check_choice("preset", self.preset, (None, "release"))

    @property
    def share(self) -> float:
        """s, or N/M."""
        return self.nm[0] / self.nm[1] if self.nm else self.sparsity or 0.0

    @property
    def groups(self) -> tuple[int, int] | None:
        """(N, M) or ``None``."""
        return (self.nm[0], self.nm[1]) if self.nm else None

    def refines(self, name: str) -> bool:
        """Whether the layer of this name is refined."""
        release = ("mlp",) if self.preset == "release" else ()
        parts = name.split(".")
        inside = [".".join(parts[: i + 1]) for i in range(len(parts))]
        skipped = any(named(str(p), part) for p in (*as_list(self.skip), *release) for part in inside)
        return self.refine and self.share > 0 and not skipped


@dataclass
class Sparsified:
    """What :func:`sparsify` did: masks by weight name (``True`` stays; in the weight's own layout), a row per layer."""

    masks: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def seconds_per_million(self) -> float:
        """Seconds, calibration included, per million weights of the treated layers."""
        return 1e6 * self.seconds / max(1, sum(mask.numel() for mask in self.masks.values()))


def selected(
    root: nn.Module, targets: Targets = None, exclude: Targets = None, network: nn.Module | None = None
) -> list[Weight]:
    """Weights of the linear layers (``nn.Linear``, transformers' ``Conv1D``) inside the network's repeated blocks.

    Embeddings and the head lie outside and stay dense. A network without repeated blocks is one block.

    Args:
        root: names are seen from here.
        targets, exclude: layers by name glob or type; ``None``: every linear layer of the blocks.
        network: where the blocks are; ``None``: ``root``.

    Raises:
        ConfigurationError: nothing matched.
    """
    inside = {id(m) for block in find_blocks(network or root).values() for m in block.modules()}
    kinds = [k for k in LINEAR if any(matches("", m, k) for m in root.modules())]
    if not kinds:
        raise NothingMatched(f"targets: no Linear layer found in {type(root).__name__}.")
    found = select_weights(root, kinds if targets is None else targets, exclude)
    found = [w for w in found if any(matches("", w.module, k) for k in kinds) and id(w.module) in inside]
    if not found:
        raise NothingMatched(f"targets={targets!r}, exclude={exclude!r} leave no Linear layer inside repeated blocks.")
    return found


@torch.inference_mode(False)
@torch.no_grad()
def sparsify(
    model: nn.Module,
    batches: Iterable[Any],
    settings: Settings,
    *,
    weights: Sequence[Weight] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    device: torch.device | str | None = None,
    store: torch.device | str | None = None,
) -> Sparsified:
    r"""Zeros the weights of a network's linear layers in place, block by block on the already sparse inputs.

    Args:
        model: any transformers model, timm ViT or other network; half precision is fine, statistics are fp32.
        batches: mappings with ``input_ids`` (B, T) and perhaps ``attention_mask`` (B, T), tuples, or tensors. The paper
            takes 128 sequences of 2,048 tokens.
        settings: sparsity and how to choose.
        weights: which; ``None``: all of :func:`selected`.
        forward, device, store: see ``core.blockwise.run_blocks``.

    Returns:
        masks, and per layer ``sparsity``; mean \|eps\| and output error (mean square on the first 256 tokens) of the
        initial and the final mask; ``swaps``; ``seconds`` for the masks.

    Raises:
        ConfigurationError: no linear layer; N:M that a layer's inputs do not fill. Nothing was changed.
        RuntimeError: NaN or infinity in an activation; a Hessian that cannot be factorised. Earlier blocks are sparse
            by then.

    A layer that saw no token (an expert nobody was routed to) stays dense, and a warning names it.

    Example::

        model = AutoModelForCausalLM.from_pretrained("facebook/opt-125m")
        batches = [{"input_ids": ids} for ids in calibration.split(4)]            # (4, 2048) each
        done = sparsify(model, batches, Settings(sparsity=0.6))
        model.save_pretrained("sparse")
    """
    begin = time.perf_counter()
    wanted = {id(w.module): w for w in (selected(model) if weights is None else weights)}
    for weight in wanted.values():
        check_groups(weight.name, in_features(weight.module), settings.groups)
    result = Sparsified()

    def treat(block: Block) -> None:
        layers = {n: m for n, m in block.module.named_modules() if id(m) in wanted}
        second = settings.init == "sparsegpt"
        seen = input_statistics(block, layers, second_moment=second, rows=SAMPLE) if layers else {}
        for name, layer in layers.items():
            weight, statistics = wanted[id(layer)], seen.pop(name)
            if not statistics.tokens:
                warnings.warn(f"{weight.name} saw no calibration token and stays dense.", stacklevel=4)
                continue
            result.masks[weight.name], result.layers[weight.name] = _sparsify_layer(weight, statistics, settings)

    run_blocks(model, batches, treat, forward=forward, device=device, store=store)
    result.seconds = time.perf_counter() - begin
    return result


def _sparsify_layer(weight: Weight, inputs: InputStatistics, settings: Settings) -> tuple[Tensor, dict[str, float]]:
    """Mask in the weight's own layout, and the report's row."""
    begin = time.perf_counter()
    data = weight.data.t() if weight.transposed else weight.data  # (out, in)
    dense = data.float()
    keep, value, scores = _initial(dense, inputs, settings)
    per_sequence = settings.expectation == "sum"
    expected = inputs.sum if per_sequence else inputs.mean
    start = (dense * expected).masked_fill(keep, 0).sum(1)
    found = Refined(keep, start, start, torch.zeros(1))
    if settings.refines(weight.name):
        found = refine(
            dense, keep, expected, inputs.variance, scores, cycles=settings.cycles,
            threshold=settings.threshold * (1 if per_sequence else inputs.sequences / inputs.tokens),
            power=settings.power, same_sign=settings.same_sign and settings.preset is None, nm=settings.groups,
        )  # fmt: skip
    row = {"sparsity": 1 - float(found.keep.float().mean())}
    row |= {"eps_before": float(found.before.abs().mean()), "eps_after": float(found.after.abs().mean())}
    for when, mask in (("before", keep), ("after", found.keep)):
        change = dense - value.masked_fill(~mask, 0)
        row[f"mse_{when}"] = float((inputs.sample @ change.T).square().mean())
    row["swaps"] = int(found.swaps.sum())
    if value is not dense:
        data.copy_(value)
    data.masked_fill_(~found.keep, 0)
    row["seconds"] = time.perf_counter() - begin
    return (found.keep.t() if weight.transposed else found.keep).contiguous(), row


def _initial(dense: Tensor, inputs: InputStatistics, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Initial mask, the weight's values, and the scores by which refining prunes; all (out, in)."""
    wanda = wanda_scores(dense, inputs.square_sum)
    if not settings.refine and settings.init == "sparsegpt":
        return *sparsegpt(dense, inputs.hessian, settings.share, settings.groups), wanda
    if not settings.refine and settings.init == "magnitude" and not settings.groups:
        return magnitude_mask(dense, settings.share), dense, wanda
    if settings.init == "sparsegpt":
        scores = sparsegpt_scores(dense, inputs.hessian)
    else:
        scores = wanda if settings.init == "wanda" else dense.abs()
    if settings.groups:
        return n_m_mask(scores, *settings.groups), dense, scores
    return row_mask(scores, settings.share), dense, wanda

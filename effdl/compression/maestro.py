"""maestro: Maestro, Uncovering Low-Rank Structures via Trainable Decomposition (Horváth et al. 2024, arXiv 2308.14929).

Every layer is a pair U V from the start, W = U V with r = min(m, n) components u_b v_b^T. A step sees the first j of
one layer's (ordered dropout), and the hierarchical group lasso makes every suffix of components small:

    R = sum_layers sum_b ||U[:, b:]||_F + ||V[b:, :]||_F,      importance_b = ||U[:, b:]||_F ||V[b:, :]||_F

so components come out ordered by importance. Those of importance below eps are left out for good (their number, the
rank, only falls), and any prefix of what remains is a network of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn

from effdl.compression._maestro_attention import SplitAttention, can_split, split_attention
from effdl.compression._maestro_deploy import SCHEME, deploy, extract
from effdl.compression._maestro_norms import (
    hierarchical_lasso,
    importance,
    kept_rank,
    lasso_scale,
    squared_norms,
)
from effdl.compression._maestro_sampler import FIXED, SAMPLERS, RankSampler
from effdl.core.errors import check_choice, check_number
from effdl.core.factorize import (
    dense_weight,
    factorize,
    max_rank,
    refuse_tied,
    select_factorizable,
)
from effdl.core.paper import Paper
from effdl.core.reweight import raw, reweight
from effdl.core.select import NothingMatched, Targets
from effdl.core.steps import Handle

__all__ = [
    "FIXED",
    "SAMPLERS",
    "Prefix",
    "RankSampler",
    "SplitAttention",
    "decompose",
    "deploy",
    "extract",
    "hierarchical_lasso",
    "importance",
    "kept_rank",
    "lasso_scale",
    "select_layers",
    "split_attention",
    "squared_norms",
]

MODES = ("slice", "mask")

PAPER = Paper(
    slug="maestro",
    title="Maestro: Uncovering Low-Rank Structures via Trainable Decomposition",
    authors=("Horváth, Samuel", "Laskaridis, Stefanos", "Rajput, Shashank", "Wang, Hongyi"),
    year=2024,
    arxiv="2308.14929",
    venue="International Conference on Machine Learning",
)


def check_numbers(lasso_weight: Any, threshold: Any, sampler: Any, mode: Any) -> None:
    """Raise ConfigurationError for a value of the method's that is out of range."""
    check_number("lasso_weight", lasso_weight, 0, float("inf"), closed="[)", fix="0 is no penalty.")
    check_number("threshold", threshold, 0, float("inf"), closed="()", fix="1e-5 in the paper.")
    check_choice("sampler", sampler, SAMPLERS)
    check_choice("mode", mode, MODES)


# ---- the network ---------------------------------------------------------------------------------------------------


def select_layers(
    model: nn.Module, targets: Targets = None, exclude: Targets = None
) -> tuple[dict[str, nn.Module], list[str]]:
    """Layers to be factorised by name, and ``nn.MultiheadAttention`` layers whose projections will be.

    By default every Linear, HF ``Conv1D``, convolution and attention. A warning names selected ones that stay dense.

    Raises:
        ConfigurationError: nothing matched, nothing that can be split is left, a tied or sharded weight.
    """
    found, left = select_factorizable(model, targets, exclude, also=(nn.MultiheadAttention,))
    attention = [name for name in left if can_split(model.get_submodule(name))]
    told = {n: why for n, why in left.items() if n not in attention and n.rpartition(".")[0] not in attention}
    layers = {name: layer for name, layer in found.items() if max_rank(dense_weight(layer).shape, SCHEME) > 1}
    reasons = "; ".join(f"{name} {reason}" for name, reason in told.items())
    if not layers and not attention:
        raise NothingMatched(
            f"targets={targets!r} leave no layer to factorise in {type(model).__name__}"
            + (f": {reasons}." if reasons else ".")
        )
    refuse_tied(model, layers)
    if reasons:
        warnings.warn(f"These layers stay dense: {reasons}.", stacklevel=2)
    return layers, attention


def decompose(model: nn.Module, targets: Targets = None, exclude: Targets = None) -> list[str]:
    """Split every selected layer at its full rank by SVD, in place: the outputs stay what they were.

    Returns:
        Names of the pairs. A convolution becomes k x k to r channels, then 1 x 1; attention :class:`SplitAttention`.

    Example::

        names = decompose(network)                       # before the optimizer is made
        pairs = {name: network.get_submodule(name) for name in names}
    """
    layers, attention = select_layers(model, targets, exclude)
    split_attention(model, attention)
    projections = [f"{name}.{part}_proj" for name in attention for part in ("q", "k", "v", "out")]
    ranks = {}
    for name in [*layers, *projections]:
        ranks[name] = max_rank(dense_weight(model.get_submodule(name)).shape, SCHEME)
    factorize(model, ranks, SCHEME, inplace=True)
    return list(ranks)


class Prefix:
    """How much of a pair is seen: the first ``active`` components, of which ``rank`` are left and ``full`` are stored.

    What is not seen is neither changed nor trained, and stays in the parameters. The numbers lie outside the module
    tree: as buffers, DDP would send them around at each step and ``WeightAveraging`` would average them.

    Args:
        pair: of the ``channel`` scheme.
        mode: ``"slice"``: less is computed; ``"mask"``: V times zeros and ones, static shapes for ``torch.compile``.

    Example::

        prefix = Prefix(pair)
        handles = prefix.attach()
        prefix.show(4)                          # pair(x) is now that of its first four components
    """

    def __init__(self, pair: nn.Sequential, mode: str = "slice") -> None:
        check_choice("mode", mode, MODES)
        self.pair, self.mode = pair, mode
        self.full = self.rank = self.active = raw(pair[0], "weight").shape[0]
        self._mask = torch.empty(0)

    @property
    def first(self) -> nn.Parameter:
        """V, whole: (r, in, *kernel)."""
        return raw(self.pair[0], "weight")

    @property
    def second(self) -> nn.Parameter:
        """U, whole: (out, r, ...)."""
        return raw(self.pair[1], "weight")

    def attach(self) -> list[Handle]:
        """Let the pair see its prefix, on the device where it is now."""
        self._mask = torch.ones(self.full, device=self.first.device, dtype=self.first.dtype)
        self.show(self.active)
        handles = [reweight(self.pair[0], "weight", self._rows)]
        return [*handles, reweight(self.pair[1], "weight", self._columns)] if self.mode == "slice" else handles

    def show(self, active: int | None = None) -> None:
        """See ``active`` components from now on; ``None``: all that are left."""
        self.active = self.rank if active is None else min(active, self.rank)
        self._mask[: self.active] = 1
        self._mask[self.active :] = 0

    def _rows(self, weight: Tensor) -> Tensor:
        if self._is_whole():
            return weight
        if self.mode == "mask":
            return weight * self._mask.view(-1, *[1] * (weight.dim() - 1))
        return weight[: self.active] if self.active else weight[:1] * 0  # there are no convolutions to no channels

    def _columns(self, weight: Tensor) -> Tensor:
        return weight if self._is_whole() else weight[:, : max(self.active, 1)]

    def _is_whole(self) -> bool:
        """Nothing is hidden."""
        if self.mode == "mask" and torch.compiler.is_compiling():
            return False  # a graph must not depend on the number
        return self.active == self.full

    @torch.no_grad()
    def add_penalty_(self, weight: float, among: Container[int]) -> None:
        """Add ``weight`` times the gradient of R over all that is stored to ``grad``.

        Args:
            weight: lambda.
            among: ids of the parameters that may be touched; those without a gradient are left alone.
        """
        for factor, squared, dim in zip((self.second, self.first), squared_norms(self.first, self.second), (1, 0)):
            if id(factor) in among and factor.grad is not None:
                shape = [-1 if axis == dim else 1 for axis in range(factor.dim())]
                factor.grad.addcmul_(factor, lasso_scale(squared).view(shape).to(factor.dtype), value=weight)

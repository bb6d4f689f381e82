"""trained-rank-pruning: Trained Rank Pruning for Efficient Deep Neural Networks (Xu et al. 2020, arXiv 2004.14566).

Every m optimizer steps each weight is replaced by T(W), its SVD cut to the rank that keeps a share e of the energy, and
is pushed along the sub-gradient of the nuclear norm; between these steps it is free (equations 3-6 of the paper):

    T(W) = U_r diag(s_r) V_r^T,   r = min{r : sum_{i<r} s_i^2 >= e sum_i s_i^2},   G = U_r V_r^T
    W <- T(W) - lr (dL/dW(T(W)) + lambda G)     every m-th step,     W <- W - lr dL/dW(W)     else

At the end the weights are of nearly low rank, and a layer splits into two small ones without loss. The matrices of a
convolution: ``core.factorize``. Under ``decouple`` every output channel's matrix is cut to a rank of its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effdl.core.errors import check, check_choice, check_number
from effdl.core.factorize import (
    SCHEMES,
    dense_weight,
    factorize,
    factors_of,
    matricise,
    max_rank,
    principal,
    row,
    select_factorizable,
    svd,
    unmatricise,
)
from effdl.core.paper import Paper
from effdl.core.select import NothingMatched, Targets
from effdl.core.subspace import leading

Criterion = tuple[str, float]
RULES = ("energy", "energy_plain", "value", "linear")
#: Of the final cut, by scheme.
FINAL: dict[str, Criterion] = {"channel": ("value", 5e-2), "spatial": ("value", 5e-2), "decouple": ("energy", 0.85)}
SMALLEST = 8  # shorter sides of a matrix below this are left alone by default
LARGE, FLAT = 256, 1 / 32  # where float32 decides a cut: from this side on, and down to this share of s_0
WARM, LOW = 128, 1 / 8  # from this side on, up to this share of the full rank, a cut starts from the last one's U_r


PAPER = Paper(
    slug="trained-rank-pruning",
    title="Trained Rank Pruning for Efficient Deep Neural Networks",
    authors=(
        "Xu, Yuhui",
        "Li, Yuxi",
        "Zhang, Shuai",
        "Wen, Wei",
        "Wang, Botao",
        "Dai, Wenrui",
        "Qi, Yingyong",
        "Chen, Yiran",
        "Lin, Weiyao",
        "Xiong, Hongkai",
    ),
    year=2020,
    arxiv="2004.14566",
    venue="International Joint Conference on Artificial Intelligence",
)


def check_numbers(scheme: Any, keep_energy: Any, nuclear_weight: Any, final_criterion: Any) -> None:
    """Raise ConfigurationError for a value of the method's that is out of range."""
    check_choice("scheme", scheme, SCHEMES)
    check_number("keep_energy", keep_energy, 0, 1, closed="()", fix="0.9 keeps nine tenths of the energy.")
    if nuclear_weight is not None:
        check_number("nuclear_weight", nuclear_weight, 0, float("inf"), closed="[)")
    if final_criterion is not None:
        check_criterion("final_criterion", final_criterion)


def check_criterion(argument: str, criterion: Any) -> None:
    """Raise unless ``criterion`` is ``(rule, number)`` with the rule's range.

    ``("energy", e)`` and ``("energy_plain", e)`` keep a share e in (0, 1) of the sum of s^2, of s; ``("value", t)``
    keeps s_i >= t > 0; ``("linear", p)`` keeps a share p in (0, 1] of the count.
    """
    pair = isinstance(criterion, (tuple, list)) and len(criterion) == 2
    check(pair, argument, criterion, "a pair (rule, number) like ('value', 0.05)")
    rule, number = criterion
    check_choice(f"{argument}[0]", rule, RULES)
    high, closed = {"value": (float("inf"), "()"), "linear": (1, "(]")}.get(rule, (1, "()"))
    check_number(f"{argument}[1]", number, 0, high, closed=closed)


def kept_rank(s: Tensor, criterion: Criterion) -> Tensor:
    """How many singular values a criterion keeps.

    Args:
        s: singular values (..., k), descending.
        criterion: see :func:`check_criterion`.

    Returns:
        int64 (...), 0 (for ``value`` and ``linear``) to k; on the device of ``s``, without waiting for it.

    Example::

        kept_rank(torch.tensor([2.0, 1.0, 0.1]), ("energy", 0.9))       # tensor(2)
    """
    rule, number = criterion
    if rule == "value":
        return (s >= number).sum(-1)
    if rule == "linear":
        return torch.full(s.shape[:-1], int(number * s.shape[-1]), device=s.device)
    energy = (s.double().square() if rule == "energy" else s.double()).cumsum(-1)
    return ((energy < number * energy[..., -1:]).sum(-1) + 1).clamp(max=s.shape[-1])


@dataclass(frozen=True)
class Cut:
    """A weight at its criterion's rank.

    Args:
        weight: T(W), of the weight's shape; float32 at least.
        subgradient: G of the nuclear norm at T(W), likewise.
        rank: int64, one number or (``decouple``) one per output channel.
        basis: U_r of a large matrix of low rank, from which its next cut is found in a fraction of the time.
    """

    weight: Tensor
    subgradient: Tensor
    rank: Tensor
    basis: Tensor | None = None


@torch.no_grad()
def truncate(
    weight: Tensor, scheme: str, criterion: Criterion, name: str = "weight", basis: Tensor | None = None
) -> Cut:
    """T(W) and G of a weight (out, in, *kernel); at least rank 1.

    Args:
        weight: any floating type.
        scheme, criterion: see :func:`check_numbers`.
        name: of the layer, for errors.
        basis: of the last cut of a weight that has changed little since, for ``energy``: what is kept is then sought
            near it (:func:`core.subspace.leading`), and found within 1e-3 of the SVD's; the whole is decomposed where
            it is not found there.

    Raises:
        RuntimeError: NaN or infinite entries, no convergence of the SVD; ``name`` says of what.

    Example::

        cut = truncate(conv.weight, "channel", ("energy", 0.9))
        conv.weight.data.copy_(cut.weight)
    """
    matrix = matricise(weight, scheme)
    tall = matrix.shape[-2] > matrix.shape[-1]
    wide = matrix.mT if tall else matrix
    part = leading(wide, criterion[1], basis) if basis is not None and criterion[0] == "energy" else None
    if part is None:
        u, s, rank = _principal(wide, criterion, name)
        pair, basis = _products(u, s, rank, wide.to(u.dtype)), _basis(u, rank)
    else:
        rank, basis = torch.tensor(len(part.s), device=wide.device), part.u
        pair = part.u @ part.rows, part.u @ (part.rows / part.s.unsqueeze(-1))
    parts = (unmatricise(a.mT.contiguous() if tall else a, weight.shape, scheme) for a in pair)
    return Cut(*parts, rank, basis)


def _basis(u: Tensor, rank: Tensor) -> Tensor | None:
    full, able = u.shape[-1], u.device.type != "mps"  # which has none of the decompositions
    low = able and u.dim() == 2 and full >= WARM and int(rank) <= LOW * full
    return u[:, : int(rank)].clone() if low else None


def _principal(wide: Tensor, criterion: Criterion, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """U, s and the rank; a large matrix in float32 unless what is kept of it reaches below ``FLAT`` of s_0."""
    kinds = [torch.float64] if wide.shape[-2] < LARGE or wide.dtype == torch.float64 else [torch.float32, torch.float64]
    for kind in kinds:
        u, s = principal(wide, name, kind)
        rank = kept_rank(s, criterion).clamp(min=1)
        last = s.gather(-1, rank.unsqueeze(-1) - 1)
        if bool((last >= FLAT * s[..., :1]).all()):  # nobody waits: the decomposition has just been read
            break
    return u, s, rank


def _products(u: Tensor, s: Tensor, rank: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
    """``U_r U_r^T W`` and ``U_r diag(1 / s_r) U_r^T W``, in the order that takes fewer products."""
    most, full = int(rank.max()), s.shape[-1]
    kept = (torch.arange(full, device=s.device) < rank.unsqueeze(-1)).unsqueeze(-2)
    inverse = kept / s.clamp(min=torch.finfo(s.dtype).tiny).unsqueeze(-2)
    if most <= 0.6 * full:
        u, kept, inverse = u[..., :most], kept[..., :most], inverse[..., :most]
        rows = u.mT @ wide
        return (u * kept) @ rows, (u * inverse) @ rows
    dropped = (u * ~kept)[..., int(rank.min()) :]
    return wide - dropped @ (dropped.mT @ wide), ((u * inverse) @ u.mT) @ wide


def select_layers(
    model: nn.Module, scheme: str, targets: Targets = None, exclude: Targets = None
) -> dict[str, nn.Module]:
    """Layers to be cut by name; a tied weight once. A warning names the selected ones that cannot be split.

    By default every Linear, HF ``Conv1D`` and convolution whose matrix has no side below 8, but for the first
    convolution and the last Linear of the model.

    Raises:
        ConfigurationError: nothing matched, nothing that can be split is left, a sharded weight.
    """
    found, left = select_factorizable(model, targets, exclude)
    told = "; ".join(f"{name} {reason}" for name, reason in left.items())
    if targets is None:
        ends, least, rule = _first_and_last(model), SMALLEST, "the first convolution, the last Linear,"
    else:
        ends, least, rule = set(), 2, ""
    chosen, weights = {}, set()
    for name, layer in found.items():
        big = max_rank(dense_weight(layer).shape, scheme) >= least
        if name not in ends and big and layer.weight.data_ptr() not in weights:
            chosen[name] = layer
            weights.add(layer.weight.data_ptr())
    if not chosen:
        raise NothingMatched(
            f"targets={targets!r} leave no layer to cut in {type(model).__name__}. Dense stay {rule} matrices with a "
            f"side below {least}" + (f", and: {told}." if told else ".")
        )
    if told:
        warnings.warn(f"These layers stay dense: {told}.", stacklevel=2)
    return chosen


def _first_and_last(model: nn.Module) -> set[str]:
    """The first convolution and the last Linear."""
    kinds = nn.modules.conv._ConvNd, nn.Linear
    convolutions, linears = ([n for n, m in model.named_modules() if isinstance(m, kind)] for kind in kinds)
    return {*convolutions[:1], *linears[-1:]}


def final_ranks(layers: Mapping[str, nn.Module], scheme: str, criterion: Criterion) -> dict[str, int]:
    """The rank of each layer at the end; under ``decouple`` the largest of its output channels'.

    A layer of which nothing is left keeps rank 1, and a warning names it.
    """
    ranks = {}
    for name, layer in layers.items():
        _, s, _ = svd(matricise(dense_weight(layer), scheme), name)
        ranks[name] = int(kept_rank(s, criterion).max())
    dead = [name for name, rank in ranks.items() if rank == 0]
    if dead:
        warnings.warn(f"No singular value is left by {criterion}, so rank 1 is kept: {', '.join(dead)}", stacklevel=2)
    return {name: max(1, rank) for name, rank in ranks.items()}


def decompose(
    model: nn.Module, layers: Mapping[str, nn.Module], scheme: str, criterion: Criterion, *, inplace: bool = False
) -> tuple[nn.Module, dict[str, dict[str, Any]]]:
    """The model with its layers split where that makes them smaller, and a row per layer.

    Args:
        model: copied unless ``inplace``.
        layers: of this model, by name.
        scheme, criterion: of the final cut.
        inplace: change the model itself.

    Returns:
        The model, and for each layer its :func:`core.factorize.row`. ``{name: rank}`` of the factors
        (:func:`core.factorize.factors_of`) rebuilds the architecture: :func:`core.factorize.factorize`.

    Example::

        layers = select_layers(model, "channel")
        small, rows = decompose(model, layers, "channel", ("value", 5e-2))
    """
    ranks, rows = final_ranks(layers, scheme, criterion), {}
    for name, layer in layers.items():
        rows[name] = row(dense_weight(layer).shape, ranks[name], scheme)
    return factorize(model, factors_of(rows), scheme, inplace=inplace), rows

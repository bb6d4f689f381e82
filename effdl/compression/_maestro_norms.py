"""maestro: the hierarchical group lasso over the components of a pair, its gradient, and their importance."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_norms(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """||U[:, b]||^2 and ||V[b, :]||^2 of each component b, float32 at least.

    Args:
        first: V, weight (r, in, *kernel) of a pair's first layer.
        second: U, weight (out, r, ...) of its second one.

    Returns:
        Two tensors [r].
    """
    kind = torch.promote_types(first.dtype, torch.float32)
    u = torch.linalg.vector_norm(second.flatten(1), dim=0, dtype=kind)
    return u.square(), torch.linalg.vector_norm(first.flatten(1), dim=1, dtype=kind).square()


def _suffix_norms(squared: Tensor) -> Tensor:
    """sqrt(sum_{k >= b} a_k), b = 1 ... r, with gradient 0 where it is 0."""
    sums = squared.flip(0).cumsum(0).flip(0)
    return torch.where(sums > 0, sums, 1).sqrt() * (sums > 0)


def hierarchical_lasso(first: Tensor, second: Tensor) -> Tensor:
    """R of one layer, for each b: ||U[:, b:]||_F + ||V[b:, :]||_F. Differentiable, also at zero.

    Returns:
        Tensor [r]; its sum is the layer's R.

    Example::

        pair = split(nn.Linear(8, 6), 6)
        loss = loss + 1e-5 * hierarchical_lasso(pair[0].weight, pair[1].weight).sum()
    """
    u, v = squared_norms(first, second)
    return _suffix_norms(u) + _suffix_norms(v)


@torch.no_grad()
def lasso_scale(squared: Tensor) -> Tensor:
    """c_k = sum_{b <= k} 1 / ||U[:, b:]||_F from squared norms [r]: dR/dU[:, k] = c_k U[:, k]; likewise of V.

    A suffix that is all zero adds nothing.
    """
    norms = _suffix_norms(squared)
    return torch.where(norms > 0, norms.reciprocal(), 0).cumsum(0)


@torch.no_grad()
def importance(first: Tensor, second: Tensor) -> Tensor:
    """||U[:, b:]||_F ||V[b:, :]||_F for each b: [r], not increasing."""
    u, v = squared_norms(first, second)
    return _suffix_norms(u) * _suffix_norms(v)


def kept_rank(values: Tensor, threshold: float, relative: bool = False) -> Tensor:
    """How many components have an importance of at least the threshold (``relative``: times the first one's); int64."""
    bound = threshold * values[:1] if relative else threshold
    # nothing is kept of a layer that is all zero
    return ((values >= bound) & (values > 0)).sum()

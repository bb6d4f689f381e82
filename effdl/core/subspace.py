"""The leading singular vectors of a large matrix of low rank, without the rest: subspace iteration from a good start.

A matrix that is cut again and again while it trains changes little between two cuts. From the left singular vectors of
the last one, and a few random directions, one pass of ``Q = orth(W W^T Q)`` finds those of this one, and the small
``Q^T W`` has their values (Halko, Martinsson and Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1). For k of m rows
that is ``6 k m n`` operations, where the Gram matrix and its eigenvectors take ``m^2 n + 9 m^3``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EXTRA = 8  # directions beside those of the start
PASSES, CHANGE = 2, 1e-3  # how often, until a pass raises the share of the energy that is kept by no more than this


@dataclass(frozen=True)
class Leading:
    """The part of a matrix W (m, n) that keeps a share of its energy.

    Args:
        u: (m, r), orthonormal columns.
        s: (r,), descending.
        rows: (r, n), ``u^T W = diag(s) V^T``.
    """

    u: Tensor
    s: Tensor
    rows: Tensor


@torch.no_grad()
def leading(matrix: Tensor, keep: float, start: Tensor) -> Leading | None:
    """The least part of ``matrix`` with a share ``keep`` of its energy, if it is near ``start``.

    The whole energy is summed exactly, so the share is really kept. The error of a pass falls with the square of the
    ratio of the singular values left out to those kept, so what is returned is far nearer the SVD than the last pass
    was far from the one before. The random directions are the same at every call, whatever the global stream.

    Args:
        matrix: (m, n), m <= n, any floating type; calculated in float32 (float64 stays).
        keep: in (0, 1), of the sum of the squared singular values.
        start: (m, k), the left singular vectors of a matrix nearby.

    Returns:
        ``None`` where k + 8 directions do not reach the share, where two passes do not settle (each raised the energy
        kept by more than 1e-3 of all), or where an entry is not finite: decompose the matrix whole.

    Example::

        part = leading(weight, 0.9, start=last.u)
        low_rank = part.u @ part.rows
    """
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    draws = torch.randn(wide.shape[0], EXTRA, generator=torch.Generator().manual_seed(0))
    try:
        return _iterate(wide, keep, torch.cat([start.to(wide), draws.to(wide)], 1))
    except torch.linalg.LinAlgError:  # of what is not finite
        return None


def _iterate(wide: Tensor, keep: float, columns: Tensor) -> Leading | None:
    total, kept = torch.linalg.vector_norm(wide).square(), None
    for _ in range(PASSES + 1):
        q = torch.linalg.qr(columns).Q
        rows = q.mT @ wide
        values, vectors = torch.linalg.eigh(rows @ rows.mT)
        values, before = values.flip(0).clamp(min=0), kept
        energy = values.cumsum(0) / total
        missing = (energy < keep).sum()  # directions that are not enough
        kept = energy[missing.clamp(max=len(energy) - 1)]
        if before is not None:
            settled = (kept - before).abs() <= CHANGE
            found, stop = torch.stack([missing, settled.to(missing)]).tolist()
            if stop:
                return _part(q, rows, values, vectors.flip(1), found + 1) if found < len(energy) else None
        columns = wide @ rows.mT
    return None


def _part(q: Tensor, rows: Tensor, values: Tensor, vectors: Tensor, rank: int) -> Leading:
    vectors = vectors[:, :rank]
    return Leading(q @ vectors, values[:rank].sqrt(), vectors.mT @ rows)

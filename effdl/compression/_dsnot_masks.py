"""dsnot: the initial masks (magnitude, Wanda, SparseGPT), for a weight (out, in); ``True`` where an entry stays."""

from __future__ import annotations

import torch
from torch import Tensor

from effdl.core.errors import ConfigurationError
from effdl.core.masks import n_m_mask

COLUMNS = 128  # SparseGPT goes through the input columns in blocks of about this many
DAMPING = 0.01  # added to H, as a share of its mean diagonal


def magnitude_mask(weight: Tensor, sparsity: float) -> Tensor:
    """Entries above the int(numel s)-th of the sorted |W| of the *whole* matrix, so one more than that is pruned."""
    if sparsity == 0:
        return torch.ones_like(weight, dtype=torch.bool)
    size = weight.abs().float()
    return size > size.flatten().kthvalue(int(size.numel() * sparsity) + 1).values


def row_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Of each output row the int(C_in s) smallest scores are pruned; of equal ones the first."""
    order = scores.argsort(dim=1, stable=True)[:, : int(scores.shape[1] * sparsity)]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, order, False)


def wanda_scores(weight: Tensor, square_sum: Tensor) -> Tensor:
    """|W_ij| ||X_j||_2, fp32 (out, in), from ``square_sum`` = ||X_j||_2^2 (in,). Wanda, arXiv 2306.11695, eq. 1."""
    return weight.float().abs() * square_sum.float().sqrt()


def inverse_factor(hessian: Tensor, damping: float = DAMPING) -> Tensor:
    """Upper Cholesky factor U of (H + damping mean(diag H) I)^-1, fp32 (in, in); H_jj = 1 at inputs that are always 0.

    Raises:
        RuntimeError: not positive definite, also with the damping times 10, 100 and 1000.
    """
    hessian = hessian.float().clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    step = diagonal.mean().clone()
    for power in range(4):
        damped = hessian.clone()
        damped.diagonal().add_(damping * 10**power * step)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if int(failed) == 0 and bool(torch.isfinite(upper).all()):
                return upper
    raise RuntimeError(
        f"the Hessian of a layer with {len(hessian)} inputs is not positive definite, even damped by "
        f"{damping * 1000:g} of its mean diagonal: give more or more varied calibration_batches."
    )


def sparsegpt_scores(weight: Tensor, hessian: Tensor) -> Tensor:
    """W_ij^2 / U_jj^2, (out, in): what removing an entry costs once the others make up for it."""
    alive = (hessian.diagonal() != 0).float()
    return (weight.float() * alive) ** 2 / inverse_factor(hessian).diagonal() ** 2


def sparsegpt(
    weight: Tensor, hessian: Tensor, sparsity: float = 0.0, nm: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """SparseGPT (arXiv 2301.00774): masks column by column, and makes the later columns pay for what was removed.

    Args:
        weight: (out, in).
        hessian: H = 2 X^T X, (in, in).
        sparsity: share of zeros of each block of 128 columns (one more entry than int(numel s) is pruned).
        nm: N zeros in each M consecutive inputs, decided from the weights as updated by then.

    Returns:
        mask (True: stays) and the updated weight, fp32, zero under the mask.
    """
    w, upper = weight.float().clone(), inverse_factor(hessian)
    w[:, hessian.diagonal() == 0] = 0
    keep = torch.ones_like(w, dtype=torch.bool)
    if sparsity == 0 and nm is None:
        return keep, weight.float().clone()
    step = COLUMNS if nm is None else max(nm[1], COLUMNS - COLUMNS % nm[1])  # groups lie in one block
    for start in range(0, w.shape[1], step):
        block = slice(start, start + step)
        keep[:, block], w[:, block], error = _sparsegpt_block(w[:, block].clone(), upper[block, block], sparsity, nm)
        w[:, start + step :] -= error @ upper[block, start + step :]
    return keep, w


def _sparsegpt_block(
    w: Tensor, upper: Tensor, sparsity: float, nm: tuple[int, int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask, weight and errors of one block of columns."""
    scale = upper.diagonal()
    keep = torch.ones_like(w, dtype=torch.bool) if nm else magnitude_mask(w**2 / scale**2, sparsity)
    errors = torch.zeros_like(w)
    for i in range(w.shape[1]):
        if nm and i % nm[1] == 0:
            group = slice(i, i + nm[1])
            keep[:, group] = n_m_mask(w[:, group] ** 2 / scale[group] ** 2, *nm)
        masked = w[:, i] * keep[:, i]
        errors[:, i] = (w[:, i] - masked) / scale[i]
        w[:, i:] -= errors[:, i : i + 1] * upper[i, i:]
        w[:, i] = masked
    return keep, w, errors


def check_groups(name: str, features: int, nm: tuple[int, int] | None) -> None:
    """Raise ConfigurationError where groups of M do not fill a layer's inputs."""
    if nm is not None and features % nm[1]:
        raise ConfigurationError(
            f"nm={nm}: {name} has {features} input features, not divisible by {nm[1]}. Name it in exclude."
        )

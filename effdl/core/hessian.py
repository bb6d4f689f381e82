"""The Hessian of a mean loss without forming it: products, both ends of the spectrum, traces.

Every function works on any subset of parameters, so a *block* of the Hessian is the same call with the block's
parameters. Nothing here changes parameters, buffers, gradients or a random stream; whether dropout and BatchNorm are in
evaluation mode is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from effdl.core.errors import check, check_integer, check_number


@dataclass(frozen=True)
class HessianOperator:
    """``v -> H v`` for the batch-size-weighted mean of ``loss`` over ``batches``, at the parameters' present values.

    Attention runs in torch's math backend, since the fused kernels have no double backward.

    Args:
        loss: batch -> mean loss of that batch (0-d). Called once per batch and product.
        parameters: with respect to which; each needs ``requires_grad``. One that the loss does not use has zero rows.
        batches: the probe set, held by the caller.
        sizes: examples per batch, the weights of the mean; ``None``: equal.
        reduce: applied to every product, e.g. a mean over ranks. Must be linear.

    Example::

        H = HessianOperator(lambda b: F.cross_entropy(model(b[0]), b[1]), list(model.parameters()), [(x, y)])
        top, bottom = extreme_eigenvalues(H)[:2]
    """

    loss: Callable[[Any], Tensor]
    parameters: Sequence[Tensor]
    batches: Sequence[Any]
    sizes: Sequence[int] | None = None
    reduce: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        check(len(self.parameters) > 0, "parameters", self.parameters, "at least one parameter")
        frozen = [tuple(p.shape) for p in self.parameters if not p.requires_grad]
        check(not frozen, "parameters", f"of shapes {frozen}", "parameters that require a gradient")
        check(len(self.batches) > 0, "batches", self.batches, "at least one batch")
        ok = self.sizes is None or len(self.sizes) == len(self.batches)
        check(ok, "sizes", self.sizes, f"one size per batch, {len(self.batches)} in all")

    @property
    def size(self) -> int:
        """The number of scalar parameters: ``H`` is ``size x size``."""
        return sum(p.numel() for p in self.parameters)

    @property
    def dtype(self) -> torch.dtype:
        """Of the flat vectors: float32, or float64 when a parameter is."""
        return torch.float64 if any(p.dtype == torch.float64 for p in self.parameters) else torch.float32

    @property
    def device(self) -> torch.device:
        """Of the flat vectors."""
        return self.parameters[0].device

    def split(self, vector: Tensor) -> list[Tensor]:
        """A flat vector (size,) as views shaped like the parameters."""
        pieces = vector.split([p.numel() for p in self.parameters])
        return [piece.view_as(p) for piece, p in zip(pieces, self.parameters)]

    def __call__(self, vector: Tensor) -> Tensor:
        """``H v`` for a flat vector (size,)."""
        direction = [piece.to(p) for piece, p in zip(self.split(vector), self.parameters)]
        sizes = self.sizes if self.sizes is not None else [1] * len(self.batches)
        product = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        for batch, size in zip(self.batches, sizes):
            product.add_(self._product(batch, direction), alpha=size / sum(sizes))
        return product if self.reduce is None else self.reduce(product)

    def _product(self, batch: Any, direction: list[Tensor]) -> Tensor:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            loss = self.loss(batch)
            grads = torch.autograd.grad(loss, self.parameters, create_graph=True, materialize_grads=True)
            slope = sum((g * v).sum() for g, v in zip(grads, direction))
            if not slope.requires_grad:  # a loss linear in the parameters
                return torch.zeros(self.size, dtype=self.dtype, device=self.device)
            rows = torch.autograd.grad(slope, self.parameters, materialize_grads=True)
        return torch.cat([row.flatten().to(self.dtype) for row in rows])


class Extremes(NamedTuple):
    """Both ends of a spectrum."""

    largest: float
    smallest: float
    iterations: int
    """Hessian-vector products spent."""
    converged: bool
    """Whether both residuals fell under the tolerance."""


def extreme_eigenvalues(
    operator: HessianOperator,
    tolerance: float = 1e-3,
    max_iterations: int = 100,
    generator: torch.Generator | None = None,
) -> Extremes:
    """The largest and the smallest eigenvalue *by sign*, from one Lanczos run.

    Power iteration would find the one of largest magnitude and need a second, shifted run for the other; Lanczos gets
    both from the same products, in fewer. Only three vectors are kept: without reorthogonalisation converged Ritz
    values reappear as copies, which leaves the extremes as they are.

    Args:
        operator: symmetric ``v -> H v`` with ``size``, ``dtype`` and ``device``.
        tolerance: stop when both residuals ``||H u - theta u||`` are under ``tolerance * max|theta|``. The error of an
            eigenvalue is at most its residual, and in general of the order of its square.
        max_iterations: products at most.
        generator: of the start vector, on the CPU; ``None``: a fresh one with seed 0, never the global stream.
    """
    check_number("tolerance", tolerance, 0, 1, closed="()")
    check_integer("max_iterations", max_iterations, 1)
    previous, vector = torch.zeros((), device=operator.device), _start(operator, generator)
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for iteration in range(1, max_iterations + 1):
        product = operator(vector)
        alphas.append(product.dot(vector))
        product = product - alphas[-1] * vector - (betas[-1] * previous if betas else 0.0)
        betas.append(product.norm())
        if not betas[-1].isfinite():  # the loss has diverged: nothing to report
            return Extremes(float("nan"), float("nan"), iteration, False)
        values, residuals = _ritz(alphas, betas)
        scale = values.abs().max()
        exhausted = betas[-1].item() <= 10 * torch.finfo(operator.dtype).eps * scale  # an invariant subspace
        if exhausted or bool((residuals <= tolerance * scale).all()):
            return Extremes(values[-1].item(), values[0].item(), iteration, True)
        previous, vector = vector, product / betas[-1]
    return Extremes(values[-1].item(), values[0].item(), max_iterations, False)


def block_traces(operator: HessianOperator, samples: int = 64, generator: torch.Generator | None = None) -> Tensor:
    """Hutchinson's estimates ``v_i . (H v)_i`` with Rademacher ``v``: one product per sample serves every parameter.

    Returns:
        (samples, number of parameters) in float64 on the CPU. ``mean(0)`` estimates the trace of each parameter's
        diagonal block, ``sum(1).mean()`` the whole trace; the spread over samples is its standard error.
    """
    check_integer("samples", samples, 1)
    generator = generator or torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(samples):
        signs = torch.randint(0, 2, (operator.size,), generator=generator, dtype=torch.int8) * 2 - 1
        v = signs.to(operator.device, operator.dtype)
        estimates.append(torch.stack([block.sum() for block in operator.split(v * operator(v))]))
    return torch.stack(estimates).double().cpu()


def _start(operator: HessianOperator, generator: torch.Generator | None) -> Tensor:
    generator = generator or torch.Generator().manual_seed(0)
    vector = torch.randn(operator.size, generator=generator, dtype=operator.dtype).to(operator.device)
    return vector / vector.norm()


def _ritz(alphas: list[Tensor], betas: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Eigenvalues of the tridiagonal matrix, and the residuals of its smallest and largest one."""
    diagonal = torch.stack(alphas).double().cpu()
    off = torch.stack(betas).double().cpu()
    values, vectors = torch.linalg.eigh(torch.diag(diagonal) + torch.diag(off[:-1], 1) + torch.diag(off[:-1], -1))
    return values, off[-1] * vectors[-1, [0, -1]].abs()

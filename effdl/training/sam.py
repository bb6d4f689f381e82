"""Sharpness-aware minimisation: the perturbation and one reference step (slug: ``sam``).

Objective (Foret et al. 2021, arXiv 2010.01412, used by Chen et al. 2022, arXiv 2106.01548)::

    min_w  max_{||e||_2 <= rho}  L(w + e),        e = rho * g / ||g||_2,        g = grad L(w)

over all trained parameters as *one* vector, ``e`` held constant (no second-order term). The adaptive form (ASAM,
Kwon et al. 2021, arXiv 2102.11600) measures the ball in units of the weights: ``e = rho * w^2 g / || |w| g ||_2``.

``effdl.callbacks.SAMCallback`` does the same inside a Lightning Trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from effdl.core.errors import check, check_number
from effdl.core.paper import Paper

PAPER = Paper(
    slug="sam",
    title="When Vision Transformers Outperform ResNets without Pre-training or Strong Data Augmentations",
    authors=("Chen, Xiangning", "Hsieh, Cho-Jui", "Gong, Boqing"),
    year=2022,
    arxiv="2106.01548",
    venue="International Conference on Learning Representations",
)
EPSILON = 1e-12
"""Added to the norm (official code), so that a zero gradient gives a zero perturbation."""


class SAMStep(NamedTuple):
    """What one step measured, as 0-d tensors on the parameters' device: nothing has been synchronised."""

    loss: Tensor
    """``L(w)``, the one to log."""
    grad_norm: Tensor
    """The norm in the denominator of ``e``: ``||g||``, or ``|| |w| g ||`` when adaptive."""
    loss_perturbed: Tensor
    """``L(w + e)``."""


def check_sam(rho: float, adaptive: bool) -> None:
    """Raise :class:`~effdl.core.errors.ConfigurationError` unless the two arguments of the perturbation are legal."""
    check_number("rho", rho, 0, float("inf"), closed="[)", fix="0.05 suits ResNets; larger ViTs and Mixers want more.")
    check(isinstance(adaptive, bool), "adaptive", adaptive, "True or False")


def perturbation(
    weights: Sequence[Tensor], grads: Sequence[Tensor], rho: float, adaptive: bool = False
) -> tuple[list[Tensor], Tensor]:
    """``e`` for every weight, and the norm in its denominator (one norm over all of them).

    Args:
        weights: the trained parameters, any shapes.
        grads: their gradients, same shapes. A constant factor (a loss scale) cancels.
        rho: radius of the ball, >= 0.
        adaptive: ASAM, elementwise in units of ``|w|``; wants a ``rho`` about ten times larger.

    Returns:
        ``(e, norm)``: shapes as ``weights``; both at least float32, since ``rho * g / ||g||`` is around 1e-5 per
        weight, which half precision would lose. Where the norm is not finite (an fp16 overflow) ``e`` is zero.

    Example::

        w, g = torch.tensor([3.0, 4.0]), torch.tensor([0.6, 0.8])
        (e,), norm = perturbation([w], [g], rho=0.5)
        assert torch.allclose(e, torch.tensor([0.3, 0.4])) and torch.allclose(norm, torch.tensor(1.0))
    """
    return _perturbation_(weights, [g.clone() for g in grads], rho, adaptive)


def _perturbation_(
    weights: Sequence[Tensor], grads: Sequence[Tensor], rho: float, adaptive: bool
) -> tuple[list[Tensor], Tensor]:
    """:func:`perturbation` in the memory of the gradients, where they are float32 or wider."""
    e = _at_least_float32(grads)
    if adaptive:
        weights = _at_least_float32(weights)
        torch._foreach_mul_(e, weights)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(e)))
    torch._foreach_mul_(e, torch.where(norm.isfinite(), rho / (norm + EPSILON), 0.0))
    if adaptive:
        torch._foreach_mul_(e, weights)
    for tensor in e:  # inf * 0 is NaN
        tensor.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    return e, norm


@contextmanager
def perturbed(parameters: Iterable[Tensor], rho: float, adaptive: bool = False) -> Iterator[Tensor]:
    """Inside the block the parameters hold ``w + e``; afterwards ``w``, bit for bit, whatever happened inside.

    ``w`` is copied and copied back (subtracting ``e`` again drifts). Storage is kept, so optimizers, DDP and compiled
    graphs see the same tensors. Parameters without a gradient, or with ``requires_grad=False``, do not move. The
    gradients are used up. Yields the norm of :func:`perturbation`; raises ``ConfigurationError`` when no parameter has
    a gradient.

    Example::

        loss_fn(model(x), y).backward()                       # g
        with perturbed(model.parameters(), rho=0.05):
            model.zero_grad()
            loss_fn(model(x), y).backward()                   # the gradient at w + e
        optimizer.step()                                      # ... applied at w
    """
    moved = [p for p in parameters if p.requires_grad and p.grad is not None]
    check(bool(moved), "parameters", [], "at least one parameter with a gradient", "Run backward() first.")
    weights = [_real(p.detach()) for p in moved]  # detached views of the same storage: no autograd below
    saved = [w.clone() for w in weights]
    e, norm = _perturbation_(weights, [_real(p.grad.detach()) for p in moved], rho, adaptive)
    try:
        torch._foreach_add_(weights, e)
        del e
        yield norm
    finally:
        torch._foreach_copy_(weights, saved)


def sam_step(
    parameters: Iterable[Tensor],
    closure: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    rho: float = 0.05,
    adaptive: bool = False,
) -> SAMStep:
    """One SAM step in plain PyTorch: two calls of ``closure``, one ``optimizer.step()``.

    Torch's own ``weight_decay`` is not part of ``g`` and so not of ``e``; a decay written into the loss is.

    Args:
        parameters: what is perturbed: all trained parameters.
        closure: zeroes the gradients, computes the loss of *one fixed batch*, calls ``backward`` and returns the loss.
        optimizer: any first-order optimizer.
        rho: radius, >= 0.
        adaptive: see :func:`perturbation`.

    Example::

        def closure():
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            return loss

        sam_step(model.parameters(), closure, optimizer, rho=0.05)
    """
    check_sam(rho, adaptive)
    loss = closure().detach()
    with perturbed(parameters, rho, adaptive) as norm:
        loss_perturbed = closure().detach()
    optimizer.step()
    return SAMStep(loss, norm, loss_perturbed)


def _at_least_float32(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor

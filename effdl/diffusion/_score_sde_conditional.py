"""score-sde: sampling under conditions, from one unconditional score (section 5, appendix I)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effdl.core.errors import check
from effdl.diffusion._flow import wide
from effdl.diffusion._score_sde_equations import SDE, Score
from effdl.diffusion._score_sde_samplers import PCSampler, normal_like

Classifier = Callable[[Tensor, Tensor], Tensor]


def class_score(score: Score, classifier: Classifier, labels: Tensor) -> Score:
    """``s(x, t) + grad_x log p_t(y | x)`` (eq. 14).

    Args:
        score: s(x, t), unconditional.
        classifier: logits ``[B, K]`` of noisy data ``[B, ...]`` at times ``[B]`` in [0, 1]; trained on x_t.
        labels: y ``[B]`` int.

    Raises:
        ConfigurationError: the classifier takes no time.

    Example::

        score_of_sevens = class_score(score, classifier, torch.full((16,), 7))
        x = PCSampler()(sde, score_of_sevens, (16, 1, 8, 8))
    """
    check(_takes_time(classifier), "classifier", type(classifier).__name__, "a callable (x, t)",
          "Train it on noisy data, and tell it the time.")  # fmt: skip

    def conditional(x: Tensor, t: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            given = x.detach().clone().requires_grad_()
            log_p = wide(classifier(given, t.clone())).log_softmax(1)
            (gradient,) = torch.autograd.grad(log_p.gather(1, labels.to(x.device)[:, None]).sum(), given)
        return score(x, t) + gradient

    return conditional


def _takes_time(classifier: Any) -> bool:
    if not callable(classifier):
        return False
    try:
        inspect.signature(getattr(classifier, "forward", classifier)).bind(None, None)
    except TypeError:
        return False
    return True


class Known:
    """Overwrites what is known of x with a draw from ``p(x_t | y)``, after every update of a :class:`PCSampler`.

    The official code makes the mean out of the noisy state, so that the last step's noise stays in the unknown part;
    here it is the mean.

    Args:
        sde: the forward equation.
        data: y ``[B, ...]``; what it holds outside the mask is never looked at.
        mask: 1 where known, 0 elsewhere; broadcastable to ``data``. With a basis it counts coordinates.
        basis: orthonormal columns ``[K, K]``, K the channels (dimension 1) or all elements of an example: known are
            coordinates ``y^T basis``, as in any linear inverse problem. ``None``: pixels.
        generator: of the noise.

    Raises:
        ConfigurationError: mask of another shape or with values between, a basis that is not orthonormal.
    """

    def __init__(
        self, sde: SDE, data: Tensor, mask: Tensor, basis: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:  # fmt: skip
        self.sde, self.generator, self.shape = sde, generator, data.shape
        self.basis = None if basis is None else basis.to(data.device, torch.promote_types(data.dtype, torch.float32))
        if self.basis is not None:
            _check_basis(self.basis, data)
        self.data = self.to_coordinates(wide(data))
        self.mask = _checked_mask(mask, self.data)

    def to_coordinates(self, x: Tensor) -> Tensor:
        """``x^T basis``, along the channels or all elements."""
        if self.basis is None:
            return x
        if len(self.basis) == x.shape[1]:
            return torch.einsum("bi...,ij->bj...", x, self.basis)
        return (x.flatten(1) @ self.basis).reshape(x.shape)

    def from_coordinates(self, c: Tensor) -> Tensor:
        """The inverse."""
        if self.basis is None:
            return c
        if len(self.basis) == c.shape[1]:
            return torch.einsum("bj...,ij->bi...", c, self.basis)
        return (c.flatten(1) @ self.basis.T).reshape(c.shape)

    def __call__(self, x: Tensor, mean: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """State and mean ``[B, ...]`` at times ``[B]``, the known part overwritten."""
        known, std = self.sde.marginal(self.data, t)
        noisy = known + std * normal_like(known, self.generator)
        pairs = ((x, noisy), (mean, known))
        new = [torch.where(self.mask, y, self.to_coordinates(old)) for old, y in pairs]
        return self.from_coordinates(new[0]), self.from_coordinates(new[1])


def _checked_mask(mask: Tensor, data: Tensor) -> Tensor:
    mask = torch.as_tensor(mask, device=data.device)
    try:
        fits = torch.broadcast_shapes(mask.shape, data.shape) == data.shape
    except RuntimeError:
        fits = False
    check(fits, "mask", tuple(mask.shape), f"a shape that broadcasts to {tuple(data.shape)}")
    check(bool(((mask == 0) | (mask == 1)).all()), "mask", "other values", "0 (unknown) and 1 (known)")
    return mask.bool()


def _check_basis(basis: Tensor, data: Tensor) -> None:
    sizes = (data.shape[1], data[0].numel())
    square = basis.dim() == 2 and basis.shape[0] == basis.shape[1] and len(basis) in sizes
    check(square, "basis", tuple(basis.shape), f"a square matrix of {sizes[0]} or {sizes[1]} rows")
    defect = (basis.T @ basis - torch.eye(len(basis), device=basis.device)).abs().max()
    check(bool(defect < 1e-4), "basis", f"off by {defect:.2g}", "orthonormal columns")


def inpaint(
    sde: SDE, score: Score, data: Tensor, mask: Tensor, sampler: PCSampler | None = None,
    basis: Tensor | None = None, generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Samples that agree with the known part of ``data``; arguments as in :class:`Known`.

    Overwriting lags behind without a corrector: by default Langevin with r = 0.16 and three steps each.

    Example::

        whole = inpaint(sde, score, images, mask)                  # mask: 1 where the image is known
    """
    sampler = PCSampler(corrector="langevin", corrector_steps=3, snr=0.16) if sampler is None else sampler
    check(isinstance(sampler, PCSampler), "sampler", type(sampler).__name__, "a PCSampler")
    known = Known(sde, data, mask, basis, generator)
    x = sde.prior(tuple(data.shape), generator).to(data.device)
    x, _ = known(x, x, x.new_ones(len(x)))
    return sampler(sde, score, x, generator, known)


def grey_basis() -> Tensor:
    """An orthonormal basis of RGB whose first vector is ``(1, 1, 1) / sqrt(3)``, as columns."""
    a, b, c = 1 / math.sqrt(3), 1 / math.sqrt(2), 1 / math.sqrt(6)
    return torch.tensor([[a, b, c], [a, -b, c], [a, 0.0, -2 * c]])


def colourise(
    sde: SDE, score: Score, grey: Tensor, sampler: PCSampler | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Colour images ``[B, 3, H, W]`` with the brightness of grey ones.

    Args:
        sde, score, sampler, generator: as in :func:`inpaint`.
        grey: ``[B, 1, H, W]``, or ``[B, 3, H, W]``, of which only the channels' mean is looked at.

    Example::

        images = colourise(sde, score, photographs.mean(1, keepdim=True))
    """
    check(grey.dim() == 4 and grey.shape[1] in (1, 3), "grey", tuple(grey.shape), "[B, 1, H, W] or [B, 3, H, W]")
    mask = torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1)
    return inpaint(sde, score, grey.expand(-1, 3, -1, -1), mask, sampler, grey_basis(), generator)

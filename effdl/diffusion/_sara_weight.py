"""sara's equations for one parameter: what its layer sees, what trains, the rank term, the second selection."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effdl.core.reweight import reweight_everywhere
from effdl.core.select import Weight
from effdl.core.steps import Handle

SUFFIX = "_sara"


def small(weight: Tensor, threshold: float) -> Tensor:
    """The mask ``|P| < theta`` (strict, in the dtype of the weight), bool of the weight's shape."""
    return weight.detach().abs() < threshold


def overwrite(base: Tensor, leaf: Tensor, index: Tensor, active: Tensor | None = None) -> Tensor:
    """The weight with ``leaf`` at the flat positions ``index``; its gradient reaches the leaf alone.

    A parameter is written in place (the memory of a copy is saved) and not seen to change by autograd; while compiled,
    and for a tensor that is no parameter, a new tensor is made.

    Args:
        base: the frozen weight, any shape.
        leaf: (nnz,), the trained values.
        index: (nnz,) int64, flat positions without repetition.
        active: (nnz,) of ones and zeros: where it is zero no gradient arrives; ``None``: ones.

    Returns:
        Tensor of ``base``'s shape and dtype.

    Example::

        weight = overwrite(base, leaf, (base.abs() < 0.01).flatten().nonzero()[:, 0])
    """
    if torch.compiler.is_compiling() or not isinstance(base, nn.Parameter):
        values = leaf if active is None else torch.where(active != 0, leaf, leaf.detach())
        return base.detach().reshape(-1).index_copy(0, index, values.to(base.dtype)).view(base.shape)
    if torch.is_grad_enabled() and leaf.requires_grad:
        return _Overwrite.apply(leaf, base, index, active)
    write_(base.data, index, leaf.detach())
    return base


@torch.no_grad()
def write_(base: Tensor, index: Tensor, values: Tensor) -> None:
    """Put values at flat positions, in place, whatever the memory format."""
    flat = base.reshape(-1)  # a view where the tensor is contiguous
    flat.index_copy_(0, index, values.to(base.dtype))
    if not base.is_contiguous():
        base.copy_(flat.view(base.shape))


class _Overwrite(torch.autograd.Function):
    """Forward: write and hand out an alias. Backward: dL/dP dies here, dL/dp goes on."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, base: Tensor, index: Tensor, active: Tensor | None) -> Tensor:
        write_(base.data, index, leaf)
        ctx.save_for_backward(leaf, index, active)
        return base.data

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        leaf, index, active = ctx.saved_tensors  # leaf: an optimizer step between forward and backward is an error
        grad = grad.to_dense() if grad.is_sparse else grad
        grad = grad.reshape(-1).index_select(0, index).to(leaf.dtype)
        return grad if active is None else grad * active, None, None, None


def nuclear_norm(matrix: Tensor, smallest: float = 1e-8) -> tuple[Tensor, Tensor]:
    """Sum of the singular values, and its subgradient ``U V^T`` over those above ``smallest``, in fp32.

    (The derivative of an SVD is unstable where singular values repeat, as they do at zero.)

    Example::

        norm, gradient = nuclear_norm(weight * mask)
    """
    u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    return s.sum(), (u * (s > smallest)) @ vh


class SparseWeight:
    """A parameter of which only the entries below ``threshold`` train.

    While attached its layer has a parameter ``weight_sara`` beside ``weight`` (the leaf, at least fp32), and reads
    ``weight`` through :func:`overwrite`. The base keeps its name and is frozen.

    Args:
        weight: which parameter.
        threshold: theta > 0.
        mask: bool of the weight's shape; default :func:`small`.
    """

    def __init__(self, weight: Weight, threshold: float, mask: Tensor | None = None) -> None:
        self.weight, self.threshold, self.attached = weight, threshold, False
        self.set_mask(small(weight.data, threshold) if mask is None else mask)
        self._swaps: list[Handle] = []

    def set_mask(self, mask: Tensor) -> None:
        """The entries that train, the values of the base there, all of them active."""
        self.set_positions(mask.reshape(-1).nonzero()[:, 0])

    def set_positions(self, index: Tensor) -> None:
        """:meth:`set_mask` from flat positions (nnz,) int64."""
        self.index = index.to(self.weight.data.device)
        self.initial = self.weight.data.reshape(-1)[self.index].cpu()
        self.values = self.initial
        self.active: Tensor | None = None
        self.held: Tensor | None = None

    @property
    def leaf(self) -> nn.Parameter:
        """(nnz,), what the optimizer moves."""
        return self.weight.module._parameters[self.weight.attribute + SUFFIX]  # type: ignore[return-value]

    def again(self, weight: Weight) -> SparseWeight:
        """The same entries, and the same base to tell a delta from, for a training that goes on."""
        twin = copy.copy(self)
        twin.weight, twin._swaps = weight, []
        twin.set_positions(self.index)
        twin.initial = self.initial
        if self.active is not None:
            twin.active, twin.held = self.active, twin.values.to(self.active)
        return twin

    def mask(self) -> Tensor:
        """Bool, of the weight's shape: the entries that train, or did until theta was asked again."""
        flat = torch.zeros(self.weight.data.numel(), dtype=torch.bool, device=self.index.device)
        return flat.index_fill_(0, self.index, True).view(self.weight.data.shape)

    def restore(self, mask: Tensor, initial: Tensor, leaf: Tensor) -> None:
        """Another run's entries and values, while attached; the base is yet to be loaded."""
        device = self.leaf.device
        self.index, self.initial = mask.reshape(-1).nonzero()[:, 0].to(device), initial.cpu()
        self.leaf.data = leaf.to(self.leaf).clone()

    def attach(self, root: nn.Module) -> None:
        """Register the leaf and let every layer below ``root`` that has the parameter see it."""
        parameter = self.weight.parameter
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        leaf = nn.Parameter(self.values.to(parameter.device, dtype, copy=True))
        self._swaps = reweight_everywhere(root, parameter, self)
        self.weight.module.register_parameter(self.weight.attribute + SUFFIX, leaf)
        self.attached = True

    def detach(self) -> None:
        """Merge: the trained values into the base, the leaf and the class swap gone. Again: nothing."""
        if self.attached:
            self.values = self.leaf.detach().to(self.weight.data.dtype).cpu()
            write_(self.weight.data, self._here(self.index), self.leaf)
            while self._swaps:
                self._swaps.pop().remove()
            del self.weight.module._parameters[self.weight.attribute + SUFFIX]
            self.attached = False

    def __call__(self, raw: Tensor) -> Tensor:
        """What the layer sees (a transform of ``core.reweight``)."""
        if self.index.device != raw.device:
            self.index = self.index.to(raw.device)
        active = None if self.active is None else self._here(self.active)
        return overwrite(raw, self.leaf, self.index, active)

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseWeight:
        """For a copy of the module: its own leaf, the same positions."""
        twin = memo[id(self)] = copy.copy(self)
        module = copy.deepcopy(self.weight.module, memo)
        twin.weight = Weight(self.weight.name, module, self.weight.attribute)
        return twin

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.weight.data.device)

    def dense(self, base: Tensor, leaf: Tensor) -> Tensor:
        """A new tensor: ``base`` with ``leaf`` written over it."""
        index, values = self.index.to(base.device), leaf.detach().to(base.device, base.dtype)
        return base.detach().reshape(-1).index_copy(0, index, values).view(base.shape)

    def base(self) -> Tensor:
        """A new tensor: the weight as it was before training."""
        return self.dense(self.weight.data, self.initial)

    def matrix(self, of: Literal["weights", "delta"] = "weights") -> Tensor:
        """``P * M`` or ``Delta P``, dense, zero outside of the mask."""
        values = self.leaf.detach() if of == "weights" else self.leaf.detach() - self._here(self.initial)
        flat = values.new_zeros(self.weight.data.numel())
        return flat.index_copy_(0, self._here(self.index), values).view(self.weight.data.shape)

    def add_nuclear_gradient_(self, factor: float, of: Literal["weights", "delta"] = "weights") -> None:
        """``factor U V^T`` at the active entries, onto the leaf's gradient (made where there is none)."""
        _, gradient = nuclear_norm(self.matrix(of))
        gradient = gradient.reshape(-1)[self._here(self.index)].to(self.leaf.dtype) * factor
        if self.active is not None:
            gradient = gradient * self._here(self.active)
        self.leaf.grad = gradient if self.leaf.grad is None else self.leaf.grad.add_(gradient)

    def still_small(self) -> Tensor:
        """(nnz,) bool: trained entries below theta, compared in the dtype of the weight."""
        values = self.leaf if self.attached else self.values
        return small(values.to(self.weight.data.dtype), self.threshold)

    @torch.no_grad()
    def reselect(self) -> None:
        """M' from the current values: a subset of M, whose rest keeps what it has from here on."""
        self.active = self.still_small().to(self.leaf.dtype)
        self.held = self.leaf.detach().clone()

    @torch.no_grad()
    def hold_(self) -> None:
        """Undo what an optimizer did to entries that no longer train (weight decay)."""
        if self.active is not None and self.held is not None:
            self.active, self.held = self._here(self.active), self._here(self.held)
            self.leaf.copy_(torch.where(self.active != 0, self.leaf, self.held))

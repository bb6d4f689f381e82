"""Binary masks over weights: how they are chosen, kept, applied, packed and counted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effdl.core.errors import ConfigurationError
from effdl.core.select import Weight


def keep_count(numel: int, sparsity: float) -> int:
    """Entries kept: ``max(1, round_half_even(N (1 - s)))``, in float64."""
    return max(1, round(numel * (1.0 - sparsity)))


def top_k_mask(scores: Tensor, keep: int) -> Tensor:
    """Bool mask of exactly ``keep`` largest scores; ties go to the lower flat index. Linear time, no sort."""
    flat = scores.reshape(-1)
    if keep >= flat.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(flat.numel() - keep + 1).values
    above, tied = flat > threshold, flat == threshold
    room = keep - above.sum()
    return (above | (tied & (tied.cumsum(0) <= room))).view(scores.shape)


def global_top_k_masks(scores: Sequence[Tensor], keep: int) -> list[Tensor]:
    """One threshold over all tensors; each keeps at least its largest entry, the total stays ``keep`` where it can."""
    flat = torch.cat([s.reshape(-1) for s in scores])
    # the largest entry of each tensor is placed first in line: nothing may outrank it
    lines, start = [], 0
    for s in scores:
        lines.append(start + s.reshape(-1).argmax())
        start += s.numel()
    ranked = flat.clone()
    ranked[torch.stack(lines)] = math.inf
    mask = top_k_mask(ranked, max(keep, len(scores)))
    return [m.view(s.shape) for m, s in zip(mask.split([s.numel() for s in scores]), scores)]


def n_m_mask(scores: Tensor, n: int, m: int, dim: int = 1) -> Tensor:
    """In each group of ``m`` consecutive entries along ``dim`` the ``n`` smallest scores are masked.

    Raises:
        ConfigurationError: the dimension is not divisible by ``m``.
    """
    size = scores.shape[dim]
    if size % m:
        raise ConfigurationError(f"{n}:{m} sparsity needs an input dimension divisible by {m}, got {size}.")
    grouped = scores.movedim(dim, -1)
    shape = grouped.shape
    groups = grouped.reshape(-1, m)
    order = groups.argsort(dim=1, stable=True, descending=True)
    mask = torch.ones_like(groups, dtype=torch.bool).scatter_(1, order[:, m - n :], False)
    return mask.view(shape).movedim(-1, dim).contiguous()


def channel_mask(scores: Tensor, keep: int, dim: int = 0) -> Tensor:
    """Whole slices along ``dim`` by their L2 norm: ``keep`` of them stay."""
    norms = scores.float().movedim(dim, 0).flatten(1).norm(dim=1)
    shape = [1] * scores.dim()
    shape[dim] = -1
    return top_k_mask(norms, keep).view(shape).expand(scores.shape).contiguous()


def block_mask(scores: Tensor, sparsity: float, block: tuple[int, int], pooling: str = "avg") -> Tensor:
    """Blocks (bh, bw) of a 2-D weight by their pooled score; an incomplete block at the edge pools what it has.

    Raises:
        ConfigurationError: the weight is not 2-D.
    """
    if scores.dim() != 2:
        raise ConfigurationError(f"block={block} needs a 2-D weight, got shape {tuple(scores.shape)}.")
    pool = F.avg_pool2d if pooling == "avg" else F.max_pool2d
    pooled = pool(scores[None, None].float(), block, stride=block, ceil_mode=True)[0, 0]
    mask = top_k_mask(pooled, keep_count(pooled.numel(), sparsity))
    wide = mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return wide[: scores.shape[0], : scores.shape[1]].contiguous()


def pack(mask: Tensor) -> dict[str, Any]:
    """A bool mask as eight entries a byte (lowest bit first) and its shape."""
    flat = F.pad(mask.reshape(-1).to(torch.uint8).cpu(), (0, -mask.numel() % 8)).view(-1, 8)
    powers = (2 ** torch.arange(8)).to(torch.uint8)
    return {"bits": (flat * powers).sum(1, dtype=torch.uint8), "shape": list(mask.shape)}


def unpack(packed: dict[str, Any]) -> Tensor:
    """The bool mask that :func:`pack` stored."""
    powers = (2 ** torch.arange(8)).to(torch.uint8)
    bits = (packed["bits"].cpu()[:, None] & powers).ne(0).reshape(-1)
    return bits[: math.prod(packed["shape"])].view(packed["shape"])


class MaskStore:
    """The masks of a run: one per weight, applied in one ``_foreach_mul_`` pass.

    Masks are held in the weight's dtype, because multiplying by a bool mask is ten times slower.
    """

    def __init__(self, weights: Iterable[Weight]) -> None:
        self.weights = {weight.name: weight for weight in weights}
        self.masks: dict[str, Tensor] = {}

    def set(self, name: str, mask: Tensor) -> None:
        data = self.weights[name].data
        self.masks[name] = mask.to(device=data.device, dtype=data.dtype)

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """(parameter, mask), following the parameter to the device it is on by now."""
        pairs = []
        for name, mask in self.masks.items():
            parameter = self.weights[name].parameter
            if mask.device != parameter.device or mask.dtype != parameter.dtype:
                mask = self.masks[name] = mask.to(device=parameter.device, dtype=parameter.dtype)
            pairs.append((parameter, mask))
        return pairs

    @torch.no_grad()
    def apply_(self) -> None:
        """Zero masked weights, in place."""
        if pairs := self._pairs():
            torch._foreach_mul_([p.data for p, _ in pairs], [m for _, m in pairs])

    @torch.no_grad()
    def apply_to_gradients_(self) -> None:
        """Zero the gradients of masked weights, so that clipping norms and second moments see live weights only."""
        if pairs := [(p.grad, m) for p, m in self._pairs() if p.grad is not None and not p.grad.is_sparse]:
            torch._foreach_mul_([g for g, _ in pairs], [m for _, m in pairs])

    @torch.no_grad()
    def apply_to_moments_(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero the optimizer's per-weight state (momentum, Adam's moments) at masked entries, in place."""
        buffers, masks = [], []
        for parameter, mask in self._pairs():
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
                    buffers.append(value)
                    masks.append(mask.to(value.dtype))
        if buffers:
            torch._foreach_mul_(buffers, masks)

    def apply_to_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replace entries of a state dict by new, masked tensors; tied ones under all their names. Returns the raw."""
        sharing: dict[int, list[str]] = {}
        for key, value in state.items():
            if isinstance(value, Tensor):
                sharing.setdefault(value.data_ptr(), []).append(key)
        kept = {}
        for name in self.masks:
            if name in state:
                raw = state[name]
                masked = self.masked(name, raw)
                for key in [k for k in sharing[raw.data_ptr()] if state[k].shape == raw.shape]:
                    kept[key], state[key] = raw, masked
        return kept

    def state(self) -> dict[str, dict[str, Any]]:
        """Packed masks, for a checkpoint."""
        return {name: pack(mask != 0) for name, mask in self.masks.items()}

    def load_state(self, state: dict[str, dict[str, Any]]) -> None:
        """Masks from a checkpoint.

        Raises:
            ConfigurationError: they belong to other layers or shapes.
        """
        for name, packed in state.items():
            if name not in self.weights or list(self.weights[name].data.shape) != packed["shape"]:
                raise ConfigurationError(
                    f"the checkpoint has a mask for {name} of shape {packed['shape']}; this run selects no such weight."
                )
        for name, packed in state.items():
            self.set(name, unpack(packed))

    def masked(self, name: str, raw: Tensor) -> Tensor:
        """A weight as the network sees it: ``raw`` times its mask, if it has one by now."""
        mask = self.masks.get(name)
        return raw if mask is None else raw * mask.to(device=raw.device, dtype=raw.dtype)

    def sparsity(self, masked: bool = False) -> Tensor:
        """Share of zeros among the selected weights (``masked``: as seen through their masks), measured.

        A tensor, so that asking costs no host sync.
        """
        seen = [self.masked(name, w.data) if masked else w.data for name, w in self.weights.items()]
        return torch.stack([(s == 0).sum() for s in seen]).sum() / sum(s.numel() for s in seen)

    def report(self) -> dict[str, dict[str, float]]:
        """``{weight: {"numel": N, "nonzero": nnz, "sparsity": share of zeros}}``, counted."""
        rows = {}
        for name, weight in self.weights.items():
            total, alive = weight.data.numel(), int(weight.data.count_nonzero())
            rows[name] = {"numel": total, "nonzero": alive, "sparsity": 1 - alive / total}
        return rows

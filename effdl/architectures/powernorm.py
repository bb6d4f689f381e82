"""PowerNorm (slug ``powernorm``): a norm of token sequences by running statistics, forward and backward.

Shen, Yao, Gholami, Mahoney, Keutzer, "PowerNorm: Rethinking Batch Normalization in Transformers", ICML 2020, arXiv
2003.07845. Symbols: x tokens [..., C]; x^ = x after group scaling; s = mean over valid tokens of x^2 [C]; phi = running
s [C]; z = x^ / sqrt(phi + eps); nu = running mean of the gradient along z [C]; t = training forwards so far, from 1.

- group scaling (appendix, "layer scale"): x^ = x / sqrt(mean over the channels of a group of x^2 + eps_g);
- forward (Algorithm 2): y = gamma z + beta with phi of the step before, with s while t <= warm-up; no mean is removed;
- backward (Algorithm 2): g~ = g - nu z, dL/dx^ = g~ / sqrt(phi + eps), nu <- nu (1 - (1-ab) Gamma) + (1-ab) Lambda with
  Gamma = mean z^2, Lambda = mean g z. Plain autograd through sqrt(mean x^2) is another method (``mode="vanilla"``).
"""

from __future__ import annotations

import warnings
from collections import deque
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effdl.architectures._powernorm_function import HALF, PowerFunction, group_scale, power_norm, upcast
from effdl.core.distributed import all_reduce_sum, world_size
from effdl.core.errors import check, check_choice, check_integer, check_number

__all__ = ["PowerNorm", "group_scale", "power_norm"]


class PowerNorm(nn.Module):
    """PowerNorm over the last dimension of [..., C] (the module docstring has the equations).

    Every training forward is one iteration t (with gradient accumulation: every micro-batch). The forward after warm-up
    does not look at the batch, so training and inference agree. Buffers, under the official names: ``running_phi`` [C],
    ``ema_gz`` [C], ``iters`` (int64 scalar); official shapes [1, C, 1, 1] and [1] load too.

    Args:
        num_features: C.
        group_num: groups of the group scaling, which carries part of the published gain; the paper takes the number of
            attention heads. ``None`` switches it off (then the whole norm folds away, :func:`fold_power_norm`).
        warmup_iters: forwards that are normalised by their own batch; the paper's scripts take the LR warm-up.
        alpha_fwd, alpha_bwd: memory of phi and of nu, in (0, 1).
        eps, group_eps: added to the mean squares.
        backward_scale: ``"running"`` divides the gradient by the phi of the forward pass (the paper, whose gradient
            bound needs it); ``"batch"`` by this batch's s, as the official code does. They agree during warm-up.
        mode: ``"power"``, or ``"vanilla"``: the ablation PN-V, batch statistics and their exact gradient.
        mask_backward: keep padding out of the backward pass too; the official code keeps it out of s only.
        sync: sum the statistics over all processes (otherwise ranks drift apart, or rank 0's buffers win).
        nu_clip: bound on the size of nu (which is of the order of dL/dy, so small) for runs where ``ema_gz`` drifts
            away; a larger ``alpha_bwd`` helps too.
        affine: learn gamma (from 1) and beta (from 0).

    Shapes: x [..., C] -> y [..., C] in x's dtype; statistics are float32 (float64 for float64 input).

    Raises:
        ConfigurationError: an argument or an input out of range, a batch that is padding only.
        FloatingPointError: the running state is not finite (looked at every 100 forwards, so that no step waits).

    Cost: about twice LayerNorm's own time, a few per cent of a transformer's step. Fails where tokens are few (under a
    few hundred per step phi is noisy) or their scale changes from batch to batch without group scaling.

    Example::

        norm = PowerNorm(64, group_num=4, warmup_iters=200)
        y = norm(torch.randn(8, 64, 64), padding_mask=torch.zeros(8, 64, dtype=torch.bool))
        y.sum().backward()
        assert norm.iters == 1
    """

    _CHECK_EVERY = 100  # reading a flag from a GPU stalls the step
    _MEMORY = 32  # forwards that activation checkpointing may still re-run

    def __init__(
        self,
        num_features: int,
        *,
        group_num: int | None = 1,
        warmup_iters: int = 10000,
        alpha_fwd: float = 0.9,
        alpha_bwd: float = 0.9,
        eps: float = 1e-5,
        group_eps: float = 1e-5,
        backward_scale: Literal["running", "batch"] = "running",
        mode: Literal["power", "vanilla"] = "power",
        mask_backward: bool = False,
        sync: bool = True,
        nu_clip: float | None = None,
        affine: bool = True,
    ) -> None:
        super().__init__()
        self.num_features, self.group_num, self.warmup_iters = num_features, group_num, warmup_iters
        self.alpha_fwd, self.alpha_bwd, self.eps, self.group_eps = alpha_fwd, alpha_bwd, eps, group_eps
        self.backward_scale, self.mode, self.mask_backward = backward_scale, mode, mask_backward
        self.sync, self.nu_clip = sync, nu_clip
        self._check_options()
        self.weight = nn.Parameter(torch.ones(num_features)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features)) if affine else None
        self.register_buffer("running_phi", torch.ones(num_features))
        self.register_buffer("ema_gz", torch.zeros(num_features))
        self.register_buffer("iters", torch.zeros((), dtype=torch.int64))
        self.name = "PowerNorm"  # what an error calls this layer
        self.padding_mask: Tensor | None = None  # [B, T], used where forward is given none and the tokens are as many
        self.warn_untrained = True
        self.loss_scale: Tensor | None = None  # fp16: how far the loss was scaled up; not-finite steps are then skipped
        self._memory: deque[tuple[Tensor, ...]] = deque(maxlen=self._MEMORY)
        self._forwards = 0

    def _check_options(self) -> None:
        check_integer("num_features", self.num_features, 1)
        if self.group_num is not None:
            check_integer("group_num", self.group_num, 1, fix="None switches the group scaling off.")
            divides = self.num_features % self.group_num == 0
            check(divides, "group_num", self.group_num, f"a divisor of num_features={self.num_features}")
        check_integer("warmup_iters", self.warmup_iters, 0)
        check_number("alpha_fwd", self.alpha_fwd, 0, 1, closed="()", fix="1 would freeze phi, 0 would forget it.")
        check_number("alpha_bwd", self.alpha_bwd, 0, 1, closed="()", fix="1 would freeze nu, 0 would forget it.")
        check_number("eps", self.eps, 0, float("inf"), closed="()")
        check_number("group_eps", self.group_eps, 0, float("inf"), closed="()")
        check_choice("backward_scale", self.backward_scale, ("running", "batch"))
        check_choice("mode", self.mode, ("power", "vanilla"))
        for name in ("mask_backward", "sync"):
            check(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        if self.nu_clip is not None:
            check_number("nu_clip", self.nu_clip, 0, float("inf"), closed="()", fix="None switches the clipping off.")

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Normalise x [..., C]; ``padding_mask`` is bool [...], true where there is padding."""
        check(x.shape[-1] == self.num_features, "x", tuple(x.shape), f"last dimension {self.num_features}")
        if self.training:
            return self._train_step(x, padding_mask)
        if self.warn_untrained and not torch.compiler.is_compiling():
            self.warn_untrained = False
            if self.iters == 0:
                warnings.warn(f"{self.name} runs in eval before any training step: running_phi is 1.", stacklevel=2)
        options = {"group_num": self.group_num, "eps": self.eps, "group_eps": self.group_eps}
        return power_norm(x, self.running_phi, self.weight, self.bias, **options)

    @torch.compiler.disable  # the backward pass writes a buffer: a graph break is the honest form
    def _train_step(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        check(x.numel() > 0, "x", tuple(x.shape), "at least one token")
        self._forwards += 1
        if self._forwards % self._CHECK_EVERY == 0:
            self.check_finite()
        tokens, valid = x.reshape(-1, self.num_features), None
        if padding_mask is None:
            padding_mask = self._standing_mask(x)
        if padding_mask is not None:
            shape = tuple(padding_mask.shape)
            check(shape == x.shape[:-1], "padding_mask", shape, f"a mask of shape {tuple(x.shape[:-1])}")
            empty = not self._distributed and padding_mask.device.type == "cpu" and bool(padding_mask.all())
            check(not empty, "padding_mask", "all true", "at least one token that is not padding")
            valid = (~padding_mask).reshape(-1, 1).to(upcast(x).dtype)
        return PowerFunction.apply(tokens, self.weight, self.bias, valid, self).view(x.shape)

    def _standing_mask(self, x: Tensor) -> Tensor | None:
        """``self.padding_mask`` where it fits x: as it is, for time-first tokens transposed, for pooled ones not."""
        mask = self.padding_mask
        if mask is None or mask.shape == x.shape[:-1]:
            return mask
        return mask.T if mask.T.shape == x.shape[:-1] else None

    def check_finite(self) -> None:
        """Raise ``FloatingPointError`` where the running state is lost (waits for the device)."""
        if not bool((self.running_phi.isfinite() & self.ema_gz.isfinite()).all()):
            raise FloatingPointError(
                f"{self.name}: running_phi or ema_gz is not finite after {int(self.iters)} forwards. Raise alpha_bwd "
                "or set nu_clip to a few times the usual (1 - alpha_bwd) * ema_gz. A batch of padding does this too."
            )

    @property
    def statistics_skip_padding(self) -> bool:
        return self.mask_backward or self.mode == "vanilla"

    @property
    def _distributed(self) -> bool:
        return self.sync and world_size() > 1

    def observe(self, scaled: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Count one iteration. Returns the sum of x^2 over this process's valid tokens and the mean squares that the
        forward and the backward pass divide by, each [C]."""
        squares = (scaled if valid is None else scaled * valid).square().sum(0)
        if self._memory and torch._C._current_graph_task_id() != -1:  # inside backward: activation checkpointing
            return self._recall(squares)
        moment = self.mean_over_tokens(squares, len(scaled) if valid is None else valid.sum())
        self.iters.add_(1)
        by_batch = self.iters <= (torch.inf if self.mode == "vanilla" else self.warmup_iters)
        forward_moment = torch.where(by_batch, moment, self.running_phi)
        backward_moment = moment if self.backward_scale == "batch" else forward_moment
        self._advance_phi(moment.to(self.running_phi.dtype))
        self._memory.append((squares, forward_moment, backward_moment))
        return self._memory[-1]

    def _recall(self, squares: Tensor) -> tuple[Tensor, ...]:
        """What the first run of this forward used: the latest one remembered whose input was nearest (it is equal)."""
        keys, *moments = (torch.stack(column) for column in zip(*self._memory))
        distance = (keys - squares).abs().sum(1)
        order = torch.arange(len(distance), device=distance.device)
        nearest = torch.where(distance == distance.min(), order, -1).argmax().view(1)
        return squares, *(moment.index_select(0, nearest)[0] for moment in moments)

    def _advance_phi(self, moment: Tensor) -> None:
        """phi <- phi (t-1)/t + s/t while t < warm-up; then, always, phi <- af phi + (1-af) s. One step for both."""
        share = torch.where(self.iters < self.warmup_iters, self.iters.to(moment.dtype).reciprocal(), 0.0)
        self._assign("running_phi", self.running_phi.lerp(moment, 1 - self.alpha_fwd * (1 - share)))

    def advance_nu(self, gradient: Tensor, square: Tensor) -> Tensor:
        """nu for this step; then ema_gz <- ema_gz + Lambda - nu Gamma, in units of the unscaled objective's gradient
        (DDP's objective is the mean over the processes, so what one process sees is ``world`` times too large)."""
        unit = world_size() if self._distributed else 1
        unit = unit if self.loss_scale is None else unit * self.loss_scale
        nu = (1 - self.alpha_bwd) * self.ema_gz * unit
        update = self.ema_gz + (gradient - nu * square) / unit
        if self.nu_clip is not None:
            bound = self.nu_clip / (1 - self.alpha_bwd)
            update = update.clamp(-bound, bound)
        self._assign("ema_gz", update)
        return nu

    def _assign(self, name: str, value: Tensor) -> None:
        buffer = getattr(self, name)
        # under fp16 an overflow is an ordinary event: the scaler skips that step, and so do the statistics
        buffer.copy_(value if self.loss_scale is None else torch.where(value.isfinite(), value, buffer))

    def mean_over_tokens(self, sums: Tensor, count: Tensor | int) -> Tensor:
        if not self._distributed:
            return sums / count
        count = count.view(1) if isinstance(count, Tensor) else sums.new_full((1,), count)
        packed = torch.cat((sums.flatten(), count))
        all_reduce_sum(packed)
        return (packed[:-1] / packed[-1]).view_as(sums)

    def _apply(self, fn: Any, recurse: bool = True) -> PowerNorm:
        """The running state stays float32 under ``.half()`` and ``.bfloat16()``, where an EMA would stand still."""
        before = {name: getattr(self, name) for name in ("running_phi", "ema_gz")}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype in HALF and not (old.is_meta or old.dtype in HALF):
                setattr(self, name, old.to(new.device))
        self._memory.clear()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("running_phi", "ema_gz", "iters"):
            value, shape = state_dict.get(prefix + name), getattr(self, name).shape
            if value is not None and value.numel() == shape.numel():  # the official file has [1, C, 1, 1] and [1]
                state_dict[prefix + name] = value.reshape(shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.num_features}, group_num={self.group_num}, warmup_iters={self.warmup_iters}, mode={self.mode!r}"

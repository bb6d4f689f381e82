"""powernorm on a Trainer: norms replaced in ``setup``, warm-up and loss scale told to the layers, state logged."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, LinearLR, OneCycleLR, SequentialLR

from effdl.architectures.powernorm import PowerNorm
from effdl.architectures.powernorm_models import powernorm_model, select_norms
from effdl.callbacks._base import MethodCallback
from effdl.core.contract import ContractExample
from effdl.core.errors import ConfigurationError, check
from effdl.core.paper import Paper
from effdl.core.schedules import steps_per_epoch
from effdl.core.select import Targets, check_targets
from effdl.core.steps import Handle
from effdl.core.surgery import refuse_after_weight_averaging, when_built

WARMUP_ATTRIBUTES = ("num_warmup_steps", "warmup_steps", "warmup_iters", "warmup_t")


class PowerNormCallback(MethodCallback):
    """Trains with PowerNorm in place of LayerNorm and RMSNorm (Shen et al. 2020).

    The architecture changes on purpose: before optimizers exist, ``setup`` puts a
    :class:`~effdl.architectures.powernorm.PowerNorm` in place of each chosen norm, starting from its gamma and beta. A
    checkpoint loads into ``powernorm_model(model)``, and ``fold_power_norm(model, example)`` gives a dense model
    without running statistics. The state advances inside the layers, once per training forward: with gradient
    accumulation every micro-batch is one iteration. Cost: a few per cent of a step.

    Args:
        warmup_iters: training forwards normalised by their own batch before the running statistics take over;
            ``"auto"``: the warm-up of the learning-rate scheduler, times ``accumulate_grad_batches``.
        group_num: channel groups of the group scaling; ``"auto"``: the heads of the attention next to each norm,
            ``None``: no group scaling.
        alpha_fwd, alpha_bwd, eps, group_eps, backward_scale, mode, mask_backward, sync, nu_clip: see ``PowerNorm``.
        targets, exclude: layers by name glob or type; default every LayerNorm and RMSNorm but those of queries and
            keys. In the paper's translation models only the encoder's are replaced.
        padding_key: key of a (B, T) mask in a batch that is a mapping, 0 or False where there is padding; such tokens
            stay out of the statistics. ``None``: count every token.

    Raises:
        ConfigurationError: an argument outside its range; nothing matched, a norm over several dimensions, no attention
            to read heads from; ``warmup_iters="auto"`` and a scheduler that does not tell its warm-up.
        FloatingPointError: a layer's running state is not finite (the layer is named; ``nu_clip`` helps).

    Logs ``powernorm/ema_gz_absmax``, which grows where the backward statistics drift away.

    Example::

        from effdl.callbacks import PowerNormCallback

        module = ImageClassifier("vit_tiny_patch16_224")
        Trainer(callbacks=[PowerNormCallback(warmup_iters=500)]).fit(module, data)
        dense = fold_power_norm(module.model, torch.randn(1, 3, 224, 224))
    """

    paper = Paper(
        slug="powernorm",
        title="PowerNorm: Rethinking Batch Normalization in Transformers",
        authors=("Shen, Sheng", "Yao, Zhewei", "Gholami, Amir", "Mahoney, Michael W.", "Keutzer, Kurt"),
        year=2020,
        arxiv="2003.07845",
        venue="ICML",
    )

    def __init__(
        self,
        warmup_iters: int | Literal["auto"] = 1000,
        group_num: int | Literal["auto"] | None = "auto",
        alpha_fwd: float = 0.9,
        alpha_bwd: float = 0.9,
        eps: float = 1e-5,
        group_eps: float = 1e-5,
        backward_scale: Literal["running", "batch"] = "running",
        mode: Literal["power", "vanilla"] = "power",
        mask_backward: bool = False,
        sync: bool = True,
        nu_clip: float | None = None,
        targets: Targets = None,
        exclude: Targets = None,
        padding_key: str | None = "attention_mask",
    ) -> None:
        self.warmup_iters, self.group_num = warmup_iters, group_num
        self.alpha_fwd, self.alpha_bwd = alpha_fwd, alpha_bwd
        self.eps, self.group_eps, self.backward_scale, self.mode = eps, group_eps, backward_scale, mode
        self.mask_backward, self.sync, self.nu_clip = mask_backward, sync, nu_clip
        self.targets, self.exclude, self.padding_key = targets, exclude, padding_key
        groups = 1 if group_num in ("auto", None) else group_num
        # the layer knows its own arguments' ranges
        PowerNorm(groups if isinstance(groups, int) and groups > 0 else 1, group_num=groups, **self._options())
        check_targets("targets", targets)
        check_targets("exclude", exclude)
        check(padding_key is None or isinstance(padding_key, str), "padding_key", padding_key, "a batch's key, or None")
        self.layers: dict[str, Any] = {}
        self._resolved: int | None = None

    def _options(self) -> dict[str, Any]:
        names = ("alpha_fwd", "alpha_bwd", "eps", "group_eps", "backward_scale", "mode", "mask_backward", "sync")
        warmup = 0 if self.warmup_iters == "auto" else self.warmup_iters  # "auto" is known in on_train_start
        return {"warmup_iters": warmup, "nu_clip": self.nu_clip, **{name: getattr(self, name) for name in names}}

    # ---- attaching -------------------------------------------------------------------------------------------

    def attach(self, trainer: Any, pl_module: Any, stage: str) -> None:
        refuse_after_weight_averaging(trainer, self)
        self.keep(when_built(pl_module, partial(self._replace, pl_module)))
        self.keep(Handle(self._release))

    def _replace(self, pl_module: nn.Module) -> None:
        powernorm_model(pl_module, self.targets, self.exclude, self.group_num, **self._options())
        self.layers = select_norms(pl_module, self.targets, self.exclude)
        for layer in self.layers.values():  # one that was a PowerNorm before follows this callback too
            vars(layer).update(self._options())

    def _release(self) -> None:
        for layer in self.layers.values():
            layer.padding_mask = layer.loss_scale = None

    def on_sanity_check_start(self, trainer: Any, pl_module: Any) -> None:
        self._warn_untrained(False)

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        self._warn_untrained(True)

    def _warn_untrained(self, warn: bool) -> None:
        for layer in self.layers.values():
            layer.warn_untrained = warn

    # ---- training --------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not any(layer.training for layer in self.layers.values()):
            rank_zero_warn(
                "All PowerNorm layers are in eval mode, which Lightning keeps: their statistics will stay at their "
                "start. A model from from_pretrained() or a checkpoint needs .train() before fit."
            )
        if self.warmup_iters == "auto":
            if self._resolved is None or trainer.global_step == 0:
                self._resolved = scheduler_warmup(trainer)
            for layer in self.layers.values():
                layer.warmup_iters = self._resolved

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        mask = batch.get(self.padding_key) if isinstance(batch, Mapping) and self.padding_key else None
        padding = mask == 0 if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        # asked for in the public way that does not wait for the device
        scale = None if scaler is None else scaler.scale(torch.ones((), device=pl_module.device))
        for layer in self.layers.values():
            layer.padding_mask, layer.loss_scale = padding, scale

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self._release()
        largest = torch.cat([layer.ema_gz for layer in self.layers.values()]).abs().max()
        pl_module.log(f"{self.slug}/ema_gz_absmax", largest)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        for layer in self.layers.values():
            layer.check_finite()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        first = next(iter(self.layers.values()))
        if first.training and first.mode == "power" and int(first.iters) <= first.warmup_iters:
            rank_zero_warn(
                f"Training ended in PowerNorm's warm-up ({int(first.iters)} forwards, warmup_iters="
                f"{first.warmup_iters}): it never used the running statistics that inference uses. Lower warmup_iters."
            )

    # ---- state and report ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"warmup_iters": self._resolved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resolved = state_dict["warmup_iters"]

    def matched(self, module: Any) -> list[str]:
        """Names of the norms that were replaced."""
        return list(self.layers)

    def report(self) -> dict[str, Any]:
        """Each layer's groups and running statistics.

        Raises:
            ConfigurationError: before any fit.
        """
        if not self.layers:
            raise ConfigurationError("report() needs a fit: nothing was replaced yet.")
        return {
            "warmup_iters": next(iter(self.layers.values())).warmup_iters,
            "layers": {name: _row(layer) for name, layer in self.layers.items()},
            "after": {"name": "PowerNorm"},
        }

    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite: a tiny vision transformer."""
        kwargs = {"warmup_iters": 4}
        return ContractExample(
            kwargs=kwargs,
            module=_tiny_vit_classifier,
            rebuild=lambda module: powernorm_model(module, **kwargs),
            bad={
                "warmup_iters": [-1, 0.5, "soon"],
                "group_num": [0, 3, "heads"],
                "alpha_fwd": [0.0, 1.0],
                "alpha_bwd": [0.0, 1.0, float("nan")],
                "eps": [0.0, -1.0],
                "group_eps": [0.0, -1.0],
                "backward_scale": "forward",
                "mode": "batch",
                "mask_backward": "yes",
                "sync": 1,
                "nu_clip": [0.0, -1.0],
                "targets": ["no.such.layer", 3],
                "exclude": "no.such.layer",
                "padding_key": 3,
            },
        )


def _tiny_vit_classifier() -> Any:
    from timm.models import VisionTransformer

    from effdl.tasks.image import ImageClassifier

    vit = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    return ImageClassifier(vit, num_classes=3)


def _row(layer: PowerNorm) -> dict[str, Any]:
    low, high = layer.running_phi.aminmax()
    return {
        "features": layer.num_features,
        "groups": layer.group_num,
        "iters": int(layer.iters),
        "phi_min": float(low),
        "phi_max": float(high),
        "ema_gz_absmax": float(layer.ema_gz.abs().max()),
    }


def scheduler_warmup(trainer: Any) -> int:
    """Training forwards during the warm-up of the Trainer's first learning-rate scheduler.

    Known: transformers' ``get_..._schedule_with_warmup``, ``OneCycleLR``, a ``LinearLR`` or ``ConstantLR`` alone or
    first in a ``SequentialLR``, and any scheduler with one of the ``WARMUP_ATTRIBUTES``.

    Raises:
        ConfigurationError: there is no scheduler, or it does not tell.
    """
    configs = trainer.lr_scheduler_configs
    length = _warmup_length(configs[0].scheduler) if configs else None
    if length is None:
        which = type(configs[0].scheduler).__name__ if configs else "no scheduler"
        raise ConfigurationError(
            f"warmup_iters='auto' is not valid: expected a scheduler that tells its warm-up, found {which}. Give "
            "warmup_iters as a number of training forwards."
        )
    steps = length * configs[0].frequency
    if configs[0].interval == "epoch":
        steps *= steps_per_epoch(trainer)
    check(math.isfinite(steps), "warmup_iters", "auto", "an epoch of known length where the scheduler counts epochs")
    return round(steps * trainer.accumulate_grad_batches)


def _warmup_length(scheduler: Any) -> int | None:
    """Warm-up in the scheduler's own steps; ``None`` where it does not tell."""
    if isinstance(scheduler, SequentialLR):
        return scheduler._milestones[0] if isinstance(scheduler._schedulers[0], (LinearLR, ConstantLR)) else None
    if isinstance(scheduler, (LinearLR, ConstantLR)):
        return scheduler.total_iters
    if isinstance(scheduler, OneCycleLR):
        return round(scheduler._schedule_phases[0]["end_step"]) + 1
    lambdas = getattr(scheduler, "lr_lambdas", [])
    told = [getattr(function, "keywords", {}).get("num_warmup_steps") for function in lambdas]
    told += [getattr(scheduler, name, None) for name in WARMUP_ATTRIBUTES]
    return next((length for length in told if isinstance(length, int)), None)

"""reste on a Trainer: binary layers whose gradient anneals from the identity to sign, and bits at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from effdl.callbacks._quantized_network import install, network_prefix, thaw
from effdl.callbacks._quantized_training import QuantizedTrainingCallback
from effdl.compression._reste_bits import signs_record
from effdl.compression._reste_relu import (
    advice,
    check_reordering,
    keep_relu_first,
    relu_first_norms,
    relus_before,
    reorder_relus,
    restore_relus,
)
from effdl.compression.reste import (
    BINARY,
    Binary,
    Scale,
    ZeroSign,
    binary_layers,
    binary_weight,
    candidates,
    check_numbers,
    check_settings,
    estimating_error,
    gradient_stability,
    make_binary,
    make_plain,
    o_schedule,
    set_power,
)
from effdl.core.contract import ContractExample
from effdl.core.errors import ConfigurationError, check
from effdl.core.export import product
from effdl.core.paper import Paper
from effdl.core.quantizers import QuantizedWeight
from effdl.core.select import Targets, Weight, select_modules
from effdl.core.steps import Handle
from effdl.core.surgery import refuse_after_weight_averaging


class ReSTECallback(QuantizedTrainingCallback):
    """Trains 1-bit weights and activations with the rectified straight-through estimator (Wu et al. 2023).

    Chosen layers compute ``conv(sign(x), alpha sign(W))``; the parameters stay the latent float weights. Backward, sign
    has the slope of ``|z|^(1/o)``: o grows from 1 (the clipped identity) towards ``o_end``, which lowers the estimating
    error and raises the gradients' variance; both are logged. At the end the network holds one bit a weight.

    Checkpoints hold ``alpha sign(W)`` under the original names and the latent weights beside. With 1-bit activations
    they mean the same network only in a model that ``compression.reste.binarize`` made binary; with
    ``activations=False`` in the bare model. Works with any optimizer and precision, accumulation and DDP (with few
    examples a GPU use ``sync_batchnorm=True``). Cost: a dozen elementwise passes over weights and inputs; on 32x32
    images a step of ResNet-18 takes 1.6 times as long.

    It fails where a ReLU feeds a binary layer: all signs are +1 then, and a warning names the place; put the BatchNorm
    behind the ReLU (conv, ReLU, BatchNorm, as in the paper's code), which ``reorder_relu=True`` does for ResNets of
    timm and torchvision and in an ``nn.Sequential``. Grouped convolutions lose most. The paper trains with SGD 0.1,
    momentum 0.9, weight decay 1e-4 for hundreds of epochs.

    Args:
        o_end: >= 1, never quite reached.
        schedule: of o over epochs: ``"cosine"`` (paper), ``"linear"``, ``"constant"`` (o_end from the start).
        total_epochs: E of the schedule; ``None``: the Trainer's ``max_epochs``.
        activations: the inputs of the layers too (1W/1A); ``False``: 1W/32A.
        scale: alpha of the whole ``"layer"``, or of each output ``"channel"``.
        detach_scale: no gradient through alpha.
        t, m: the gradient ends at t > m, and is constant below m > 0.
        zero_sign: sign(0) is +1 (``"plus"``), or 0 as in the official code (``"zero"``).
        pad_value: of binary convolutions' borders: 0 (the code), -1 or 1.
        reorder_relu: where a ReLU feeds a binary layer, move it before the BatchNorm in front of it, that of the branch
            where it follows a residual sum; between two layers without a BatchNorm it goes. Names and parameters stay,
            the function does not: train from scratch, and rebuild with ``binarize(model, reorder_relu=True)``.
        targets, exclude: layers by name glob or type; default every Linear, Conv1d and Conv2d but for the first, the
            last, and those in a part called "downsample" or "shortcut".

    Raises:
        ConfigurationError: an argument outside its range; nothing matched; a layer of another class; NaN or infinite
            weights; a run of unknown length without ``total_epochs``; a callback that holds weights at zero; listed
            after a ``WeightAveraging``; with ``reorder_relu`` a ReLU in a layout that is not known.

    Logs ``reste/o`` per epoch, and ``reste/estimating_error``, ``reste/gradient_stability`` and ``reste/dead_fraction``
    (of latent weights beyond t) whenever the Trainer logs.

    Example::

        from effdl.callbacks import ReSTECallback

        callback = ReSTECallback(o_end=3.0)
        Trainer(max_epochs=200, callbacks=[callback]).fit(module, data)
        print(callback.report()["bits_per_weight"])
    """

    paper = Paper(
        slug="reste",
        title="Estimator Meets Equilibrium Perspective: A Rectified Straight Through Estimator for Binary Neural "
        "Networks Training",
        authors=("Wu, Xiao-Ming", "Zheng, Dian", "Liu, Zuhao", "Zheng, Wei-Shi"),
        year=2023,
        arxiv="2308.06689",
        venue="ICCV 2023",
    )

    def __init__(
        self,
        o_end: float = 3.0,
        schedule: Literal["cosine", "linear", "constant"] = "cosine",
        total_epochs: int | None = None,
        activations: bool = True,
        scale: Scale = "layer",
        detach_scale: bool = False,
        t: float = 1.5,
        m: float = 0.1,
        zero_sign: ZeroSign = "plus",
        pad_value: float = 0,
        reorder_relu: bool = False,
        targets: Targets = None,
        exclude: Targets = None,
    ) -> None:
        check_numbers(o_end, schedule, total_epochs)
        check(isinstance(activations, bool), "activations", activations, "True or False")
        check_settings(scale, detach_scale, t, m, zero_sign, pad_value)
        check_reordering(reorder_relu, activations)
        self.reorder_relu = reorder_relu
        self.o_end, self.schedule, self.total_epochs = o_end, schedule, total_epochs
        self.activations, self.scale, self.detach_scale = activations, scale, detach_scale
        self.t, self.m, self.zero_sign, self.pad_value = t, m, zero_sign, pad_value
        self.settings = Binary(activations, scale, detach_scale, t, m, zero_sign, float(pad_value))
        self.epochs, self.o = total_epochs, 1.0
        # no teacher here, and one group for a tensor or a row
        self.check_shared(None, None, 1.0, 0.0, "batchmean", None, True, targets, exclude)

    # ---- binary layers -----------------------------------------------------------------------------------------

    def _chosen(self, pl_module: Any) -> list[Weight]:
        if self.targets is None and self.exclude is None:
            layers = candidates(pl_module)
        else:
            default = candidates(pl_module).values() if self.targets is None else ()
            layers = select_modules(pl_module, self.targets, self.exclude, tuple(BINARY))
            layers = {n: m for n, m in layers.items() if self.targets is not None or any(m is d for d in default)}
        check(bool(layers), "targets", self.targets, "a Linear, Conv1d or Conv2d between the first and the last")
        for name, layer in layers.items():
            fix = f"exclude={name!r} leaves it as it is."
            check(type(layer) in BINARY, f"the layer {name}", type(layer).__name__, "Linear, Conv1d or Conv2d", fix)
        return [Weight(f"{name}.weight", layer, "weight") for name, layer in layers.items()]

    def _before_attaching(self, trainer: Any, pl_module: Any, chosen: list[Weight]) -> None:
        refuse_after_weight_averaging(trainer, self)  # layers get a buffer, which its copy would not have
        network, names = product(pl_module), _inside(pl_module, [weight.name for weight in chosen])
        if self.reorder_relu:
            moved = reorder_relus(network, names)
            self._changes.append(Handle(lambda: restore_relus(network, moved)))
        elif self.activations:
            for relu, layer in relus_before(network, names):
                rank_zero_warn(f"{advice(relu, layer)} reorder_relu=True moves the ReLU where it can.")
        self._relu_first = relu_first_norms(network)
        for weight in chosen:
            if getattr(weight.module, "groups", 1) > 1:
                rank_zero_warn(f"{weight.name}: grouped convolutions are known to lose most when binary.")
            if not bool(weight.data.any()):
                rank_zero_warn(f"{weight.name} is all zero: its alpha is 0, and it stays silent.")

    def _attach_weight(self, pl_module: Any, weight: Weight) -> list[Handle]:
        layer = weight.module
        make_binary(layer, self.settings)
        return [Handle(lambda: make_plain(layer))]

    def _seen(self, name: str, raw: Tensor, points: Tensor | None) -> Tensor:
        return binary_weight(raw, 1.0, self.settings)

    def _record(self, name: str, raw: Tensor, points: Tensor | None) -> QuantizedWeight:
        return signs_record(raw, self.scale)

    def _install(self, pl_module: Any, records: dict[str, QuantizedWeight]) -> None:
        if self.reorder_relu:
            reorder_relus(product(pl_module), _inside(pl_module, list(records)))
        for name in records:
            layer = pl_module.get_submodule(name.removesuffix(".weight"))
            if type(layer) in BINARY:
                make_binary(layer, self.settings)
        install(pl_module, records)

    def _thaw(self, pl_module: Any) -> bool:
        held = thaw(pl_module)
        for layer in binary_layers(pl_module).values():
            make_plain(layer)
        return held

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        keep_relu_first(product(pl_module), self._relu_first)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        if stage == "fit" and self.finished is not None:
            keep_relu_first(product(pl_module), self._relu_first)

    # ---- the power -----------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.epochs = self.epochs or self.total_epochs or trainer.max_epochs
        if self.schedule != "constant" and (self.epochs is None or self.epochs < 1):
            raise ConfigurationError("total_epochs: the run has no max_epochs; give the number of epochs o grows over.")

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        share = min(trainer.current_epoch, max(self.epochs or 1, 1))
        self.o = o_schedule(share, max(self.epochs or 1, 1), self.o_end, self.schedule)
        set_power(pl_module, self.o)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if batch_idx == 0:
            pl_module.log("reste/o", self.o)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        every = trainer.log_every_n_steps or 0
        if not every or (trainer.global_step + 1) % every or not self.weights:
            return
        with torch.no_grad():
            weights = [weight.module._parameters["weight"] for weight in self.weights.values()]
            grads = [w.grad for w in weights if w.grad is not None]
            beyond = sum((w.abs() > self.t).sum() for w in weights) / sum(w.numel() for w in weights)
            pl_module.log("reste/estimating_error", sum(estimating_error(w, self.o) for w in weights))
            pl_module.log("reste/dead_fraction", beyond)
            if grads:
                pl_module.log("reste/gradient_stability", sum(gradient_stability(g) for g in grads))

    # ---- state ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "epochs": self.epochs, "o": self.o}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.epochs, self.o = state_dict["epochs"], state_dict["o"]

    def _begin(self) -> None:
        super()._begin()
        self.epochs, self.o = self.total_epochs, 1.0
        self._relu_first: dict[str, type] = {}

    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite."""

        def rebuild(module: nn.Module) -> nn.Module:
            from effdl.compression.reste import binarize

            return binarize(module)

        return ContractExample(
            kwargs={"total_epochs": 4},
            rebuild=rebuild,
            bad={
                "o_end": [0.5, float("nan")],
                "schedule": "exponential",
                "total_epochs": [0, 2.5],
                "activations": "yes",
                "scale": "row",
                "detach_scale": 1,
                "t": [0, -1.0],
                "m": [0, 2.0],
                "zero_sign": "minus",
                "pad_value": 0.5,
                "reorder_relu": "yes",
                "targets": ["no.such.layer", 3],
                "exclude": "no.such.layer",
            },
            zeros_stay=False,
        )


def _inside(pl_module: Any, weights: list[str]) -> list[str]:
    """Of weights in the LightningModule, the names of their layers in its network."""
    prefix = network_prefix(pl_module)
    return [name.removeprefix(prefix).removesuffix(".weight") for name in weights]

"""polycom on a Trainer: when layers are replaced, what is logged, what a checkpoint says about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from effdl.architectures.polycom import PolyNorm, PolyReLU, polynomial
from effdl.architectures.polycom_models import describe, no_decay_groups, polycom_model, polynomials
from effdl.callbacks._base import MethodCallback
from effdl.core.checkpoint import fold_checkpoints
from effdl.core.contract import ContractExample
from effdl.core.errors import ConfigurationError, check, check_integer
from effdl.core.paper import Paper
from effdl.core.select import Targets, check_targets
from effdl.core.surgery import count_parameters, refuse_after_weight_averaging, when_built

__all__ = ["PolyComCallback", "no_decay_groups"]


class PolyComCallback(MethodCallback):
    """Replaces the activations of MLP blocks by learned polynomials (Zhuo et al., ICLR 2025, eq. 3 and 4).

    In ``setup``, before optimizers exist: every ReLU, GELU or SiLU between the projections of a feed-forward block
    becomes a :class:`~effdl.architectures.polycom.PolyNorm` or ``PolyReLU`` with 4 scalars, and a gated MLP (SwiGLU)
    becomes a plain one of equal parameters. The architecture changes on purpose and stays changed:
    ``polycom_model(model, ...)`` with the same arguments rebuilds it, and checkpoints load into that strictly. Works
    with any precision, accumulation, DDP, ``torch.compile``.

    Made for training from scratch. Only ReLU nets convert without loss: ``kind="polyrelu", init="relu"``. Cost: at
    dense-LLM width below 1 % of the operations, more in time where layers are small. It fails with large
    pre-activations (PolyReLU cubes them: usual 0.02 init, a modest learning rate, AdamW or clipping; it warns when
    their RMS in the first batch is above 5). ``no_decay_groups(module, weight_decay)`` keeps weight decay off the
    coefficients; the callback never edits an optimizer.

    Args:
        kind: ``"polynorm"`` (powers, each normalised over the hidden vector) or ``"polyrelu"`` (powers of ReLU).
        order: highest power, 1..8.
        init: ``"third"``: equal coefficients of sum 1; ``"relu"`` (PolyReLU): exactly ReLU.
        norm, eps, dim: of PolyNorm: ``"rms"`` or ``"l2"``, added to the mean square, the hidden dimension (1: NCHW).
        checkpoint: keep only the input for the backward pass, not the powers.
        match_params: give an ungated MLP of width f the width 3f/2 (rounded to a multiple of 8) and new weights;
            ``False`` keeps f and its up- and down-projection, a third fewer parameters.
        targets, exclude: activations or what contains them, by name glob or type; default those of MLP blocks.
        seed: of the new weights that ``match_params`` needs.

    Raises:
        ConfigurationError: an argument out of range; nothing matched; a gated MLP of unknown layout; listed after
            ``WeightAveraging``; resumed from a checkpoint with other polynomials.

    Logs ``polycom/parameter_delta`` once and the coefficients, ``polycom/LAYER/a3`` ..., after each epoch.

    Example::

        from effdl.callbacks import PolyComCallback

        polycom = PolyComCallback(kind="polynorm", exclude="lm_head")
        Trainer(callbacks=[polycom]).fit(module, data)
        print(polycom.report()["layers"])
    """

    paper = Paper(
        slug="polycom",
        title="Polynomial Composition Activations: Unleashing the Dynamics of Large Language Models",
        authors=("Zhuo, Zhijian", "Wang, Ya", "Zeng, Yutao", "Li, Xiaoqing", "Zhou, Xun", "Ma, Jinwen"),
        year=2025,
        arxiv="2411.03884",
        venue="International Conference on Learning Representations",
    )

    def __init__(
        self,
        kind: Literal["polynorm", "polyrelu"] = "polynorm",
        order: int = 3,
        init: Literal["third", "relu"] = "third",
        norm: Literal["rms", "l2"] = "rms",
        eps: float = 1e-6,
        dim: int = -1,
        checkpoint: bool = True,
        match_params: bool = True,
        targets: Targets = None,
        exclude: Targets = None,
        seed: int = 0,
    ) -> None:
        self.kind, self.order, self.init, self.norm, self.eps, self.dim = kind, order, init, norm, eps, dim
        self.checkpoint, self.match_params = checkpoint, match_params
        self.targets, self.exclude, self.seed = targets, exclude, seed
        polynomial(**self._options())
        check(isinstance(match_params, bool), "match_params", match_params, "True or False")
        check_targets("targets", targets)
        check_targets("exclude", exclude)
        check_integer("seed", seed, 0)
        self.parameters: tuple[int, int] | None = None  # of the module, before and after
        self._layers: dict[str, PolyReLU | PolyNorm] = {}

    def _options(self) -> dict[str, Any]:
        names = ("kind", "order", "init", "norm", "eps", "dim", "checkpoint")
        return {name: getattr(self, name) for name in names}

    # ---- surgery ---------------------------------------------------------------------------------------------

    def attach(self, trainer: Any, pl_module: Any, stage: str) -> None:
        refuse_after_weight_averaging(trainer, self)
        self.keep(when_built(pl_module, lambda: self._convert(pl_module)))
        self.keep(fold_checkpoints(pl_module, self.slug, lambda _: describe(pl_module), self._compare(pl_module)))

    def _convert(self, pl_module: Any) -> None:
        done = pl_module.__dict__.get("_effdl_polycom", [])
        if self.state_key not in done:  # setup runs for fit, and again for test
            before = count_parameters(pl_module)
            old = polynomials(pl_module)
            polycom_model(pl_module, self.targets, self.exclude, self.match_params, self.seed, **self._options())
            self.parameters = before, count_parameters(pl_module)
            pl_module._effdl_polycom = [*done, self.state_key]
            self._layers = {name: layer for name, layer in polynomials(pl_module).items() if name not in old}
        self._layers = self._layers or polynomials(pl_module)

    def _compare(self, pl_module: Any) -> Callable[[dict, dict], None]:
        def compare(state: dict[str, Any], saved: dict[str, Any]) -> None:
            here = describe(pl_module)
            for name, settings in saved.items():
                if name in here and here[name] != settings:  # the shapes agree, so only this would notice
                    raise ConfigurationError(
                        f"The checkpoint's {name} is {settings}, this run's is {here[name]}: give the same arguments."
                    )

        return compare

    # ---- logging ---------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.parameters is not None:
            pl_module.log(f"{self.slug}/parameter_delta", float(self.parameters[1] - self.parameters[0]))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 0 and batch_idx == 0 and self.kind == "polyrelu":
            self._rms: dict[str, torch.Tensor] = {}
            self._hooks = [layer.register_forward_pre_hook(self._measure(name)) for name, layer in self._layers.items()]
            self.keep(self._hooks)

    def _measure(self, name: str) -> Callable[[nn.Module, tuple], None]:
        seen = self._rms

        def hook(_layer: nn.Module, args: tuple) -> None:
            seen[name] = args[0].detach().float().square().mean().sqrt()

        return hook

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        hooks, self._hooks = getattr(self, "_hooks", []), []
        for handle in hooks:
            handle.remove()
        large = {name: f"{float(rms):.3g}" for name, rms in self._rms.items() if float(rms) > 5} if hooks else {}
        if large:
            rank_zero_warn(
                f"PolyReLU cubes its input, and pre-activations start with an RMS of {large}: expect divergence. Use "
                "weights of standard deviation 0.02, a norm before the MLP, or kind='polynorm'."
            )

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log_dict(
            {
                f"{self.slug}/{name}/{a}": value.clone()
                for name, layer in self._layers.items()
                for a, value in coefficients(layer).items()
            }
        )

    # ---- report ----------------------------------------------------------------------------------------------

    def matched(self, module: Any) -> list[str]:
        """Names of the polynomial activations."""
        return list(self._layers)

    def report(self) -> dict[str, Any]:
        """Parameters before and after, and the coefficients of each layer.

        Raises:
            ConfigurationError: before any setup.
        """
        if self.parameters is None:
            raise ConfigurationError("report() needs a fit: nothing was replaced yet.")
        layers = {name: {a: float(v) for a, v in coefficients(layer).items()} for name, layer in self._layers.items()}
        return {
            "parameter_delta": self.parameters[1] - self.parameters[0],
            "layers": layers,
            "before": {"name": "stock", "parameters": self.parameters[0]},
            "after": {"name": self.kind},
        }

    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite."""
        return ContractExample(
            kwargs={},
            bad={
                "kind": "polygelu",
                "order": [0, 9, 2.0],
                "init": ["relu", "zero"],
                "norm": "l1",
                "eps": [0.0, -1e-6, float("nan")],
                "dim": [1.5, "last"],
                "checkpoint": "yes",
                "match_params": "yes",
                "targets": ["no.such.layer", 3],
                "exclude": "no.such.layer",
                "seed": [-1, 0.5],
            },
            module=_tiny_vit_classifier,
            rebuild=polycom_model,
        )


def coefficients(layer: PolyReLU | PolyNorm) -> dict[str, torch.Tensor]:
    """``{"a3": ..., "a2": ..., "a1": ..., "a0": ...}``, scalars."""
    names = [f"a{p}" for p in range(layer.order, 0, -1)]
    return {**dict(zip(names, layer.weight.detach())), "a0": layer.bias.detach()[0]}


def _tiny_vit_classifier() -> Any:
    from timm.models import VisionTransformer

    from effdl.tasks.image import ImageClassifier

    return ImageClassifier(
        VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=10)
    )

"""smooth-diffusion: a diffusion model whose images change steadily as its noise does (arXiv 2312.04410).

Fine-tuning with a penalty on the spread of ``r = || d <x0_hat, Delta y> / d eps ||``, the length by which the one-step
estimate's change is pulled back to the noise, around its running mean: the path-length regulariser of StyleGAN2, put
on one diffusion step. Interpolation, inversion and editing gain; reach for it before such work.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from effdl.core.adapters import add_lora, fold_lora, lora_layers, save_lora, unfold_lora
from effdl.core.capture import uncompiled
from effdl.core.checkpoint import MODEL_STATES, fold_into
from effdl.core.contract import ContractExample
from effdl.core.errors import ConfigurationError, check, check_integer, check_number
from effdl.core.paper import Paper
from effdl.core.random import generator
from effdl.core.select import NothingMatched, Targets, check_targets
from effdl.core.steps import require_automatic_optimization
from effdl.core.surgery import when_built
from effdl.diffusion._draws import Draws
from effdl.diffusion._smooth_diffusion_paths import draw_paths, interpolate
from effdl.diffusion._smooth_diffusion_tap import (
    DenoiserCall,
    find_network,
    find_schedule,
    is_compiled,
    require_first,
    tap_denoiser,
    twice_differentiable,
)
from effdl.diffusion._smooth_diffusion_variation import (
    RunningVariation,
    denoiser_variations,
    interpolated_images,
    interpolation_std,
    noise_variations,
    path_distances,
    slerp,
    variation_penalty,
    weighted_direction,
)
from effdl.tasks.diffusion import DiffusionModule

__all__ = [
    "SmoothDiffusionMixin", "SmoothDiffusionModule", "denoiser_variations", "interpolate", "interpolated_images",
    "interpolation_std", "noise_variations", "path_distances", "slerp", "variation_penalty", "weighted_direction",
]  # fmt: skip

SLUG = "smooth-diffusion"
DIRECTION = 1404  # stream of the random directions: no other use of (seed, epoch, batch) draws the same
PAPER = Paper(
    slug="smooth-diffusion",
    title="Smooth Diffusion: Crafting Smooth Latent Spaces in Diffusion Models",
    authors=("Guo, Jiayi", "Xu, Xingqian", "Pu, Yifan", "Ni, Zanlin", "Wang, Chaofei", "Vasu, Manushree",
             "Song, Shiji", "Huang, Gao", "Shi, Humphrey"),
    year=2024,
    arxiv="2312.04410",
    venue="CVPR",
)  # fmt: skip


class SmoothDiffusionMixin:
    """Adds the step-wise variation penalty to the loss of any noise-predicting diffusion module (Guo et al. 2024).

    ``class Mine(SmoothDiffusionMixin, YourModule)``: your ``training_step`` computes its own loss and calls its network
    once on ``(x_t, timesteps, ...)``; the penalty reads that call, differentiates it by its noisy input, and adds
    ``lambda_reg mean (r - a)^2``. Any input but this one stays as it is, and so does the loss for ``lambda_reg=0``.
    With ``rank`` a LoRA of the attention trains and everything else is frozen: the checkpoint's ``state_dict`` is the
    stock architecture's with the adapter folded in, adapter and running mean lie in
    ``checkpoint["effdl"]["smooth-diffusion"]``, and a resumed run goes on exactly.

    The network is differentiated twice: more than twice the time and memory of a plain step; ``every`` spares it. In
    such steps attention runs through torch's math kernel and compiled parts run eagerly; gradient checkpointing must
    be ``use_reentrant=False``. In several processes the mean of r is that of all.

    Args:
        lambda_reg: weight of the penalty, >= 0; 0 leaves the second backward out altogether.
        decay: of the running mean a, in (0, 1].
        every: take the penalty in every so-manieth optimizer step, that many times as heavy.
        rank: of the LoRA (extra ``peft``); ``None`` trains all weights.
        targets, exclude: layers of the network that get the LoRA; ``None``: to_q, to_k, to_v, to_out of its attention.
        network: name of the submodule that predicts; ``None``: ``model``, ``unet``, ``transformer``, ... or the only
            child.

    A scheduler with ``alphas_cumprod`` must be an attribute of the module (or override ``diffusion_schedule``); what
    the network predicts is ``self.prediction``, else the scheduler's ``prediction_type``.

    Suggested: the paper trains a rank 8 LoRA of SD 1.5 with AdamW 1e-4 (weight decay 1e-2), gradients clipped at 1
    (near t = T the estimate divides by 0.07), batch 96 at 512 px for 30,000 steps on LAION aesthetics 6.5+.
    Fails when: lambda_reg blurs images (watch the module's own loss); attention is xformers' or flash.

    Logs ``smooth-diffusion/penalty``, ``/variation`` (mean r of the batch) and ``/mean_variation`` (a).

    Raises:
        ConfigurationError: a value out of range, manual optimisation, no network or schedule, no second derivative.
        MissingExtraError: ``rank`` without peft.

    Example::

        class Mine(SmoothDiffusionMixin, MyDiffusion): ...

        module = Mine(rank=8)
        Trainer(max_steps=30_000, gradient_clip_val=1.0).fit(module, data)
        module.save_lora("smooth")                  # pipe.load_lora_weights("smooth")
    """

    paper: ClassVar[Paper] = PAPER

    def __init__(
        self,
        *args: Any,
        lambda_reg: float = 1.0,
        decay: float = 0.01,
        every: int = 1,
        rank: int | None = 8,
        targets: Targets = None,
        exclude: Targets = None,
        network: str | None = None,
        **kwargs: Any,
    ) -> None:
        check_number("lambda_reg", lambda_reg, 0, float("inf"), closed="[)")
        check_number("decay", decay, 0, 1, closed="(]")
        check_integer("every", every, 1)
        check(network is None or isinstance(network, str), "network", network, "a submodule's name or None")
        if rank is not None:
            check_integer("rank", rank, 1, fix="None trains all weights.")
        for name, value in (("targets", targets), ("exclude", exclude)):
            check_targets(name, value)
        super().__init__(*args, **kwargs)
        self.lambda_reg, self.every = lambda_reg, every
        self.rank, self.targets, self.exclude, self.smooth_network = rank, targets, exclude, network
        self.variation = RunningVariation(decay)
        if rank is not None:
            when_built(self, self._smooth_lora)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        require_first(cls, SmoothDiffusionMixin)

    def _smooth_denoiser(self) -> nn.Module:
        return find_network(self, self.smooth_network)

    def _smooth_lora(self) -> None:
        network = uncompiled(self._smooth_denoiser())
        if not lora_layers(network):
            try:
                add_lora(network, self.rank, self.targets, self.exclude)
            except NothingMatched as error:  # a typo, no reason to wait
                raise ConfigurationError(str(error)) from None

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            require_automatic_optimization(self, "SmoothDiffusionMixin")

    def on_train_start(self) -> None:
        super().on_train_start()
        self._smooth_denoiser()
        self.diffusion_schedule()
        self.variation.restart()
        if self.lambda_reg and is_compiled(self):
            rank_zero_warn("compiled code is not differentiable twice: smooth-diffusion's training steps run eagerly.")

    def diffusion_schedule(self) -> tuple[Tensor, str]:
        """``(alpha-bar [T], prediction)``; override it where the module keeps no scheduler with ``alphas_cumprod``."""
        return find_schedule(self)

    def training_step(self, batch: Any, *args: Any) -> Any:
        step = super().training_step
        rest = args[: len(inspect.signature(step).parameters) - 1]
        if not self.lambda_reg or self.global_step % self.every:
            return step(batch, *rest)
        return self._smooth_step(lambda: step(batch, *rest), *args)

    @torch.compiler.disable
    def _smooth_step(self, step: Callable[[], Any], batch_idx: int = 0, *_: Any) -> Any:
        with twice_differentiable(), tap_denoiser(self._smooth_denoiser()) as calls:
            output = step()
            if output is None:  # the module skips this batch
                return None
            penalty = self._smooth_penalty(calls, batch_idx)
        loss = output["loss"] if isinstance(output, Mapping) else output
        loss = loss + self.lambda_reg * self.every * penalty
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        # checkpointed blocks run again in here
        with twice_differentiable() if self.lambda_reg else contextlib.nullcontext():
            super().backward(loss, *args, **kwargs)

    def _smooth_penalty(self, calls: list[DenoiserCall], batch_idx: int) -> Tensor:
        call = next((call for call in reversed(calls) if call.output.requires_grad), None)
        if call is None:
            raise ConfigurationError("training_step did not call the network, with gradients, as network(x_t, t, ...).")
        draws = Draws(getattr(self, "seed", None) or 0, self.current_epoch, batch_idx, call.x_t.device)
        schedule, noise = self.diffusion_schedule(), draws.rows(len(call.x_t), call.normal, DIRECTION)
        r = denoiser_variations(call.x_t, call.output, call.timesteps, *schedule, noise)
        penalty, mean = self.variation.penalty(r, (self.current_epoch, batch_idx) if self._trainer else None)
        values = {"penalty": penalty.detach(), "variation": mean, "mean_variation": self.variation.mean}
        self.log_dict({f"{SLUG}/{name}": value for name, value in values.items()}, batch_size=len(r))
        return penalty

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        fold_into(checkpoint, SLUG, lambda state: fold_lora(self, state))
        checkpoint["effdl"][SLUG]["mean_variation"] = self.variation.mean.cpu().clone()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint.get("effdl", {}).get(SLUG, {})
        for key in MODEL_STATES:
            if key in checkpoint:
                unfold_lora(self, checkpoint[key], kept.get(key, {}))
        self.variation.mean = kept.get("mean_variation", self.variation.mean)
        super().on_load_checkpoint(checkpoint)

    def save_lora(self, folder: str | Path) -> Path:
        """Write the adapter alone, as ``pipe.load_lora_weights(folder)`` opens it; there is none where rank is None."""
        check(self.rank is not None, "rank", None, "a rank: without a LoRA the whole model is what was trained")
        network = uncompiled(self._smooth_denoiser())
        return save_lora({"transformer" if "Transformer" in type(network).__name__ else "unet": network}, folder)

    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite."""
        from effdl.diffusion._smooth_diffusion_example import example

        return example()


class SmoothDiffusionModule(SmoothDiffusionMixin, DiffusionModule):
    """The stock diffusion task under smooth-diffusion: arguments of both, as ``effdl run smooth-diffusion`` uses it.

    Logs ``val/istd`` after each validation: the spread of adjacent images' distances along ``istd_pairs`` noise
    interpolations (10 points, DDIM with 20 steps) under the conditions of the first validation batch; lower is
    smoother (Lightning's sanity check takes that of the start). ``figures/interpolation.png`` shows the paths.

    Args:
        istd_pairs: paths for ``val/istd``, 200 network calls each; 0 leaves it out. Below 20 it is noisy.

    Example::

        module = SmoothDiffusionModule("digits-pipeline", rank=8, optimizer=lambda p: torch.optim.AdamW(p, 1e-4))
        Trainer(max_steps=1000, gradient_clip_val=1.0).fit(module, ImageData("digits", image_size=8, channels=1))
        module.save_pretrained("smooth")         # a stock pipeline, and the adapter beside it
        images = interpolate(module, *torch.randn(2, 4, 1, 8, 8))         # (4, 10, 1, 8, 8)
    """

    def __init__(self, *args: Any, istd_pairs: int = 4, **kwargs: Any) -> None:
        check_integer("istd_pairs", istd_pairs, 0)
        super().__init__(*args, **kwargs)
        self.istd_pairs = istd_pairs
        self._smooth_shown: dict[str, Tensor] | None = None
        self._smooth_before: dict[str, Any] = {}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if batch_idx == 0:
            self._smooth_shown = {name: rows[: self.istd_pairs] for name, rows in self.condition(batch).items()}

    def _smooth_paths(self, pairs: int) -> Tensor:
        """Images of the first paths; their conditions are those of the first validation batch."""
        condition = {name: rows[:pairs] for name, rows in (self._smooth_shown or {}).items()}
        pairs = min([pairs, *map(len, condition.values())])
        noise = torch.randn(2, self.istd_pairs, *self._shape(), generator=generator(self.seed))
        return interpolate(self, *noise[:, :pairs], condition=condition)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if not self.istd_pairs or self._smooth_shown is None:
            return
        value = interpolation_std(self._smooth_paths(self.istd_pairs))
        if not self.trainer.sanity_checking:
            self.log("val/istd", value, sync_dist=True)
        elif self.global_step == 0:
            self._smooth_before = {"name": "before", "metrics": {"val/istd": value.item()}}

    def report(self) -> dict[str, Any]:
        """``val/istd`` of the weights that training started from, for the run's report."""
        return {"before": self._smooth_before} if self._smooth_before else {}

    def figures(self, folder: Path) -> None:
        """``interpolation.png``: one path per row."""
        if self.istd_pairs and self._smooth_shown is not None:
            draw_paths(self._smooth_paths(min(self.istd_pairs, 8)), folder / "interpolation.png")

    def save_pretrained(self, folder: str | Path) -> None:
        """The stock pipeline with the adapter folded in, and the adapter's own file beside it."""
        super().save_pretrained(folder)
        if self.rank is not None:
            self.save_lora(folder)

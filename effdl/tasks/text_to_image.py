"""The stock text-to-image task: Stable Diffusion 1.x, 2.x, XL and 3, trained whole or through an adapter."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from effdl.core import adapters
from effdl.core.checkpoint import MODEL_STATES, fold_into
from effdl.core.errors import ConfigurationError, check, check_integer, check_number
from effdl.core.noise import add_noise, expand, prediction_of
from effdl.core.pictures import image_grid, log_picture, save_picture
from effdl.tasks import tiny
from effdl.tasks._denoising import Denoising, logit_normal, min_snr_weight, prompts_of, stream
from effdl.tasks._diffusers import TEXT_KEYS
from effdl.tasks._encode_cache import EncodeCache
from effdl.tasks.diffusion import DiffusionModule

TINY = {
    "tiny": tiny.tiny_stable_diffusion,
    "tiny-2": tiny.tiny_stable_diffusion_2,
    "tiny-xl": tiny.tiny_stable_diffusion_xl,
    "tiny-3": tiny.tiny_stable_diffusion_3,
}
TINY_TEXT = 32  # tokens: tiny tokenizers spell
SHOWN = 8  # prompts of a sample grid, where none are given


class TextToImageModule(DiffusionModule):
    """Training of a text-to-image pipeline's U-Net or transformer; its text encoders and VAE stay frozen.

    The loss is the squared error of what the network predicts: noise, v or image for Stable Diffusion 1.x, 2.x and XL,
    the velocity eps - x_0 of a straight line at logit-normal times for 3. Noise, times and dropped prompts are
    functions of (seed, epoch, batch, process). Encoders are in no checkpoint, no optimizer, no reducer and no average.

    Args:
        model: a diffusers pipeline, its local folder or its hub id; ``"tiny"``, ``"tiny-2"``, ``"tiny-xl"``,
            ``"tiny-3"``: small random ones of each kind for 32x32 images.
        noise_scheduler: a diffusers scheduler to train with; default the pipeline's own.
        prediction: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``; default as the scheduler says. None for flows.
        min_snr: gamma of the min-SNR weighting (Hang et al., 2303.09556; theirs is 5); ``None``: all times count alike.
            Under a v-prediction with zero terminal SNR the last time then counts nothing.
        prompt_dropout: share of the training prompts that are replaced by what the pipeline guides away from, in
            [0, 1]; guidance needs some. 0.1 is common.
        gradient_checkpointing: activations are computed again in the backward pass: less memory, a third more time.
        rank: of low-rank adapters (extra ``peft``) in place of training all weights; ``None``: all weights. To train a
            sparse part of them instead, add ``SaRACallback``.
        targets: layers with adapters, as globs; ``None``: the projections of all attentions.
        cache: a folder where latents and prompts are encoded once, before the first step; then the encoders leave the
            device. Wants data with ``index`` and images that are not augmented. One pass per data set and encoder.
        prompts: of the sample grid that is drawn at every validation (at the end of every epoch, where there is none)
            and sent to the loggers as ``samples``; ``None``: the first validation batch's.
        steps, guidance: of those samples; ``steps=0`` draws none.
        seed: of noise, times, dropped prompts and adapters.
        optimizer, scheduler: as LightningCLI injects them; default Adam 1e-3, right for the tiny ones. AdamW with 1e-5
            (all weights) or 1e-4 (adapters) is usual for full-size pipelines.

    Batches are dicts with ``image`` (B, 3, H, W) float in [-1, 1] and ``prompt`` (B strings); or, in place of the
    prompt, the network's own arguments (``encoder_hidden_states`` (B, L, D), ``text_embeds`` or ``pooled_projections``
    (B, E)). Stable Diffusion XL takes ``time_ids`` (B, 6) too: original size, corner of the crop, size; without them
    images count as whole.

    Checkpoints hold the network in its stock architecture, adapters folded in (and kept beside, for the exact resume).

    Raises:
        ConfigurationError: an argument out of range, a model that is no such pipeline, a batch without text.
        HubError: a hub id that neither the hub nor the cache gives.

    Example::

        module = TextToImageModule.from_pretrained("sd-legacy/stable-diffusion-v1-5", rank=8, cache="cache")
        Trainer(max_epochs=10, precision="bf16-mixed").fit(module, CaptionedImageData("my-photos"))
        module.save_lora("adapter")                     # pipeline.load_lora_weights("adapter")
        module.save_pretrained("pipeline")              # StableDiffusionPipeline.from_pretrained("pipeline")
    """

    def __init__(
        self,
        model: DiffusionPipeline | str = "tiny",
        noise_scheduler: SchedulerMixin | None = None,
        prediction: Literal["epsilon", "v_prediction", "sample"] | None = None,
        min_snr: float | None = None,
        prompt_dropout: float = 0.1,
        gradient_checkpointing: bool = False,
        rank: int | None = None,
        targets: list[str] | None = None,
        cache: str | Path | None = None,
        prompts: list[str] | None = None,
        steps: int = 25,
        guidance: float = 3.0,
        seed: int = 0,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        if min_snr is not None:
            check_number("min_snr", min_snr, 0, float("inf"), closed="()", fix="The paper's gamma is 5.")
        check_number("prompt_dropout", prompt_dropout, 0, 1)
        check_integer("steps", steps, 0)
        check_number("guidance", guidance, 0, float("inf"), closed="[)")
        check(targets is None or rank is not None, "targets", targets, "None without a rank")
        listed = prompts is None or (isinstance(prompts, list) and all(isinstance(p, str) for p in prompts))
        check(listed, "prompts", prompts, "a list of strings")
        check(
            isinstance(model, (str, DiffusionPipeline)), "model", type(model).__name__, "a pipeline, folder or hub id"
        )
        self.min_snr = min_snr  # before the scheduler is looked at
        made = TINY[model](text_length=TINY_TEXT) if isinstance(model, str) and model in TINY else model
        super().__init__(made, noise_scheduler, prediction, seed, optimizer, scheduler)
        check(self.surroundings.takes_prompts, "model", type(self.surroundings.pipeline or self.model).__name__,
              "a Stable Diffusion 1.x, 2.x, XL or 3 pipeline")  # fmt: skip
        self.prompt_dropout, self.prompts, self.steps, self.guidance = prompt_dropout, prompts, steps, guidance
        self.rank = rank
        if rank is not None:
            adapters.add_lora(self.model, rank, targets, seed=seed)
        if gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self._cache = None if cache is None else EncodeCache(cache, self.surroundings)
        if cache is not None:  # of this instance alone: Lightning remarks on it wherever there is a data module
            self.on_before_batch_transfer = self._from_cache
        self._shown: list[str] = []
        self._picture: Tensor | None = None

    def _schedule(self, given: Any, prediction: str | None) -> tuple[Any, str]:
        if not type(given).__name__.startswith("FlowMatch"):
            return super()._schedule(given, prediction)
        check(prediction is None, "prediction", prediction, "None for a flow")
        check(self.min_snr is None, "min_snr", self.min_snr, "None for a flow")
        dynamic = given.config.get("use_dynamic_shifting", False)
        check(not dynamic, "noise_scheduler", "use_dynamic_shifting=True", "a schedule with a fixed shift")
        return type(given).from_config(given.config), "velocity"

    # What a step computes

    @property
    def timestep_shift(self) -> float:
        """Alpha by which :meth:`draw_times` shifts: a flow's scheduler says it."""
        return self.noise_scheduler.config.shift if self.prediction == "velocity" else 1.0

    def draw_times(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        if self.prediction != "velocity":
            return super().draw_times(count, generator)
        device = self.device if generator is None else generator.device
        return logit_normal(count, self.timestep_shift, device, generator)

    def _times(self, count: int, generator: torch.Generator | None) -> Tensor:
        if self.prediction != "velocity":
            return super()._times(count, generator)
        return self.noise_scheduler.config.num_train_timesteps * self.draw_times(count, generator)

    def _noised(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        if self.prediction != "velocity":
            return super()._noised(x0, noise, timesteps)
        s = expand(timesteps / self.noise_scheduler.config.num_train_timesteps, x0)
        return add_noise(x0, noise, 1 - s, s), prediction_of(x0, noise, 1 - s, s, "velocity")

    def compute_loss(self, outputs: Denoising, batch: Any) -> Tensor:
        """Mean squared error, weighted by :func:`min_snr_weight` where ``min_snr`` is given."""
        if self.min_snr is None:
            return super().compute_loss(outputs, batch)
        error = (outputs.prediction.float() - outputs.target.float()).square().flatten(1).mean(1)
        table = self.noise_scheduler.alphas_cumprod
        weight = min_snr_weight(table, outputs.timesteps, self.prediction, self.min_snr)
        return self.mean_loss(weight * error)

    def latents(self, batch: Any, generator: torch.Generator | None = None) -> Tensor:
        if isinstance(batch, Mapping) and "moments" in batch:
            return self.surroundings.draw_latents(*batch["moments"].unbind(1), generator)
        return super().latents(batch, generator)

    def condition(self, batch: Any) -> dict[str, Tensor]:
        """The network's text, of a batch's prompts or as the batch has it; empty where the prompt was ``dropped``."""
        batch = batch if isinstance(batch, Mapping) else {}
        text = {key: batch[key] for key in TEXT_KEYS if key in batch}
        if "encoder_hidden_states" not in text:
            if (prompts := prompts_of(batch)) is None:
                raise ConfigurationError(f"the network wants text: 'prompt' in the batch, which has {sorted(batch)}.")
            text |= self._encoded(prompts)
        if "dropped" in batch:
            for key, empty in self.surroundings.unconditional(self.device).items():
                text[key] = torch.where(expand(batch["dropped"], text[key]), empty.to(text[key].dtype), text[key])
        return text

    def _encoded(self, prompts: list[str]) -> dict[str, Tensor]:
        found = None if self._cache is None else self._cache.text(prompts)
        if found is None:
            return self.surroundings.encode_prompts(prompts, self.device)
        return {name: value.to(self.device) for name, value in found.items()}

    def _unconditional(self, count: int) -> dict[str, Tensor]:
        empty = self.surroundings.unconditional(self.device)
        return {name: value.expand(count, *value.shape[1:]) for name, value in empty.items()}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.prompt_dropout and isinstance(batch, Mapping):
            key = "encoder_hidden_states"
            count = len(batch[key] if key in batch else prompts_of(batch) or ())
            draw = stream([self.seed, 4, batch_idx, self.global_rank, self.current_epoch], "cpu")
            dropped = torch.rand(count, generator=draw) < self.prompt_dropout
            batch = {**batch, "dropped": dropped.to(self.device, non_blocking=True)}
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self._shown = self.prompts or (prompts_of(batch) or [])[:SHOWN]
            self._show()  # here, where an average of the weights is in its place

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Samples (B, C, H, W) in [-1, 1] for the prompts of the batch, with ``steps`` and ``guidance``."""
        text, seed = self.condition(batch), [self.seed, 3, batch_idx, self.global_rank]
        return self._sample(len(text["encoder_hidden_states"]), text, seed, self.steps or 25, self.guidance)

    def on_train_epoch_end(self) -> None:
        if not self.trainer.val_dataloaders or self.trainer.limit_val_batches == 0:
            self._shown = self.prompts or []
            self._show()

    # Samples

    def _show(self) -> None:
        if not self._shown or not self.steps or not self.trainer.is_global_zero:
            return
        images = self.sample(prompts=self._shown, steps=self.steps, guidance=self.guidance, seed=self.seed)
        self._leave()
        self._picture = image_grid(images, len(self._shown))
        log_picture(self.trainer, "samples", self._picture)

    def figures(self, folder: Path) -> None:
        """``samples.png``: the last sample grid."""
        if self._picture is not None:
            save_picture(self._picture, Path(folder) / "samples.png")

    # Encoded once

    def on_train_start(self) -> None:
        if self._cache is None:
            return
        validation = self.trainer.val_dataloaders or []
        validation = validation if isinstance(validation, (list, tuple)) else [validation]
        loaders = {"train": self.trainer.train_dataloader}
        loaders |= {f"validation {i}": loader for i, loader in enumerate(validation)}
        prompts = ["", *(self.prompts or [])]
        self._cache.fill(loaders, prompts, self.device, self.trainer.strategy.barrier)
        self._leave()

    def _leave(self) -> None:
        """With everything in the cache the encoders make room."""
        if self._cache is not None and self._cache.texts is not None:
            self.surroundings.to("cpu")

    def on_fit_start(self) -> None:
        if self._cache is not None:
            self._cache.close()

    def _from_cache(self, batch: Any, dataloader_idx: int) -> Any:
        """Before the batch goes to the device, so that its positions are read without waiting for that."""
        name = "train" if self.trainer.training else f"validation {dataloader_idx}"
        fitting = self.trainer.state.fn == "fit"  # the cache is that of its loaders
        return self._cache.encoded(name, batch) if fitting and name in self._cache.images else batch

    # Adapters

    def save_lora(self, folder: str | Path) -> Path:
        """Write the adapter alone, which ``pipeline.load_lora_weights(folder)`` opens.

        Raises:
            ConfigurationError: the module trains all weights (``rank=None``).
        """
        check(self.rank is not None, "rank", None, "a rank: without adapters use save_pretrained")
        return adapters.save_lora({self.surroundings.role: self.model}, folder)

    def save_pretrained(self, folder: str | Path) -> None:
        """The pipeline's folder, adapters folded into the weights; the adapter alone goes into ``lora/``."""
        self._save(adapters.merged(self.model), folder)
        if self.rank is not None:
            self.save_lora(Path(folder) / "lora")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.rank is not None:
            fold_into(checkpoint, "lora", partial(adapters.fold_lora, self))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = checkpoint.get("effdl", {}).get("lora", {})
        for key in MODEL_STATES if self.rank is not None else ():
            if key in checkpoint:
                checkpoint[key] = copy.copy(checkpoint[key])
                adapters.unfold_lora(self, checkpoint[key], kept.get(key, {}))

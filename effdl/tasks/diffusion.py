"""The stock diffusion task: diffusers networks and pipelines, trained to predict noise, velocity or image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from effdl.core.batch import unpack
from effdl.core.errors import ConfigurationError, check, check_choice, check_integer, check_number
from effdl.core.mean_loss import MeanLoss
from effdl.core.solvers import sample_loop
from effdl.tasks._denoising import Denoising, diffuse, prompts_of, stream
from effdl.tasks._diffusers import call, class_tokens, put_together, save, take_apart
from effdl.tasks._optimizers import optimizer_and_scheduler

PREDICTIONS = ("epsilon", "v_prediction", "sample")


class DiffusionModule(MeanLoss, LightningModule):
    """Denoising training of a diffusers network, unconditional, on class labels or on text; in pixels or in latents.

    Noise and timesteps are functions of (seed, epoch, batch, process): a resumed run goes on exactly, processes draw
    different ones, and the global random stream is not touched. For validation they are the same in every epoch. For an
    exponential moving average add Lightning's ``EMAWeightAveraging``; sampling and saving then use the average.

    Args:
        model: a ``UNet2DModel``, a ``UNet2DConditionModel`` or a whole pipeline; a local folder of either, or a
            pipeline's hub id; a configuration as in ``config.json``; ``"tiny"``: an unconditional UNet for 32x32 colour
            images. A pipeline's VAE and text encoder stay frozen and out of the checkpoint.
        noise_scheduler: a diffusers scheduler with ``alphas_cumprod``; default the pipeline's own, else 1000-step DDPM.
        prediction: what the network predicts: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``; default as the noise
            scheduler says.
        seed: of the noise and the timesteps.
        optimizer, scheduler: of the training, as LightningCLI injects them; default Adam 1e-3, constant rate.

    Batches are dicts (or tuples ``(x, y)``) with ``image`` (B, C, H, W) float in [-1, 1]; for a class-conditional
    network ``label`` (B,) int; for a text-conditional one ``input_ids`` (B, L), ``prompt`` (list of strings) or
    ``encoder_hidden_states`` (B, L, D); where there is no text encoder, ``label`` makes a one-hot token (B, 1, D).

    Raises:
        ConfigurationError: a model or a scheduler that does not fit, a batch without the network's condition.

    Example::

        module = DiffusionModule({"sample_size": 32, "block_out_channels": [64, 128], "down_block_types": [...], ...})
        Trainer(max_epochs=10, callbacks=[EMAWeightAveraging(decay=0.999)]).fit(module, ImageData("digits"))
        images = module.sample(16, steps=50)
        module.save_pretrained("my-pipeline")        # DDPMPipeline.from_pretrained("my-pipeline")
    """

    def __init__(
        self,
        model: nn.Module | dict[str, Any] | str = "tiny",
        noise_scheduler: SchedulerMixin | None = None,
        prediction: Literal["epsilon", "v_prediction", "sample"] | None = None,
        seed: int = 0,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        check_choice("prediction", prediction, (None, *PREDICTIONS))
        check_integer("seed", seed, 0)
        network, own, self.surroundings = take_apart(model)
        self.model = network.train()
        self.noise_scheduler, self.prediction = self._schedule(noise_scheduler or own or DDPMScheduler(), prediction)
        self.seed, self.optimizer, self.scheduler = seed, optimizer, scheduler

    def _schedule(self, given: Any, prediction: str | None) -> tuple[Any, str]:
        """A scheduler of the module's own, and what the network predicts."""
        fix = "Flow matching has modules of its own."
        named = "a diffusers scheduler with alphas_cumprod"
        check(hasattr(given, "alphas_cumprod"), "noise_scheduler", type(given).__name__, named, fix)
        prediction = prediction or given.config.get("prediction_type", "epsilon")
        check_choice("prediction", prediction, PREDICTIONS)
        return type(given).from_config(given.config, prediction_type=prediction), prediction

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> DiffusionModule:
        """The module around a saved pipeline: a local folder or a hub id; ``kwargs`` are the constructor's."""
        return cls(str(name), **kwargs)

    @property
    def pipeline(self) -> DiffusionPipeline:
        """A diffusers pipeline around the trained network (not a copy): the one it came from, else a DDPMPipeline."""
        pipeline = put_together(self.surroundings, self.model, self.noise_scheduler)
        if pipeline is None:
            raise ConfigurationError(f"a {type(self.model).__name__} alone makes no pipeline: train it inside of one.")
        return pipeline

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the pipeline's folder, which diffusers' ``from_pretrained`` and ``DiffusionModule(folder)`` open."""
        self._save(self.model, folder)

    def _save(self, network: nn.Module, folder: str | Path) -> None:
        save(self.surroundings, network, self.noise_scheduler, folder)

    def forward(self, noisy: Tensor, timesteps: Tensor, **condition: Tensor) -> Tensor:
        """The network's prediction (B, C, H, W) from ``noisy`` (B, C, H, W) at ``timesteps`` (B,)."""
        return call(self.model, noisy, timesteps, condition, self.surroundings.factor)

    def compute_loss(self, outputs: Denoising, batch: Any) -> Tensor:
        """Mean squared error (DDPM, eq. 14); the hook that methods with a loss of their own override."""
        return self.mean_loss(F.mse_loss(outputs.prediction.float(), outputs.target.float(), reduction="none"))

    def denoise(self, batch: Any, generator: torch.Generator | None = None) -> Denoising:
        """Add noise at random timesteps and predict the target; all draws come from ``generator``."""
        x0 = self.latents(batch, generator)
        timesteps = self._times(len(x0), generator)
        noise = torch.randn(x0.shape, device=x0.device, generator=generator)
        noisy, target = self._noised(x0, noise, timesteps)
        condition = self.condition(batch)
        prediction = self(noisy.to(self.dtype), timesteps, **condition)
        return Denoising(prediction, target, noisy, timesteps, condition)

    def latents(self, batch: Any, generator: torch.Generator | None = None) -> Tensor:
        """What is denoised: the images of a batch, encoded where there is a VAE."""
        return self.surroundings.encode_images(unpack(batch).inputs, generator)

    def draw_times(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Training times ``[count]`` in [0, 1], noise at 1: uniform. What ``TimestepSamplerCallback`` replaces."""
        steps = self.noise_scheduler.config.num_train_timesteps
        device = self.device if generator is None else generator.device
        return (torch.randint(steps, (count,), device=device, generator=generator) + 0.5) / steps

    def _times(self, count: int, generator: torch.Generator | None) -> Tensor:
        """Labels of drawn times: i is drawn as often as the density has mass in [i / T, (i + 1) / T)."""
        steps = self.noise_scheduler.config.num_train_timesteps
        return (steps * self.draw_times(count, generator)).long().clamp(max=steps - 1)

    def _noised(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        # moved once and kept, as diffusers' own schedulers do
        self.noise_scheduler.alphas_cumprod = self.noise_scheduler.alphas_cumprod.to(x0.device)
        return diffuse(x0, noise, timesteps, self.noise_scheduler.alphas_cumprod, self.prediction)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, "train", [self.seed, 0, batch_idx, self.global_rank, self.current_epoch])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._step(batch, "val", [self.seed, 1, batch_idx, self.global_rank])

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._step(batch, "test", [self.seed, 2, batch_idx, self.global_rank])

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Samples (B, C, H, W) in [-1, 1] for the conditions of the batch."""
        condition = self.condition(batch)
        return self._sample(len(unpack(batch).inputs), condition, [self.seed, 3, batch_idx, self.global_rank])

    def _step(self, batch: Any, stage: str, seed: list[int]) -> Tensor:
        outputs = self.denoise(batch, stream(seed, self.device))
        train = stage == "train"
        loss = self.compute_loss(outputs, batch) if train else DiffusionModule.compute_loss(self, outputs, batch)
        bar, size = stage != "test", len(outputs.noisy)
        self.log(f"{stage}/loss", loss, prog_bar=bar, on_step=train, on_epoch=True, batch_size=size)
        return loss

    def condition(self, batch: Any) -> dict[str, Tensor]:
        """The network's keyword arguments besides image and time: from the batch's labels, tokens or prompts."""
        config = getattr(self.model, "config", {})
        condition = {}
        if config.get("num_class_embeds") is not None:
            labels = unpack(batch).labels
            if labels is None:
                raise ConfigurationError("the network wants class labels, and the batch has no 'label'.")
            condition["class_labels"] = labels
        if config.get("cross_attention_dim") is not None:
            condition["encoder_hidden_states"] = self._text(batch)
        return condition

    def _text(self, given: Any) -> Tensor:
        batch = given if isinstance(given, Mapping) else {}
        if "encoder_hidden_states" in batch:
            return batch["encoder_hidden_states"]
        prompts = prompts_of(batch)
        if "input_ids" in batch or prompts is not None:
            ids = batch["input_ids"] if "input_ids" in batch else self.surroundings.tokens(prompts)
            return self.surroundings.encode_tokens(ids.to(self.device))
        if self.surroundings.text_encoder is None and (labels := unpack(given).labels) is not None:
            width = self.model.config.get("encoder_hid_dim") or self.model.config.cross_attention_dim
            return class_tokens(labels, width).to(self.dtype)
        wanted = "'prompt', 'input_ids' or 'encoder_hidden_states'"
        raise ConfigurationError(f"the network wants text: {wanted} in the batch, which has {sorted(batch)}.")

    def _unconditional(self, count: int) -> dict[str, Tensor]:
        """What guidance leads away from."""
        return {"encoder_hidden_states": self._text({"prompt": [""] * count})}

    def sample(
        self,
        count: int = 1,
        steps: int = 50,
        labels: Sequence[int] | Tensor | None = None,
        prompts: Sequence[str] | str | None = None,
        guidance: float = 1.0,
        noise_scheduler: SchedulerMixin | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Draw images.

        Args:
            count: how many; with ``labels`` or a list of ``prompts`` as many as these.
            steps: network evaluations (for most schedulers).
            labels: classes (B,), for a class-conditional network.
            prompts: one for all or one per image, for a text-conditional pipeline.
            guidance: classifier-free: ``out(empty) + guidance (out(prompt) - out(empty))``; 1 is off.
            noise_scheduler: another diffusers scheduler to sample with, as
                ``DDIMScheduler.from_config(module.noise_scheduler.config)``; default the training one.
            seed: of the starting noise.

        Returns:
            Images (B, C, H, W), float32, about [-1, 1].

        Raises:
            ConfigurationError: a missing or superfluous condition, an illegal number.
        """
        check_integer("count", count, 1)
        check_integer("steps", steps, 1)
        check_number("guidance", guidance, 0, float("inf"), closed="[)")
        batch: dict[str, Any] = {"image": ()}
        if labels is not None:
            batch["label"] = torch.as_tensor(labels, device=self.device)
        if prompts is not None:
            batch["prompt"] = [prompts] * count if isinstance(prompts, str) else list(prompts)
        condition = self.condition(batch)
        takes_text = "encoder_hidden_states" in condition
        takes_labels = "class_labels" in condition or (takes_text and prompts is None)
        check(labels is None or takes_labels, "labels", labels, "None: this network knows no classes")
        check(prompts is None or takes_text, "prompts", prompts, "None: this network knows no text")
        check(guidance == 1 or prompts is not None, "guidance", guidance, "1 without prompts")
        count = len(next(iter(condition.values()), range(count)))
        return self._sample(count, condition, [seed], steps, guidance, noise_scheduler)

    @torch.no_grad()
    def _sample(
        self,
        count: int,
        condition: dict[str, Tensor],
        seed: Sequence[int],
        steps: int = 50,
        guidance: float = 1.0,
        scheduler: SchedulerMixin | None = None,
    ) -> Tensor:
        scheduler = scheduler or type(self.noise_scheduler).from_config(self.noise_scheduler.config)
        empty = condition
        if guidance != 1:
            empty = condition | self._unconditional(count)

        def predict(x: Tensor, t: Tensor) -> Tensor:
            x = x.to(self.dtype)
            out = self(x, t, **condition).float()
            if guidance == 1:
                return out
            without = self(x, t, **empty).float()
            return without + guidance * (out - without)

        generator = stream(seed, "cpu")  # the same image on every device
        noise = torch.randn(count, *self._shape(), generator=generator).to(self.device)
        flags = {module: module.training for module in self.model.modules()}
        self.model.eval()
        try:
            return self.surroundings.decode_images(sample_loop(predict, noise, scheduler, steps, generator))
        finally:
            for module, flag in flags.items():
                module.training = flag

    def _shape(self) -> tuple[int, int, int]:
        size = self.model.config.sample_size
        check(size is not None, "model", "sample_size=None", "a network whose configuration has a sample_size")
        height, width = (size, size) if isinstance(size, int) else size
        return self.model.config.in_channels, height, width

    def configure_optimizers(self) -> Any:
        return optimizer_and_scheduler(self, self.optimizer, self.scheduler)

"""The stock diffusion task: diffusers networks and pipelines, trained to predict noise, velocity or image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from effdl.core.batch import unpack
from effdl.core.errors import ConfigurationError, check, check_choice, check_integer, check_number
from effdl.core.noise import add_noise, alpha_sigma, prediction_of
from effdl.core.solvers import sample_loop
from effdl.tasks._diffusers import class_tokens, put_together, save, take_apart
from effdl.tasks._optimizers import optimizer_and_scheduler

PREDICTIONS = ("epsilon", "v_prediction", "sample")
PROMPT_KEYS = ("prompt", "caption", "text")


class Denoising(NamedTuple):
    """What a training step computes before its loss: the ``outputs`` of ``compute_loss``.

    ``prediction`` and ``target`` (B, C, H, W), ``noisy`` the network's input x_t, ``timesteps`` (B,) int, ``condition``
    its keyword arguments.
    """

    prediction: Tensor
    target: Tensor
    noisy: Tensor
    timesteps: Tensor
    condition: dict[str, Any] = {}


def diffuse(
    x0: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction: str
) -> tuple[Tensor, Tensor]:
    """``x_t = a x_0 + s eps`` with ``a^2 = alpha-bar_t = 1 - s^2`` (DDPM, eq. 4), and what is to be predicted from it.

    Args:
        x0, noise: (B, ...).
        timesteps: (B,) int.
        alphas_cumprod: alpha-bar, (T,).
        prediction: ``"epsilon"`` (eps), ``"sample"`` (x_0) or ``"v_prediction"`` (a eps - s x_0; Salimans & Ho 2022).

    Returns:
        ``(x_t, target)``, both (B, ...).

    Example::

        noisy, target = diffuse(images, torch.randn_like(images), t, DDPMScheduler().alphas_cumprod, "epsilon")
    """
    a, s = (value.to(x0.dtype) for value in alpha_sigma(alphas_cumprod, timesteps, x0))
    return add_noise(x0, noise, a, s), prediction_of(x0, noise, a, s, prediction)


class DiffusionModule(LightningModule):
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
        given = noise_scheduler or own or DDPMScheduler()
        fix = "Flow matching has modules of its own."
        named = "a diffusers scheduler with alphas_cumprod"
        check(hasattr(given, "alphas_cumprod"), "noise_scheduler", type(given).__name__, named, fix)
        self.prediction = prediction or given.config.get("prediction_type", "epsilon")
        check_choice("prediction", self.prediction, PREDICTIONS)
        self.noise_scheduler = type(given).from_config(given.config, prediction_type=self.prediction)
        self.seed, self.optimizer, self.scheduler = seed, optimizer, scheduler

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
        save(self.surroundings, self.model, self.noise_scheduler, folder)

    def forward(self, noisy: Tensor, timesteps: Tensor, **condition: Tensor) -> Tensor:
        """The network's prediction (B, C, H, W) from ``noisy`` (B, C, H, W) at ``timesteps`` (B,)."""
        output = self.model(noisy, timesteps, **condition)
        return output if isinstance(output, Tensor) else output[0]

    def compute_loss(self, outputs: Denoising, batch: Any) -> Tensor:
        """Mean squared error (DDPM, eq. 14); the hook that methods with a loss of their own override."""
        return F.mse_loss(outputs.prediction.float(), outputs.target.float())

    def denoise(self, batch: Any, generator: torch.Generator | None = None) -> Denoising:
        """Add noise at random timesteps and predict the target; all draws come from ``generator``."""
        images = unpack(batch).inputs
        x0 = self.surroundings.encode_images(images, generator)
        steps = self.noise_scheduler.config.num_train_timesteps
        timesteps = torch.randint(steps, (len(x0),), device=x0.device, generator=generator)
        noise = torch.randn(x0.shape, device=x0.device, generator=generator)
        # moved once and kept, as diffusers' own schedulers do
        self.noise_scheduler.alphas_cumprod = self.noise_scheduler.alphas_cumprod.to(x0.device)
        noisy, target = diffuse(x0, noise, timesteps, self.noise_scheduler.alphas_cumprod, self.prediction)
        condition = self.condition(batch)
        prediction = self(noisy.to(images.dtype), timesteps, **condition)
        return Denoising(prediction, target, noisy, timesteps, condition)

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
        inputs = unpack(batch).inputs
        outputs = self.denoise(batch, _generator(seed, inputs.device))
        train = stage == "train"
        loss = self.compute_loss(outputs, batch) if train else DiffusionModule.compute_loss(self, outputs, batch)
        bar, size = stage != "test", len(inputs)
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
        prompts = next((batch[key] for key in PROMPT_KEYS if key in batch), None)
        if "input_ids" in batch or prompts is not None:
            ids = batch["input_ids"] if "input_ids" in batch else self.surroundings.tokens(list(prompts))
            return self.surroundings.encode_tokens(ids.to(self.device))
        if self.surroundings.text_encoder is None and (labels := unpack(given).labels) is not None:
            width = self.model.config.get("encoder_hid_dim") or self.model.config.cross_attention_dim
            return class_tokens(labels, width).to(self.dtype)
        wanted = "'prompt', 'input_ids' or 'encoder_hidden_states'"
        raise ConfigurationError(f"the network wants text: {wanted} in the batch, which has {sorted(batch)}.")

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
            empty = condition | {"encoder_hidden_states": self._text({"prompt": [""] * count})}

        def predict(x: Tensor, t: Tensor) -> Tensor:
            x = x.to(self.dtype)
            out = self(x, t, **condition).float()
            if guidance == 1:
                return out
            without = self(x, t, **empty).float()
            return without + guidance * (out - without)

        generator = _generator(seed, "cpu")  # the same image on every device
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


def _generator(seed: Sequence[int], device: torch.device | str) -> torch.Generator:
    """A stream of its own for every (seed, epoch, batch, process)."""
    state = np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) >> 1)

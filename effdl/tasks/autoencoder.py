"""The first stage of a latent diffusion model: training of a pipeline's VAE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from effdl.core.batch import unpack
from effdl.core.distributed import all_reduce_sum
from effdl.core.errors import check, check_integer, check_number
from effdl.core.pictures import image_grid, log_picture, save_picture
from effdl.core.teacher import Frozen
from effdl.tasks._denoising import stream
from effdl.tasks._diffusers import put_together, take_apart
from effdl.tasks._optimizers import optimizer_and_scheduler
from effdl.tasks.text_to_image import TINY, TINY_TEXT

SHOWN = 8
COUNTED = 50  # batches whose latents set the scale


class AutoencoderModule(LightningModule):
    """Reconstruction training of the VAE of a pipeline; a tiny pipeline's knows nothing before.

    The loss is the mean absolute error of the image plus ``kl_weight`` times the KL divergence of latents' posterior
    from N(0, I), per latent entry (Rombach et al., 2112.10752, without their perceptual and adversarial terms). At the
    end the pipeline's scaling factor becomes one over the standard deviation of the latents, their mean its shift where
    it has one.

    Args:
        model: as of :class:`TextToImageModule`: a pipeline with a VAE, a folder, a hub id, ``"tiny"`` and its like.
        kl_weight: of the divergence, >= 0.
        seed: of the posterior's noise, a function of (seed, epoch, batch, process).
        optimizer, scheduler: as LightningCLI injects them; default Adam 1e-3.

    Batches have ``image`` (B, C, H, W) in [-1, 1]. Logged: ``train/loss``, ``val/loss`` (absolute error of the mean's
    reconstruction), and the first images beside their reconstructions as ``reconstructions``.

    Raises:
        ConfigurationError: a model without a VAE, an argument out of range.

    Example::

        first = AutoencoderModule("tiny")
        Trainer(max_epochs=10).fit(first, CaptionedImageData())
        first.save_pretrained("start")                       # TextToImageModule("start")
    """

    def __init__(
        self,
        model: DiffusionPipeline | str = "tiny",
        kl_weight: float = 1e-4,
        seed: int = 0,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        check_number("kl_weight", kl_weight, 0, float("inf"), closed="[)")
        check_integer("seed", seed, 0)
        made = TINY[model](text_length=TINY_TEXT) if isinstance(model, str) and model in TINY else model
        network, self.noise_scheduler, self.surroundings = take_apart(made)
        self.network = Frozen(network)  # on its way from one folder to the next
        vae = getattr(self.surroundings.pipeline, "vae", None)
        check(vae is not None, "model", type(made).__name__, "a pipeline with a VAE")
        self.model = vae.requires_grad_(True).train()
        self.kl_weight, self.seed = kl_weight, seed
        self.optimizer, self.scheduler = optimizer, scheduler
        self._picture: Tensor | None = None

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Any]:
        """Reconstructions (B, C, H, W) and the posterior; of its mean without a generator."""
        posterior = self.model.encode(images).latent_dist
        latents = posterior.mean
        if generator is not None:
            noise = torch.randn(latents.shape, device=latents.device, dtype=latents.dtype, generator=generator)
            latents = latents + posterior.std * noise
        return self.model.decode(latents).sample, posterior

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images = unpack(batch).inputs
        key = [self.seed, 5, batch_idx, self.global_rank, self.current_epoch]
        again, posterior = self(images, stream(key, self.device))
        error = F.l1_loss(again.float(), images.float())
        divergence = posterior.kl().float().mean() / posterior.mean[0].numel()
        loss = error + self.kl_weight * divergence
        self.log("train/loss", loss, prog_bar=True, on_step=True, on_epoch=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images = unpack(batch).inputs
        again, _ = self(images)
        error = F.l1_loss(again.float(), images.float())
        self.log("val/loss", error, prog_bar=True, on_epoch=True, batch_size=len(images), sync_dist=True)
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self._picture = image_grid(torch.cat((images[:SHOWN], again[:SHOWN].to(images.dtype))), len(images[:SHOWN]))
            log_picture(self.trainer, "reconstructions", self._picture)

    @torch.no_grad()
    def on_train_end(self) -> None:
        """The latents' scale (and shift), over the first training batches of all processes."""
        sums = torch.zeros(3, dtype=torch.float64)
        for number, batch in enumerate(self.trainer.train_dataloader):
            if number == COUNTED:
                break
            images = unpack(batch).inputs.to(self.device, self.model.dtype)
            mean = self.model.encode(images).latent_dist.mean.double().cpu()
            sums += torch.tensor([mean.numel(), mean.sum(), mean.square().sum()])
        sums = sums.to(self.device)
        all_reduce_sum(sums)
        count, total, square = sums.tolist()
        shifted = self.model.config.get("shift_factor") is not None
        shift = total / count if shifted else 0.0
        variance = square / count - shift**2
        self.model.register_to_config(scaling_factor=variance**-0.5, **({"shift_factor": shift} if shifted else {}))

    def save_pretrained(self, folder: str | Path) -> None:
        """The pipeline's folder, with the trained VAE in it."""
        pipeline = put_together(self.surroundings, self.network.module, self.noise_scheduler)
        pipeline.register_modules(vae=self.model)
        pipeline.save_pretrained(str(folder))

    def figures(self, folder: Path) -> None:
        """``reconstructions.png``: images of the last validation, and below them what the VAE makes of them."""
        if self._picture is not None:
            save_picture(self._picture, Path(folder) / "reconstructions.png")

    def configure_optimizers(self) -> Any:
        return optimizer_and_scheduler(self, self.optimizer, self.scheduler)

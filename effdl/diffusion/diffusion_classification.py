"""diffusion-classification: a frozen diffusion network as a representation learner.

The image is noised to one timestep, one intermediate block is read, and a small head learns the classes. Numbering of
blocks and the truncated forward: :mod:`effdl.diffusion._unet_blocks`; heads: :mod:`effdl.diffusion._feature_heads`; the
sweep over blocks and timesteps: :mod:`effdl.diffusion._feature_sweep`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from effdl.core.batch import unpack
from effdl.core.contract import ContractExample
from effdl.core.errors import ConfigurationError, check, check_integer
from effdl.core.paper import Paper
from effdl.core.teacher import Frozen
from effdl.diffusion._feature_extractor import DiffusionFeatureExtractor, input_size, no_prompt, warn_unless_signed
from effdl.diffusion._feature_heads import AttentionHead, PooledHead, make_head
from effdl.diffusion._feature_sweep import (
    TIMESTEPS,
    baseline_rows,
    check_timm,
    draw_sweep,
    first_images,
    probe_accuracy,
    search_blocks,
    told,
)
from effdl.tasks._denoising import stream
from effdl.tasks._diffusers import save, take_apart
from effdl.tasks._optimizers import optimizer_and_scheduler

__all__ = [
    "AttentionHead", "DiffusionFeatureExtractor", "DiffusionFeaturesModule", "PooledHead", "baseline_rows",
    "draw_sweep", "probe_accuracy", "search_blocks",
]  # fmt: skip


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """The paper's optimizer of the linear head: SGD 1e-2 without momentum."""
    return torch.optim.SGD(parameters, 1e-2)


class DiffusionFeaturesModule(LightningModule):
    """Trains a classifier head on the features of a diffusion network.

    Per batch: eps ~ N(0, I), fresh in training and at test; ``x_t = a_t x + s_t eps``; the network up to block b; head;
    cross-entropy. The network is frozen, in eval mode, and outside checkpoint, optimizer and DDP, unless ``fine_tune``.

    Args:
        model: the diffusion model: as :class:`DiffusionModule` takes it (network, pipeline, folder, hub id, config).
            A pipeline's VAE encodes the images; its text encoder gives the empty prompt.
        block: number (1-based), layer name, or a list of either whose maps are fused; ``None``: the first third of the
            decoder, the paper's 24 of 37. :meth:`DiffusionFeatureExtractor.blocks` lists them.
        timestep: in [0, T - 1], or a list to fuse. The paper: 90; up to 200 hardly worse, from 500 much worse.
        head: ``"linear"``, ``"mlp"``, ``"cnn"`` or ``"attention"``.
        pool: side of the pooled maps; ``None``: 2, and 16 for the attention head.
        num_classes: with ``effdl run`` linked to the data module's.
        head_kwargs: ``hidden`` (MLP widths), ``width`` (CNN), ``dim``, ``heads``, ``depth``, ``mlp_ratio``, ``norm``
            (attention: 1024, 8, 2, 4, "layer").
        feedback: DifFeed (2311.17921): decoder blocks, by number or name, that feed the encoder blocks mirroring them
            (1x1 convolution, batch norm, ReLU) before ``block`` is read in a second pass; the network stays frozen.
            The paper: [21, 24, 27, 30, 33, 36] of 37, attention, timestep 150. ``sync_batchnorm=True`` joins processes.
        fine_tune: also train the network's blocks up to b (those after it stay frozen); the paper's rate: 1e-3.
        null_class: for a class-conditional network, the class that was trained to mean "none".
        draws: at test, average the logits of so many noises.
        sweep: at the end of training, probe all blocks at some timesteps with so many training images, report the
            table and draw ``features.png``; 0: do not.
        baselines: timm models whose pooled features get the same probe, beside the pixels.
        pretrained_baselines: with the hub's weights, not random ones.
        noise_scheduler: with the ``alphas_cumprod`` that the network was trained with; ``None``: the model's own, else
            1000-step DDPM.
        seed: of the noise, a function of (seed, epoch, batch, process).
        optimizer, scheduler: as LightningCLI injects them; the paper: SGD 1e-2 (linear) or 5e-2 (attention), times 0.1
            every 7 of 28 epochs.

    Batches have images (B, C, H, W) in [-1, 1] and labels (B,). Logged: ``train/loss``, ``val/loss``, ``val/accuracy``.

    Suggested: pool 2 before pool 1; the attention head where data are many; sweep first. Costs: 0.4 to 0.6 of the
    network's forward per image; with feedback two forwards and a backward. Fails when: images are in [0, 1] or
    normalised otherwise (a warning says so).

    Raises:
        ConfigurationError: an argument out of range; a head that does not fit the feature maps.

    Example::

        module = DiffusionFeaturesModule("my-pipeline", timestep=50, pool=2)
        Trainer(max_epochs=28).fit(module, ImageData("digits"))
        module.save_pretrained("classifier")
    """

    paper: ClassVar[Paper] = Paper(
        slug="diffusion-classification",
        title="Diffusion Models Beat GANs on Image Classification",
        authors=(
            "Mukhopadhyay, Soumik", "Gwilliam, Matthew", "Agarwal, Vatsal", "Padmanabhan, Namitha",
            "Swaminathan, Archana", "Hegde, Srinidhi", "Zhou, Tianyi", "Shrivastava, Abhinav",
        ),
        year=2023,
        arxiv="2307.08702",
    )  # fmt: skip

    def __init__(
        self,
        model: nn.Module | dict[str, Any] | str = "tiny",
        block: int | str | list[int | str] | None = None,
        timestep: int | list[int] = 90,
        head: Literal["linear", "mlp", "cnn", "attention"] = "linear",
        pool: int | None = None,
        num_classes: int = 10,
        head_kwargs: dict[str, Any] | None = None,
        feedback: list[int | str] | None = None,
        fine_tune: bool = False,
        null_class: int | None = None,
        draws: int = 1,
        sweep: int = 0,
        baselines: Sequence[str] = (),
        pretrained_baselines: bool = False,
        noise_scheduler: SchedulerMixin | None = None,
        seed: int = 0,
        optimizer: OptimizerCallable = sgd,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        check_integer("num_classes", num_classes, 2)
        for name, value, least in (("draws", draws, 1), ("sweep", sweep, 0), ("seed", seed, 0)):
            check_integer(name, value, least)
        check(isinstance(fine_tune, bool), "fine_tune", fine_tune, "True or False")
        check(isinstance(pretrained_baselines, bool), "pretrained_baselines", pretrained_baselines, "True or False")
        self.pool = (16 if head == "attention" else 2) if pool is None else pool
        check_integer("pool", self.pool, 1)
        check_timm(baselines)
        network, own, self.surroundings = take_apart(model)
        self.noise_scheduler = noise_scheduler or own or DDPMScheduler()
        named = "a diffusers scheduler with alphas_cumprod"
        given = type(self.noise_scheduler).__name__
        check(hasattr(self.noise_scheduler, "alphas_cumprod"), "noise_scheduler", given, named)
        self.extractor = DiffusionFeatureExtractor(
            network, self.noise_scheduler.alphas_cumprod, _listed(block), _listed(timestep), null_class,
            no_prompt(network, self.surroundings), self.surroundings.factor,
        )  # fmt: skip
        size, times = input_size(network), len(self.extractor.timesteps)
        shapes = self.extractor.shapes(size)
        self.model = make_head(head, shapes, num_classes, times, self.pool, **(head_kwargs or {}))
        check(feedback is None or not fine_tune, "feedback", feedback, "None with fine_tune: its network is frozen")
        self.feedback = None if feedback is None else self.extractor.feed_back(feedback, size)
        self._hold(network, fine_tune)
        self.head, self.draws, self.sweep, self.seed = head, draws, sweep, seed
        self.baselines, self.pretrained_baselines = tuple(baselines), pretrained_baselines
        self.optimizer, self.scheduler = optimizer, scheduler
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self._rows, self._first = [], True

    def _hold(self, network: nn.Module, fine_tune: bool) -> None:
        self.fine_tune = fine_tune
        if not fine_tune:
            self.frozen = Frozen(network)
            return
        self.backbone = network.train().requires_grad_(True)
        for layer in self.extractor.layers_after():
            layer.requires_grad_(False)

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits ``[B, K]`` of images ``[B, C, H, W]`` in [-1, 1], of one noise."""
        return self.model(*self.features(images, generator))

    def features(self, images: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        """Feature maps fp32 ``[B, C, H, W]``, one per (timestep, block)."""
        learns = self.fine_tune or self.feedback is not None
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            if not self.fine_tune:
                self.frozen.on(images)
            return self.extractor(self.surroundings.encode_images(images, generator), generator)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = self._labelled(batch)
        if self._first:
            warn_unless_signed(images)
            self._first = False
        logits = self(images, stream([self.seed, 0, batch_idx, self.global_rank, self.current_epoch], images.device))
        loss = F.cross_entropy(logits, labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Probabilities ``[B, K]``."""
        return self._averaged(unpack(batch).inputs, [self.seed, 3, batch_idx, self.global_rank]).softmax(-1)

    def _evaluate(self, batch: Any, batch_idx: int, stage: str) -> None:
        images, labels = self._labelled(batch)
        logits = self._averaged(images, [self.seed, 1 + (stage == "test"), batch_idx, self.global_rank])
        self.val_accuracy.update(logits, labels)
        loss, size = F.cross_entropy(logits, labels), len(images)
        self.log(f"{stage}/loss", loss, prog_bar=stage == "val", sync_dist=True, batch_size=size)
        self.log(f"{stage}/accuracy", self.val_accuracy, prog_bar=stage == "val", on_epoch=True, batch_size=size)

    def _averaged(self, images: Tensor, seed: list[int]) -> Tensor:
        random = stream(seed, images.device)
        return torch.stack([self(images, random) for _ in range(self.draws)]).mean(0)

    def _labelled(self, batch: Any) -> tuple[Tensor, Tensor]:
        images, labels, _ = unpack(batch)
        if labels is None:
            raise ConfigurationError("the batch has no labels: expected a tuple (x, y) or a dict with 'label'.")
        return images, labels

    def configure_optimizers(self) -> Any:
        return optimizer_and_scheduler(self, self.optimizer, self.scheduler)

    def on_train_end(self) -> None:
        if self.sweep and self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            self._rows = self._sweep()

    def _sweep(self) -> list[dict[str, Any]]:
        """All blocks at some timesteps, and the baselines, on the first images of the loaders."""
        loaders = self.trainer.train_dataloader, self.trainer.val_dataloaders
        train, test = (first_images(loader, self.sweep, self.device) for loader in loaders)
        if train is None or test is None:
            return []
        if not self.fine_tune:
            self.frozen.on(self.device)
        with torch.inference_mode(False), torch.no_grad():
            latents = [(self.surroundings.encode_images(x), y) for x, y in (train, test)]
            rows = search_blocks(self.extractor, *latents, timesteps=self._times_to_try(), seed=self.seed)
            return [*rows, *baseline_rows(train, test, self.baselines, self.pretrained_baselines)]

    def _times_to_try(self) -> list[int]:
        last = self.noise_scheduler.config.num_train_timesteps - 1
        return sorted({min(t, last) for t in (*TIMESTEPS, *self.extractor.timesteps)})

    def report(self) -> dict[str, Any]:
        """What was read, and the sweep's best rows beside the baselines."""
        return {**self.record(), "blocks": len(self.extractor.blocks()), **told(self._rows)}

    def figures(self, folder: Path) -> None:
        """``features.png``: accuracy of the probe by block and timestep."""
        if found := [row for row in self._rows if "block" in row]:
            draw_sweep(found, folder / "features.png")

    def record(self) -> dict[str, Any]:
        """Where the features come from: goes into checkpoints and beside a saved head."""
        names = {number: name for number, _, name in self.extractor.blocks()}
        return {
            "block": list(self.extractor.wanted), "layer": [names[b] for b in self.extractor.wanted],
            "timestep": list(self.extractor.timesteps), "pool": self.pool, "head": self.head,
            "feedback": [] if self.feedback is None else list(self.feedback.pairs),
        }  # fmt: skip

    def save_pretrained(self, folder: str | Path) -> None:
        """``head.safetensors``, ``feedback.safetensors`` where there is one, ``features.json`` (block, timestep, pool,
        schedule) and, if it was trained along, the network as stock diffusers opens it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in {"head": self.model, "feedback": self.feedback}.items():
            if part is not None:
                weights = {key: value.contiguous().cpu() for key, value in part.state_dict().items()}
                save_file(weights, folder / f"{name}.safetensors")
        schedule = {k: v for k, v in self.noise_scheduler.config.items() if isinstance(v, (int, float, str, bool))}
        (folder / "features.json").write_text(json.dumps({**self.record(), "scheduler": schedule}, indent=2))
        if self.fine_tune:
            save(self.surroundings, self.backbone, self.noise_scheduler, folder)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.setdefault("effdl", {})["diffusion-classification"] = self.record()

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        saved = checkpoint.get("effdl", {}).get("diffusion-classification", self.record())
        for key, own in self.record().items():
            if key in ("block", "timestep", "feedback"):
                check(saved.get(key, own) == own, key, own, f"{saved.get(key)}, the checkpoint's")

    @classmethod
    def contract_example(cls) -> ContractExample:
        from effdl.diffusion._diffusion_classification_example import example

        return example()


def _listed(value: Any) -> Any:
    return value if value is None or isinstance(value, (list, tuple)) else [value]

"""rectified-flow-transformer: flow matching whose times favour the middle of the path, shifted by resolution (SD3).

Maths: densities and shift in :mod:`effdl.diffusion._timestep_densities`, the straight line and its loss in
:mod:`effdl.diffusion._flow`; normalised queries and keys: :func:`add_qk_norm`. The two-stream transformer itself is
diffusers' ``SD3Transformer2DModel``. Time here is the paper's and diffusers': data at t = 0, noise at t = 1.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from effdl.core.batch import unpack
from effdl.core.capture import evaluating
from effdl.core.contract import ContractExample
from effdl.core.errors import check, check_integer, check_number
from effdl.core.mean_loss import MeanLoss
from effdl.core.paper import Paper
from effdl.diffusion._denoiser import CONVENTIONS, TimeConvention, kind
from effdl.diffusion._draws import Draws
from effdl.diffusion._figures import draw_samples, first_rows, on_device
from effdl.diffusion._flow import Condition, Velocity, guided_velocity, rectified_flow_loss, wide
from effdl.diffusion._flow_schedulers import integrate, scheduler_of, sigma_grid
from effdl.diffusion._flux import FLUX
from effdl.diffusion._rectified_flow_transformer_conditions import (
    check_null,
    drop,
    empty,
    read_condition,
    text_layout,
)
from effdl.diffusion._rectified_flow_transformer_qk_norm import add_qk_norm
from effdl.diffusion._source import FlowSource
from effdl.diffusion._timestep_densities import (
    CosMap,
    LogitNormal,
    Mirrored,
    Mode,
    TimestepSampler,
    Uniform,
    check_shift,
    log_snr,
    loss_weight,
    resolution_shift,
    shift_time,
    timestep_sampler,
)
from effdl.tasks._optimizers import optimizer_and_scheduler

__all__ = [
    "CosMap", "LogitNormal", "Mirrored", "Mode", "RectifiedFlowModule", "TimestepSampler", "Uniform", "add_qk_norm",
    "integrate", "log_snr", "loss_weight", "resolution_shift", "shift_time", "sigma_grid", "timestep_sampler",
]  # fmt: skip

PAPER = Paper(
    slug="rectified-flow-transformer",
    title="Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
    authors=(
        "Esser, Patrick", "Kulal, Sumith", "Blattmann, Andreas", "Entezari, Rahim", "Müller, Jonas",
        "Saini, Harry", "Levi, Yam", "Lorenz, Dominik", "Sauer, Axel", "Boesel, Frederic", "Podell, Dustin",
        "Dockhorn, Tim", "English, Zion", "Lacey, Kyle", "Goodwin, Alex", "Marek, Yannik", "Rombach, Robin",
    ),
    year=2024,
    arxiv="2403.03206",
    venue="ICML",
)  # fmt: skip
PAPER_TIME = TimeConvention(1000.0, False, 1.0)  # label 1000 t, output eps - x0, with t = 1 at the noise
VALIDATION_TIMES = tuple((k + 0.5) / 8 for k in range(8))
SHOWN = 10  # images in a row of samples.png


class RectifiedFlowModule(MeanLoss, LightningModule):
    """Trains a velocity network on straight paths, at times from a density that favours the middle (SD3).

    With t from ``density``, then shifted, and ``z_t = (1 - t) x0 + t eps``: the loss is
    ``E || v(z_t, 1000 t | c) - (eps - x0) ||^2``, unweighted, in fp32. The plain flow (``density="uniform"``) spends as
    much on the ends of the path, where the target is easy, as on the middle. Noise, times and dropped conditions are
    functions of (seed, epoch, batch).

    Args:
        model: where the weights start: an ``SD3Transformer2DModel``, ``FluxTransformer2DModel``, ``UNet2DModel`` or
            ``UNet2DConditionModel`` (object, folder, configuration), a pipeline around one (object, folder, hub id),
            any ``network(z, 1000 t, condition)``, or ``"tiny"``. The trained network is a copy. A diffusion U-Net may
            be fine-tuned into a flow.
        density: of t: ``"uniform"``, ``"logit_normal(0, 1)"`` (m, s), ``"mode(1.29)"`` (s), ``"cosmap"``, or a
            ``TimestepSampler``.
        convention: ``"diffusers"`` mirrors the density: m of its training scripts has the sign opposite to the paper's.
        shift: alpha, for training *and* sampling; ``None``: the loaded scheduler's, else 1. The paper: 1 at 256^2, 3 at
            1024^2. Scripts that read a shifted scheduler's times have shifted already.
        steps: N of :meth:`sample`, by default the paper's 28 (it evaluates 5 to 50).
        dropout: share of the examples that lose their whole condition, in [0, 1), so that guidance has something to
            start from. SD3's three encoders drop out one by one, with the cube root: the paper's 46.4 %.
        null_label: what a dropped class label becomes, often the number of classes; ``None``: labels are kept.
        qk_norm: RMS-normalise queries and keys (:func:`add_qk_norm`): where bf16 at high resolution diverges.
        seed: of times, noise and dropping, drawn for the global batch.
        optimizer, scheduler: as LightningCLI injects them. The paper: AdamW 1e-4, batch 4096, 500k steps at 256^2.

    Batches: ``image`` [B, C, H, W] in [-1, 1] or ``latents``; and ``label`` [B], or ``prompt`` (list of strings), or
    precomputed ``encoder_hidden_states`` [B, L, D] and ``pooled_projections`` [B, P]. A guidance-distilled Flux is
    told ``guidance`` [B], or 3.5: not :meth:`sample`'s guidance w, which is the pipeline's ``true_cfg_scale``.

    Logged: ``train/loss``; ``val/loss``, the mean of ``rectified-flow-transformer/loss_t*`` at eight fixed times 1/16,
    3/16, ..., the measure of the paper's scaling laws. EMA (0.99 to 0.9999) is Lightning's ``EMAWeightAveraging``.

    Fails when: noise levels at the very ends matter (logit-normal never sees them: its loss below t = 0.05 is worse);
    a weighting is put on top of the density; text is padded differently than in training (no mask hides padding).
    Cost: that of plain flow matching. Float16 needs T5 and MM-DiT in bf16, or QK-norm.

    Raises:
        ConfigurationError: an argument out of range; a flow saved under another convention of time.

    Example::

        flow = RectifiedFlowModule(tiny_unet(16, 1, num_classes=11), null_label=10)
        Trainer(max_steps=1000).fit(flow, ImageData("digits", image_size=16, channels=1))
        images = flow.sample(torch.arange(10), steps=28, guidance=5.0)
        flow.save_pretrained("flow")                # UNet2DModel.from_pretrained("flow"), and its scheduler beside it
    """

    paper: ClassVar[Paper] = PAPER

    def __init__(
        self,
        model: nn.Module | dict[str, Any] | str = "tiny",
        density: str | TimestepSampler = "logit_normal(0, 1)",
        convention: Literal["paper", "diffusers"] = "paper",
        shift: float | None = None,
        steps: int = 28,
        dropout: float = 0.1,
        null_label: int | None = None,
        qk_norm: bool = False,
        seed: int = 0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.density = timestep_sampler(density, convention)
        check_integer("steps", steps, 1)
        check_number("dropout", dropout, 0, 1, closed="[)", fix="0.1 is usual, 0 for a network without condition.")
        check(isinstance(qk_norm, bool), "qk_norm", qk_norm, "True or False")
        check_integer("seed", seed, 0)
        self.source = FlowSource(model, "diffusers")
        network, diffusers = self.source.network, CONVENTIONS["diffusers"].as_list()
        check(isinstance(network, nn.Module), "model", type(network).__name__, "a torch.nn.Module to train")
        recorded = self.source.record.get("convention", diffusers)
        check(recorded == diffusers, "model", model, f"a flow with the time convention {diffusers}, not {recorded}")
        check_null(null_label, network)
        loaded = getattr(self.source.scheduler, "config", None) or {}
        dynamic = shift is None and loaded.get("use_dynamic_shifting", False)
        check(not dynamic, "shift", shift, "a number: this pipeline's follows the number of tokens",
              "exp(mu): for Flux 1.65 at 256 tokens, 3.16 at 4096 (1024^2).")  # fmt: skip
        self.shift = loaded.get("shift", loaded.get("flow_shift", 1.0)) if shift is None else shift
        check_shift(self.shift)
        self.model = copy.deepcopy(network).train().requires_grad_(True)
        if qk_norm:
            add_qk_norm(self.model)
        self.convention, self.steps, self.dropout, self.null_label = convention, steps, dropout, null_label
        self.qk_norm, self.seed, self.optimizer, self.scheduler = qk_norm, seed, optimizer, scheduler
        self._layout = text_layout(self.source)
        self._shown: tuple[Tensor, Condition] | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        draws = Draws(self.seed, self.current_epoch, batch_idx, self.device)
        data, noise, condition = self._read(batch, draws)
        lost = draws.rows(len(data), lambda n, g: torch.rand(n, 3, generator=g, device=self.device), 3)
        condition = drop(condition, lost, self.dropout, self.null_label, self._layout)
        t = self.times(draws, len(data))
        loss = self.mean_loss(rectified_flow_loss(self._velocity(condition), data, noise, t, "none"))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(data))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        data, noise, condition = self._read(batch, Draws(self.seed, -1, batch_idx, self.device))
        velocity, common = self._velocity(condition), {"sync_dist": True, "batch_size": len(data)}
        losses = {}
        for time in VALIDATION_TIMES:
            loss = rectified_flow_loss(velocity, data, noise, noise.new_full((len(data),), time))
            losses[f"{self.paper.slug}/loss_t{time:.4f}"] = loss
        self.log_dict(losses, **common)
        self.log("val/loss", torch.stack(list(losses.values())).mean(), prog_bar=True, **common)
        if batch_idx == 0:
            self._shown = first_rows(noise, SHOWN), first_rows(condition, SHOWN)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Images for a batch's conditions, one from noise of its own each."""
        _, noise, condition = self._read(batch, Draws(self.seed, -1, batch_idx, self.device))
        return self.sample(condition, noise)

    def configure_optimizers(self) -> Any:
        return optimizer_and_scheduler(self, self.optimizer, self.scheduler)

    def forward(self, z: Tensor, t: Tensor, condition: Condition = None) -> Tensor:
        """The velocity ``[B, ...]``, noise minus data, at times ``[B]`` in [0, 1] with the noise at 1."""
        return PAPER_TIME.denoiser(self.model)(z, t, condition)

    @property
    def timestep_shift(self) -> float:
        """Alpha by which :meth:`draw_times` shifts."""
        return self.shift

    def draw_times(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Training times ``[count]`` of the density, shifted; fp32. What ``TimestepSamplerCallback`` replaces."""
        return shift_time(self.density.sample(count, generator), self.shift)

    def times(self, draws: Draws, count: int) -> Tensor:
        """This process's training times ``[count]``, of those drawn for all."""
        return draws.rows(count, self.draw_times, 0)

    def _velocity(self, condition: Condition) -> Velocity:
        return guided_velocity(self, condition, None, 1.0)

    def _read(self, batch: Any, draws: Draws) -> tuple[Tensor, Tensor, Condition]:
        """Data (latents), noise and condition of a batch."""
        named = batch if isinstance(batch, Mapping) else {}
        if "latents" in named:
            data, labels = named["latents"], named.get("label")
        else:
            images, labels, _ = unpack(batch)
            data = self.source.latents(images, draws.stream(2))
        condition = read_condition(self.source, named, labels, self.device)
        return wide(data), draws.noise(data.shape), condition

    @torch.no_grad()
    def sample(
        self,
        condition: Sequence[str] | Condition = None,
        noise: Tensor | None = None,
        steps: int | None = None,
        guidance: float = 1.0,
        seed: int = 0,
        shift: float | None = None,
    ) -> Tensor:
        """Images ``[B, C, H, W]`` by Euler steps on the shifted grid: ``v_u + w (v_c - v_u)`` with guidance w > 1.

        Args:
            condition: prompts ``[B]``, labels ``[B]``, embeddings or a dict; ``None`` for an unconditional network.
            noise: ``[B, ...]``, of another size for another resolution; drawn from ``seed`` by default.
            steps: N; ``None``: the module's.
            guidance: w; the paper takes 5 to 7. Without the condition the embeddings are zero, as in training (a stock
                pipeline given no ``negative_prompt_embeds`` takes those of the empty prompt), the label ``null_label``.
            seed: of the noise, on the CPU: the same on every machine.
            shift: alpha; ``None``: the module's.

        Raises:
            ConfigurationError: an illegal number, or guidance without a condition that can be left out.
        """
        noise = (self.source.noise(condition, seed) if noise is None else noise).to(self.device)
        steps, shift = self.steps if steps is None else steps, self.shift if shift is None else shift
        sigmas = sigma_grid(steps, shift, flux=kind(self.model) == FLUX)
        if isinstance(condition, (list, tuple)) and condition and isinstance(condition[0], str):
            condition = self.source.encode(condition, self.device)
        condition = on_device(condition, self.device)
        null = empty(condition, self.null_label) if guidance > 1 else None
        with evaluating(self.model):
            data = integrate(guided_velocity(self, condition, null, guidance), noise, sigmas)
        return self.source.decode(data)

    def figures(self, folder: Path) -> None:
        """``samples.png``: the noise and conditions of a validation batch, a row for each number of steps."""
        if self._shown is not None:
            draw_samples(self, *self._shown, (5, 10, self.steps), folder / "samples.png")

    def record(self) -> dict[str, Any]:
        """Which flow this is: what goes into checkpoints and beside saved weights."""
        convention = CONVENTIONS["diffusers"].as_list()
        return {"density": repr(self.density), "shift": self.shift, "convention": convention, "stage": "flow", "k": 1}

    def save_pretrained(self, folder: str | Path) -> None:
        """The pipeline (or network) as stock diffusers loads it, with a scheduler that samples as this module does.

        That is ``FlowMatchEulerDiscreteScheduler`` with the shift, in ``scheduler/``. ``StableDiffusionPipeline``
        cannot run it and gets DPM-Solver of first order on a flow, which is Euler on a grid from 0.999.
        """
        scheduler = scheduler_of(self.source.pipeline, self.source.scheduler, self.shift)
        self.source.save(folder, self.model, self.record(), scheduler)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.setdefault("effdl", {})[self.paper.slug] = self.record()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("effdl", {}).get(self.paper.slug, {})
        fitting = self._trainer is not None and self._trainer.state.fn == "fit"
        for name, value in self.record().items():
            same = not fitting or saved.get(name, value) == value
            check(same, name, value, f"{saved.get(name)!r}, as in the checkpoint",
                  "To train on with others, pass the saved model as model=.")  # fmt: skip

    @classmethod
    def contract_example(cls) -> ContractExample:
        from effdl.diffusion._rectified_flow_transformer_example import example

        return example()

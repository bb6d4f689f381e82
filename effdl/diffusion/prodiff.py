"""prodiff: clean data in two calls: a conditional few-step diffusion decoder, halved by progressive distillation.

Equations and samplers: :mod:`~effdl.diffusion._prodiff_steps`; networks: :mod:`~effdl.diffusion._diffnet`; folders:
:mod:`~effdl.diffusion._prodiff_files`; stage 2 on your own module: :mod:`~effdl.diffusion.progressive_distill`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from effdl.core.batch import unpack
from effdl.core.capture import evaluating
from effdl.core.contract import ContractExample
from effdl.core.errors import check, check_choice
from effdl.core.paper import Paper
from effdl.core.teacher import Frozen, freeze
from effdl.diffusion._diffnet import ClassEncoder, DiffNet
from effdl.diffusion._draws import Draws
from effdl.diffusion._prodiff_batch import encode, mask_of, masked, noise_for, read
from effdl.diffusion._prodiff_files import Decoder, masked_call, module_of, open_decoder, save_decoder
from effdl.diffusion._prodiff_rounds import catch_up, length_of_a_round, restore, saved_state
from effdl.diffusion._prodiff_steps import (
    LOSSES,
    Round,
    absolute_error,
    alphas_cumprod,
    checked_schedule,
    dissimilarity,
    distillation_loss,
    noised,
    posterior,
    sample,
    sample_posterior,
    two_into_one,
)
from effdl.tasks._optimizers import optimizer_and_scheduler

__all__ = [
    "ClassEncoder", "DiffNet", "ProDiffModule", "absolute_error", "alphas_cumprod", "dissimilarity", "noised",
    "posterior", "sample", "sample_posterior", "two_into_one",
]  # fmt: skip


PAPER = Paper(
    slug="prodiff",
    title="ProDiff: Progressive Fast Diffusion Model For High-Quality Text-to-Speech",
    authors=("Huang, Rongjie", "Zhao, Zhou", "Liu, Huadai", "Liu, Jinglin", "Cui, Chenye", "Ren, Yi"),
    year=2022, arxiv="2207.06389", venue="ACM Multimedia",
)  # fmt: skip


class ProDiffModule(LightningModule):
    """Trains a denoiser that says clean data (stage teacher), or halves its steps (stage distill).

    With x_t = alpha_t x_0 + sigma_t eps on a schedule of T + 1 indices, of which T is noise:

    ========= ============================ ==================================================================
    stage     t                            loss
    ========= ============================ ==================================================================
    teacher   uniform in {0 .. T}          0.5 |f(x_t, t, c) - x_0| + 0.5 (1 - SSIM), plus the encoder's own
    distill   uniform in {s, 2s, .., T}    |f_S(x_t, t - s, c) - x*|, x* from two DDIM half steps of the teacher
    ========= ============================ ==================================================================

    The student starts as the teacher, the encoder is frozen; data enter only through x_t. Saying x_0 makes few steps
    possible: noise prediction divides by alpha_T = 4e-5.

    Args:
        denoiser: any ``f(x, t, c)`` on x ``[B, 1, M, T]``, t ``[B]``, or a diffusers U-Net with ``sample`` as output;
            a dict: arguments of :class:`DiffNet`; ``None`` in stage distill: a copy of the teacher's.
        encoder: ``encoder(batch, frames) -> c``, ``[B, H, T]``, or ``(c, {name: loss})``; a dict: arguments of
            :class:`ClassEncoder`; ``None``: the batch's ``condition``, in stage distill the teacher's encoder.
        stage: as above.
        teacher: for stage distill: a ``ProDiffModule``, or the folder that it saved.
        steps: T of stage teacher; in stage distill the teacher's.
        time_scale: s of the (first) student, which needs T / s calls; even.
        rounds: each halves the steps again; the student teaches the next. Rounds take equal shares of the run.
        schedule: ``"vpsde"`` (the paper's), ``"linear"``, ``"cosine"``, ``"logsnr"``.
        loss: of stage teacher, ``"l1_ssim"`` or ``"l1"``.
        reduction: ``"mean"`` over the frames that count, or ``"official"`` over padded ones too.
        seed: of noise and times, functions of (seed, epoch, batch), drawn for the global batch.
        optimizer, scheduler: as LightningCLI injects them.

    Batches: dicts with ``mel`` (or ``image``) ``[B, M, T]`` or ``[B, 1, M, T]`` in about [-1, 1], and what the encoder
    wants (``label``, ``speaker``) or ``condition`` ``[B, H, T]``; ``mask`` ``[B, T]`` bool where frames are padded.
    Logged: ``train/loss``, ``val/loss``, ``prodiff/calls``, in stage distill ``prodiff/to_teacher`` (L1 of the
    student's samples to the teacher's, same noise).

    Suggested: T = 4, one round, 200,000 updates of 48 sentences in each stage. Fails when: the condition says little
    (few steps then blur), T is far from 4 with this schedule, the teacher predicts noise.

    Raises:
        ConfigurationError: an argument out of range, steps that the rounds do not divide, a teacher without folder.

    Example::

        teacher = ProDiffModule(DiffNet(20, 64, 32, 4), ClassEncoder(10, 6, 32, 64))
        Trainer(max_steps=1500).fit(teacher, data := SpokenDigits("fsdd_digits.npz"))
        student = ProDiffModule(stage="distill", teacher=teacher)
        Trainer(max_steps=1500).fit(student, data)
        mel = student.sample({"label": torch.arange(10), "speaker": torch.zeros(10, dtype=torch.long)}, frames=32)
    """

    paper: ClassVar[Paper] = PAPER

    def __init__(
        self,
        denoiser: nn.Module | dict[str, int] | None = None,
        encoder: nn.Module | dict[str, int] | None = None,
        stage: Literal["teacher", "distill"] = "teacher",
        teacher: Any = None,
        steps: int = 4,
        time_scale: int = 2,
        rounds: int = 1,
        schedule: Literal["vpsde", "linear", "cosine", "logsnr"] = "vpsde",
        loss: Literal["l1_ssim", "l1"] = "l1_ssim",
        reduction: Literal["mean", "official"] = "mean",
        seed: int = 0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        check_choice("stage", stage, ("teacher", "distill"))
        check_choice("loss", loss, LOSSES)
        alpha_bar = checked_schedule(schedule, steps, time_scale, rounds, reduction, seed)
        if stage == "distill":
            self._take(denoiser, encoder, teacher, alpha_bar)
        else:
            check(teacher is None, "teacher", type(teacher).__name__, "None in stage teacher")
            check(rounds == 1, "rounds", rounds, "1 in stage teacher")
            self.model = module_of({} if denoiser is None else denoiser, DiffNet, "denoiser")
            self.encoder = None if encoder is None else module_of(encoder, ClassEncoder, "encoder")
        self.stage, self.steps, self.rounds, self.loss, self.reduction = stage, steps, rounds, loss, reduction
        self.seed, self.optimizer, self.scheduler = seed, optimizer, scheduler
        self.round, self.round_steps, self.first_scale = 0, None, time_scale
        self.register_buffer("alphas_cumprod", alpha_bar)
        self.register_buffer("timesteps", torch.tensor(self.calls))
        self.register_buffer("time_scale", torch.tensor(self.scale))

    def _take(self, denoiser: Any, encoder: Any, teacher: Any, alpha_bar: Tensor) -> None:
        """Teacher, frozen encoder and the student that starts as the teacher is."""
        for name, value in (("denoiser", denoiser), ("encoder", encoder)):
            check(value is None, name, type(value).__name__, "None in stage distill: the teacher's is copied")
        decoder = open_decoder(teacher, alpha_bar)
        self.teacher, self.teacher_shift = Frozen(decoder.denoiser), decoder.label_shift
        self.encoder = None if decoder.encoder is None else freeze(decoder.encoder)
        self.model = copy.deepcopy(decoder.denoiser).train().requires_grad_(True)

    def train(self, mode: bool = True) -> ProDiffModule:
        """The encoder of stage distill stays in eval mode."""
        super().train(mode)
        if self.stage == "distill" and self.encoder is not None:
            self.encoder.eval()
        return self

    @property
    def scale(self) -> int:
        """Indices that one step crosses, in this round."""
        return 1 if self.stage == "teacher" else self.first_scale * 2**self.round

    @property
    def calls(self) -> int:
        """Network calls per sample, in this round."""
        return self.steps // self.scale

    @property
    def label_shift(self) -> int:
        """Label = index - shift: a student is asked for the time where its step ends."""
        return 0 if self.stage == "teacher" else self.scale

    @property
    def _shift_of_teacher(self) -> int:  # a student that teaches is asked as it was trained
        return self.teacher_shift if self.round == 0 else self.scale // 2

    def update_buffers(self) -> None:
        """``timesteps`` and ``time_scale`` as they are in this round."""
        self.timesteps.fill_(self.calls)
        self.time_scale.fill_(self.scale)

    def on_train_start(self) -> None:
        if self.round_steps is None:
            self.round_steps = length_of_a_round(self.trainer, self.rounds)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        catch_up(self)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, parts = self._loss(batch, Draws(self.seed, self.current_epoch, batch_idx, self.device))
        size = len(unpack(batch).inputs)
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        self.log_dict({f"prodiff/{name}": value for name, value in parts.items()}, batch_size=size)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        draws, size = Draws(self.seed, -1, batch_idx, self.device), len(unpack(batch).inputs)
        loss, _ = self._loss(batch, draws)
        self.log("val/loss", loss, prog_bar=True, sync_dist=True, batch_size=size)
        if self.stage == "distill":
            self.log("prodiff/to_teacher", self._distance(batch, draws), sync_dist=True, batch_size=size)

    def _distance(self, batch: Any, draws: Draws) -> Tensor:
        """L1 between the student's and the teacher's samples of the same noise."""
        x, mask, condition, _ = read(self.encoder, batch, self.stage == "teacher")
        noise, alpha_bar = draws.noise(x.shape), self.alphas_cumprod
        teacher = masked_call(self.teacher.on(x), condition, mask)
        ours = sample(masked_call(self.model, condition, mask), noise, alpha_bar, self.scale, self.label_shift, mask)
        theirs = sample(teacher, noise, alpha_bar, self.scale // 2, self._shift_of_teacher, mask)
        return absolute_error(ours, theirs, mask)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Samples ``[B, 1, M, T]`` for a batch's conditions."""
        shape = read(self.encoder, batch, False).x.shape
        return self.sample(batch, noise=Draws(self.seed, -1, batch_idx, self.device).noise(shape))

    def configure_optimizers(self) -> Any:
        return optimizer_and_scheduler(self, self.optimizer, self.scheduler)

    def forward(self, x: Tensor, t: Tensor, condition: Any, mask: Tensor | None = None) -> Tensor:
        """x_0 ``[B, 1, M, T]`` of noisy data at labels ``[B]``."""
        return masked_call(self.model, condition, mask)(x, t)

    def _loss(self, batch: Any, draws: Draws) -> tuple[Tensor, dict[str, Any]]:
        x0, mask, condition, extra = read(self.encoder, batch, self.stage == "teacher")
        noise, uniform = draws.noise(x0.shape), draws.uniform(len(x0))
        told = {"calls": float(self.calls), **{name: value.detach() for name, value in extra.items()}}
        student = masked_call(self.model, condition, mask)
        if self.stage == "distill":
            now = Round(self.scale, self._shift_of_teacher, self.alphas_cumprod)
            teacher = masked_call(self.teacher.on(x0), condition, mask)
            error = distillation_loss(student, teacher, x0, noise, uniform, now, mask, self.reduction)
            return error, {"l1": error.detach(), **told}
        t = (uniform * (self.steps + 1)).long()
        prediction = student(masked(noised(x0, noise, t, self.alphas_cumprod), mask), t)
        error = absolute_error(prediction, x0, mask, self.reduction)
        told["l1"] = error.detach()
        if self.loss == "l1_ssim":
            error = 0.5 * error + 0.5 * dissimilarity(prediction, x0, mask, self.reduction)
        return error + sum(extra.values()), told

    @torch.no_grad()
    def sample(
        self,
        batch: Any,
        frames: int | None = None,
        noise: Tensor | None = None,
        calls: int | None = None,
        sampler: Literal["ddim", "posterior"] = "ddim",
        seed: int = 0,
    ) -> Tensor:
        """Samples ``[B, 1, M, T]`` in exactly ``calls`` calls of the network.

        Args:
            batch: what the encoder (or ``condition``) wants; ``mask`` ``[B, T]`` where frames are padded.
            frames: T; ``None``: that of ``noise``.
            noise: ``[B, 1, M, T]``; drawn from ``seed`` by default, which needs a :class:`DiffNet` or ``mel``.
            calls: ``None``: the module's own; a teacher can be run at any divisor of T, a student at its own.
            sampler: ``"ddim"`` consistent with the training, ``"posterior"`` the released one (draws from ``seed``).
            seed: of the noise.
        """
        check_choice("sampler", sampler, ("ddim", "posterior"))
        calls = self.calls if calls is None else calls
        own = self.stage == "teacher" and isinstance(calls, int) and calls > 0 and self.steps % calls == 0
        check(own or calls == self.calls, "calls", calls, f"{self.calls}, or for a teacher a divisor of {self.steps}")
        noise = noise_for(self.model, batch, frames, seed).to(self.device) if noise is None else noise.to(self.device)
        mask, scale = mask_of(batch), self.steps // calls
        with evaluating(self):
            condition, _ = encode(self.encoder, batch, noise.shape[-1], False)
            denoiser = masked_call(self.model, condition, mask)
            if sampler == "posterior":
                return sample_posterior(denoiser, noise, self.alphas_cumprod, scale, mask, seed)
            return sample(denoiser, noise, self.alphas_cumprod, scale, self.label_shift, mask)

    def save_pretrained(self, folder: str | Path) -> None:
        """``model.safetensors`` and ``prodiff.json``: the decoder without its teacher, to sample or to teach."""
        decoder = Decoder(self.model, self.encoder, self.alphas_cumprod, self.label_shift)
        save_decoder(decoder, folder, {"stage": self.stage, "timesteps": self.calls, "time_scale": self.scale})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.setdefault("effdl", {})["prodiff"] = saved_state(self)

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        if "prodiff" in checkpoint.get("effdl", {}):
            restore(self, checkpoint["effdl"]["prodiff"])

    @classmethod
    def contract_example(cls) -> ContractExample:
        from effdl.diffusion._prodiff_example import example

        return example()

"""instaflow: reflow a diffusion or flow model onto straight paths and distil it to one step.

Three stages, one module: ``"flow"`` fits a velocity to independent pairs of noise and data, ``"reflow"`` fits it again
to the pairs (noise, what the teacher makes of it), which straightens the paths, ``"distill"`` fits the one step from
noise to image. Maths: :mod:`effdl.diffusion._flow`; pairs: :mod:`effdl.diffusion._pairs`; networks and time labels:
:mod:`effdl.diffusion._denoiser`; pipelines: :mod:`effdl.diffusion._source`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from effdl.core.batch import unpack
from effdl.core.capture import evaluating
from effdl.core.contract import ContractExample
from effdl.core.errors import check, check_choice, check_integer, check_number
from effdl.core.mean_loss import MeanLoss
from effdl.core.paper import Paper
from effdl.core.teacher import Frozen
from effdl.diffusion._denoiser import CONVENTIONS, StackedDenoiser, TimeConvention
from effdl.diffusion._draws import Draws
from effdl.diffusion._figures import draw_samples, first_rows
from effdl.diffusion._flow import (
    Condition,
    Velocity,
    check_times,
    euler,
    guided_velocity,
    interpolate,
    rectified_flow_loss,
    rk45,
    straightness,
    time_points,
    wide,
)
from effdl.diffusion._pair_table import PairTable
from effdl.diffusion._pairs import ReflowPairs
from effdl.diffusion._perceptual import PerceptualDistance, check_distance
from effdl.diffusion._source import FlowSource, OnlineTeacher, merge_delta
from effdl.tasks._optimizers import optimizer_and_scheduler

__all__ = [
    "CONVENTIONS", "FlowSource", "PairTable", "ReflowModule", "ReflowPairs", "StackedDenoiser", "TimeConvention",
    "euler", "guided_velocity", "interpolate", "merge_delta", "rectified_flow_loss", "rk45", "straightness",
    "time_points",
]  # fmt: skip

STRAIGHTNESS_STEPS = 20
SHOWN = 10  # images in a row of samples.png


class ReflowModule(MeanLoss, LightningModule):
    """Trains a velocity network on straight lines from noise to data (InstaFlow).

    With x0 ~ N(0, I), t = 0 at the noise, X_t = t x1 + (1 - t) x0:

    ========== ============================= ============= ==========================================
    stage      batch                         t             loss
    ========== ============================= ============= ==========================================
    flow       images, labels or prompts     U[eps, 1)     E || v(X_t, t | c) - (x1 - x0) ||^2
    reflow     x0, x1, condition             U[eps, 1)     the same, with x1 = ODE[teacher](x0 | c)
    distill    x0, x1, condition             0 (or k / K)  E D(x1, x0 + v(x0, 0 | c))
    ========== ============================= ============= ==========================================

    Reflow changes the coupling and distillation keeps it: run them one after the other, on pairs of the network that
    the stage starts from (:class:`ReflowPairs`), never fused. One step of a 1-flow is E[x1 | c], a blur; what makes one
    step enough is the deterministic coupling, so x0, x1 and c must stay together. Distilling a diffusion model directly
    fails (the paper's FID 40.9 against 31.0 through a reflow).

    Args:
        model: where the weights start: a diffusers pipeline (object, folder, hub id), a ``UNet2DModel``,
            ``UNet2DConditionModel``, ``SD3Transformer2DModel`` (object, folder, configuration), any ``network(x, label,
            condition)``, or ``"tiny"``. The student is a copy; a denoising U-Net needs no new head for a velocity.
        stage: ``"flow"``, ``"reflow"`` or ``"distill"``.
        teacher: for ``online_steps``, of the same kinds; ``None``: ``model`` as it was given, frozen.
        convention: how the network counts time, a name in ``CONVENTIONS`` or a ``TimeConvention``; ``None``: as its
            folder records, else ``"instaflow"`` for U-Nets, ``"diffusers"`` for SD3, ``"plain"`` for other networks. A
            saved pipeline is sampled by the stock one under ``"diffusers"``, by ``instaflow_one_step`` under the first.
        steps: network calls per image, N of :meth:`sample`; in stage distill also K: the net is valid at this N only.
        eps: smallest t; ``None``: 1e-3, and 0 in stage distill, whose net is called at exactly t = k/K.
        distance: ``"l2"``, or in stage distill with one step ``"lpips"`` or any differentiable
            ``distance(images, targets)`` on decoded images in [-1, 1]. The paper: L2 first, then LPIPS in a second run.
        online_steps: in stage reflow, integrate the teacher with so many Euler steps (20 is common) inside the training
            step instead of reading pairs; a batch gives the conditions (``prompt``, or images and ``label``).
        guidance: alpha of that teacher.
        seed: of times and noise, which are functions of (seed, epoch, batch), drawn for the global batch.
        optimizer, scheduler: as LightningCLI injects them. The paper: AdamW 1e-5 for Stable Diffusion (unverified).

    Logged: ``train/loss``, ``val/loss``, ``instaflow/straightness`` (on the first validation batch, 20 Euler steps; not
    in stage distill, whose net knows nothing of 0 < t). EMA (the paper: 0.9999) is Lightning's ``EMAWeightAveraging``.

    Suggested: reflow batch 64 x 70k then 1024 x 25k, distillation 1024 x 21.5k (L2) and x 18k (LPIPS) for Stable
    Diffusion (199 A100-days in all); 1e6 pairs or more for CIFAR-10, Adam 2e-4, warm-up 5000, clipping at 1.
    Fails when: there are too few pairs (the student repeats them), x0 and x1 were shuffled (no gain at all), the pairs
    were made with a guidance above 2 for a reflowed net (over-saturated).

    Raises:
        ConfigurationError: an argument out of range, or a combination that the paper excludes.

    Example::

        flow = ReflowModule(tiny_unet(16, 1, num_classes=10), stage="flow")
        Trainer(max_steps=1000).fit(flow, ImageData("digits", image_size=16, channels=1))
        flow.save_pretrained("1-flow")
        reflow = ReflowModule("1-flow", stage="reflow")
        Trainer(max_steps=1000).fit(reflow, ReflowPairs("pairs", teacher="1-flow", conditions=10, count=4000))
        images = reflow.sample(torch.arange(10), steps=1)
    """

    paper: ClassVar[Paper] = Paper(
        slug="instaflow",
        title="InstaFlow: One Step is Enough for High-Quality Diffusion-Based Text-to-Image Generation",
        authors=("Liu, Xingchao", "Zhang, Xiwen", "Ma, Jianzhu", "Peng, Jian", "Liu, Qiang"),
        year=2024,
        arxiv="2309.06380",
        venue="ICLR",
    )

    def __init__(
        self,
        model: nn.Module | dict[str, Any] | str = "tiny",
        stage: Literal["flow", "reflow", "distill"] = "reflow",
        teacher: nn.Module | dict[str, Any] | str | None = None,
        convention: str | TimeConvention | None = None,
        steps: int = 1,
        eps: float | None = None,
        distance: str | Callable[[Tensor, Tensor], Tensor] = "l2",
        online_steps: int | None = None,
        guidance: float = 1.0,
        seed: int = 0,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        check_choice("stage", stage, ("flow", "reflow", "distill"))
        check_integer("steps", steps, 1)
        check_integer("seed", seed, 0)
        check_number("guidance", guidance, 0, float("inf"), closed="[)")
        self.eps = (0.0 if stage == "distill" else 1e-3) if eps is None else eps
        check_times("uniform", self.eps)
        check(online_steps is None or stage == "reflow", "online_steps", online_steps, f"None in stage {stage}")
        check(teacher is None or online_steps is not None, "teacher", type(teacher).__name__,
              "None without online_steps", "Pairs are made by ReflowPairs(teacher=...).")  # fmt: skip
        check_distance(distance, stage, steps)
        self.source = FlowSource(model, convention)
        check(isinstance(self.source.network, nn.Module), "model", type(model).__name__, "a torch.nn.Module to train")
        self.model = copy.deepcopy(self.source.network).train().requires_grad_(True)
        self.teacher = None
        if online_steps is not None:
            given = convention if isinstance(teacher, nn.Module) else None
            source = self.source if teacher is None else FlowSource(teacher, given)
            self.teacher = OnlineTeacher(source, online_steps, guidance)
        self.stage, self.steps, self.distance = stage, steps, distance
        self.guidance, self.seed, self.optimizer, self.scheduler = guidance, seed, optimizer, scheduler
        self._shown: tuple[Tensor, Condition] | None = None
        self._perceptual = None if distance == "l2" else Frozen(PerceptualDistance(self.source, distance))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, x0, _ = self._step(batch, Draws(self.seed, self.current_epoch, batch_idx, self.device))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(x0))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss, x0, condition = self._step(batch, Draws(self.seed, -1, batch_idx, self.device))
        self.log("val/loss", loss, prog_bar=True, sync_dist=True, batch_size=len(x0))
        if batch_idx == 0:
            self._shown = first_rows(x0, SHOWN), first_rows(condition, SHOWN)
        if batch_idx == 0 and self.stage != "distill":
            value = straightness(self._velocity(condition), x0, STRAIGHTNESS_STEPS)
            self.log("instaflow/straightness", value, sync_dist=True, batch_size=len(x0))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Images of a batch's conditions (and noise, where the batch carries it)."""
        x0, _, condition = self._triplet(batch, Draws(self.seed, -1, batch_idx, self.device))
        return self.source.decode(euler(self._velocity(condition), x0, self.steps))

    def configure_optimizers(self) -> Any:
        return optimizer_and_scheduler(self, self.optimizer, self.scheduler)

    @property
    def denoiser(self) -> Callable[[Tensor, Tensor, Condition], Tensor]:
        """The student as ``v(x, t, condition)``, noise at t = 0."""
        return self.source.convention.denoiser(self.model)

    def forward(self, x: Tensor, t: Tensor, condition: Condition = None) -> Tensor:
        """The velocity ``[B, ...]`` at times ``[B]`` in [0, 1], noise at 0."""
        return self.denoiser(x, t, condition)

    def _velocity(self, condition: Condition) -> Velocity:
        return guided_velocity(self.denoiser, condition, None, 1.0)

    def _step(self, batch: Any, draws: Draws) -> tuple[Tensor, Tensor, Condition]:
        """Loss, noise and condition of a batch."""
        x0, x1, condition = self._triplet(batch, draws)
        uniform = draws.uniform(len(x0)) if self.stage == "distill" else 1 - draws.rows(len(x0), self.draw_times, 0)
        velocity, t = self._velocity(condition), self._times(uniform)
        if self._perceptual is None:
            return self.mean_loss(rectified_flow_loss(velocity, x0, x1, t, "none")), x0, condition
        return self._perceptual.on(x1)(wide(x0) + velocity(x0, t), x1), x0, condition

    def draw_times(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Training times ``[count]`` in [0, 1] with the *noise at 1*: what ``TimestepSamplerCallback`` replaces."""
        return 1 - torch.rand(count, generator=generator, device=generator.device if generator else self.device)

    def _times(self, uniform: Tensor) -> Tensor:
        return time_points(uniform, self.steps if self.stage == "distill" else "uniform", self.eps)

    def _triplet(self, batch: Any, draws: Draws) -> tuple[Tensor, Tensor, Condition]:
        """Noise, end point and condition of a batch of this stage."""
        if self.stage != "flow" and self.teacher is None:
            if isinstance(batch, (tuple, list)):
                batch = dict(zip(("x0", "x1", "condition"), batch))
            keys = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            check("x0" in keys and "x1" in keys, "batch", keys, f"x0, x1 and condition in stage {self.stage}",
                  "Make pairs with ReflowPairs.")  # fmt: skip
            return batch["x0"], batch["x1"], self._condition(batch, batch.get("condition"))
        if self.teacher is not None and isinstance(batch, Mapping) and "prompt" in batch:
            x0, condition = draws.noise((len(batch["prompt"]), *self.source.shape)), self._condition(batch, None)
            return x0, self.teacher(x0, condition), condition
        images, labels, _ = unpack(batch)
        x1 = self.source.latents(images, draws.stream(2))
        x0, condition = draws.noise(x1.shape).to(x1.dtype), self._condition(batch, labels)
        return x0, x1 if self.teacher is None else self.teacher(x0, condition), condition

    def _condition(self, batch: Any, otherwise: Any) -> Condition:
        if isinstance(batch, Mapping) and "prompt" in batch:
            return self.source.encode(batch["prompt"], self.device)
        return self.source.accepted(otherwise)

    @torch.no_grad()
    def sample(
        self,
        condition: Sequence[str] | Condition = None,
        noise: Tensor | None = None,
        steps: int | None = None,
        guidance: float = 1.0,
        seed: int = 0,
        strict: bool = False,
    ) -> Tensor:
        """Images ``[B, C, H, W]``: ``steps`` calls of the network on B rows (2 B with guidance > 1), then the decoder.

        Args:
            condition: prompts ``[B]``, labels ``[B]``, embeddings or a dict; ``None`` for an unconditional network.
            noise: x0 ``[B, ...]``; drawn from ``seed`` by default (one image without a condition).
            steps: N; ``None``: the module's.
            guidance: alpha, at most 1 for a one-step net, up to 2 for a reflowed one.
            seed: of the noise, on the CPU: the same on every machine.
            strict: raise, not warn, when a distilled net is sampled with another number of steps than its own.
        """
        steps = self.steps if steps is None else steps
        if self.stage == "distill" and steps != self.steps:
            text = f"steps={steps}: this network was distilled for steps={self.steps} and is valid there only."
            check(not strict, "steps", steps, f"steps={self.steps}", text)
            warnings.warn(text, stacklevel=2)
        noise = self.source.noise(condition, seed).to(self.device) if noise is None else noise
        with evaluating(self.model):
            return self.source.decode(self.source.solve(noise, condition, steps, guidance, self.model))

    def figures(self, folder: Path) -> None:
        """``samples.png``: the noise and conditions of a validation batch, a row for each number of steps."""
        steps = (self.steps,) if self.stage == "distill" else (1, 2, 4, 25)
        if self._shown is not None:
            draw_samples(self, *self._shown, steps, folder / "samples.png")

    def record(self) -> dict[str, Any]:
        """Which flow this is: what goes into checkpoints and beside saved weights."""
        before = self.source.record.get("k", 1)
        data = getattr(self._trainer, "datamodule", None)
        return {
            "stage": self.stage, "k": {"flow": 1, "reflow": before + 1, "distill": before}[self.stage],
            "num_steps": self.steps, "guidance": getattr(data, "guidance", self.guidance),
            "convention": self.source.convention.as_list(),
        }  # fmt: skip

    def save_pretrained(self, folder: str) -> None:
        """The pipeline (or network) with the student in it, as stock diffusers loads it, and ``reflow.json``."""
        self.source.save(folder, self.model, self.record())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.setdefault("effdl", {})["instaflow"] = self.record()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("effdl", {}).get("instaflow", {}).get("stage", self.stage)
        check(saved == self.stage, "stage", self.stage, f"{saved!r}, the stage of the checkpoint",
              "To start a stage from the one before, pass its saved model as model=.")  # fmt: skip

    @classmethod
    def contract_example(cls) -> ContractExample:
        from effdl.diffusion._instaflow_example import example

        return example()

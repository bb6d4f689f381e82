"""score-sde: one score network, trained in continuous time; sampled by SDE or ODE, with likelihoods and conditions.

Forward equations: :mod:`effdl.diffusion._score_sde_equations`; the loss and the network's labels: ``_training``;
predictors, correctors, ODE: ``_samplers``; bits per dimension: ``_likelihood``; classes, inpainting, colour:
``_conditional``; what a trained module offers: ``_services``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from effdl.core.batch import unpack
from effdl.core.capture import evaluating
from effdl.core.contract import ContractExample
from effdl.core.errors import check, check_choice, check_integer
from effdl.core.paper import Paper
from effdl.core.random import generator
from effdl.diffusion._draws import Draws
from effdl.diffusion._figures import save_rows
from effdl.diffusion._score_sde_conditional import Known, class_score, colourise, grey_basis, inpaint
from effdl.diffusion._score_sde_equations import SDE, SDES, VE, VP, Score, SubVP, sde_of
from effdl.diffusion._score_sde_files import open_network, save_network
from effdl.diffusion._score_sde_likelihood import Likelihood, exact_divergence, hutchinson, likelihood
from effdl.diffusion._score_sde_samplers import (
    CORRECTORS,
    PREDICTORS,
    ODESampler,
    PCSampler,
    ancestral,
    annealed_langevin,
    euler_maruyama,
    langevin,
    reverse_diffusion,
    solve_flow,
)
from effdl.diffusion._score_sde_services import SAMPLERS, CountedScore, ScoreServices, sampler_of
from effdl.diffusion._score_sde_training import (
    TRAIN_EPS,
    ScoreAdapter,
    dequantise,
    dequantised_offset,
    score_matching_loss,
)
from effdl.tasks._optimizers import optimizer_and_scheduler

__all__ = [
    "CORRECTORS", "PREDICTORS", "SDE", "SDES", "VE", "VP", "Known", "Likelihood", "ODESampler", "PCSampler", "Score",
    "ScoreAdapter", "ScoreSDEModule", "SubVP", "ancestral", "annealed_langevin", "class_score", "colourise",
    "dequantise", "dequantised_offset", "euler_maruyama", "exact_divergence", "grey_basis", "hutchinson", "inpaint",
    "langevin", "likelihood", "reverse_diffusion", "score_matching_loss", "sde_of", "solve_flow",
]  # fmt: skip

SHOWN = 10  # images in a row of samples.png


class ScoreSDEModule(ScoreServices, LightningModule):
    """Denoising score matching in continuous time, for a choice of forward equation (Score SDE).

    ``dx = f dt + g dw`` takes data (t = 0) to noise (t = 1); the network learns s = grad log p_t from
    ``|| std s(x_t, t) + z ||^2``, t ~ U(1e-5, 1). The reverse equation ``f - g^2 s`` and the ODE ``f - g^2 s / 2`` then
    sample, and the ODE gives likelihoods and latent codes. One unconditional network serves :meth:`sample` (also for a
    class), :meth:`inpaint`, :meth:`colourise`, :meth:`likelihood` and :meth:`encode`.

    Args:
        model: an unconditional ``UNet2DModel`` (object, folder, configuration), a DDPM pipeline, any
            ``nn.Module (x, label)``, a folder that :meth:`save_pretrained` wrote, or ``"tiny"``.
        sde: ``"ve"``, ``"vp"``, ``"subvp"``, an ``SDE``, or its ``config()``; ``None``: as the folder records, else vp.
        prediction: ``"epsilon"`` or ``"score"``, what the network says; see :class:`ScoreAdapter`, labels included.
        sampler: ``"pc"``, ``"ode"``, a ``PCSampler`` or an ``ODESampler``: the default of :meth:`sample` and
            ``predict_step``.
        likelihood_weighting: weight the loss by g^2, not std^2 (uniform t; in small runs it was worse).
        reduce_mean: mean over the pixels, or half their sum; ``None``: mean for vp and subvp, half sum for ve, as in
            the paper's configurations. Learning rate and clipping depend on it.
        levels: grey levels of quantised images in [-1, 1] (256; 17 for the digits at 8x8): uniform noise is added to
            each, in training, validation and :meth:`likelihood`. ``None``: data are taken as they are.
        likelihood_batches: so many validation batches get bits per dimension (some 100 calls each, with gradient).
        warmup: optimizer steps over which the rate rises from zero (the paper: 5000).
        seed: of times, noise and dequantisation, functions of (seed, epoch, batch), drawn for the global batch.
        optimizer, scheduler: as LightningCLI injects them. The paper: Adam 2e-4, eps 1e-8, batch 128, clipping at 1.

    Batches: images (or any ``[B, ...]``) in [-1, 1], as ``core.batch.unpack`` finds them; labels are not looked at.
    Logged: ``train/loss``, ``val/loss``, ``score-sde/bits_per_dim`` (median of a batch: single examples reach far). EMA
    (the paper: 0.9999 for vp, 0.999 for ve) is Lightning's ``EMAWeightAveraging``; likelihoods, samples and the saved
    network are then of the average. Times, std and divergence are fp32 under any precision; a Langevin step's norms
    are of this process's batch.

    Suggested: vp or subvp for likelihoods, ve with ``PCSampler`` for samples; N = 1000. ve: sigma_max about the largest
    distance of two images. ODE samples have a slightly worse FID than PC ones, at a tenth of the calls; of a briefly
    trained network they are much worse, for without noise nothing corrects its mistakes.
    Fails when: eps is too small (NaN at t -> 0), data were not dequantised (bits below any bound), an inpainting has no
    corrector (the overwritten part leads, the rest lags).

    Raises:
        ConfigurationError: an argument out of range, a combination that does not exist.

    Example::

        module = ScoreSDEModule(tiny_unet(8, 1), sde="subvp", levels=17)
        Trainer(max_steps=2000).fit(module, ImageData("digits", image_size=8, channels=1))
        images = module.sample(16, sampler=PCSampler(corrector="langevin"))
        print(module.likelihood(images).bits.median())
    """

    paper: ClassVar[Paper] = Paper(
        slug="score-sde",
        title="Score-Based Generative Modeling through Stochastic Differential Equations",
        authors=(
            "Song, Yang", "Sohl-Dickstein, Jascha", "Kingma, Diederik P.", "Kumar, Abhishek", "Ermon, Stefano",
            "Poole, Ben",
        ),
        year=2021,
        arxiv="2011.13456",
        venue="ICLR",
    )  # fmt: skip

    def __init__(
        self,
        model: nn.Module | dict[str, Any] | str = "tiny",
        sde: SDE | dict[str, Any] | str | None = None,
        prediction: Literal["epsilon", "score"] | None = None,
        sampler: PCSampler | ODESampler | str = "pc",
        likelihood_weighting: bool = False,
        reduce_mean: bool | None = None,
        levels: int | None = None,
        likelihood_batches: int = 0,
        warmup: int = 0,
        seed: int = 0,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        check_choice("likelihood_weighting", likelihood_weighting, (True, False))
        check_choice("reduce_mean", reduce_mean, (None, True, False))
        for name, value in (("likelihood_batches", likelihood_batches), ("warmup", warmup), ("seed", seed)):
            check_integer(name, value, 0)
        if levels is not None:
            check_integer("levels", levels, 2)
        check(likelihood_batches == 0 or levels is not None, "likelihood_batches", likelihood_batches,
              "0 without levels", "The bits of a density need to know how fine the data are.")  # fmt: skip
        check(warmup == 0 or scheduler is None, "warmup", warmup, "0 beside a scheduler")
        self.model, record = open_network(model)
        self.model.train()
        self.sde = sde_of(record.get("sde", "vp") if sde is None else sde)
        self.prediction = ScoreAdapter(self.model, self.sde, prediction or record.get("prediction")).prediction
        self.levels = record.get("levels") if levels is None else levels
        self.sampler = sampler_of(sampler, self.sde)
        self.likelihood_weighting, self.likelihood_batches = likelihood_weighting, likelihood_batches
        self.reduce_mean = self.sde.reduce_mean if reduce_mean is None else reduce_mean
        self.seed, self.warmup = seed, warmup
        self.optimizer, self.scheduler = optimizer, scheduler
        self._shape: tuple[int, ...] | None = None
        self._told: dict[str, float] = {}
        self._rows: list[Tensor] = []

    @property
    def score(self) -> ScoreAdapter:
        """The network as s(x, t)."""
        return ScoreAdapter(self.model, self.sde, self.prediction)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x), ``[B, ...]``, at times ``[B]`` in (0, 1]."""
        return self.score(x, t)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x0, draws = self._data(batch, self.current_epoch, batch_idx)
        loss = self._loss(x0, draws)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(x0))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x0, draws = self._data(batch, -1, batch_idx)
        self.log("val/loss", self._loss(x0, draws), prog_bar=True, sync_dist=True, batch_size=len(x0))
        if batch_idx < self.likelihood_batches and not self.trainer.sanity_checking:  # an untrained ODE takes minutes
            found = likelihood(self.sde, self.score, x0, offset=self.offset, generator=draws.stream(3))
            bits = found.bits.median()
            self._told = {"bits_per_dim": bits.item(), "likelihood_calls": found.calls}
            self.log("score-sde/bits_per_dim", bits, prog_bar=True, sync_dist=True, batch_size=len(x0))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """As many samples as the batch has examples."""
        x0, draws = self._data(batch, -1, batch_idx)
        start = self.sde.prior_std * draws.noise(x0.shape)
        return self.sampler(self.sde, self.score, start, draws.stream(3 + self.global_rank))

    def _data(self, batch: Any, epoch: int, batch_idx: int) -> tuple[Tensor, Draws]:
        x0, draws = unpack(batch).inputs, Draws(self.seed, epoch, batch_idx, self.device)
        self._shape = tuple(x0.shape[1:])
        if self.levels is None:
            return x0, draws
        count, *rest = x0.shape
        u = draws.rows(count, lambda n, stream: torch.rand(n, *rest, generator=stream, device=stream.device), 2)
        return dequantise(x0, self.levels, u), draws

    def _loss(self, x0: Tensor, draws: Draws) -> Tensor:
        t = draws.uniform(len(x0)) * (1 - TRAIN_EPS) + TRAIN_EPS
        noise = draws.noise(x0.shape)
        return score_matching_loss(self.sde, self.score, x0, t, noise, self.likelihood_weighting, self.reduce_mean)

    def configure_optimizers(self) -> Any:
        made = optimizer_and_scheduler(self, self.optimizer, self.scheduler)
        if self.warmup == 0:
            return made
        rise = torch.optim.lr_scheduler.LambdaLR(made, lambda step: min(1.0, (step + 1) / self.warmup))
        return {"optimizer": made, "lr_scheduler": {"scheduler": rise, "interval": "step"}}

    def report(self) -> dict[str, Any]:
        """Bits per dimension of the last validation, and the calls that each way of sampling takes."""
        counted = CountedScore(self.score)
        self._rows = []
        for name, make in SAMPLERS.items():
            with evaluating(self.model):
                start = self.sde.prior((SHOWN, *self.example_shape()), generator(0)).to(self.device)
                counted.calls = 0
                self._rows.append(make()(self.sde, counted, start, generator(1)))
            self._told[f"{name}_calls"] = counted.calls
        return dict(self._told)

    def figures(self, folder: Path) -> None:
        """``samples.png``: predictor-corrector and ODE, from the same noises."""
        if self._rows:
            save_rows(self._rows, folder / "samples.png")

    def record(self) -> dict[str, Any]:
        """What ``sde.json`` and checkpoints say beside the weights."""
        return {"sde": self.sde.config(), "prediction": self.prediction, "levels": self.levels}

    def save_pretrained(self, folder: str | Path) -> None:
        """The network as stock diffusers opens it, and ``sde.json``; ``ScoreSDEModule(folder)`` opens both."""
        save_network(folder, self.model, self.sde, self.prediction, self.record())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.setdefault("effdl", {})["score-sde"] = self.record()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("effdl", {}).get("score-sde", {}).get("sde", self.sde.config())
        same = saved | {"steps": self.sde.steps} == self.sde.config()
        check(same, "sde", self.sde.config(), f"{saved}, the equation of the checkpoint")

    @classmethod
    def contract_example(cls) -> ContractExample:
        from effdl.diffusion._score_sde_example import example

        return example()

"""score-sde: one score network, trained in continuous time; sampled by SDE or ODE, with likelihoods and conditions.

Forward equations: :mod:`effdl.diffusion._score_sde_equations`; the loss and the network's labels: ``_training``;
predictors, correctors, ODE: ``_samplers``; bits per dimension: ``_likelihood``; classes, inpainting, colour:
``_conditional``; what a trained module offers: ``_services``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from effdl.core.batch import unpack
from effdl.core.contract import ContractExample
from effdl.core.errors import ConfigurationError, check, check_choice, check_integer
from effdl.core.mean_loss import MeanLoss
from effdl.core.paper import Paper
from effdl.core.steps import require_automatic_optimization
from effdl.diffusion._draws import Draws
from effdl.diffusion._score_sde_conditional import Known, class_score, colourise, grey_basis, inpaint
from effdl.diffusion._score_sde_equations import SDE, SDES, VE, VP, Score, SubVP, sde_of
from effdl.diffusion._score_sde_files import open_network
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
from effdl.diffusion._score_sde_services import ScoreServices, sampler_of
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
    "ScoreAdapter", "ScoreSDEMixin", "ScoreSDEModule", "SubVP", "ancestral", "annealed_langevin", "class_score",
    "colourise", "dequantise", "dequantised_offset", "euler_maruyama", "exact_divergence", "grey_basis", "hutchinson",
    "inpaint", "langevin", "likelihood", "reverse_diffusion", "score_matching_loss", "sde_of", "solve_flow",
]  # fmt: skip

PAPER = Paper(
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
SETTINGS = (
    "sde", "prediction", "sampler", "likelihood_weighting", "reduce_mean", "levels", "likelihood_batches", "seed",
)  # fmt: skip


class ScoreSDEMixin(MeanLoss, ScoreServices):
    """Trains the network of somebody's module as a score in continuous time, and serves what a score can (Score SDE).

    ``class Mine(ScoreSDEMixin, YourModule)``: network, optimizer, schedulers, ``forward`` and everything else stay
    yours; ``training_step``, ``validation_step`` and ``predict_step`` are replaced by the paper's loss, its value on
    validation data, and its sampler (``Mine`` may have its own again). On top come ``score``, ``sample``, ``inpaint``,
    ``colourise``, ``likelihood``, ``encode``, ``decode`` and ``save_pretrained``. A checkpoint's ``state_dict`` is your
    module's own. Batches, logged values, advice and what fails: :class:`ScoreSDEModule`, this mixin around a network.

    Args:
        network: name of the submodule that is called as ``network(x, label)``; :class:`ScoreAdapter` says the labels.
        sde, prediction, sampler, likelihood_weighting, reduce_mean, levels, likelihood_batches, seed: see
            :class:`ScoreSDEModule`; attributes of the module afterwards.

    Raises:
        ConfigurationError: an argument out of range; the mixin is not the first base; the module has attributes of
            these names already; before the first step: no such network, manual optimisation.

    Example::

        class Mine(ScoreSDEMixin, MyModule): ...        # MyModule sets self.net and configures an optimizer

        module = Mine(sde="subvp", levels=256, network="net")
        Trainer(max_steps=2000).fit(module, images)
        print(module.likelihood(module.sample(16)).bits.median())
    """

    paper: ClassVar[Paper] = PAPER

    def __init__(
        self,
        *args: Any,
        sde: SDE | dict[str, Any] | str = "vp",
        prediction: Literal["epsilon", "score"] | None = None,
        sampler: PCSampler | ODESampler | str = "pc",
        likelihood_weighting: bool = False,
        reduce_mean: bool | None = None,
        levels: int | None = None,
        likelihood_batches: int = 0,
        seed: int = 0,
        network: str = "model",
        **kwargs: Any,
    ) -> None:
        check_choice("prediction", prediction, (None, "epsilon", "score"))
        check_choice("likelihood_weighting", likelihood_weighting, (True, False))
        check_choice("reduce_mean", reduce_mean, (None, True, False))
        for name, value in (("likelihood_batches", likelihood_batches), ("seed", seed)):
            check_integer(name, value, 0)
        if levels is not None:
            check_integer("levels", levels, 2)
        check(likelihood_batches == 0 or levels is not None, "likelihood_batches", likelihood_batches,
              "0 without levels", "The bits of a density need to know how fine the data are.")  # fmt: skip
        check(isinstance(network, str) and network != "", "network", network, "the name of a submodule")
        sde = sde_of(sde)
        sampler = sampler_of(sampler, sde)
        super().__init__(*args, **kwargs)
        taken = [name for name in SETTINGS if hasattr(self, name)]
        check(not taken, "module", taken, "one without attributes of these names", "Rename its own.")
        self.sde, self.prediction, self.sampler = sde, prediction, sampler
        self.likelihood_weighting, self.likelihood_batches = likelihood_weighting, likelihood_batches
        self.reduce_mean = sde.reduce_mean if reduce_mean is None else reduce_mean
        self.levels, self.seed, self._network = levels, seed, network
        self._shape: tuple[int, ...] | None = None
        self._told: dict[str, float] = {}
        self._rows: list[Tensor] = []

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(ScoreSDEMixin)]
        wrong = [c.__name__ for c in before if "training_step" in vars(c) and not issubclass(c, ScoreSDEMixin)]
        if wrong:
            raise ConfigurationError(f"ScoreSDEMixin must come first: class {cls.__name__}(ScoreSDEMixin, {wrong[0]}).")

    def on_fit_start(self) -> None:
        super().on_fit_start()
        require_automatic_optimization(self, "ScoreSDEMixin")
        _ = self.score  # a network that does not fit, or is not there, is told before the first step

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
        t = draws.rows(len(x0), self.draw_times, 0) * (1 - TRAIN_EPS) + TRAIN_EPS
        noise = draws.noise(x0.shape)
        how = {"likelihood_weighting": self.likelihood_weighting, "reduce_mean": self.reduce_mean}
        return self.mean_loss(score_matching_loss(self.sde, self.score, x0, t, noise, **how, per_example=True))

    def draw_times(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Training times ``[count]`` in [0, 1], put on [1e-5, 1] later. What ``TimestepSamplerCallback`` replaces."""
        return torch.rand(count, generator=generator, device=generator.device if generator else self.device)

    @classmethod
    def contract_example(cls) -> ContractExample:
        from effdl.diffusion._score_sde_example import mixin_example

        return mixin_example()


class ScoreSDEModule(ScoreSDEMixin, LightningModule):
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

    paper: ClassVar[Paper] = PAPER

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
        check_integer("warmup", warmup, 0)
        check(warmup == 0 or scheduler is None, "warmup", warmup, "0 beside a scheduler")
        opened, record = open_network(model)
        super().__init__(
            sde=record.get("sde", "vp") if sde is None else sde,
            prediction=record.get("prediction") if prediction is None else prediction,
            sampler=sampler,
            likelihood_weighting=likelihood_weighting,
            reduce_mean=reduce_mean,
            levels=record.get("levels") if levels is None else levels,
            likelihood_batches=likelihood_batches,
            seed=seed,
        )
        self.model = opened.train()
        self.prediction, self.warmup = self.score.prediction, warmup
        self.optimizer, self.scheduler = optimizer, scheduler

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x), ``[B, ...]``, at times ``[B]`` in (0, 1]."""
        return self.score(x, t)

    def configure_optimizers(self) -> Any:
        made = optimizer_and_scheduler(self, self.optimizer, self.scheduler)
        if self.warmup == 0:
            return made
        rise = torch.optim.lr_scheduler.LambdaLR(made, lambda step: min(1.0, (step + 1) / self.warmup))
        return {"optimizer": made, "lr_scheduler": {"scheduler": rise, "interval": "step"}}

    @classmethod
    def contract_example(cls) -> ContractExample:
        from effdl.diffusion._score_sde_example import example

        return example()

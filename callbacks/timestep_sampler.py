"""rectified-flow-transformer on a Trainer: another density of the training times, in a module that one has already."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from effdl.callbacks._base import MethodCallback
from effdl.core.contract import ContractExample
from effdl.core.errors import ConfigurationError, check_integer
from effdl.core.steps import wrap
from effdl.diffusion._draws import Draws
from effdl.diffusion._time_bins import TimeBins, draw_bins, expected_share
from effdl.diffusion._timestep_densities import TimestepSampler, check_shift, shift_time, timestep_sampler
from effdl.diffusion.rectified_flow_transformer import PAPER

PROTOCOL = (
    "a method draw_times(count, generator) -> times [count] in [0, 1], noise at 1, through which its training_step "
    "draws every time"
)


class TimestepSamplerCallback(MethodCallback):
    """Draws the times of a flow's or diffusion model's training steps from another density, and puts the old one back.

    The loss and its weights stay as they are: a density pi in place of pi_0 weights the loss with pi(t) / pi_0(t) in
    expectation. Validation keeps its own times, so that runs compare. Modules of the house take it as they are:
    ``RectifiedFlowModule``, ``ReflowModule`` (not in stage distill, whose points are fixed), ``ScoreSDEModule``,
    ``DiffusionModule``, ``TextToImageModule`` and what is mixed into them. Any other takes part with one method::

        def draw_times(self, count, generator=None):        # t [count] in [0, 1], noise at 1
            return torch.rand(count, generator=generator, device=self.device)

    through which its ``training_step`` draws every time. The generator is the module's, and what is drawn from it is
    on its device; for ``None`` the draws are a function of (seed, epoch, batch) for the global batch, the same in both
    passes of SAM. Either way there is nothing to restore in a resumed run.

    Where the module makes its loss through a second method, the loss is told by time, for the examples' part in it,
    with whatever weights they have there. The house's modules have it (``core.mean_loss.MeanLoss``); a loss that does
    not go through it, as of ``KOALADistillationModule``, is trained on as ever and not told by time::

        def mean_loss(self, losses):                        # [count, ...], before they are averaged
            return losses.mean()

    How t enters is the module's affair. A flow takes it as it is, Stable Diffusion 3 as label 1000 t. A discrete
    schedule of T steps takes label ``floor(T t)``: label i has the mass of [i / T, (i + 1) / T). A module that divides
    by t maps [0, 1] onto [eps, 1] (Score SDE 1e-5, InstaFlow 1e-3).

    Args:
        density: of t: ``"uniform"``, ``"logit_normal(0, 1)"`` (m, s; m > 0 goes to the noise), ``"mode(1.29)"`` (s),
            ``"cosmap"``, or a ``TimestepSampler``.
        convention: ``"diffusers"`` mirrors the density: m of its training scripts has the sign opposite to the paper's.
        shift: alpha of the resolution shift, in place of the module's; ``None``: the module's ``timestep_shift``, else
            1. Training alone: sample with the same one.
        seed: of the draws where the module hands no generator.
        bins: equal parts of [0, 1] by which draws and losses are told, >= 2.

    Cost: none to speak of; 4 x ``bins`` numbers are summed over the processes in every batch.

    Suggested: ``logit_normal(0, 1)`` for velocities. Fails when: a loss is weighted already for uniform times, as with
    min-SNR; noise levels at the very ends matter, which logit-normal never sees.

    Logs, under ``rectified-flow-transformer/``, at the end of an epoch and over all processes: ``time``, the mean of
    the times; ``share_t0.0625`` and so on, named by the middle of the bin, how many of them were in each; and
    ``train_loss_t...``, the mean loss there (no value where no example was). At the end of a validation
    ``loss_t...``, the same of its examples, at the times that the module draws there, equal in every epoch. A
    ``RectifiedFlowModule`` logs ``loss_t...`` itself: all examples at eight fixed times, the paper's measure, and their
    mean ``val/loss``. A run's ``time_bins.png`` shows shares, beside the density's, and losses of the last epoch.

    Raises:
        ConfigurationError: an argument out of range; a module without ``draw_times``, or whose first step did not call
            it; a ``mean_loss`` of other than one loss per time; a second sampler; a run resumed with another density.

    Example::

        from effdl.callbacks import TimestepSamplerCallback

        Trainer(callbacks=[TimestepSamplerCallback("mode(1.29)", shift=3.0)]).fit(module, data)
    """

    paper = PAPER
    contract_exceptions = {"C1": "a module that never heard of it draws its times where nobody reaches: see draw_times"}

    def __init__(
        self,
        density: str | TimestepSampler = "logit_normal(0, 1)",
        convention: Literal["paper", "diffusers"] = "paper",
        shift: float | None = None,
        seed: int = 0,
        bins: int = 8,
    ) -> None:
        self.sampler = timestep_sampler(density, convention)
        if shift is not None:
            check_shift(shift)
        check_integer("seed", seed, 0)
        check_integer("bins", bins, 2, fix="8 are those of the paper's validation.")
        self.density, self.convention, self.shift, self.seed, self.bins = density, convention, shift, seed, bins
        self._alpha = 1.0 if shift is None else float(shift)
        self._batch = (0, 0)
        self._drawn: int | None = None  # draws of the training step that runs; None outside of one
        self._found = False  # whether this run ever drew: steps of another kind may come later
        self._begin()

    def _begin(self) -> None:
        self._epoch = -1  # of the training bins
        self._seen = {"train": TimeBins(self.bins), "val": TimeBins(self.bins)}
        self._told: dict[str, dict[str, Any]] = {}
        self._due = False  # a batch is counted in its first step alone: SAM and LBFGS take more
        self._listening: TimeBins | None = None
        self._times: Tensor | None = None  # last drawn in the step that runs

    def attach(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        others = [c for c in trainer.callbacks if isinstance(c, TimestepSamplerCallback) and c is not self]
        if others:
            raise ConfigurationError("callbacks: one TimestepSamplerCallback at a time: the times have one density.")
        if not _draws_times(pl_module):
            raise ConfigurationError(f"TimestepSamplerCallback needs {PROTOCOL}; {type(pl_module).__name__} has none.")
        self._alpha = getattr(pl_module, "timestep_shift", 1.0) if self.shift is None else float(self.shift)
        self._found = False
        self._begin()
        self.keep(self.same_arguments_on_resume(trainer, pl_module))

        def draw(own: Callable[..., Tensor], count: int, generator: torch.Generator | None = None) -> Tensor:
            t = own(count, generator) if self._drawn is None else self._draw(pl_module, count, generator)
            if self._listening is not None:
                self._times = t
                self._listening.add_times(t)
            return t

        self.keep(wrap(pl_module, "draw_times", draw))
        self.keep(wrap(pl_module, "training_step", partial(self._step, pl_module)))
        if callable(getattr(pl_module, "mean_loss", None)):
            self.keep(wrap(pl_module, "mean_loss", self._hear))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._batch = trainer.current_epoch, batch_idx
        self._due = True
        if self._epoch != trainer.current_epoch:  # resumed in the middle of an epoch, its bins go on
            self._epoch, self._seen["train"] = trainer.current_epoch, TimeBins(self.bins)

    def _step(self, pl_module: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._drawn = 0
        self._listen("train" if self._due else None)
        self._due = False
        try:
            output = step(*args, **kwargs)
            if not self._found and output is not None:
                raise ConfigurationError(
                    "TimestepSamplerCallback changes nothing here: training_step drew no time through draw_times. "
                    f"It needs {PROTOCOL}."
                )
            if self._listening is not None:
                self._listening.reduce(pl_module.device)
            return output
        finally:
            self._drawn = None
            self._listen(None)

    def _listen(self, stage: str | None) -> None:
        self._listening, self._times = self._seen.get(stage), None

    def _hear(self, mean: Callable[[Tensor], Tensor], losses: Tensor) -> Tensor:
        if self._listening is not None and self._times is not None:
            self._listening.add_losses(self._times, losses)
        return mean(losses)

    def _draw(self, pl_module: Any, count: int, generator: torch.Generator | None) -> Tensor:
        if generator is None:
            draws = Draws(self.seed, *self._batch, pl_module.device)
            t = draws.rows(count, self.sampler.sample, self._drawn)
        else:
            t = self.sampler.sample(count, generator)
        self._drawn, self._found = self._drawn + 1, True
        return shift_time(t, self._alpha)

    # ---- by time ---------------------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        told = self._told["train"] = self._seen["train"].told()
        by_time = self._by("share_t", told["share"]) | self._by("train_loss_t", told["loss"])
        self._log(pl_module, {"time": told["time"], **by_time})

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self._seen["val"] = TimeBins(self.bins)

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._listen("val")

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._listen(None)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._seen["val"].reduce(pl_module.device)
        if not trainer.sanity_checking:
            told = self._told["val"] = self._seen["val"].told()
            self._log(pl_module, self._by("loss_t", told["loss"]))

    def _by(self, name: str, row: list[float | None]) -> dict[str, float | None]:
        return {f"{name}{time:.4f}": value for time, value in zip(self._seen["train"].centres, row)}

    def _log(self, pl_module: Any, values: dict[str, float | None]) -> None:
        known = {f"{self.slug}/{name}": value for name, value in values.items() if value is not None}
        pl_module.log_dict(known, sync_dist=True)  # equal on all processes already: this saves the warning

    # ---- state and report ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        sums = self._seen["train"].sums
        own = {"epoch": self._epoch, "sums": None if sums is None else sums.cpu()}
        return {"density": repr(self.sampler), "shift": self._alpha, **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._epoch, self._seen["train"].sums = state_dict["epoch"], state_dict["sums"]

    def report(self) -> dict[str, Any]:
        """The density and the shift that the run trained with; shares and losses by time of the last epoch."""
        told = {"density": repr(self.sampler), "shift": self._alpha}
        if not self._told:
            return told
        train, val = self._told.get("train", {}), self._told.get("val", {})
        by_time = {"share": train.get("share"), "train_loss": train.get("loss"), "val_loss": val.get("loss")}
        curves = [f"{self.slug}/time", "train/loss", "val/loss"]
        return {**told, "curves": curves, "times": self._seen["train"].centres, **by_time}

    def figures(self, folder: Path) -> None:
        """``time_bins.png``: how the last epoch's times were spread, and the loss by time."""
        if self._told:
            expected = expected_share(self.sampler, self._alpha, self.bins)
            draw_bins(self._seen["train"].centres, expected, self._told, folder / "time_bins.png")

    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite."""
        from effdl.callbacks._timestep_sampler_example import example

        return example()


def _draws_times(pl_module: Any) -> bool:
    draw = getattr(pl_module, "draw_times", None)
    if not callable(draw):
        return False
    try:
        inspect.signature(draw).bind(1, None)
    except TypeError:
        return False
    return True

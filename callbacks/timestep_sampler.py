"""rectified-flow-transformer on a Trainer: another density of the training times, in a module that one has already."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from effdl.callbacks._base import MethodCallback
from effdl.core.contract import ContractExample
from effdl.core.errors import ConfigurationError, check_integer
from effdl.core.steps import wrap
from effdl.diffusion._draws import Draws
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

    Suggested: ``logit_normal(0, 1)`` for velocities. Fails when: a loss is weighted already for uniform times, as with
    min-SNR; noise levels at the very ends matter, which logit-normal never sees.

    Logs ``rectified-flow-transformer/time``, the mean of the epoch's times.

    Raises:
        ConfigurationError: an argument out of range; a module without ``draw_times``, or whose first step did not call
            it; a second sampler; a run resumed with another density.

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
    ) -> None:
        self.sampler = timestep_sampler(density, convention)
        if shift is not None:
            check_shift(shift)
        check_integer("seed", seed, 0)
        self.density, self.convention, self.shift, self.seed = density, convention, shift, seed
        self._alpha = 1.0 if shift is None else float(shift)
        self._batch = (0, 0)
        self._drawn: int | None = None  # draws of the training step that runs; None outside of one
        self._found = False  # whether this run ever drew: steps of another kind may come later

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
        self.keep(self.same_arguments_on_resume(trainer, pl_module))

        def draw(own: Callable[..., Tensor], count: int, generator: torch.Generator | None = None) -> Tensor:
            return own(count, generator) if self._drawn is None else self._draw(pl_module, count, generator)

        self.keep(wrap(pl_module, "draw_times", draw))
        self.keep(wrap(pl_module, "training_step", self._step))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._batch = trainer.current_epoch, batch_idx

    def _step(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._drawn = 0
        try:
            output = step(*args, **kwargs)
            if not self._found and output is not None:
                raise ConfigurationError(
                    "TimestepSamplerCallback changes nothing here: training_step drew no time through draw_times. "
                    f"It needs {PROTOCOL}."
                )
            return output
        finally:
            self._drawn = None

    def _draw(self, pl_module: Any, count: int, generator: torch.Generator | None) -> Tensor:
        if generator is None:
            draws = Draws(self.seed, *self._batch, pl_module.device)
            t = draws.rows(count, self.sampler.sample, self._drawn)
        else:
            t = self.sampler.sample(count, generator)
        self._drawn, self._found = self._drawn + 1, True
        t = shift_time(t, self._alpha)
        pl_module.log(f"{self.slug}/time", t.mean(), on_step=False, on_epoch=True, batch_size=count)
        return t

    def state_dict(self) -> dict[str, Any]:
        return {"density": repr(self.sampler), "shift": self._alpha}

    def report(self) -> dict[str, Any]:
        """The density and the shift that the run trained with."""
        return self.state_dict()

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

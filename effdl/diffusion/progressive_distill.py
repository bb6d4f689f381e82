"""prodiff: stage 2 on somebody's own module: halving the steps of a network that says clean data (2207.06389)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from effdl.core.batch import unpack
from effdl.core.capture import evaluating
from effdl.core.contract import ContractExample
from effdl.core.errors import ConfigurationError, check
from effdl.core.export import product
from effdl.core.paper import Paper
from effdl.core.steps import require_automatic_optimization
from effdl.core.teacher import Frozen
from effdl.diffusion._draws import Draws
from effdl.diffusion._prodiff_batch import read
from effdl.diffusion._prodiff_files import masked_call
from effdl.diffusion._prodiff_rounds import catch_up, length_of_a_round, restore, saved_state
from effdl.diffusion._prodiff_steps import (
    Round,
    checked_schedule,
    distillation_loss,
    sample,
)
from effdl.diffusion.prodiff import PAPER


class Rounds:
    """What a distillation has come to; what ``_prodiff_rounds`` keeps of ``ProDiffModule``, kept beside a module."""

    stage = "distill"

    def __init__(self, owner: Any, teacher: nn.Module, scale: int, rounds: int, alpha_bar: Tensor) -> None:
        self.owner, self.teacher, self.alpha_bar = owner, Frozen(teacher), alpha_bar
        self.first_scale, self.rounds, self.round, self.round_steps = scale, rounds, 0, None

    @property
    def model(self) -> nn.Module:
        return self.owner.model

    @property
    def trainer(self) -> Any:
        return self.owner.trainer

    @property
    def now(self) -> Round:
        """This round; its teacher was trained on data, or is the student of the round before."""
        scale = self.first_scale * 2**self.round
        return Round(scale, 0 if self.round == 0 else scale // 2, self.alpha_bar)

    def update_buffers(self) -> None:
        """A module of somebody else has none."""


class ProgressiveDistillMixin:
    """Trains any module's network to make one step of two of its teacher's, as ProDiff's second stage does.

    ``class Mine(ProgressiveDistillMixin, YourModule)``: the network is ``self.model``; it starts with the teacher's
    weights, ``training_step`` is replaced by ``|f(x_t, t - s, c) - x*|``, x* of two DDIM half steps of the frozen
    teacher, and validation, optimizer and checkpoints stay yours. Network and teacher say clean data:
    ``network(x, label, c)`` of ``[B, C, H, W]`` (or ``[B, 1, mels, frames]``) and integer labels; diffusers' networks
    are called as such. The round, and the teacher of rounds after the first, are kept in
    ``checkpoint["effdl"]["prodiff"]``. :class:`ProDiffModule` is the same with DiffNet, encoder and stage 1.

    Args:
        teacher: the network that teaches, or a module with it as ``model``; trained with labels 0 .. T. Required.
        steps: T, the teacher's calls.
        time_scale: s of the first student, which needs T / s calls; even.
        rounds: each halves the steps again; the student (its moving average, where there is one) teaches the next.
        schedule: of the teacher's T + 1 indices: ``"vpsde"``, ``"linear"``, ``"cosine"``, ``"logsnr"``.
        reduction: ``"mean"`` over the frames that count, or ``"official"`` over padded ones too.
        seed: of noise and times, functions of (seed, epoch, batch), drawn for the global batch.

    Batches: (data, condition), or dicts with ``image`` or ``mel``, ``label`` or ``condition``, and ``mask`` ``[B, T]``.
    Logs ``prodiff/l1`` and ``prodiff/calls``. Cost: two calls of the teacher in each step.

    Raises:
        ConfigurationError: an argument out of range, a teacher of other weights than ``self.model``'s, manual
            optimisation, a class before the mixin that has a ``training_step``.

    Example::

        class Mine(ProgressiveDistillMixin, MyDecoder): ...

        student = Mine(teacher=trained, steps=4)
        Trainer(max_steps=1500).fit(student, data)
        images = student.few_steps(torch.randn(8, 1, 32, 32), labels)           # two calls
    """

    paper: ClassVar[Paper] = PAPER

    def __init__(
        self,
        *args: Any,
        teacher: Any = None,
        steps: int = 4,
        time_scale: int = 2,
        rounds: int = 1,
        schedule: Literal["vpsde", "linear", "cosine", "logsnr"] = "vpsde",
        reduction: Literal["mean", "official"] = "mean",
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        alpha_bar = checked_schedule(schedule, steps, time_scale, rounds, reduction, seed)
        valid = "a network that says clean data, or a module with one as model"
        check(isinstance(teacher, nn.Module), "teacher", type(teacher).__name__, valid)
        super().__init__(*args, **kwargs)
        network, model = product(teacher), getattr(self, "model", None)
        same = isinstance(model, nn.Module) and _shapes(model) == _shapes(network)
        check(same, "teacher", type(network).__name__, f"one with the weights of self.model, {type(model).__name__}")
        model.load_state_dict(network.state_dict())
        self.prodiff = Rounds(self, copy.deepcopy(network), time_scale, rounds, alpha_bar)
        self.prodiff_seed, self.prodiff_reduction = seed, reduction

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(ProgressiveDistillMixin)]
        wrong = [c.__name__ for c in before if "training_step" in vars(c)]
        if wrong:
            raise ConfigurationError(f"ProgressiveDistillMixin must come first: {wrong[0]} has a training_step.")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            require_automatic_optimization(self, "ProgressiveDistillMixin")

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.prodiff.round_steps is None:
            self.prodiff.round_steps = length_of_a_round(self.trainer, self.prodiff.rounds)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        catch_up(self.prodiff)
        return super().on_train_batch_start(batch, batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x0, mask, condition, _ = read(None, batch, False)
        draws, now = Draws(self.prodiff_seed, self.current_epoch, batch_idx, self.device), self.prodiff.now
        student, teacher = (masked_call(f, condition, mask) for f in (self.model, self.prodiff.teacher.on(x0)))
        noise, uniform = draws.noise(x0.shape), draws.uniform(len(x0))
        loss = distillation_loss(student, teacher, x0, noise, uniform, now, mask, self.prodiff_reduction)
        told = {"prodiff/l1": loss.detach(), "prodiff/calls": float((len(now.alpha_bar) - 1) // now.scale)}
        self.log_dict(told, batch_size=len(unpack(batch).inputs))
        return loss

    @torch.no_grad()
    def few_steps(self, noise: Tensor, condition: Any = None, mask: Tensor | None = None) -> Tensor:
        """Samples like ``noise`` in this round's T / s calls of the network."""
        now = self.prodiff.now
        with evaluating(self):
            return sample(masked_call(self.model, condition, mask), noise, now.alpha_bar, now.scale, now.scale, mask)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint.setdefault("effdl", {})["prodiff"] = saved_state(self.prodiff)

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "prodiff" in checkpoint.get("effdl", {}):
            restore(self.prodiff, checkpoint["effdl"]["prodiff"])

    @classmethod
    def contract_example(cls) -> ContractExample:
        from effdl.diffusion._prodiff_example import mixin_example

        return mixin_example()


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}

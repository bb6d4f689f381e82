"""sam on a Trainer: two passes per optimizer step. What it does to a network, ``SharpnessCallback`` measures."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from effdl.callbacks._base import MethodCallback
from effdl.callbacks.sharpness import SharpnessCallback
from effdl.core.contract import ContractExample
from effdl.core.errors import ConfigurationError, check, check_integer
from effdl.core.random import preserved_rng, rng_state, set_rng_state
from effdl.core.replay import unrecorded
from effdl.core.steps import require_automatic_optimization, wrap
from effdl.training.sam import PAPER, check_sam, perturbed

__all__ = ["SAMCallback", "SharpnessCallback"]


class SAMCallback(MethodCallback):
    """Sharpness-aware minimisation: each step follows the gradient at the worst nearby weights (SAM and ASAM).

    The gradient g of the batch gives ``e = rho g / ||g||``; the same batch is run again at ``w + e``, and that gradient
    goes to the optimizer at ``w``. The module, its optimizer, its schedulers and its checkpoints stay its own: nobody
    outside the two passes ever sees ``w + e``. Accumulated micro-batches are held and all run again. The second pass
    sees the same dropout masks, moves no BatchNorm statistics, no metric and no log.

    Cost: two forwards and backwards per step, one copy of the weights. Callback hooks of the backward pass
    (``on_after_backward``) fire in both. ``rho`` does not carry over between sizes: for models under a million
    parameters sweep 0.01 to 0.1 (under label noise up to 0.3); the paper's ViTs take 0.1 to 0.2, Mixers up to 0.6.
    On clean data that the plain optimizer fits to zero loss, expect no gain.

    Args:
        rho: radius of the perturbation, >= 0: its Euclidean length over all weights. 0 is the plain optimizer, bit for
            bit.
        adaptive: ASAM: elementwise in units of ``|w|``; ``rho`` about ten times larger.
        interval: a SAM step every ``interval``-th optimizer step, plain ones between.
        sync_perturbation: under DDP one ``e`` from the gradient averaged over ranks. The paper's (``False``): each rank
            its own from its local gradient.
        same_randomness: both passes draw the same dropout masks and augmentations.

    Raises:
        ConfigurationError: an argument out of range; in ``setup``: manual optimisation (and so several optimizers), a
            strategy other than one device or DDP, DDP with ``static_graph``, a second SAMCallback; before the first
            step: an optimizer that needs a closure (LBFGS), weights stored in half precision.

    Logs ``sam/sharpness``: L(w + e) - L(w) of the last micro-batch, both in train mode.

    Example::

        from effdl.callbacks import SAMCallback

        Trainer(callbacks=[SAMCallback(rho=0.05)], precision="16-mixed", gradient_clip_val=1.0).fit(module, data)
    """

    paper = PAPER

    def __init__(
        self,
        rho: float = 0.05,
        adaptive: bool = False,
        interval: int = 1,
        sync_perturbation: bool = False,
        same_randomness: bool = True,
    ) -> None:
        check_sam(rho, adaptive)
        check_integer("interval", interval, 1)
        for name, value in (("sync_perturbation", sync_perturbation), ("same_randomness", same_randomness)):
            check(isinstance(value, bool), name, value, "True or False")
        self.rho, self.adaptive, self.interval = rho, adaptive, interval
        self.sync_perturbation, self.same_randomness = sync_perturbation, same_randomness
        self.step = 0
        self._held: list[tuple[tuple, dict[str, Any], dict[str, Any]]] | None = []
        self._sharpness: Tensor | None = None

    # ---- attaching -------------------------------------------------------------------------------------------

    def attach(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        _check_trainer(trainer, pl_module)
        if trainer.global_step == 0:  # a second fit of the same Trainer goes on counting
            self.step = 0
        self._held, self._sharpness = [], None
        # the outermost place that sees a micro-batch, so that whatever wraps training_step is run again too
        self.keep(wrap(trainer.strategy, "training_step", self._hold))

        def optimizer_step(call_next: Callable, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> Any:
            both = closure
            if self._perturbs():
                both = partial(self._two_passes, trainer, pl_module, (epoch, batch_idx, optimizer), closure)
            try:
                result = call_next(epoch, batch_idx, optimizer, both)
            finally:
                self._held = []
            self.step += 1
            return result

        self.keep(wrap(pl_module, "optimizer_step", optimizer_step))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        for optimizer in trainer.optimizers:
            _check_optimizer(optimizer)

    # ---- one step --------------------------------------------------------------------------------------------

    def _perturbs(self) -> bool:
        return self.rho > 0 and (self.step + 1) % self.interval == 0

    def _hold(self, call_next: Callable, *args: Any, **kwargs: Any) -> Any:
        """Remember a micro-batch and the random state it meets; ``_held`` is ``None`` during the second pass."""
        if self._held is not None and self._perturbs():
            self._held.append((args, kwargs, rng_state() if self.same_randomness else {}))
        return call_next(*args, **kwargs)

    def _two_passes(self, trainer: Any, pl_module: Any, where: tuple, closure: Any) -> Tensor | None:
        """The closure that the optimizer calls: leaves the gradient at w + e behind, and everything else as at w.

        Both passes lie inside it, so that clipping, unscaling and ``on_before_optimizer_step`` come once, after them,
        and a module's own ``optimizer_step`` decides as before whether and when there is a step.
        """
        with contextlib.nullcontext() if self.sync_perturbation else _unsynced(trainer):
            loss = closure()
        if loss is None:  # training_step skipped the batch
            return None
        result = getattr(closure, "_result", None)  # what Lightning logs and hands to callbacks
        held, self._held = self._held or [], None
        parameters = [p for group in where[-1].param_groups for p in group["params"]]
        randomness = preserved_rng() if self.same_randomness else contextlib.nullcontext()
        # an fp16 overflow gives e = 0 and still a second pass: other ranks wait in its all-reduce
        with perturbed(parameters, self.rho, self.adaptive), unrecorded(pl_module), randomness:
            pl_module.optimizer_zero_grad(*where)
            for micro_batch in held[:-1]:
                self._replay(trainer, *micro_batch)
            if self.same_randomness and held:
                set_rng_state(held[-1][-1])
            loss_perturbed = closure()
        if result is not None:
            closure._result = result
        self._sharpness = (loss_perturbed - loss) * trainer.accumulate_grad_batches
        return loss

    def _replay(self, trainer: Any, args: tuple, kwargs: dict[str, Any], random: dict[str, Any]) -> None:
        """Forward and backward of an earlier micro-batch, as Lightning's own loop does it under accumulation."""
        if random:
            set_rng_state(random)
        with _unsynced(trainer), torch.enable_grad():
            output = trainer.strategy.training_step(*args, **kwargs)
            loss = output["loss"] if isinstance(output, Mapping) else output
            if loss is not None:
                trainer.strategy.backward(loss / trainer.accumulate_grad_batches, trainer.optimizers[0])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if self._sharpness is not None:
            pl_module.log(f"{self.slug}/sharpness", self._sharpness)
            self._sharpness = None

    # ---- state -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"rho": self.rho, "adaptive": self.adaptive, "interval": self.interval, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.step = state_dict["step"]

    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite."""
        return ContractExample(
            kwargs={"rho": 0.05},
            bad={
                "rho": [-0.1, float("nan"), float("inf"), "large"],
                "adaptive": 1,
                "interval": [0, 1.5],
                "sync_perturbation": "yes",
                "same_randomness": None,
            },
            second={"rho": 0.1},
            ddp_equals_single=False,  # each rank perturbs by its own gradient
        )


def _unsynced(trainer: Any) -> contextlib.AbstractContextManager:
    """Under DDP: gradients stay local."""
    return getattr(trainer.strategy, "block_backward_sync", contextlib.nullcontext)()


def _check_trainer(trainer: Any, pl_module: Any) -> None:
    """Refuse, before anything was changed, what two passes cannot serve."""
    require_automatic_optimization(pl_module, "SAMCallback")
    if sum(isinstance(callback, SAMCallback) for callback in trainer.callbacks) > 1:
        raise ConfigurationError("two SAMCallbacks would run four passes per step: keep one.")
    strategy = trainer.strategy
    kind = type(strategy).__name__
    if not {"SingleDeviceStrategy", "DDPStrategy"} & {cls.__name__ for cls in type(strategy).__mro__}:
        raise ConfigurationError(f"strategy={kind}: SAMCallback needs whole weights on each rank: one device or ddp.")
    if getattr(strategy, "_ddp_kwargs", {}).get("static_graph"):
        raise ConfigurationError(
            "static_graph=True: the first pass of SAM runs without synchronisation, which a static graph forbids. "
            "Use DDPStrategy(static_graph=False)."
        )
    precision = str(getattr(trainer.precision_plugin, "precision", ""))
    _check_precision(precision, precision in ("16-true", "bf16-true"))
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise ConfigurationError("training_step(dataloader_iter) draws a new batch when called again: take a batch.")


def _check_optimizer(optimizer: Any) -> None:
    name = type(optimizer).__name__
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ConfigurationError(f"optimizer={name} evaluates the loss itself: SAM needs a first-order optimizer.")
    for dtype in {p.dtype for group in optimizer.param_groups for p in group["params"]}:
        _check_precision(dtype, dtype in (torch.float16, torch.bfloat16))


def _check_precision(precision: Any, half: bool) -> None:
    fix = "Weights in half precision round the perturbation away."
    check(not half, "precision", precision, "'32-true', 'bf16-mixed' or '16-mixed'", fix)

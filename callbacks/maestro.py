"""maestro on a Trainer: when layers become pairs, what a step sees of them, when ranks fall, when pairs are sliced."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effdl.callbacks._low_rank import LowRankCallback
from effdl.callbacks._maestro_parts import as_saved, rebuild, two_passes
from effdl.compression.maestro import (
    PAPER,
    Prefix,
    RankSampler,
    check_numbers,
    decompose,
    deploy,
    importance,
    kept_rank,
)
from effdl.core.checkpoint import fold_checkpoints
from effdl.core.contract import ContractExample
from effdl.core.errors import check, check_integer
from effdl.core.export import product
from effdl.core.factorize import factors_of, join
from effdl.core.schedules import Point, check_point, resolve_point
from effdl.core.select import Targets, Weight, check_targets, refuse_sharded
from effdl.core.steps import Handle, require_automatic_optimization, wrap
from effdl.core.surgery import refuse_after_weight_averaging, when_built


class MaestroCallback(LowRankCallback):
    """Trains every layer as a product of two, with components ordered by importance, and keeps those that matter.

    Layers become pairs in ``setup``, equal to what they were (a pretrained start stays one). Each optimizer step sees
    the first components of one layer; a penalty makes the last ones vanish; after each epoch the rank of a layer falls
    to what is above ``threshold``. Parameters keep their full size until the end of training, when they are sliced:
    the module then holds a smaller network of stock layers. Validation inside a fit sees all components that are left,
    with BatchNorm statistics taken anew; those of training are put back.

    Checkpoints are those of ``core.factorize.factorize(module, full ranks)``, components that are out set to zero.
    ``trainer.validate(module, ckpt_path=...)`` with this callback slices one as the end of training would have.
    List callbacks that act on weights (masks, averages) behind it; masks stay only in layers that stay pairs.
    At full rank a network costs up to twice the dense one, in a 3x3 ResNet a ninth more; weight decay on both
    factors acts like a nuclear norm. Start with a large ``lasso_weight`` and halve it until the accuracy suffices.

    Args:
        lasso_weight: lambda >= 0 of the penalty, added to the gradient once per optimizer step.
        threshold: eps > 0; components of lower importance leave.
        relative: the threshold is a share of the importance of a layer's first component (BatchNorm lets weights
            shrink, and an absolute one depends on their scale).
        sampler: ``"per_layer"``: every (layer, rank) in turn, the other layers whole; ``"across_layers"``: a uniform
            rank for each layer; ``"fixed"``: a quarter of each rank.
        full_pass: also train the whole network, which teaches the cut one: CE(full, y) + CE(cut, softmax(full)). A
            second forward. ``False``: the cut network's own loss.
        mode: ``"slice"``: a step computes only what it sees; ``"mask"``: static shapes, for ``torch.compile``.
        start: cutting, penalty and falling ranks begin here; pairs are trained whole before.
        calibration_batches: training batches for BatchNorm statistics in front of a validation, and at the end; 0: off.
        smallest: at the end multiply out the pairs that are no smaller than a dense layer. ``False``: all stay pairs,
            from which ``effdl.compression.maestro.extract`` takes networks for a budget.
        targets, exclude: layers by name glob or type; default every Linear, HF ``Conv1D``, convolution without groups
            and ``nn.MultiheadAttention`` (whose projections become layers of their own: ``split_attention``).
        seed: of the sampler.

    Raises:
        ConfigurationError: an argument outside its range; nothing matched; a selected weight is tied or sharded;
            listed after a ``WeightAveraging``; a fraction of a run of unknown length; ``full_pass`` with manual
            optimisation, or of a network whose forward gives no logits; ``ckpt_path`` of a run with other arguments.

    Logs ``maestro/rank``, the mean share of the full rank that is left.

    Example::

        from effdl.callbacks import MaestroCallback

        maestro = MaestroCallback(lasso_weight=1e-4)
        Trainer(callbacks=[maestro]).fit(module, data)
        print(maestro.ranks)             # {"model.conv2": 6, ...}: core.factorize.factorize(module, maestro.ranks)
    """

    paper = PAPER

    def __init__(
        self,
        lasso_weight: float = 1e-5,
        threshold: float = 1e-5,
        relative: bool = False,
        sampler: Literal["per_layer", "across_layers", "fixed"] = "per_layer",
        full_pass: bool = False,
        mode: Literal["slice", "mask"] = "slice",
        start: Point = 0,
        calibration_batches: int = 16,
        smallest: bool = True,
        targets: Targets = None,
        exclude: Targets = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_numbers(lasso_weight, threshold, sampler, mode)
        for name, flag in (("relative", relative), ("full_pass", full_pass), ("smallest", smallest)):
            check(isinstance(flag, bool), name, flag, "True or False")
        check_point("start", start)
        check_integer("calibration_batches", calibration_batches, 0)
        check_integer("seed", seed, 0)
        check_targets("targets", targets)
        check_targets("exclude", exclude)
        self.lasso_weight, self.threshold, self.relative = lasso_weight, threshold, relative
        self.sampler, self.full_pass, self.mode, self.start = sampler, full_pass, mode, start
        self.calibration_batches, self.smallest = calibration_batches, smallest
        self.targets, self.exclude, self.seed = targets, exclude, seed
        self.rows: dict[str, dict[str, Any]] = {}
        self.prefixes: dict[str, Prefix] = {}
        self._begin()

    def _begin(self) -> None:
        super()._begin()
        self._first_step = 0
        self.draws = RankSampler(self.sampler, {}, self.seed)
        self._views: list[Handle] = []
        self._put_back: Callable[[], None] | None = None

    @property
    def ranks(self) -> dict[str, int]:
        """Layer to rank: now, while it trains; afterwards of the layers that are pairs."""
        return factors_of(self.rows) if self.rows else {name: p.rank for name, p in self.prefixes.items()}

    # ---- attaching -------------------------------------------------------------------------------------------

    def attach(self, trainer: Any, pl_module: Any, stage: str) -> None:
        known = [*self.rows, *self.prefixes]
        if stage != "fit":
            self._saved = None
            self.keep(wrap(pl_module, "on_load_checkpoint", lambda load, ckpt: as_saved(load, ckpt, pl_module, known)))
            return
        refuse_after_weight_averaging(trainer, self)
        if self.full_pass:
            require_automatic_optimization(pl_module, "MaestroCallback(full_pass=True)")
        saved = self.state_dict() if trainer.global_step else None  # a Trainer that goes on
        self._begin()
        self._saved = saved
        self.keep(self.same_arguments_on_resume(trainer, pl_module))
        self.keep(when_built(pl_module, lambda: self._decompose(pl_module, known)))
        self.keep(fold_checkpoints(pl_module, self.state_key, self._fold, lambda state, kept: state.update(kept)))
        # the module's hooks run after all callbacks', so after an average was put in
        self.keep(wrap(pl_module, "on_validation_epoch_start", lambda act: (act(), self._whole(trainer, pl_module))))
        self._then_finish(trainer, pl_module)
        if self.full_pass:
            self.keep(wrap(pl_module, "training_step", two_passes(lambda: product(pl_module), lambda: self.prefixes)))

    def _decompose(self, pl_module: Any, known: list[str]) -> None:
        join(pl_module, known)  # of an earlier fit
        names = decompose(pl_module, self.targets, self.exclude)
        self.prefixes = {name: Prefix(pl_module.get_submodule(name), self.mode) for name in names}
        self.rows = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        for name, prefix in self.prefixes.items():  # a strategy may have sharded or flattened them by now
            for i, weight in enumerate((prefix.first, prefix.second)):
                refuse_sharded(Weight(f"{name}.{i}.weight", prefix.pair[i], "weight"))
                check(weight.dim() > 1, "strategy", type(trainer.strategy).__name__, "one of whole weights, like ddp")
        self.draws = RankSampler(self.sampler, self.ranks, self.seed)
        if self._saved is not None:
            self.step = self._saved["step"]
            self._first_step = self._saved["first_step"]
            self.draws.load_state_dict(self._saved["sampler"])
            for name, rank in self.draws.ranks.items():
                self.prefixes[name].rank = rank
        self._views = [handle for prefix in self.prefixes.values() for handle in prefix.attach()]
        self.keep(self._views)
        self._show(None)
        self._count_steps(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self._saved is None:
            self._first_step = resolve_point("start", self.start, trainer)

    # ---- a step ----------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        # the micro-batches of an optimizer step see the same
        if self._fresh and self.step >= self._first_step:
            self._show(self.draws.draw())
        self._fresh = False

    def _show(self, active: Mapping[str, int] | None) -> None:
        for name, prefix in self.prefixes.items():
            prefix.show(None if active is None else active[name])

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if not self.lasso_weight or self.step < self._first_step:
            return
        mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for prefix in self.prefixes.values():
            prefix.add_penalty_(self.lasso_weight, mine)

    # ---- an epoch --------------------------------------------------------------------------------------------

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.step > self._first_step:
            self._shrink()
        shares = [prefix.rank / prefix.full for prefix in self.prefixes.values()]
        pl_module.log(f"{self.slug}/rank", sum(shares) / len(shares))

    def _shrink(self) -> None:
        found = [(prefix.first.detach(), prefix.second.detach()) for prefix in self.prefixes.values()]
        kept = torch.stack([kept_rank(importance(*pair), self.threshold, self.relative) for pair in found]).tolist()
        gone = []
        for (name, prefix), rank in zip(self.prefixes.items(), kept):
            if rank == 0 < prefix.rank:
                gone.append(name)
            prefix.rank = min(prefix.rank, rank)
        if gone:
            warnings.warn(f"Nothing but the bias is left of {', '.join(gone)}: lower lasso_weight.", stacklevel=2)
        self.draws.shrink(self.ranks)

    def _whole(self, trainer: Any, pl_module: Any) -> None:
        """For a validation: all that is left, and BatchNorm statistics that belong to it."""
        if self.rows or not self._attached(trainer) or trainer.sanity_checking:
            return
        active = {name: prefix.active for name, prefix in self.prefixes.items()}
        network, buffers = product(pl_module), {}
        self._show(None)
        if self.calibration_batches:
            kind = nn.modules.batchnorm._BatchNorm
            norms = [m for m in network.modules() if isinstance(m, kind)]
            buffers = {buffer: buffer.clone() for norm in norms for buffer in norm.buffers()}
            self._recalibrate(trainer, pl_module, seed=self.seed)

        def put_back() -> None:
            self._show(active)
            for buffer, value in buffers.items():
                buffer.copy_(value)

        self._put_back = put_back

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        put_back, self._put_back = self._put_back, None
        if put_back:
            put_back()

    def _split(self, trainer: Any, pl_module: Any, *, train: bool) -> None:
        ranks = self.ranks if train else self._saved["sampler"]["ranks"]
        for view in self._views:
            view.remove()
        _, self.rows = deploy(pl_module, ranks, smallest=self.smallest, inplace=True)
        self.prefixes, self._network = {}, product(pl_module)
        self._recalibrate(trainer, pl_module, train=train, seed=self.seed)

    # ---- state and report ------------------------------------------------------------------------------------

    def _fold(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Components that are out become zero: a checkpoint computes what the run does."""
        kept = {}
        for name, prefix in self.prefixes.items():
            key = f"{name}.0.weight"
            if prefix.rank < prefix.full and key in state:
                kept[key] = state[key].clone()
                state[key] = state[key].clone()
                state[key][prefix.rank :] = 0
        return kept

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "first_step": self._first_step, "sampler": self.draws.state_dict()}

    def matched(self, module: Any) -> list[str]:
        """Names of the layers that become pairs."""
        return list(self.prefixes)

    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite. Nothing is left out there: what is finished must equal its last checkpoint."""
        return ContractExample(
            kwargs={"lasso_weight": 1e-3, "calibration_batches": 0},
            bad={
                "lasso_weight": [-1e-3, float("nan"), "much"],
                "threshold": [0, -1.0],
                "relative": "yes",
                "sampler": "layerwise",
                "full_pass": 1,
                "mode": "cut",
                "start": [-1, 1.5, "3 parsecs"],
                "calibration_batches": -1,
                "smallest": "no",
                "targets": ["no.such.layer", 3],
                "exclude": "no.such.layer",
                "seed": -1,
            },
            rebuild=rebuild,
        )

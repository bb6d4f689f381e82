"""pdp on a Trainer: which weights are seen softly and from when, what validation and checkpoints get, how it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from effdl.callbacks import _mask_report, _pdp_targets
from effdl.callbacks._masked import MaskedCallback
from effdl.callbacks._pdp_channels import Compaction
from effdl.compression.pdp import PrunedWeight, Ramp
from effdl.core.contract import ContractExample
from effdl.core.errors import ConfigurationError
from effdl.core.export import product
from effdl.core.masks import MaskStore
from effdl.core.paper import Paper
from effdl.core.reweight import reweight_everywhere
from effdl.core.schedules import Point
from effdl.core.select import Targets
from effdl.core.steps import wrap


class PDPCallback(MaskedCallback):
    """Prunes with soft masks computed from the weights themselves (PDP, Cho et al. 2023): no parameter, no extra loss.

    The network sees ``sigmoid((w^2 - t^2) / tau) w``, with t recomputed in every forward pass; a pruned weight may
    return until the masks are binarised. Reach for it at 85 to 95 % sparsity or under N:M, where gradual magnitude
    pruning loses accuracy. Checkpoints hold the binarised weights under their own names (the raw ones beside them, for
    resuming). Works with any optimizer and precision, accumulation, DDP, ``torch.compile`` and ``WeightAveraging``.
    Cost: about 1.4 times the step of a ResNet-18 on small images on a CPU, and two tensors of the weights' size. It
    fails with masks that never decide (``temperature`` too high) or are as good as hard (too low): both are warned of.

    Args:
        sparsity: final share of zeros R in [0, 1); ``None`` only for N:M.
        temperature: tau > 0, in units of w^2 (times the size of a channel); the paper's 1e-4 suits ResNet-18's weights.
            ``"auto"``, per tensor at ``start``: a tenth of its final t^2, or of the spread of the squared norms of its
            channels; a twentieth under N:M. It did better than 1e-4 on small networks (docs/results.md).
        start: s, dense training before it; the budget of each layer is fixed here. 0 for a pretrained model.
        stop: where the full target is reached; the paper's epsilon is ``every / (stop - start)``, by default 0.015 of
            100 epochs. In short runs let it be halfway between ``start`` and the end.
        every: the paper's epoch, at whose beginning the ratio rises.
        freeze: binarise here and fine-tune with fixed masks; ``None``: binarise at the end.
        granularity: ``"unstructured"``, ``"channel"`` (output channels or rows) or ``"N:M"``: of M consecutive input
            weights N *stay*, as in the paper (PruningCallback names the number that go; 2:4 is the same).
        scope: ``"global"``: one magnitude threshold over all weights at ``start`` sets each layer's share (the paper;
            channels are ranked by their root mean square); ``"local"``: every weight gets ``sparsity``.
        eval_hard: validate with the binarised weights, which are what is deployed.
        compact: at the end the network in ``module.model`` loses its dead channels with their biases and BatchNorms, in
            place (extra ``prune``); from ``report()["channels"]`` ``core.structure.rebuild`` makes the smaller
            architecture. Give it a ``freeze``, at which dead channels fall silent and the network heals. Channels of a
            residual sum go only where all its partners are dead.
        targets, exclude: layers by name glob or type; default every Linear, convolution, attention projection and HF
            ``Conv1D`` but the first convolution and the last Linear (the paper prunes those too: ``targets="*"``).

    Raises:
        ConfigurationError: an argument outside its range; nothing matched; input features that groups of M do not fill;
            a fraction of a run of unknown length; ``ckpt_path`` of a run that pruned with other arguments.
        RuntimeError: NaN or infinity in a weight when the budget is set.

    Logs at each ``every``: ``pdp/target``, ``pdp/sparsity`` (what binarising prunes) and ``pdp/undecided`` (the share
    of 0.01 < m < 0.99).

    Example::

        from effdl.callbacks import PDPCallback

        pruning = PDPCallback(sparsity=0.9, temperature="auto", start="2ep", stop=0.6)
        Trainer(callbacks=[pruning]).fit(module, data)
        print(pruning.report()["layers"])
    """

    paper = Paper(
        slug="pdp",
        title="PDP: Parameter-free Differentiable Pruning is All You Need",
        authors=("Cho, Minsik", "Adya, Saurabh", "Naik, Devang"),
        year=2023,
        arxiv="2305.11203",
        venue="Advances in Neural Information Processing Systems",
    )
    retain = True

    def __init__(
        self,
        sparsity: float | None = None,
        temperature: float | Literal["auto"] = 1e-4,
        start: Point = 0.16,
        stop: Point = 0.8267,
        every: Point = "1ep",
        freeze: Point | None = None,
        granularity: str = "unstructured",
        scope: Literal["global", "local"] = "global",
        eval_hard: bool = True,
        compact: bool = False,
        targets: Targets = None,
        exclude: Targets = None,
    ) -> None:
        self.sparsity, self.temperature, self.granularity, self.scope = sparsity, temperature, granularity, scope
        self.start, self.stop, self.every, self.freeze = start, stop, every, freeze
        self.eval_hard, self.compact, self.targets, self.exclude = eval_hard, compact, targets, exclude
        _pdp_targets.check_arguments(self)
        self.final = _pdp_targets.final_sparsity(sparsity, granularity)
        self._begin()

    # ---- attaching -------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        super()._begin()
        self.ramp: Ramp | None = None
        self.freeze_step: int | None = None
        self.layers: dict[str, PrunedWeight] = {}
        self.budgeted = self.frozen = False
        self._share, self._interval, self._full, self.compaction = 0.0, -1, None, Compaction(self.compact)

    def attach(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().attach(trainer, pl_module, stage)
        if stage == "fit":
            self.keep(wrap(pl_module, "on_validation_epoch_start", self._then_harden))

    def _select(self, pl_module: Any) -> None:
        weights = _pdp_targets.chosen(pl_module, self.targets, self.exclude, self.granularity)
        if self.compact and product(pl_module) is pl_module:
            raise ConfigurationError("compact=True needs the network in module.model, whose channels it takes out.")
        self.store, self._network, self._swaps = MaskStore(weights), product(pl_module), []
        for weight in weights:
            self._swaps += reweight_everywhere(pl_module, weight.parameter, self._see_through(weight.name))
        self.keep(self._swaps)

    def _see_through(self, name: str) -> Callable[[Tensor], Tensor]:
        def seen(raw: Tensor) -> Tensor:  # a closure: a deep copy of the module must not copy the callback
            if name not in self.layers:
                return raw
            return self.store.masked(name, raw) if self.store.masks else self.layers[name].seen(raw)

        return seen

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.ramp is None:
            self.ramp, self.freeze_step = _pdp_targets.points(self, trainer)

    def _is_dense(self) -> bool:
        return self.ramp is not None and not self.budgeted

    # ---- one step --------------------------------------------------------------------------------------------

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.frozen:
            if self.step > self.freeze_step:  # one step later, when a resumed run has seen a forward too
                self.compaction.silence(self._probe, self.store)
            return
        if self.step < self.ramp.start:
            return
        if not self.budgeted:
            self._measure_dense(trainer, pl_module)
            _mask_report.warn_of_frozen(self.store)
            self.budgeted, form = True, (self.granularity, self.scope, self.final, self.temperature)
            self.layers = _pdp_targets.budget(list(self.store.weights.values()), *form)
        if (interval := self.ramp.interval(self.step)) != self._interval:
            self._interval = interval
            self._rise(self.ramp.share(self.step))
            told = {"target": self._share * self.final, **_pdp_targets.shares(self.layers, self.store.weights)}
            self._unlogged = {f"{self.slug}/{name}": value for name, value in told.items()}
        if self.freeze_step is not None and self.step >= self.freeze_step:
            self._harden()
            self.frozen = True

    def _rise(self, share: float) -> None:
        self._share = share
        for name, layer in self.layers.items():
            layer.set_share(share, self.store.weights[name].data.device)

    @torch.no_grad()
    def _harden(self) -> None:
        """Binarise the masks of the weights as they are now; as long as the store has masks, the network sees them."""
        if not self.frozen:
            for name, layer in self.layers.items():
                self.store.set(name, layer.hard(self.store.weights[name].data))

    def _project(self) -> None:
        self.compaction.project()

    # ---- validation and the end --------------------------------------------------------------------------------

    def _then_harden(self, call_next: Callable, *args: Any) -> None:
        call_next(*args)
        if self.eval_hard:
            self._harden()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self.store is not None and not self.frozen:
            self.store.masks.clear()
        super().on_validation_end(trainer, pl_module)

    def _then_finish(self, call_next: Callable, *args: Any) -> None:
        def binarise(*args: Any) -> None:
            call_next(*args)
            self._harden()
            for handle in self._swaps:
                handle.remove()

        super()._then_finish(binarise, *args)
        if self.ramp is not None and self._share < 1:
            reached = float(self.store.sparsity())
            _mask_report.warn_of_early_end(self.step, self.ramp.stop, reached, self.final)
        if self._probe is not None:
            self.compaction.take_out(self._probe, self.store)
            self._full = self.compaction.full

    # ---- state and report --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        return {
            **state,
            "masks": state["masks"] if self.frozen else {},
            "silenced": self.compaction.state(),
            "share": self._share,
            "interval": self._interval,
            "ramp": dict(vars(self.ramp)) if self.ramp else None,
            "freeze": self.freeze_step,
            "layers": {n: {"sparsity": w.sparsity, "temperature": w.temperature} for n, w in self.layers.items()},
            "budgeted": self.budgeted,
        }

    def _restore(self, saved: dict[str, Any]) -> None:
        super()._restore(saved)
        self.ramp, self.freeze_step = Ramp(**saved["ramp"]) if saved["ramp"] else None, saved["freeze"]
        weights = {name: self.store.weights[name] for name in saved["layers"]}
        self.layers = _pdp_targets.layers_of(weights, self.granularity, saved["layers"])
        self._interval = saved["interval"]
        self._rise(saved["share"])
        self.budgeted, self.frozen = saved["budgeted"], bool(saved["masks"])
        self.compaction.load_state(self._network, saved["silenced"])

    def _fold(self, state: dict[str, Any]) -> dict[str, Any]:
        masks = dict(self.store.masks) if self.store else {}
        for name, layer in self.layers.items():
            if not self.frozen and name in state:  # an averaged state has masks of its own
                self.store.set(name, layer.hard(state[name]))
        raw = super()._fold(state)
        if self.store:
            self.store.masks = masks
        return raw

    def report(self) -> dict[str, Any]:
        """Counted sparsity, target and temperature per weight, dense and pruned model, latency.

        Raises:
            ConfigurationError: before any fit.
        """
        told = super().report()
        told["curves"].insert(1, f"{self.slug}/undecided")
        for name, layer in self.layers.items():
            told["layers"][name] |= {"target": layer.sparsity, "temperature": layer.temperature}
        return told | ({"channels": self.compaction.counts} if self.compaction.counts else {})

    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite."""
        return ContractExample(
            kwargs={"sparsity": 0.5, "temperature": "auto", "start": 2, "stop": 12, "every": 2},
            bad={
                "sparsity": [1.0, -0.1, float("nan"), None],
                "temperature": [0, -1e-4, float("nan"), float("inf"), "warm"],
                "start": [-1, 1.5, "3 parsecs"],
                "stop": [-1, 1.5, 1],
                "every": [0, -3],
                "freeze": [-1, 1.5, 1],
                "granularity": ["2:2", "4x1", "blocks"],
                "scope": "everywhere",
                "eval_hard": "yes",
                "compact": ["yes", True],
                "targets": ["no.such.layer", 3],
                "exclude": "no.such.layer",
            },
        )

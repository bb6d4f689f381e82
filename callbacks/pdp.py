"""pdp on a Trainer: which weights are seen softly and from when, what validation and checkpoints get, how it ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from effdl.callbacks import _mask_report, _pdp_example, _pdp_targets
from effdl.callbacks._base import MethodCallback
from effdl.callbacks._pdp_channels import Compaction
from effdl.compression.pdp import PrunedWeight, Ramp
from effdl.core.checkpoint import fold_checkpoints
from effdl.core.contract import ContractExample
from effdl.core.errors import ConfigurationError, check
from effdl.core.export import product
from effdl.core.masks import MaskStore
from effdl.core.paper import Paper
from effdl.core.report import ForwardProbe, measure
from effdl.core.reweight import reweight_everywhere
from effdl.core.schedules import Point
from effdl.core.select import Targets
from effdl.core.steps import after_optimizer_step, wrap
from effdl.core.surgery import when_built


class PDPCallback(MethodCallback):
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
            channels; a twentieth under N:M.
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

    Logs at each rise ``pdp/target``, ``pdp/sparsity`` (what binarising would prune) and ``pdp/undecided`` (the share
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
        self.store: MaskStore | None = None
        self._saved: dict[str, Any] | None = None
        self._begin()

    # ---- attaching -------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self.step, self._share, self.compaction = 0, 0.0, Compaction(self.compact)
        self.ramp: Ramp | None = None
        self.freeze_step: int | None = None
        self._told: dict[str, Any] = {}
        self.layers: dict[str, PrunedWeight] = {}
        self.budgeted = self.frozen = self._hard = False
        self.dense: dict[str, Any] = {}
        self._unlogged: dict[str, float] = {}
        self._probe: ForwardProbe | None = None

    def attach(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            # fit called again goes on with its budget
            self._saved = self.state_dict() if trainer.global_step else None
            self._begin()
            self.keep(when_built(pl_module, lambda: self._select(pl_module)))
            self.keep(fold_checkpoints(pl_module, self.state_key, self._fold, lambda state, kept: state.update(kept)))
            self.keep(self.same_arguments_on_resume(trainer, pl_module))
            # the module's hooks run after all callbacks', so after WeightAveraging put its average in
            self.keep(wrap(pl_module, "on_validation_epoch_start", self._then_harden))
            self.keep(wrap(pl_module, "on_train_end", self._then_finish))
            check(not self.compact or product(pl_module) is not pl_module, "compact", True, "a network in module.model")

    def _select(self, pl_module: Any) -> None:
        weights = _pdp_targets.chosen(pl_module, self.targets, self.exclude, self.granularity)
        self.store = MaskStore(weights)
        self._swaps = []
        for weight in weights:
            self._swaps += reweight_everywhere(pl_module, weight.parameter, self._see_through(weight.name))
        self.keep(self._swaps)

    def _see_through(self, name: str) -> Callable[[Tensor], Tensor]:
        def seen(raw: Tensor) -> Tensor:  # a closure: a deep copy of the module must not copy the callback
            if name not in self.layers:
                return raw
            return self.store.masked(name, raw) if self._hard else self.layers[name].seen(raw)

        return seen

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self._saved is not None:
            self._restore(self._saved, product(pl_module))
        self.keep(after_optimizer_step(trainer, lambda opt: self._count(trainer, opt), type(self).__name__))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.ramp is None:
            self.ramp, self.freeze_step = _pdp_targets.points(self, trainer)

    # ---- one step --------------------------------------------------------------------------------------------

    def _count(self, trainer: Any, optimizer: Any) -> None:
        self.step += optimizer is trainer.optimizers[0]
        self.compaction.project()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        model = product(pl_module)
        if self._probe is None and model is not pl_module:
            self._probe = ForwardProbe(model)
            self.keep(self._probe)
        if self.frozen:
            if self.step > self.freeze_step:  # one step later, when a resumed run has seen a forward too
                self.compaction.silence(self._probe, self.store)
            return
        if self.step < self.ramp.start:
            return
        if not self.budgeted:
            # once, where every weight still lives: what the finished model is compared with
            if trainer.is_global_zero and "parameters" not in self.dense:
                self.dense |= measure(model)
            _mask_report.warn_of_frozen(self.store)
            self.budgeted, form = True, (self.granularity, self.scope, self.final, self.temperature)
            self.layers = _pdp_targets.budget(list(self.store.weights.values()), *form)
        share = self.ramp.share(self.step)
        if share != self._share:
            self._rise(share)
            told = {"target": share * self.final, **_pdp_targets.shares(self.layers, self.store.weights)}
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
        """Binarise the masks of the weights as they are now."""
        if not self.frozen:
            for name, layer in self.layers.items():
                self.store.set(name, layer.hard(self.store.weights[name].data))
        self._hard = bool(self.layers)

    # ---- logging, validation and the end -----------------------------------------------------------------------

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        if self._unlogged:
            pl_module.log_dict(self._unlogged)
            self._unlogged = {}

    def _then_harden(self, call_next: Callable, *args: Any) -> None:
        call_next(*args)
        if self.eval_hard:
            self._harden()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._hard = self.frozen
        if self.ramp is not None and not trainer.sanity_checking and not self.budgeted:
            seen = {k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith(self.slug)}
            self.dense["metrics"] = {k: v for k, v in seen.items() if "val" in k} or seen

    def _then_finish(self, call_next: Callable, *args: Any) -> None:
        call_next(*args)
        self._harden()
        for handle in self._swaps:
            handle.remove()
        self.store.apply_()
        self._told = _mask_report.pruning_report(self.store)
        if self.ramp is not None and self._share < 1:
            _mask_report.warn_of_early_end(self.step, self.ramp.stop, self._told["sparsity"], self.final)
        if self._probe is not None:
            self.compaction.take_out(self._probe, self.store)

    # ---- state and report --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "share": self._share,
            "ramp": dict(vars(self.ramp)) if self.ramp else None,
            "freeze": self.freeze_step,
            "layers": {n: {"sparsity": w.sparsity, "temperature": w.temperature} for n, w in self.layers.items()},
            "budgeted": self.budgeted,
            "masks": self.store.state() if self.frozen else {},
            "silenced": self.compaction.state(),
            "dense": dict(self.dense),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict

    def _restore(self, saved: dict[str, Any], model: Any) -> None:
        self.step, self.freeze_step, self.dense = saved["step"], saved["freeze"], dict(saved["dense"])
        self.ramp = Ramp(**saved["ramp"]) if saved["ramp"] else None
        weights = {name: self.store.weights[name] for name in saved["layers"]}
        self.layers = _pdp_targets.layers_of(weights, self.granularity, saved["layers"])
        self.store.load_state(saved["masks"])
        self._rise(saved["share"])
        self.budgeted, self.frozen, self._hard = saved["budgeted"], bool(saved["masks"]), bool(saved["masks"])
        self.compaction.load_state(model, saved["silenced"])

    def _fold(self, state: dict[str, Any]) -> dict[str, Any]:
        if not self.layers:
            return {}
        masks = dict(self.store.masks)
        if not self.frozen:  # an averaged state has masks of its own
            for name, layer in self.layers.items():
                if name in state:
                    self.store.set(name, layer.hard(state[name]))
        raw = self.store.apply_to_state(state)
        self.store.masks = masks
        return {key: value.clone() for key, value in raw.items()}

    def matched(self, module: Any) -> list[str]:
        """Names of the weights that will be pruned."""
        return list(self.store.weights) if self.store else []

    def report(self) -> dict[str, Any]:
        """Counted sparsity per weight and in all, dense numbers at ``start``, latency.
        Raises:
            ConfigurationError: before any fit.
        """
        if self.store is None:
            raise ConfigurationError("report() needs a fit: nothing was pruned yet.")
        told = dict(self._told or _mask_report.pruning_report(self.store))
        for name, layer in self.layers.items():
            told["layers"][name] |= {"target": layer.sparsity, "temperature": layer.temperature}
        told |= {"channels": self.compaction.counts} if self.compaction.counts else {}
        told |= _mask_report.columns(self.dense, self._probe, self.compaction.full)
        curves = [f"{self.slug}/sparsity", f"{self.slug}/undecided", *sorted(self.dense.get("metrics", {}))]
        return {"steps": self.step, "curves": curves, **told}

    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite."""
        return _pdp_example.example()

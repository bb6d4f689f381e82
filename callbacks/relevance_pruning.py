"""relevance-pruning on a Trainer: when filters are scored and masked, and how they leave the network at the end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from effdl.callbacks import _relevance_network as place
from effdl.callbacks._mask_report import warn_of_early_end
from effdl.callbacks._masked import MaskedCallback
from effdl.compression.relevance_pruning import FilterPruner, check_settings, prunable, reference_samples
from effdl.core.calibrate import calibration_batches as read_batches
from effdl.core.calibrate import to_device
from effdl.core.contract import ContractExample
from effdl.core.errors import ConfigurationError, check, check_integer
from effdl.core.export import product
from effdl.core.masks import MaskStore
from effdl.core.paper import Paper
from effdl.core.report import ForwardProbe
from effdl.core.schedules import Point, check_point, resolve_point
from effdl.core.select import Targets, check_targets, select_weights
from effdl.core.steps import wrap
from effdl.core.structure import dead_channels, swap_children


class RelevancePruningCallback(MaskedCallback):
    """Removes the filters that carry least relevance for the true class of a few images (Yeom et al. 2021).

    For a network that works already and has to get smaller on little data: a handful of images per class is enough,
    also without training afterwards. Filters are masked, ``step_sparsity`` of them at a time with new scores, held at
    zero behind every optimizer step, and at the end taken out: the module's network is then a smaller dense one. One
    scoring pass costs a few gradients of the reference images. With ``every`` the network trains between two steps
    (the paper: about 10 epochs at a tenth of the rate). Checkpoints keep the full size, with exact zeros; one that is
    loaded by ``trainer.validate`` (``effdl export``) is compacted behind the validation.

    Args:
        sparsity: share of the filters to remove, in (0, 1).
        step_sparsity: share of the original filters that goes in one step.
        start: when pruning begins. 0 suits a trained network, from scratch give it some epochs; 1.0: after training.
        every: interval between two steps; ``None``: all of them at ``start``, without training in between.
        criterion: ``"lrp"``, or to compare with ``"weight"``, ``"gradient"``, ``"taylor"``, ``"random"``.
        rule: relevance rules, ``"composite"`` (epsilon in Linear, z+ in convolutions), ``"zplus"`` (z+ everywhere, the
            authors' VGG script; keeps classes less apart), ``"epsilon"``, ``"alpha2-beta1"``.
        absolute: score by the sum of |R| (the authors' ResNet code) instead of R.
        reference: batches ``(x, y)`` to score on, without augmentation; ``None``: drawn from the training data.
        calibration_batches: how many training batches are read for that, in an order of ``seed``.
        samples_per_class: reference samples of each class; ``None``: all that were read.
        coupled: channels that a residual sum or a depthwise convolution ties go together, so that they can be taken
            out; ``False``: each filter by itself (the authors' code), and those in sums stay as zeros.
        compact: take dead filters out at the end of training; ``False``: leave zeros.
        strict: raise where the last filter of a layer would go, instead of keeping it.
        targets, exclude: layers by name glob or type; default every convolution, without any every Linear layer. What
            makes the network's output is never pruned.
        batch_size: reference samples per scoring pass.
        seed: of the reference draw and of ``criterion="random"``.

    Under DDP each process scores its share of the reference samples, and sums are all-reduced.

    Raises:
        ConfigurationError: an argument outside its range; nothing matched; batches without labels; a ``sparsity`` that
            would empty layers; ``ckpt_path`` of a run with other arguments.
        LRPRuleNotFound: an operation without a relevance rule (``effdl.core.lrp.register_rule``).
        MissingExtraError: Torch-Pruning (extra ``prune``) is not installed.
        RuntimeError: relevance that is not finite; the message names the layer.

    Logs ``relevance-pruning/sparsity``, ``/reference_accuracy``, ``/parameters`` and ``/macs`` after each step.

    Example::

        from effdl.callbacks import RelevancePruningCallback

        pruning = RelevancePruningCallback(sparsity=0.6, start="2ep", every="1ep")
        Trainer(callbacks=[pruning]).fit(module, data)
        print(pruning.history, pruning.counts)       # effdl.core.structure.rebuild(model, counts) is the architecture
    """

    paper = Paper(
        slug="relevance-pruning",
        title="Pruning by Explaining: A Novel Criterion for Deep Neural Network Pruning",
        authors=(
            "Yeom, Seul-Ki",
            "Seegerer, Philipp",
            "Lapuschkin, Sebastian",
            "Binder, Alexander",
            "Wiedemann, Simon",
            "Müller, Klaus-Robert",
            "Samek, Wojciech",
        ),
        year=2021,
        arxiv="1912.08881",
        venue="Pattern Recognition 115",
    )

    def __init__(
        self,
        sparsity: float = 0.6,
        step_sparsity: float = 0.05,
        start: Point = 0,
        every: Point | None = None,
        criterion: str = "lrp",
        rule: str = "composite",
        absolute: bool = False,
        reference: Iterable[Any] | None = None,
        calibration_batches: int = 16,
        samples_per_class: int | None = 10,
        coupled: bool = True,
        compact: bool = True,
        strict: bool = False,
        targets: Targets = None,
        exclude: Targets = None,
        batch_size: int = 64,
        seed: int = 0,
    ) -> None:
        check_settings(sparsity, step_sparsity, criterion, rule)
        check_point("start", start)
        if every is not None:
            check_point("every", every, positive=True)
        flags = {"absolute": absolute, "coupled": coupled, "compact": compact, "strict": strict}
        for name, value in flags.items():
            check(isinstance(value, bool), name, value, "True or False")
        iterable = reference is None or (isinstance(reference, Iterable) and not isinstance(reference, str))
        check(iterable, "reference", reference, "batches (x, y), or None for the training data")
        check_integer("calibration_batches", calibration_batches, 1)
        if samples_per_class is not None:
            check_integer("samples_per_class", samples_per_class, 1)
        check_targets("targets", targets)
        check_targets("exclude", exclude)
        check_integer("batch_size", batch_size, 1)
        check_integer("seed", seed, 0)
        self.sparsity, self.step_sparsity, self.start, self.every = sparsity, step_sparsity, start, every
        self.criterion, self.rule, self.absolute = criterion, rule, absolute
        self.reference, self.calibration_batches = reference, calibration_batches
        self.samples_per_class = samples_per_class
        self.coupled, self.compact, self.strict = coupled, compact, strict
        self.targets, self.exclude, self.batch_size, self.seed = targets, exclude, batch_size, seed
        self._begin()

    def _begin(self) -> None:
        super()._begin()
        self.history: list[dict[str, float]] = []
        self.counts: dict[str, dict[str, int]] = {}
        self._points: dict[str, int] = {}
        self._pruner: FilterPruner | None = None
        self._full: nn.Module | None = None

    # ---- attaching -------------------------------------------------------------------------------------------

    def attach(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._full is not None:
            full = self._full
            self.keep(wrap(pl_module, "on_load_checkpoint", lambda *args: place.of_full_size(pl_module, full, *args)))
        super().attach(trainer, pl_module, stage)

    def _select(self, pl_module: Any) -> None:
        network = product(pl_module)
        self._layers = prunable(network, self.targets, self.exclude)
        select_weights(network, self._layers)  # refuses sharded ones
        self.store = MaskStore(place.parameters(pl_module))

    def _is_dense(self) -> bool:
        return self.store is not None and not self.store.masks and not self.counts

    def matched(self, module: Any) -> list[str]:
        """Names of the layers that lose filters."""
        return list(self._layers) if self.store else []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not self._points:
            begin = resolve_point("start", self.start, trainer)
            every = 0 if self.every is None else resolve_point("every", self.every, trainer, interval=True)
            self._points = {"begin": begin, "every": every}
        if self.counts:  # fit again on the compacted network: nothing is left to do
            return
        inputs, labels = reference_samples(self._batches(trainer, pl_module), self.samples_per_class)
        self._pruner = FilterPruner(
            product(pl_module), inputs, labels, self.sparsity, self.step_sparsity, self.criterion, self.rule,
            self.absolute, self.coupled, self.strict, self.targets, self.exclude, self.batch_size, self.seed,
        )  # fmt: skip
        if self.store.masks:  # resumed: the masked rows are the dead filters
            self._project()
            found = dead_channels(self._pruner.model)
            self._pruner.dead |= {name: found[name] for name in self._pruner.layers}
        if self.step == 0:
            self._after_own_step(trainer)

    def _batches(self, trainer: Any, pl_module: Any) -> list[Any]:
        if self.reference is not None:
            return [to_device(batch, pl_module.device) for batch in self.reference]
        return read_batches(trainer, pl_module, self.calibration_batches, seed=self.seed)

    # ---- pruning ---------------------------------------------------------------------------------------------

    def _after_own_step(self, trainer: Any) -> None:
        begin, every = self._points["begin"], self._points["every"]
        due = self.step == begin or (every and self.step > begin and (self.step - begin) % every == 0)
        if not due or self._pruner is None or self._pruner.done:
            return
        if self._is_dense():
            self._measure_dense(trainer, trainer.lightning_module)
            self.history.append(self._pruner.row())
        self._prune_step(trainer)
        while not every and not self._pruner.done:
            self._prune_step(trainer)
        self._unlogged = {f"{self.slug}/{name}": value for name, value in self.history[-1].items()}

    def _prune_step(self, trainer: Any) -> None:
        prefix = place.prefix_of(trainer.lightning_module)
        self._set_masks(trainer, {prefix + name: mask for name, mask in self._pruner.advance().items()})
        self.history.append(self._pruner.row())

    def _then_finish(self, call_next: Callable, *args: Any) -> None:
        super()._then_finish(call_next, *args)
        if self._pruner is None:
            return
        begin, every = self._points["begin"], self._points["every"]
        if not self._pruner.done:
            steps = -(-(self._pruner.goal - self._pruner.removed) // self._pruner.per_step)
            end = max(begin, self.step) + steps * max(every, 1)
            warn_of_early_end(self.step, end, self._pruner.reached, self.sparsity)
        if self.compact and self._pruner.removed:
            self._take_out(self._pruner.model, *self._pruner.compacted())

    def _take_out(self, network: nn.Module, small: nn.Module, counts: dict[str, dict[str, int]]) -> None:
        self._full, self.counts = copy.deepcopy(network), counts
        swap_children(network, small)

    # ---- a checkpoint under trainer.validate (effdl export) ---------------------------------------------------

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if self.compact and place.validates_checkpoint(trainer):
            self._probe = ForwardProbe(product(pl_module))
            self.keep(self._probe)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        super().on_validation_end(trainer, pl_module)
        if self.compact and place.validates_checkpoint(trainer):
            network = product(pl_module)
            found = place.compacted_again(network, prunable(network, self.targets, self.exclude), self._probe)
            if found is not None:
                self._take_out(network, *found)

    # ---- state and report ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        state = {**super().state_dict(), "history": list(self.history), "counts": self.counts, "points": self._points}
        return {**state, "masks": {} if self.counts else state["masks"]}

    def _restore(self, saved: dict[str, Any]) -> None:
        super()._restore(saved)
        self.history, self.counts = list(saved["history"]), dict(saved["counts"])
        self._points = dict(saved["points"])

    def report(self) -> dict[str, Any]:
        """Filters per layer, the history of all steps, channel counts, and the dense and the pruned network.

        Raises:
            ConfigurationError: before any fit.
        """
        if self._pruner is None:
            raise ConfigurationError("report() needs a fit: nothing was pruned yet.")
        dead = self._pruner.dead
        layers = {name: {"filters": len(d), "kept": len(d) - int(d.sum())} for name, d in dead.items()}
        return {
            "steps": self.step,
            "sparsity": self._pruner.reached,
            "filters": self._pruner.total,
            "filters_removed": self._pruner.removed,
            "history": self.history,
            "channels": self.counts,
            "layers": layers,
            "curves": [f"{self.slug}/sparsity", f"{self.slug}/reference_accuracy", *self.dense.get("metrics", {})],
            **place.columns(self.dense, self._full, self._pruner.model, self._probe),
        }

    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite."""
        return ContractExample(
            kwargs={"sparsity": 0.25, "step_sparsity": 0.1, "start": 1, "every": 1, "samples_per_class": 4},
            bad=dict.fromkeys(("absolute", "coupled", "compact", "strict"), "yes")
            | {
                "sparsity": [0.0, 1.0, float("nan"), 0.95],
                "step_sparsity": [0.0, 1.5],
                "start": [-1, 1.5, "soon"],
                "every": [0, -3],
                "criterion": ["relevance", 3],
                "rule": "z-plus",
                "reference": [3, [torch.zeros(2, 3, 8, 8)]],
                "calibration_batches": 0,
                "samples_per_class": 0,
                "targets": ["no.such.layer", 3],
                "exclude": "no.such.layer",
                "batch_size": 0,
                "seed": -1,
            },
        )

"""rnn-sparsity on a Trainer: recurrent weights pruned once at a percentile, the rest trained on under fixed masks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from effdl.callbacks import _mask_report
from effdl.callbacks._masked import MaskedCallback
from effdl.compression.rnn_sparsity import PAPER, check_pruning, percentile_masks, prune_recurrent_, recurrent_weights
from effdl.compression.rnn_sparsity_models import RecurrentClassifier, example_input, example_strings
from effdl.core.contract import ContractExample
from effdl.core.distributed import check_equal_on_ranks
from effdl.core.errors import check, check_integer
from effdl.core.masks import MaskStore
from effdl.core.schedules import Point, check_point, resolve_point
from effdl.core.select import Targets, check_targets


class RNNPruningCallback(MaskedCallback):
    """Prunes recurrent weights below a percentile of their magnitudes, once, and trains on under the mask (Darji 2021).

    thr = percentile of |w|, linearly interpolated, over the chosen matrices of all chosen RNN, GRU and LSTM layers and
    cells; what is strictly smaller is zeroed in place, keeps a zero gradient, and is zeroed behind each optimizer step.
    Stock modules, their names and cuDNN's fused kernels stay. Bidirectional and projected layers count with all their
    matrices (``weight_hr`` under h2h). Pruned at 80 %, a GRU or an LSTM regains its accuracy within an epoch; a network
    pruned to 100 % in i2h never does.

    Args:
        sparsity: the percentile / 100, in [0, 1].
        weights: ``"both"`` groups under one threshold, ``"i2h"`` (``weight_ih``) or ``"h2h"`` (``weight_hh``). Biases,
            embeddings and heads never.
        scope: ``"global"``: one threshold over all layers (the thesis's code); ``"layer"``: one for each layer and
            direction (its text); ``"gate"``: one for each gate of these.
        start: when to prune: in front of the first batch from then on. 0 suits a trained model; 1.0 prunes the
            finished one without re-training.
        keep_largest: at ``sparsity=1`` the percentile is the largest magnitude, which stays (the thesis's code);
            ``False`` empties the matrices.
        targets, exclude: recurrent layers by name glob or type; default all.

    Raises:
        ConfigurationError: an argument out of range; no recurrent layer; an optimizer without step hooks; a fraction
            of a run of unknown length; ``ckpt_path`` of a run that pruned with other arguments.
        RuntimeError: NaN or infinity in a weight when it is ranked.

    Logs ``rnn-sparsity/sparsity`` (measured over the chosen weights) when it prunes.

    Example::

        from effdl.callbacks import RNNPruningCallback

        pruning = RNNPruningCallback(sparsity=0.8, start="8ep")
        Trainer(max_epochs=10, gradient_clip_val=5, callbacks=[pruning]).fit(RecurrentClassifier("LSTM"), ReberData())
        print(pruning.report()["layers"])
    """

    paper = PAPER

    def __init__(
        self,
        sparsity: float,
        weights: Literal["both", "i2h", "h2h"] = "both",
        scope: Literal["global", "layer", "gate"] = "global",
        start: Point = 0,
        keep_largest: bool = True,
        targets: Targets = None,
        exclude: Targets = None,
    ) -> None:
        check_pruning(sparsity, weights, scope, keep_largest)
        check_point("start", start)
        check_targets("targets", targets)
        check_targets("exclude", exclude)
        self.sparsity, self.weights, self.scope, self.start = sparsity, weights, scope, start
        self.keep_largest, self.targets, self.exclude = keep_largest, targets, exclude
        self._begin()

    def _begin(self) -> None:
        super()._begin()
        self._at: int | None = None  # start, in optimizer steps

    def _select(self, pl_module: Any) -> None:
        self.store = MaskStore(recurrent_weights(pl_module, self.weights, self.targets, self.exclude))

    def _is_dense(self) -> bool:
        return self.store is not None and not self.store.masks

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self._at is None:
            self._at = resolve_point("start", self.start, trainer)
        self._project()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.step >= self._at and self._is_dense():
            self._prune(trainer, pl_module)

    def _prune(self, trainer: Any, pl_module: Any) -> None:
        chosen = list(self.store.weights.values())
        check_equal_on_ranks((weight.data for weight in chosen), "a weight to be pruned")
        self._measure_dense(trainer, pl_module)
        _mask_report.warn_of_frozen(self.store)
        masks = percentile_masks(chosen, self.sparsity, scope=self.scope, keep_largest=self.keep_largest)
        self._set_masks(trainer, masks)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self._is_dense() and self._at is not None:
            if self.step >= self._at:  # start=1.0: the trained model, pruned and not trained on
                self._prune(trainer, pl_module)
            else:
                rank_zero_warn(f"Training stopped at step {self.step} before start (step {self._at}): nothing pruned.")

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "at": self._at}

    def _restore(self, saved: dict[str, Any]) -> None:
        super()._restore(saved)
        self._at = saved["at"]

    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite: a tiny two-layer GRU on strings."""
        return ContractExample(
            kwargs={"sparsity": 0.4, "start": 2},
            module=_tiny_classifier,
            data=example_strings,
            example_input=example_input,
            bad={
                "sparsity": [1.5, -0.1, float("nan"), None],
                "weights": ["hidden", None],
                "scope": "everywhere",
                "start": [-1, 1.5, "3 parsecs"],
                "keep_largest": "yes",
                "targets": ["no.such.layer", "head", 3],
                "exclude": "no.such.layer",
            },
        )


def _tiny_classifier() -> Any:
    return RecurrentClassifier("GRU", hidden_size=6, num_layers=2, embedding_size=4)


class _Listener(Callback):
    """The metric of every validation."""

    def __init__(self, metric: str) -> None:
        self.metric, self.seen = metric, []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        found = trainer.callback_metrics
        check(self.metric in found, "metric", self.metric, f"one of the logged {sorted(found)}")
        self.seen.append(float(found[self.metric]))


def sweep(
    module: Any,
    data: Any,
    sparsities: Sequence[float] = tuple(p / 10 for p in range(1, 11)),
    weights: Sequence[str] = ("both", "i2h", "h2h"),
    epochs: int = 10,
    scope: str = "global",
    metric: str = "val/accuracy",
    trainer: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """The thesis's protocol: from one trained module, prune, validate at once, and re-train under the fixed mask.

    Args:
        module: a trained LightningModule that logs ``metric``; each run starts from a copy of it.
        data: a data module (or what ``Trainer.fit`` takes) with a validation split.
        sparsities, weights, scope: see :class:`RNNPruningCallback`; every pair is one run.
        epochs: of re-training; 0 for the accuracy at once alone.
        metric: what is recorded.
        trainer: further arguments of every Trainer, such as ``{"gradient_clip_val": 5}``.

    Returns:
        Rows ``{"sparsity", "weights", "epoch", "accuracy"}``: epoch 0 is the pruned network before any re-training; the
        first row, sparsity 0 and weights ``"none"``, is the dense module.

    Raises:
        ConfigurationError: an argument out of range, no recurrent layer, a metric that is not logged.

    Example::

        rows = sweep(module, data, sparsities=(0.5, 0.8), epochs=1, trainer={"gradient_clip_val": 5})
        print(epochs_to_regain(rows, tolerance=0.01))        # {(0.5, "both"): 0, (0.8, "both"): 1, ...}
    """
    check_integer("epochs", epochs, 0)
    pairs = [(sparsity, group) for sparsity in sparsities for group in weights]
    for sparsity, group in pairs:
        check_pruning(sparsity, group, scope, True)

    def measured(module: Any, callbacks: list[Any]) -> list[float]:
        listener = _Listener(metric)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        options = {"enable_checkpointing": False, "num_sanity_val_steps": 0, **quiet, **(trainer or {})}
        make = Trainer(max_epochs=epochs, callbacks=[listener, *callbacks], **options)
        make.validate(module, data, verbose=False)
        if callbacks and epochs:
            make.fit(module, data)
        return listener.seen

    rows = [{"sparsity": 0.0, "weights": "none", "epoch": 0, "accuracy": measured(module, [])[0]}]
    for sparsity, group in pairs:
        copied = copy.deepcopy(module)
        prune_recurrent_(copied, sparsity, weights=group, scope=scope)
        # the mask of a pruned matrix is the mask it was pruned by: what is zero ranks below the threshold again
        pruning = RNNPruningCallback(sparsity, group, scope)
        for epoch, accuracy in enumerate(measured(copied.train(), [pruning])):
            rows.append({"sparsity": sparsity, "weights": group, "epoch": epoch, "accuracy": accuracy})
    return rows


def epochs_to_regain(
    rows: Sequence[Mapping[str, Any]], tolerance: float = 0.0
) -> dict[tuple[float, str], int | None]:
    """First epoch of each run of a :func:`sweep` whose accuracy is the dense one's less ``tolerance``, or ``None``."""
    goal = next(row["accuracy"] for row in rows if row["weights"] == "none") - tolerance
    found: dict[tuple[float, str], int | None] = {}
    for row in rows:
        if row["weights"] != "none":
            key = (row["sparsity"], row["weights"])
            regained = row["epoch"] if row["accuracy"] >= goal else None
            found[key] = regained if found.get(key) is None else found[key]
    return found

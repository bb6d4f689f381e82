"""elr: Early-Learning Regularization, a classifier that does not memorise wrong labels (arXiv 2007.00151).

Each training example i keeps a running average T[i] of the network's own predictions. Early in training these are
right even where the label is wrong; the loss of equation (6) holds the prediction p near T:

    L = CE(z, y) + lam * mean_b log(1 - <T[idx_b], p_b>)

The second term is negative and minimised, so it pulls <T, p> towards 1. Expect a loss below zero: monitor validation
accuracy, not the loss. After training ``argmax T[i] != y[i]`` lists the suspect labels.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from effdl.core.batch import unpack
from effdl.core.capture import named_module
from effdl.core.contract import ContractExample
from effdl.core.distributed import rank
from effdl.core.errors import ConfigurationError, check
from effdl.core.paper import Paper
from effdl.core.steps import require_automatic_optimization, tap_logits
from effdl.data.indexed import num_examples_of
from effdl.tasks.image import ImageClassifier
from effdl.training._elr_loss import (
    check_elr_arguments,
    clamped_softmax,
    elr_loss,
    elr_regularizer,
    normalised,
)
from effdl.training._elr_table import LabelReport, TargetTable, label_report, update_targets

__all__ = [
    "ELRImageClassifier",
    "ELRLossMixin",
    "LabelReport",
    "TargetTable",
    "clamped_softmax",
    "elr_loss",
    "elr_regularizer",
    "label_report",
    "normalised",
    "update_targets",
]

PAPER = Paper(
    slug="elr",
    title="Early-Learning Regularization Prevents Memorization of Noisy Labels",
    authors=("Liu, Sheng", "Niles-Weed, Jonathan", "Razavian, Narges", "Fernandez-Granda, Carlos"),
    year=2020,
    arxiv="2007.00151",
    venue="Advances in Neural Information Processing Systems",
)


class ELRLossMixin:
    """Adds the early-learning regulariser to the loss of any classifier (Liu et al. 2020, equation 6).

    ``class Mine(ELRLossMixin, YourModule)``: your ``training_step`` computes its own loss, ELR listens to the logits of
    that one forward and adds ``lam * mean log(1 - <T, p>)``. Batches carry the data-set index: ``(x, y, index)`` or a
    dict with ``index`` (wrap the data set in ``effdl.data.indexed.IndexedDataset``).
    The inference model, its state_dict and its checkpoints stay yours; the table T is kept in
    ``checkpoint["effdl"]["elr"]``, so a resumed run goes on exactly. Reach for it when a tenth to most of the training
    labels are wrong and no clean subset exists. Cost: a softmax and one row of T per example.

    The loss may be negative: do not monitor it for early stopping or plateau schedules. Under gradient accumulation T
    is updated per micro-batch; a second pass over a batch (SAM, LBFGS) reads T without updating it. T learns from the
    predictions of all ranks. An example that appears twice in a batch takes its last prediction.

    Args:
        num_examples: N, the largest index + 1; ``None`` takes the size of the training data.
        beta: momentum of T, in [0, 1). 0.7 (CIFAR-10), 0.9 (CIFAR-100, asymmetric noise).
        lam: weight of the regulariser, >= 0. 3 (CIFAR-10), 1 (asymmetric noise), 7 (CIFAR-100).
        clamp: predictions are clamped to [clamp, 1 - clamp], in (0, 0.5).
        targets_device: where T lies; ``None``: on the module's device. ``"cpu"`` for tables that do not fit.
        targets_dtype: ``"float32"``, or ``"float16"`` for half the memory.
        network: name of the submodule whose output are the logits [B, C]; ``None``: the module or a direct child.
        index_key: key of the index in a dict batch, where it is not ``index``.

    Logs ``elr/regularizer`` and ``elr/suspects``, the share of the batch whose label T disagrees with.

    Raises:
        ConfigurationError: a value out of range, manual optimisation, data of unknown or another size.
        TypeError: a batch without index. IndexError: an index outside the table.

    Example::

        class Mine(ELRLossMixin, MyClassifier): ...

        module = Mine(beta=0.7, lam=3.0)
        Trainer(max_epochs=120).fit(module, DataLoader(IndexedDataset(train), batch_size=128, shuffle=True))
        module.label_report("labels.csv")      # suspects: argmax T != label
    """

    paper: ClassVar[Paper] = PAPER

    def __init__(
        self,
        *args: Any,
        num_examples: int | None = None,
        beta: float = 0.7,
        lam: float = 3.0,
        clamp: float = 1e-4,
        targets_device: str | None = None,
        targets_dtype: Literal["float32", "float16"] = "float32",
        network: str | None = None,
        index_key: str | None = None,
        **kwargs: Any,
    ) -> None:
        check_elr_arguments(beta, lam, clamp)
        for name, value in (("network", network), ("index_key", index_key)):
            check(value is None or isinstance(value, str), name, value, "a name or None")
        super().__init__(*args, **kwargs)
        self.elr = TargetTable(num_examples, beta, targets_device, targets_dtype)
        self.elr_lam, self.elr_clamp, self.elr_network, self.elr_index_key = lam, clamp, network, index_key
        self._elr_start()

    def _elr_start(self) -> None:
        self._elr_last = (-1, -1)  # epoch and number of the latest batch that T has learned from
        self._elr_trend = [0, 0.0, 0.0]  # batches, mean and recent mean of the module's own loss in the first epoch

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(ELRLossMixin)]
        wrong = [c.__name__ for c in before if "training_step" in vars(c) and not issubclass(c, ELRLossMixin)]
        if wrong:
            raise ConfigurationError(f"ELRLossMixin must come first: class {cls.__name__}(ELRLossMixin, {wrong[0]}).")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit":
            require_automatic_optimization(self, "ELRLossMixin")

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.elr_network is not None:
            named_module(self, self.elr_network, "network")
        self.elr.fit_to(training_examples(self.trainer))
        self._elr_start()

    def training_step(self, batch: Any, *args: Any) -> Any:
        _, labels, index = unpack(batch, index_key=self.elr_index_key)
        require_index(index)
        step = super().training_step
        with tap_logits(self, self.elr_network) as tap:
            output = step(batch, *args[: len(inspect.signature(step).parameters) - 1])
        if output is None:  # the module skips this batch
            return None
        loss = output["loss"] if isinstance(output, Mapping) else output
        update = self._elr_first_pass(*args)
        if update:
            self._elr_follow(loss.detach())
        regularizer = self._elr_regularizer(tap.logits(), labels, index, update)
        loss = loss + self.elr_lam * regularizer
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    def _elr_first_pass(self, batch_idx: int = -1, *_: Any) -> bool:
        """Whether this batch is new: SAM and LBFGS run a batch again before the next one."""
        if getattr(self, "_trainer", None) is None:  # somebody's own loop
            return True
        now = (self.current_epoch, batch_idx)
        new, self._elr_last = now > self._elr_last, max(now, self._elr_last)
        return new

    def _elr_regularizer(self, logits: Tensor, labels: Tensor | None, index: Tensor, update: bool) -> Tensor:
        check(len(logits) == len(index), "logits", tuple(logits.shape), f"one row per index of the batch, {len(index)}")
        check(logits.shape[1] >= 2, "logits", tuple(logits.shape), "[B, C], C >= 2", "A binary task needs two logits.")
        p = clamped_softmax(logits, self.elr_clamp)
        if update:
            self.elr.learn(index, normalised(p), labels)
        rows = self.elr.read(index)
        regularizer = elr_regularizer(p, rows, self.elr_clamp)
        self.log("elr/regularizer", regularizer.detach(), on_step=False, on_epoch=True, batch_size=len(index))
        if labels is not None and labels.shape == index.shape:
            suspects = (rows.argmax(dim=1) != labels).float().mean()
            self.log("elr/suspects", suspects, on_step=False, on_epoch=True, batch_size=len(index))
        return regularizer

    def _elr_follow(self, loss: Tensor) -> None:
        if self.current_epoch == 0:
            n, mean, recent = self._elr_trend
            self._elr_trend = [n + 1, mean + (loss - mean) / (n + 1), recent + (loss - recent) / min(n + 1, 10)]

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        _, mean, recent = self._elr_trend
        if self.current_epoch == 0 and recent > mean and self.elr.certainty() > 0.99:
            rank_zero_warn(
                "ELR collapses: after the first epoch the running targets are certain (mean max T > 0.99) while the "
                "module's own loss rises. Lower lam, or raise beta."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint.setdefault("effdl", {})["elr"] = self.elr.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.elr.load_state(checkpoint.get("effdl", {}).get("elr", {}))

    def label_report(self, path: str | Path | None = None, labels: Tensor | None = None) -> LabelReport:
        """What T says about every training label; with ``path`` also a CSV file, written by the first process.

        Args:
            path: of the CSV file ``index,label,target,confidence,suspect``.
            labels: [N], in place of the labels seen in training.
        """
        report = self.elr.report(labels)
        if path is not None and rank() == 0:
            report.to_csv(path)
        return report

    def report(self) -> dict[str, Any]:
        """For the run's report: how many labels were seen, and how many are suspect."""
        return {} if self.elr.targets is None else self.label_report().summary()

    def figures(self, folder: Path) -> None:
        """Writes ``labels.csv``, the label report."""
        if self.elr.targets is not None:
            self.label_report(Path(folder) / "labels.csv")

    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite."""
        return ContractExample(
            kwargs={"beta": 0.7, "lam": 3.0},
            bad={
                "num_examples": [0, 1.5],
                "beta": [1.0, -0.1],
                "lam": [-1.0, float("nan")],
                "clamp": [0.0, 0.5],
                "targets_device": "abacus",
                "targets_dtype": "int8",
                "network": 3,
                "index_key": 3,
            },
            data=example_batches,
        )


class ELRImageClassifier(ELRLossMixin, ImageClassifier):
    """The stock image classifier under ELR: arguments of both, as ``effdl run elr`` uses it.

    Example::

        data = ImageData("digits", noise="symmetric", noise_rate=0.4)
        module = ELRImageClassifier(model="resnet18", num_classes=10, beta=0.7, lam=3.0)
        Trainer(max_epochs=30).fit(module, data)
    """


def require_index(index: Tensor | None) -> None:
    """Raise ``TypeError`` where a batch carries no index."""
    if index is None:
        raise TypeError("ELR needs the dataset index of each example; wrap with effdl.data.indexed.IndexedDataset.")


def training_examples(trainer: Any) -> int | None:
    """Rows that a table over the Trainer's training data needs; ``None`` where that cannot be known."""
    count = getattr(getattr(trainer, "datamodule", None), "num_examples", None)
    loader = trainer.train_dataloader
    batched = getattr(loader, "batch_sampler", None) is not None  # else the data set may be a list of batches
    return count or num_examples_of(getattr(loader, "dataset", None), by_length=batched)


def example_batches(batch_size: int = 4) -> Any:
    """Thirty-two fixed 8x8 pictures of three classes with their index, for the contract suite."""
    from torch.utils.data import TensorDataset

    from effdl.data.indexed import IndexedDataset
    from effdl.data.loading import ResumableLoader

    g = torch.Generator().manual_seed(7)
    y = torch.randint(0, 3, (32,), generator=g)
    x = torch.randn(32, 3, 8, 8, generator=g) + 0.5 * y.view(-1, 1, 1, 1)
    return ResumableLoader(IndexedDataset(TensorDataset(x, y)), batch_size=batch_size, shuffle=True, seed=3)


def __getattr__(name: str) -> Any:
    if name in ("ELRPlusModule", "elr_plus_loss", "sigmoid_rampup"):  # they import this file
        from effdl.training import elr_plus

        return getattr(elr_plus, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

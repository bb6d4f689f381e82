"""elr: the table of running targets T, one row per training example, and what it says about the labels."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effdl.core.distributed import all_gather_rows
from effdl.core.errors import ConfigurationError, check, check_choice, check_integer


@torch.no_grad()
def update_targets(targets: Tensor, index: Tensor, probabilities: Tensor, beta: float) -> Tensor:
    """T[idx] <- beta T[idx] + (1 - beta) phat in place; returns the new rows.

    An index that appears twice in a batch takes its last prediction, on every device and every rank alike.

    Args:
        targets: T, [N, C], any float dtype and device.
        index: [B], int64.
        probabilities: phat, [B, C].
        beta: momentum in [0, 1).

    Returns:
        T[idx], [B, C], with the dtype and device of ``probabilities``.

    Raises:
        IndexError: an index below 0 or >= N (checked where ``index`` lies on the CPU; CUDA asserts by itself).
    """
    place = index.to(targets.device)
    check_index(place, len(targets))
    order = place.argsort(stable=True)
    last = order[torch.searchsorted(place[order], place, right=True) - 1]
    rows = beta * targets[place].to(probabilities.dtype) + (1 - beta) * probabilities.to(targets.device)[last]
    targets[place] = rows.to(targets.dtype)
    return rows.to(probabilities.device)


def check_index(index: Tensor, size: int) -> None:
    """Raise ``IndexError`` naming the first index outside [0, size). Looks only at CPU tensors: no sync."""
    if index.device.type != "cpu" or torch.compiler.is_compiling():
        return
    outside = index[(index < 0) | (index >= size)]
    if len(outside):
        raise IndexError(
            f"index {int(outside[0])} is outside the ELR table of {size} examples: num_examples must be the largest "
            "dataset index + 1 (for a Subset, the size of the data set it was taken from)."
        )


class TargetTable:
    """T and the labels seen beside it, outside the module tree: no state_dict entry, no DDP broadcast, no EMA of it.

    Memory: N * C * 4 bytes (CIFAR-100 20 MB, Clothing1M 56 MB, ImageNet-1k 5 GB; half of it in float16).
    Under DDP every rank holds the whole table and learns from the predictions of all ranks.

    Args:
        num_examples: N; ``None`` until the training data is known.
        beta: momentum of T, in [0, 1).
        device: where T lies; ``None``: where the predictions are. ``"cpu"`` costs a transfer per step.
        dtype: ``"float32"`` or ``"float16"``.

    Example::

        table = TargetTable(num_examples=50_000, beta=0.7)
        table.learn(index, probabilities)
        rows = table.read(index)
    """

    def __init__(
        self,
        num_examples: int | None = None,
        beta: float = 0.7,
        device: str | torch.device | None = None,
        dtype: str = "float32",
    ) -> None:
        if num_examples is not None:
            check_integer("num_examples", num_examples, 1, fix="It is the largest dataset index + 1.")
        check_choice("targets_dtype", dtype, ("float32", "float16"))
        self.num_examples, self.beta, self.dtype = num_examples, beta, getattr(torch, dtype)
        self.device = None if device is None else _device(device)
        self.targets: Tensor | None = None
        self.labels: Tensor | None = None

    def learn(self, index: Tensor, probabilities: Tensor, labels: Tensor | None = None) -> None:
        """Update the rows ``index`` [B] with ``probabilities`` [B, C]; remember ``labels`` [B] for the report."""
        self._place(probabilities)
        index = all_gather_rows(index)
        update_targets(self.targets, index, all_gather_rows(probabilities), self.beta)
        if labels is not None and labels.ndim == 1 and not labels.is_floating_point():
            self.labels[index.to(self.labels.device)] = all_gather_rows(labels).to(self.labels)

    def read(self, index: Tensor) -> Tensor:
        """T[idx], [B, C], float32 on the device of ``index``, without gradient."""
        rows = self.targets[index.to(self.targets.device)].to(index.device)
        return rows.float() if rows.dtype == torch.float16 else rows

    def _place(self, like: Tensor) -> None:
        """Make the table at the first batch, follow the predictions to their device."""
        device = self.device or like.device
        if self.targets is None:
            if self.num_examples is None:
                raise ConfigurationError("num_examples=None: the size of the training data is not known; give it.")
            self.targets = torch.zeros(self.num_examples, like.shape[1], dtype=self.dtype, device=device)
            self.labels = torch.full((self.num_examples,), -1, device=device)
        if self.targets.device != device:
            self.targets, self.labels = self.targets.to(device), self.labels.to(device)

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint; empty before the first batch."""
        return {} if self.targets is None else {"targets": self.targets, "labels": self.labels}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from :meth:`state`; an empty one starts afresh."""
        self.targets = self.labels = None
        if state:
            self.targets, self.labels = state["targets"].to(self.dtype, copy=True), state["labels"].clone()

    def fit_to(self, num_examples: int | None) -> None:
        """Take the size of the training data where none was given; refuse one that does not fit.

        Raises:
            ConfigurationError: unknown, more examples than rows, or a restored table of another data set.
        """
        fix = "It is the largest dataset index + 1; wrap the data in IndexedDataset, or give it."
        check(num_examples or self.num_examples, "num_examples", self.num_examples, "the size of the data", fix)
        self.num_examples = self.num_examples or num_examples
        check(self.num_examples >= (num_examples or 0), "num_examples", self.num_examples, f">= {num_examples}", fix)
        if self.targets is not None and len(self.targets) != self.num_examples:
            raise ConfigurationError(
                f"num_examples={self.num_examples}, but the checkpoint's ELR table has {len(self.targets)} rows: "
                "it belongs to another data set."
            )

    def certainty(self) -> float:
        """Mean of max T over the examples seen so far, in [0, 1]."""
        best = self.targets.float().amax(dim=1)
        return float(best.sum() / (best > 0).sum().clamp_min(1))

    def report(self, labels: Tensor | None = None) -> LabelReport:
        """What the table says about every label; ``labels`` [N] replaces those seen in training."""
        if self.targets is None:
            raise ConfigurationError("label_report() needs a fit: the ELR table is empty.")
        return label_report(self.targets, self.labels if labels is None else labels)


def _device(name: Any) -> torch.device:
    try:
        return torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigurationError(f"targets_device={name!r} is no device: 'cpu', 'cuda', 'cuda:1' or None.") from error


class LabelReport(NamedTuple):
    """What the table says about every label; all tensors have shape [N] and lie on the CPU."""

    label: Tensor  # int64, as trained on; -1 for an example that was never seen
    target: Tensor  # int64, argmax T: what the network believed
    confidence: Tensor  # float32 in [0, 1]: max T / sum T, 0 for an example that was never seen
    suspect: Tensor  # bool: seen, and target != label

    def summary(self) -> dict[str, float]:
        """How many labels were seen, how many of them are suspect."""
        seen, suspects = int((self.label >= 0).sum()), int(self.suspect.sum())
        return {"labels": seen, "suspects": suspects, "suspect_share": suspects / max(seen, 1)}

    def to_csv(self, path: str | Path) -> Path:
        """One line per example: ``index,label,target,confidence,suspect``."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = [column.tolist() for column in self]
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["index", *self._fields])
            for i, (label, target, confidence, suspect) in enumerate(zip(*columns)):
                writer.writerow([i, label, target, f"{confidence:.4f}", int(suspect)])
        return path


def label_report(targets: Tensor, labels: Tensor) -> LabelReport:
    """Find wrong labels: those that the running targets disagree with.

    Args:
        targets: T, [N, C].
        labels: the labels trained on, [N], in the order of the table.

    Example::

        report = label_report(targets, labels)
        suspects = report.suspect.nonzero().flatten()
        report.to_csv("labels.csv")
    """
    check(labels.shape == targets.shape[:1], "labels", tuple(labels.shape), f"shape [{len(targets)}], one per row of T")
    labels, values = labels.cpu(), targets.float().cpu()
    best, argmax = values.max(dim=1)
    seen = (best > 0) & (labels >= 0)
    confidence = torch.where(seen, best / values.sum(dim=1).clamp_min(1e-12), 0.0)
    return LabelReport(labels, argmax, confidence, seen & (argmax != labels))

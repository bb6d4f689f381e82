"""adjoint-dpm: what a run needs beside the module: the samples as data, and a classifier as the metric."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effdl.core.batch import logits_of
from effdl.core.errors import check, check_integer
from effdl.core.networks import build_model
from effdl.core.teacher import Frozen
from effdl.data.loading import EpochSampler, ResumableLoader, as_it_is


class _Rows(torch.utils.data.Dataset):
    """Row numbers, with a label or a prompt each."""

    def __init__(self, count: int, classes: int | None, prompts: Sequence[str] | None) -> None:
        self.count, self.classes, self.prompts = count, classes, prompts

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Any]:
        index = torch.as_tensor(rows)
        batch: dict[str, Any] = {"index": index}
        if self.classes is not None:
            batch["label"] = index % self.classes
        if self.prompts is not None:
            batch["prompt"] = [self.prompts[i % len(self.prompts)] for i in rows]
        return batch


class SampleRows(L.LightningDataModule):
    """No data but the samples' own numbers: batches with ``index`` int64 ``[B]``, perhaps ``label`` or ``prompt``.

    Args:
        num_examples: samples to work on; with ``effdl run`` linked to the module's.
        classes: gives row i the label ``i mod classes``.
        prompts: gives row i the prompt ``i mod`` their number.
        batch_size: per step and process; ``None``: all of them.
        seed: of the order.

    Raises:
        ConfigurationError: a number out of range.

    Example::

        Trainer(max_epochs=30).fit(AdjointDPMModule("my-pipeline", loss, num_examples=8), SampleRows(8))
    """

    def __init__(
        self,
        num_examples: int = 8,
        classes: int | None = None,
        prompts: list[str] | None = None,
        batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_integer("num_examples", num_examples, 1)
        check_integer("seed", seed, 0)
        if classes is not None:
            check_integer("classes", classes, 1)
        if batch_size is not None:
            check_integer("batch_size", batch_size, 1)
        texts = prompts is None or (len(prompts) > 0 and all(isinstance(text, str) for text in prompts))
        check(texts, "prompts", prompts, "None or at least one prompt")
        self.num_examples, self.batch_size, self.seed = num_examples, batch_size or num_examples, seed
        self.rows = _Rows(num_examples, classes, prompts)

    def train_dataloader(self) -> ResumableLoader:
        return self._loader(shuffle=True)

    def predict_dataloader(self) -> ResumableLoader:
        return self._loader(shuffle=False)

    def _loader(self, shuffle: bool) -> ResumableLoader:
        shard = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {}
        sampler = EpochSampler(self.rows, shuffle, self.seed, **shard)
        return ResumableLoader(self.rows, batch_size=self.batch_size, sampler=sampler, collate_fn=as_it_is)


class ClassifierLoss:
    """Cross-entropy of generated images under a frozen classifier: a sample that is taken for ``target``.

    Args:
        model: an ``nn.Module`` that maps images to logits, a timm name with ``"local-dir:"``, or a timm folder.
        target: the class that is wanted; ``None``: the batch's ``label``.
        scale: multiplies the loss (the paper: 0.05 on ImageNet).

    Raises:
        ConfigurationError: a model or a class that does not fit.

    Example::

        loss = ClassifierLoss("runs/judge/version_0/model", target=3)
        value = loss(images, {})
    """

    def __init__(self, model: nn.Module | str, target: int | None = None, scale: float = 1.0) -> None:
        if isinstance(model, str) and Path(model).is_dir():
            model = f"local-dir:{model}"
        if target is not None:
            check_integer("target", target, 0)
        # None: as many classes as the folder says
        self.network = Frozen(build_model(model, None, False, {}))  # type: ignore[arg-type]
        self.target, self.scale = target, scale

    def logits(self, images: Tensor) -> Tensor:
        """``[B, C]``."""
        return logits_of(self.network.on(images)(images))

    def __call__(self, images: Tensor, batch: Any) -> Tensor:
        """A scalar."""
        logits = self.logits(images)
        labels = batch["label"] if self.target is None else torch.full_like(logits[:, 0], self.target).long()
        return self.scale * F.cross_entropy(logits.float(), labels)

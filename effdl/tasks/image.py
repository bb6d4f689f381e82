"""The stock image classifier: any timm model, local checkpoint or ``nn.Module``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from effdl.core.batch import logits_of, unpack
from effdl.core.errors import ConfigurationError, check_integer, check_number
from effdl.core.networks import build_model, load_weights
from effdl.tasks._optimizers import optimizer_and_scheduler


class ImageClassifier(LightningModule):
    """Cross-entropy training of an image classifier.

    Args:
        model: a timm name (``"resnet50"``), ``"local-dir:FOLDER"`` (a timm folder, with its weights), or any
            ``nn.Module`` that maps images (B, C, H, W) to logits (B, num_classes).
        num_classes: C; with ``effdl run`` linked to the data module's.
        pretrained: load timm's weights from the hub, unless a ``checkpoint`` takes their place.
        checkpoint: a local ``.safetensors`` or weights-only ``.pt``/``.ckpt`` file to start from: a state dict, or a
            checkpoint of Lightning's or timm's, under whatever prefix its keys have.
        model_kwargs: further arguments of ``timm.create_model``.
        label_smoothing: of the training cross-entropy.
        optimizer, scheduler: callables, as LightningCLI injects them; default Adam 1e-3 and a constant rate. Frozen
            parameters are left out. A scheduler steps once per epoch; a ``OneCycleLR``, ``CyclicLR``, ``LambdaLR`` or
            warm-restarts one once per step; a ``ReduceLROnPlateau`` watches ``val/loss`` or its own ``monitor``.

    Batches are dicts with ``image`` (B, C, H, W) float and ``label`` (B,) int, or tuples ``(x, y[, index])``.

    Raises:
        ConfigurationError: unknown timm name (close ones are listed), missing file, weights that do not fit, illegal
            number, a batch without labels.
        HubError: ``pretrained`` weights that neither the hub nor the cache gives.

    Example::

        from effdl import ImageClassifier

        module = ImageClassifier("resnet18", num_classes=10)
        Trainer(max_epochs=3).fit(module, ImageData("digits"))
    """

    def __init__(
        self,
        model: str | nn.Module = "resnet18",
        num_classes: int = 10,
        pretrained: bool = False,
        checkpoint: str | None = None,
        model_kwargs: dict[str, Any] | None = None,
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.Adam,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        check_integer("num_classes", num_classes, 2)
        check_number("label_smoothing", label_smoothing, 0, 1, closed="[)")
        self.model = build_model(model, num_classes, pretrained and checkpoint is None, model_kwargs or {})
        if checkpoint is not None:
            load_weights(self.model, checkpoint)
        self.label_smoothing = label_smoothing
        self.optimizer, self.scheduler = optimizer, scheduler
        # validating the labels would wait for the device in each training step
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of images (B, C, H, W)."""
        return logits_of(self.model(images))

    def compute_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """The loss of logits (B, C); the hook that methods with a loss of their own override."""
        return F.cross_entropy(outputs, unpack(batch).labels, label_smoothing=self.label_smoothing)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, "train", self.train_accuracy)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._step(batch, "val", self.val_accuracy)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._step(batch, "test", self.test_accuracy)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Probabilities (B, C)."""
        return self(unpack(batch).inputs).softmax(-1)

    def _step(self, batch: Any, stage: str, accuracy: MulticlassAccuracy) -> Tensor:
        inputs, labels, _ = unpack(batch)
        if labels is None:
            raise ConfigurationError("the batch has no labels: expected a tuple (x, y) or a dict with 'label'.")
        logits = self(inputs)
        loss = self.compute_loss(logits, batch) if stage == "train" else F.cross_entropy(logits, labels)
        accuracy.update(logits, labels)
        bar, size = stage != "test", len(labels)
        self.log(f"{stage}/loss", loss, prog_bar=bar, on_step=stage == "train", on_epoch=True, batch_size=size)
        self.log(f"{stage}/accuracy", accuracy, prog_bar=bar, on_step=False, on_epoch=True, batch_size=size)
        return loss

    def configure_optimizers(self) -> Any:
        return optimizer_and_scheduler(self, self.optimizer, self.scheduler)

"""The stock image classifier: any timm model, local checkpoint or ``nn.Module``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from effdl.core.batch import logits_of, unpack
from effdl.core.errors import ConfigurationError, check_integer, check_number, suggest
from effdl.tasks._optimizers import optimizer_and_scheduler


class ImageClassifier(LightningModule):
    """Cross-entropy training of an image classifier.

    Args:
        model: a timm name (``"resnet50"``), ``"local-dir:FOLDER"`` (a timm folder), or any ``nn.Module`` that maps
            images (B, C, H, W) to logits (B, num_classes).
        num_classes: C; with ``effdl run`` linked to the data module's.
        pretrained: load timm's weights from the hub.
        checkpoint: a local ``.safetensors`` or weights-only ``.pt``/``.ckpt`` file to start from.
        model_kwargs: further arguments of ``timm.create_model``.
        label_smoothing: of the cross-entropy.
        optimizer, scheduler: callables, as LightningCLI injects them; default Adam 1e-3 and a constant rate. A
            scheduler steps once per epoch; a ``OneCycleLR``, ``LambdaLR`` or warm-restarts one once per step.

    Batches are dicts with ``image`` (B, C, H, W) float and ``label`` (B,) int, or tuples ``(x, y[, index])``.

    Raises:
        ConfigurationError: unknown timm name (close ones are listed), missing file, illegal number.

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
        self.model = build_model(model, num_classes, pretrained, model_kwargs or {})
        if checkpoint is not None:
            load_weights(self.model, checkpoint)
        self.label_smoothing = label_smoothing
        self.optimizer, self.scheduler = optimizer, scheduler
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of images (B, C, H, W)."""
        return logits_of(self.model(images))

    def compute_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """The loss of logits (B, C); the hook that methods with a loss of their own override."""
        return F.cross_entropy(outputs, unpack(batch).labels, label_smoothing=self.label_smoothing)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, _ = self._step(batch, "train", self.train_accuracy)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._step(batch, "val", self.val_accuracy)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._step(batch, "test", self.test_accuracy)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(unpack(batch).inputs).softmax(-1)

    def _step(self, batch: Any, stage: str, accuracy: MulticlassAccuracy) -> tuple[Tensor, Tensor]:
        logits = self(unpack(batch).inputs)
        labels = unpack(batch).labels
        loss = self.compute_loss(logits, batch) if stage == "train" else F.cross_entropy(logits, labels)
        accuracy(logits, labels)
        bar, size = stage != "test", len(labels)
        self.log(f"{stage}/loss", loss, prog_bar=bar, on_step=stage == "train", on_epoch=True, batch_size=size)
        self.log(f"{stage}/accuracy", accuracy, prog_bar=bar, on_step=False, on_epoch=True, batch_size=size)
        return loss, logits

    def configure_optimizers(self) -> Any:
        return optimizer_and_scheduler(self, self.optimizer, self.scheduler)


def build_model(model: str | nn.Module, num_classes: int, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    """A timm model by name or folder; an ``nn.Module`` is taken as it is."""
    if isinstance(model, nn.Module):
        return model
    import timm

    name = model.split(".")[0]
    if not model.startswith(("local-dir:", "hf-hub:", "hf_hub:")) and name not in timm.list_models():
        raise ConfigurationError(f"model={model!r} is no timm model. {suggest(name, timm.list_models())}")
    if model.startswith("local-dir:") and not Path(model[len("local-dir:") :]).is_dir():
        raise ConfigurationError(f"model={model!r}: there is no such folder.")
    create = timm.create_model
    if pretrained or model.startswith(("hf-hub:", "hf_hub:")):
        from effdl.core.hub import from_hub

        return from_hub(
            lambda _name, **rest: create(model, pretrained=pretrained, num_classes=num_classes, **rest),
            model,
            instead="a timm folder as model='local-dir:FOLDER', or weights as checkpoint='FILE.safetensors'",
            **kwargs,
        )
    local = model.startswith("local-dir:")
    return create(model, pretrained=local, num_classes=num_classes, **kwargs)


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Weights from a local safetensors or weights-only torch file; a Lightning checkpoint's ``model.`` prefix goes.

    Raises:
        ConfigurationError: no such file, or keys and shapes that do not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigurationError(f"checkpoint={str(path)!r}: there is no such file.")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
    own = set(model.state_dict())
    state = {k.removeprefix("model.") if k not in own else k: v for k, v in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigurationError(f"checkpoint={str(path)!r} does not fit the model: {error}") from error

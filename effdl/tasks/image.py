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
from effdl.core.errors import ConfigurationError, check, check_integer, check_number, suggest
from effdl.core.hub import from_hub
from effdl.tasks._optimizers import optimizer_and_scheduler

LOCAL = "a timm folder as model='local-dir:FOLDER'"


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


def build_model(model: str | nn.Module, num_classes: int, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    """A timm model by name or folder; an ``nn.Module`` is taken as it is."""
    if isinstance(model, nn.Module):
        fix = "A network comes with its weights; others are loaded by checkpoint."
        check(not pretrained, "pretrained", pretrained, "False where model is a network", fix)
        check(not kwargs, "model_kwargs", kwargs, "nothing where model is a network")
        return model
    import timm

    check(isinstance(model, str), "model", model, f"a timm name, a network or {LOCAL}")
    local, hub = model.startswith("local-dir:"), model.startswith(("hf-hub:", "hf_hub:"))
    if local:
        folder = Path(model.removeprefix("local-dir:"))
        check((folder / "config.json").is_file(), "model", model, "a folder with timm's config.json and weights")
    elif not hub:
        _check_name(model, pretrained)

    def create(name: str) -> nn.Module:
        try:
            return timm.create_model(name, pretrained=pretrained or local, num_classes=num_classes, **kwargs)
        except (TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, ConfigurationError):
                raise
            raise ConfigurationError(f"model={model!r}, model_kwargs={kwargs}: {_line(error)}") from error

    if hub or (pretrained and not local):
        return from_hub(create, model, instead=f"{LOCAL}, or weights as checkpoint='FILE.safetensors'")
    return create(model)


def _check_name(model: str, pretrained: bool) -> None:
    import timm

    name = model.split(".")[0]
    if not timm.is_model(model):
        fix = f"The folder is model='local-dir:{model}'." if Path(model).is_dir() else suggest(name, timm.list_models())
        raise ConfigurationError(f"model={model!r} is no timm model. {fix}")
    versions = [v for v in timm.list_models(f"{name}.*", include_tags=True) if v.split(".")[0] == name]
    if "." in model and model not in versions:
        raise ConfigurationError(f"model={model!r}: timm has {', '.join(map(repr, versions)) or 'no versions of it'}.")
    if pretrained and not timm.is_model_pretrained(model):
        raise ConfigurationError(f"pretrained=True: timm has no weights of model={model!r}.")


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Weights from a local safetensors or weights-only torch file, whose keys may have a prefix (``model.``).

    Raises:
        ConfigurationError: no such file, not a file of weights alone, or keys and shapes that do not fit.
    """
    path = Path(path)
    check(path.is_file(), "checkpoint", str(path), "an existing file")
    try:
        state = _read_weights(path)
    except Exception as error:  # whatever a torn or foreign file makes of torch and safetensors
        raise ConfigurationError(f"checkpoint={str(path)!r} is no file of weights alone: {_line(error)}") from error
    try:
        model.load_state_dict(_without_prefix(state, set(model.state_dict())))
    except RuntimeError as error:
        raise ConfigurationError(f"checkpoint={str(path)!r} does not fit the model: {_line(error)}") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):  # Lightning's and timm's checkpoints; torchvision's
        if isinstance(state.get(key), dict):
            return state[key]
    return state


def _without_prefix(state: dict[str, Any], own: set[str]) -> dict[str, Any]:
    """The entries under the prefix (``model.``, ``module.``, ...) that brings the most of the model's own keys."""
    prefixes = {""} | {key[: i + 1] for key in state for i, letter in enumerate(key) if letter == "."}
    hits = {prefix: sum(prefix + key in state for key in own) for prefix in sorted(prefixes)}
    most = max(hits.values())
    best = [""] if hits[""] == most else [prefix for prefix in hits if hits[prefix] == most]
    best = [prefix for prefix in best if prefix.startswith("model.")] or best
    if len(best) > 1:
        raise RuntimeError(f"it holds several networks like this, under {', '.join(best)}: save the one meant alone")
    return {key.removeprefix(best[0]): value for key, value in state.items() if key.startswith(best[0])}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__

"""A module, a data module and two methods small enough to train in a tenth of a second."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from effdl.core.errors import ConfigurationError, check_number
from effdl.core.paper import Paper


class TinyModule(L.LightningModule):
    """A perceptron."""

    def __init__(
        self,
        num_classes: int,
        width: int = 4,
        start_from: str | None = None,
        optimizer: OptimizerCallable = torch.optim.SGD,
    ) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, num_classes))
        if start_from is not None:
            from safetensors.torch import load_file

            self.model.load_state_dict(load_file(Path(start_from) / "model.safetensors"))

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/accuracy", (self.model(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class TinyMethodModule(TinyModule):
    """A method that is a module."""

    paper = Paper(slug="tiny-module", title="A tiny module", authors=("Doe, Jane",), year=2020)


class NoValidation(TinyModule):
    """Only trains."""

    validation_step = L.LightningModule.validation_step


class TinyData(L.LightningDataModule):
    """Random vectors."""

    def __init__(self, size: int = 32, classes: int = 3) -> None:
        super().__init__()
        self.size, self.num_classes = size, classes

    def _loader(self) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.size, 8, generator=generator)
        y = torch.randint(self.num_classes, (self.size,), generator=generator)
        return DataLoader(TensorDataset(x, y), batch_size=8)

    train_dataloader = val_dataloader = test_dataloader = _loader


class TinyCallback(L.Callback):
    """Counts steps; reports as a method does."""

    paper = Paper(slug="tiny", title="A tiny method", authors=("Doe, Jane",), year=2021, arxiv="2101.00001")

    def __init__(self, sparsity: float = 0.5, fail: str | None = None) -> None:
        check_number("sparsity", sparsity, 0, 1)
        self.sparsity, self.fail, self.steps = sparsity, fail, 0

    def setup(self, trainer, pl_module, stage):
        if self.fail == "configuration":
            raise ConfigurationError("fail='configuration' is not valid:\n expected nothing.")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.fail == "crash":
            raise RuntimeError("a bug")
        if self.fail == "interrupt" and trainer.current_epoch == 1:
            raise InterruptedError("the plug was pulled")
        self.steps += 1
        pl_module.log("tiny/steps", float(self.steps))

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]

    def matched(self, pl_module):
        return ["model.0", "model.2"]

    def report(self):
        return {
            "before": {"name": "dense", "metrics": {"val/accuracy": 0.25}, "parameters": 51, "stored_bytes": 1234},
            "after": {"name": "smaller"},
            "layers": {"model.0": {"weights": 32, "sparsity": self.sparsity}},
            "steps seen": self.steps,
        }

    def figures(self, folder):
        (folder / "tiny.txt").write_text("a figure")


class SwapCallback(L.Callback):
    """Replaces the activation."""

    def setup(self, trainer, pl_module, stage):
        pl_module.model[1] = nn.Tanh()

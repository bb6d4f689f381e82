"""A network that a method changed at the end is validated again, and nobody else notices."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from effdl.core.revalidate import validate_again

DATA = DataLoader([torch.ones(2, 1), torch.ones(4, 1)], batch_size=None)


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer, self.metric = nn.Linear(1, 1), MeanMetric()
        nn.init.zeros_(self.layer.bias)

    def training_step(self, batch, batch_idx):
        return 0 * self.layer(batch).sum()

    def validation_step(self, batch, batch_idx):
        out = self.layer(batch)
        self.metric.update(out)
        self.log("val/metric", self.metric)
        self.log("val/mean", out.mean(), batch_size=len(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Change(Callback):
    def __init__(self):
        self.validations, self.after = 0, None

    def on_validation_end(self, trainer, pl_module):
        self.validations += 1

    def on_train_end(self, trainer, pl_module):
        nn.init.constant_(pl_module.layer.weight, 3.0)
        self.after = validate_again(trainer)
        self.training = pl_module.training


def test_the_changed_network_is_scored_and_nothing_else_is_told(tmp_path):
    options = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    options |= {"enable_checkpointing": False, "num_sanity_val_steps": 0}
    change, logger = Change(), CSVLogger(tmp_path)
    trainer = Trainer(callbacks=[change], logger=logger, **options)
    trainer.fit(Net(), DATA, DATA)
    assert change.after == {"val/metric": 3.0, "val/mean": 3.0}
    assert float(trainer.callback_metrics["val/mean"]) == 3.0
    assert (change.validations, change.training) == (1, True)
    assert trainer.loggers == [logger]
    assert "3.0" not in (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    trainer = Trainer(callbacks=[change], logger=False, **options)
    trainer.fit(Net(), DATA)
    assert change.after == {}

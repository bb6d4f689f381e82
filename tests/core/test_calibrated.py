"""callbacks/_calibrated.CalibratedCallback: when it acts, on which data, whole or not at all."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from effdl.callbacks._calibrated import CalibratedCallback
from effdl.core.errors import ConfigurationError
from effdl.core.paper import Paper
from tests.core.test_callback_base import Net


class SetsToMean(CalibratedCallback):
    """The weight becomes the mean of the calibration data."""

    paper = Paper(slug="sets-to-mean", title="t", year=2024, authors=("A B",), arxiv="2401.00001")

    def __init__(self, when="end", calibration_batches=2, fails=False):
        self.check_calibration(when, calibration_batches)
        self.fails, self.calls = fails, []

    def calibrate(self, trainer, pl_module, batches):
        self.calls.append((len(batches), pl_module.training, torch.is_grad_enabled(), trainer.global_step))
        pl_module.net.weight.fill_(torch.cat(batches).mean())
        if self.fails:
            raise RuntimeError("half-way")


class Validating(Net):
    seen = ()
    lr = 0.1

    def validation_step(self, batch, batch_idx):
        self.seen = (*self.seen, float(self.net.weight[0, 0]))


def trainer(callback, **kwargs):
    return Trainer(
        callbacks=[callback], max_epochs=1, logger=False, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, **{"enable_checkpointing": False, **kwargs},
    )  # fmt: skip


def loader(value, count=3):
    return DataLoader([torch.full((2, 2), value)] * count, batch_size=None)


def test_at_the_end_on_training_data_and_not_in_validations_of_the_fit():
    callback, module = SetsToMean(), Validating()
    run = trainer(callback)
    run.fit(module, loader(5.0), loader(7.0))
    assert callback.calls == [(2, False, False, 3)]
    assert module.net.weight.unique().tolist() == [5.0]
    assert 5.0 not in module.seen
    assert module.training
    run.validate(module, loader(7.0), verbose=False)  # done: not once more
    assert len(callback.calls) == 1


def test_at_the_start_once_also_across_a_resume(tmp_path):
    callback, module = SetsToMean("start"), Validating()
    run = trainer(callback, enable_checkpointing=True, default_root_dir=tmp_path)
    run.fit(module, loader(5.0))
    assert callback.calls == [(2, False, False, 0)]
    assert 5.0 not in module.net.weight.unique().tolist()  # trained on from there
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = SetsToMean("start")
    resumed = trainer(again)
    resumed.fit_loop.max_epochs = 2
    resumed.fit(Validating(), loader(5.0), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert again.calls == []


def test_lr_find_leaves_the_network_alone():
    callback, module = SetsToMean(), Validating()
    before = module.net.weight.detach().clone()
    Tuner(trainer(callback, enable_checkpointing=True)).lr_find(
        module, loader(5.0, 40), attr_name="lr", num_training=5, update_attr=False
    )
    assert callback.calls == []
    assert torch.equal(module.net.weight, before)


def test_alone_under_validate_before_the_first_batch():
    callback, module = SetsToMean(), Validating()
    trainer(callback).validate(module, loader(7.0), verbose=False)
    assert callback.calls == [(2, False, False, 0)]
    assert module.seen == (7.0,) * 3
    assert not module.net.weight.is_inference()


def test_a_failure_leaves_the_weights_of_before():
    module = Validating()
    before = module.net.weight.detach().clone()
    with pytest.raises(RuntimeError, match="half-way"):
        trainer(SetsToMean("start", fails=True)).fit(module, loader(5.0))
    assert torch.equal(module.net.weight, before)
    with pytest.raises(RuntimeError, match="half-way"):
        trainer(SetsToMean(fails=True)).validate(module, loader(5.0))
    assert torch.equal(module.net.weight, before)


@pytest.mark.parametrize("first", [True, False])
def test_at_the_end_on_what_weight_averaging_leaves(first):
    callback, module = SetsToMean(), Validating()
    pair = [callback, EMAWeightAveraging(decay=0.5)]
    Trainer(
        callbacks=pair if first else pair[::-1], max_epochs=1, logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    ).fit(module, loader(5.0))  # fmt: skip
    assert module.net.weight.unique().tolist() == [5.0]
    assert "on_train_end" not in vars(module)


@pytest.mark.parametrize(("argument", "value"), [("when", "later"), ("calibration_batches", 0)])
def test_bad_arguments(argument, value):
    with pytest.raises(ConfigurationError, match=argument):
        SetsToMean(**{argument: value})

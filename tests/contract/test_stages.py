"""The contract's row C6: every stage, every way to end, and no trace afterwards."""

from __future__ import annotations

import contextlib

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.contract.cases import QUIET, Case, every, traces, weights
from tests.contract.endings import RaiseAt, StopError, case_steps


@every("C6")
def test_c06_validate_test_predict_alone_leave_no_trace(case: Case):
    module = case.module()
    clean = traces(module)
    for stage in ("validate", "test", "predict"):
        if stage == "validate" or hasattr(type(module), f"{stage}_step"):
            trainer = lightning.Trainer(callbacks=case.callbacks(), **QUIET)
            with contextlib.suppress(lightning.utilities.exceptions.MisconfigurationException):
                getattr(trainer, stage)(module, case.loader())
            assert traces(module) == clean, stage


@every("C6")
def test_c06_fast_dev_run_and_fit_twice(case: Case):
    _, module = case.fit(fast_dev_run=2)
    clean = traces(module)
    callbacks = case.callbacks()
    module = case.module()
    case.fit(module=module, own_callbacks=callbacks, max_epochs=1)
    trainer, module = case.fit(module=module, own_callbacks=callbacks, max_epochs=1)
    assert trainer.global_step >= 8
    assert {k: v for k, v in traces(module).items() if v[0] or v[2]} == {}
    assert {k: v for k, v in clean.items() if v[0] or v[2]} == {}


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt, SystemExit], ids=lambda e: e.__name__)
@every("C6")
def test_c06_an_error_in_the_middle_leaves_no_trace(case: Case, error, tmp_path):
    module = case.module()
    hooks = {k: v[1] for k, v in traces(module).items()}
    save = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=case_steps(case, 2))
    own = case.callbacks()
    with pytest.raises((error, SystemExit)):
        case.fit([save, RaiseAt(4, error)], module=module, own_callbacks=own)
    left = traces(module)
    assert all(not wrapped and not swapped for wrapped, _, swapped in left.values())
    if case.example.rebuild is None:
        assert {k: v[1] for k, v in left.items()} == hooks
    assert torch.isfinite(weights(module)).all()
    case.fit(ckpt_path=tmp_path / "last.ckpt", own_callbacks=own)  # what was saved resumes, with the same callback too

"""The contract's row C7: beside averaging, SAM, pruning, clipping, lr_find and itself."""

from __future__ import annotations

import contextlib

import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.tuner import Tuner

from effdl.callbacks import PruningCallback
from effdl.core.errors import ConfigurationError
from tests.contract.cases import QUIET, Case, every, traces, weights


def runs_or_refuses(case: Case, before: list, after: list, **kwargs) -> str:
    """``"runs"``, or ``"refused"`` when a ConfigurationError says how to do it; anything else fails."""
    module = case.module()
    try:
        _, module = case.fit(module=module, own_callbacks=[*before, *case.callbacks(), *after], max_epochs=1, **kwargs)
    except ConfigurationError:
        assert traces(module) == traces(case.module())
        return "refused"
    assert torch.isfinite(weights(module)).all()
    return "runs"


@every("C7", attaches=True)
def test_c07_with_ema_in_both_orders(case: Case):
    assert runs_or_refuses(case, [], [EMAWeightAveraging(decay=0.5)]) == "runs"
    assert runs_or_refuses(case, [EMAWeightAveraging(decay=0.5)], []) in ("runs", "refused")


@every("C7", attaches=True)
def test_c07_with_sam_and_pruning(case: Case):
    if case.entry.name != "SAMCallback":
        from effdl.callbacks import SAMCallback

        assert runs_or_refuses(case, [], [SAMCallback(rho=0.05)]) == "runs"
    if case.entry.name != "PruningCallback":
        pruning = PruningCallback(sparsity=0.5, start=1, stop=6, every=1)
        if not case.example.zeros_stay:
            assert runs_or_refuses(case, [], [pruning]) == "refused"
            return
        assert runs_or_refuses(case, [], [pruning]) == "runs"
        assert pruning.report()["sparsity"] == pytest.approx(0.5, abs=0.05)


@every("C7", attaches=True)
def test_c07_with_gradient_clipping(case: Case):
    assert runs_or_refuses(case, [], [], gradient_clip_val=0.1) == "runs"


@every("C7", attaches=True)
def test_c07_with_lr_find(case: Case, tmp_path):
    module = case.module()
    if not hasattr(module, "lr"):
        module.lr = 0.05
    options = {**QUIET, "default_root_dir": tmp_path, "max_epochs": 2}
    trainer = lightning.Trainer(callbacks=case.callbacks(), **options)
    Tuner(trainer).lr_find(module, case.loader(), num_training=4, update_attr=False)
    assert all(not wrapped and not swapped for wrapped, _, swapped in traces(module).values())
    trainer.fit(module, case.loader())
    assert torch.isfinite(weights(module)).all()


@every("C7", "callback")
def test_c07_with_a_second_instance_of_itself(case: Case):
    second = case.callback(**(case.example.second or {}))
    if case.example.second is None:
        with contextlib.suppress(RuntimeError, ConfigurationError):  # one state key twice: refused by Lightning
            assert runs_or_refuses(case, [], [second]) == "runs"
    else:
        assert runs_or_refuses(case, [], [second]) in ("runs", "refused")

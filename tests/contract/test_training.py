"""The contract's rows C1 and C2: somebody else's module, three precisions."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from tests.contract.cases import QUIET, Case, every, shell, weights


@every("C1", attaches=True)
def test_c01_foreign_module(case: Case):
    module = case.module()
    before = weights(module)
    trainer, module = case.fit(module=module, max_epochs=1)
    assert trainer.global_step >= 8
    assert torch.isfinite(weights(module)).all()
    assert before.numel() != weights(module).numel() or not torch.equal(before, weights(module))


@every("C1", "callback")
def test_c01_foreign_module_of_pytorch_lightning(case: Case):
    import pytorch_lightning

    module = shell(case.module())
    before = weights(module)
    torch.manual_seed(1)
    trainer = pytorch_lightning.Trainer(max_epochs=1, callbacks=case.callbacks(), **QUIET)
    trainer.fit(module, case.loader(), case.loader())
    assert trainer.global_step == 8
    assert before.numel() != weights(module).numel() or not torch.equal(before, weights(module))


def precision(name: str) -> dict:
    if name == "16-mixed":  # on a CPU Lightning itself offers fp16 only through the plugin
        return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))]}
    return {"precision": name}


@pytest.mark.parametrize("name", ["32-true", "bf16-mixed", "16-mixed"])
@every("C2")
def test_c02_precision(case: Case, name: str):
    module = case.module()
    before = weights(module)
    _, module = case.fit(module=module, max_epochs=1, **precision(name))
    after = weights(module)
    assert torch.isfinite(after).all()
    assert before.numel() != after.numel() or not torch.equal(before, after)
    assert {p.dtype for p in module.parameters()} == {torch.float32}

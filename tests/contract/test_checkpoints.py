"""The contract's rows C4 and C5: bit-equal resume, checkpoints that open without effdl."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from effdl.callbacks import RNGStateCallback
from tests.contract.cases import CASES, Case, assert_same, every, first, state_of
from tests.contract.endings import RaiseAt, StopError, case_steps
from tests.support import in_fresh_process


def everything(trainer, module) -> dict:
    """Weights, optimizers and the states of effdl's callbacks."""
    own = {c.state_key: c.state_dict() for c in trainer.callbacks if "effdl" in type(c).__module__}
    return {"model": state_of(module), "optimizers": [o.state_dict()["state"] for o in trainer.optimizers], "own": own}


@pytest.mark.parametrize("when", ["boundary", "middle"])
@every("C4")
def test_c04_resume_is_bit_equal(case: Case, when: str, tmp_path):
    whole = everything(*case.fit([RNGStateCallback()] if case.entry.name != "RNGStateCallback" else []))
    extra = lambda: [RNGStateCallback()] if case.entry.name != "RNGStateCallback" else []  # noqa: E731
    if when == "boundary":
        save = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    else:
        save = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=case_steps(case, 5), save_top_k=-1,
                               enable_version_counter=False)  # fmt: skip
    with pytest.raises(StopError):
        case.fit([*extra(), save, RaiseAt(9 if when == "boundary" else 6)])
    assert (tmp_path / "last.ckpt").exists()
    trainer, module = case.fit(extra(), ckpt_path=tmp_path / "last.ckpt")
    assert_same(whole, everything(trainer, module))


@pytest.mark.parametrize("kind", ["full", "weights-only", "beside-ema", "on-exception"])
@every("C5", attaches=True)
def test_c05_checkpoint_is_plain(case: Case, kind: str, tmp_path):
    save = ModelCheckpoint(
        tmp_path, filename="saved", save_last=kind != "on-exception", save_on_train_epoch_end=True,
        save_weights_only=kind == "weights-only", save_on_exception=kind == "on-exception",
        every_n_epochs=5 if kind == "on-exception" else 1,
    )  # fmt: skip
    ema = [EMAWeightAveraging(decay=0.5)] if kind == "beside-ema" else []
    if kind == "on-exception":
        with pytest.raises(StopError):
            case.fit([save, RaiseAt(5)])
    else:
        _, module = case.fit([*ema, save], max_epochs=1, val=False)
    (path, *_) = sorted(tmp_path.glob("*.ckpt"))
    state = torch.load(path, weights_only=True)["state_dict"]
    bare = case.rebuilt()
    bare.load_state_dict(state, strict=True)
    if kind in ("full", "weights-only"):
        x = case.inputs(bare)
        a, b = case.network(bare).eval()(*x), case.network(module).eval()(*x)
        assert torch.allclose(first(a), first(b), atol=1e-6)


def test_c05_checkpoints_open_in_a_process_without_effdl(tmp_path):
    names = [name for name, case in CASES.items() if case.attaches and "C5" not in case.entry.contract_exceptions]
    for name in names:
        save = ModelCheckpoint(tmp_path, filename=name, save_on_train_epoch_end=True)
        CASES[name].fit([save], max_epochs=1, val=False)
    program = (
        "import sys, pathlib, torch\n"
        "sys.modules['effdl'] = None\n"
        "for path in pathlib.Path(sys.argv[1]).glob('*.ckpt'):\n"
        "    state = torch.load(path, weights_only=True)['state_dict']\n"
        "    assert state and all(isinstance(v, torch.Tensor) for v in state.values()), path\n"
        "    print(path.stem)\n"
    )
    assert sorted(in_fresh_process(program, tmp_path).split()) == sorted(names)

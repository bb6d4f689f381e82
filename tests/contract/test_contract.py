"""The contract of DESIGN: rows C1, C2, C4-C11 for every public class that the catalogue lists (C3: test_ddp.py)."""

from __future__ import annotations

import contextlib
import inspect
import json
import subprocess
import sys

import jsonargparse
import lightning.pytorch as lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.tuner import Tuner

from effdl import catalog
from effdl.callbacks import PruningCallback, RNGStateCallback
from effdl.core.contract import ContractExample
from effdl.core.errors import ConfigurationError
from effdl.core.export import export_onnx, export_program, onnx_outputs, save_safetensors
from tests.contract.cases import CASES, QUIET, Case, assert_same, every, shell, state_of, traces, weights

# ---- C1: somebody else's module -----------------------------------------------------------------------------------


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


# ---- C2: precision ------------------------------------------------------------------------------------------------


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


# ---- C4: resume ---------------------------------------------------------------------------------------------------


class StopError(RuntimeError):
    pass


class RaiseAt(Callback):
    """Ends the run by an error when the n-th training batch starts, counted over epochs."""

    def __init__(self, batches: int, error: type[BaseException] = StopError) -> None:
        self.left, self.error = batches, error

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.left == 0:
            raise self.error("stopped on purpose")
        self.left -= 1


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


def case_steps(case: Case, batches: int) -> int:
    """``global_step`` after so many batches: under manual optimisation each optimizer counts."""
    module = case.module()
    optimizers = module.configure_optimizers() if case.example.manual else None
    return batches * (len(optimizers) if isinstance(optimizers, (list, tuple)) else 1)


# ---- C5: plain checkpoints ----------------------------------------------------------------------------------------


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


def first(output):
    return output if isinstance(output, torch.Tensor) else next(iter(getattr(output, "values", lambda: output)()))


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
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == sorted(names)


# ---- C6: stages and ends ------------------------------------------------------------------------------------------


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


# ---- C7: composition ----------------------------------------------------------------------------------------------


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


# ---- C8: arguments ------------------------------------------------------------------------------------------------


def arguments(case: Case) -> list[str]:
    """The class's own constructor arguments; a mixin's ``*args, **kwargs`` belong to the next class."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(case.cls.__init__).parameters.values()
    return [p.name for p in parameters if p.name != "self" and p.kind not in kinds]


@every("C8")
def test_c08_every_argument_refuses_a_bad_value_by_name(case: Case):
    bad = case.example.bad
    assert sorted(bad) == sorted(arguments(case)), "contract_example().bad must name every constructor argument"
    for argument, values in bad.items():
        if values == ContractExample.ANY:
            continue
        for value in values if isinstance(values, list) else [values]:
            with pytest.raises(ConfigurationError) as raised:
                refuse(case, argument, value)
            assert argument in str(raised.value), f"{argument}={value!r}: {raised.value}"


def refuse(case: Case, argument: str, value) -> None:
    if case.entry.kind != "callback":
        case.module(**{argument: value})
        return
    callback = case.callback(**{argument: value})
    module = case.module()
    before, clean = state_of(module), traces(module)
    try:
        case.fit(module=module, own_callbacks=[callback], max_epochs=1)
    finally:
        assert_same(before, state_of(module))
        assert traces(module) == clean


# ---- C9: YAML -----------------------------------------------------------------------------------------------------


@every("C9")
def test_c09_arguments_round_trip_through_yaml(case: Case):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--it", type=case.cls)
    kwargs = {k: v for k, v in case.example.kwargs.items() if _is_plain(v)}
    parsed = parser.parse_object({"it": {"class_path": case.entry.class_path, "init_args": kwargs}})
    again = parser.parse_string(parser.dump(parsed, skip_validation=True))
    assert again.as_dict() == parsed.as_dict()
    for name, value in kwargs.items():
        assert json.dumps(again.it.init_args[name], default=str) == json.dumps(value, default=str)


def _is_plain(value) -> bool:
    return isinstance(value, (str, int, float, bool, list, tuple, dict, type(None)))


@pytest.mark.parametrize("slug", sorted({case.entry.slug for case in CASES.values() if case.entry.paper}))
def test_c09_recipe_parses_and_prints_its_config(slug, capsys):
    from effdl.cli import main

    with contextlib.suppress(SystemExit):
        main(["run", slug, "--print_config"])
    printed = capsys.readouterr().out
    assert any(f".{entry.name}" in printed or (entry.concrete and entry.concrete in printed)
               for entry in catalog.of_slug(slug)), printed[:400]  # fmt: skip


# ---- C10: export --------------------------------------------------------------------------------------------------


@every("C10")
def test_c10_the_finished_model_exports(case: Case, tmp_path):
    _, module = case.fit(max_epochs=1)
    model, inputs = case.network(module).eval(), case.inputs(module)
    with torch.no_grad():
        want = first(model(*inputs))
    from safetensors.torch import load_file

    state = load_file(save_safetensors(model, tmp_path / "model.safetensors"))
    assert_same(dict(model.state_dict()), state)
    program = export_program(model, inputs, tmp_path / "model.pt2")
    assert torch.allclose(first(program.module()(*inputs)), want, atol=1e-5)
    if "C10-onnx" not in case.entry.contract_exceptions:
        onnx = onnx_outputs(export_onnx(model, inputs, tmp_path / "model.onnx"), inputs)
        assert torch.allclose(onnx[0], want, atol=1e-4)


# ---- C11: metadata ------------------------------------------------------------------------------------------------


@every("C11")
def test_c11_metadata(case: Case):
    doc = inspect.getdoc(case.cls) or ""
    assert "Example::" in doc, "a runnable example belongs in the docstring"
    if case.example.bad:
        assert "Raises:" in doc
        assert "Args:" in doc
    paper = case.cls.paper
    if paper is not None:
        assert paper.title
        assert paper.year > 1980
        assert paper.arxiv or paper.venue
        assert paper.bibtex.startswith("@")
        assert paper.slug == case.entry.slug
    assert case.entry.name in {entry.name for entry in catalog.entries()}
    assert set(case.entry.contract_exceptions) <= {*(f"C{i}" for i in range(1, 12)), "C10-onnx"}

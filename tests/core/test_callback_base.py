"""callbacks/_base.MethodCallback: the state key, undoing once whatever happens, other arguments on resume."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from effdl.callbacks._base import MethodCallback
from effdl.core.errors import ConfigurationError
from effdl.core.paper import Paper
from effdl.core.steps import wrap
from tests.core.state_keys import KEYS, Method, state_keys
from tests.support import ROOT, quiet_fit


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def run(module, *callbacks, **kwargs):
    loader = DataLoader([torch.ones(2, 2)] * 3, batch_size=None)
    return quiet_fit(module, loader, *callbacks, **{"max_epochs": 1, **kwargs})


def is_wrapped(owner, name="training_step"):
    return hasattr(vars(owner).get(name), "_effdl_chain")


# ---- state key ----------------------------------------------------------------------------------------------------


def test_state_keys_differ_by_arguments_and_are_the_same_in_the_next_process():
    keys = state_keys()
    assert all(key.startswith("my-method-") for key in keys)
    assert len(set(keys)) == len(KEYS)
    assert keys == state_keys()
    assert Method(targets=object()).state_key == keys[-1]
    assert Method(targets={"a": nn.Linear, "b": 1}).state_key == keys[5]  # a dict's order does not matter
    command = [sys.executable, "-m", "tests.core.state_keys"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == keys


def test_a_subclass_adds_its_arguments_and_keeps_those_it_passes_on():
    class Mine(Method):
        def __init__(self, extra=1, **kwargs):
            super().__init__(**kwargs)
            self.extra = extra

    keys = {Mine().state_key, Mine(extra=2).state_key, Mine(rate=0.1).state_key, Mine(targets="a").state_key}
    assert len(keys) == 4


# ---- undoing ------------------------------------------------------------------------------------------------------


def test_a_fit_undoes_once_and_backwards():
    module, method = Net(), Method()
    trainer = run(module, method)
    assert method.undone == ["second", "first"]
    method.undo()
    assert method.undone == ["second", "first"]
    assert not is_wrapped(module)
    assert not is_wrapped(trainer.strategy, "on_exception")
    run(module, method)
    assert method.undone == ["second", "first"] * 2


def test_an_attach_that_raises_leaves_nothing():
    module, method = Net(), Method(fails="attach")
    with pytest.raises(ConfigurationError, match="attach fails"):
        run(module, method)
    assert method.undone == ["second", "first"]
    assert not is_wrapped(module)
    assert not is_wrapped(module, "on_load_checkpoint")
    method.fails = None
    run(module, method)
    assert method.undone == ["second", "first"] * 2


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_after_an_error_it_is_undone_behind_the_last_checkpoint(error, tmp_path):
    seen = []

    class Save(ModelCheckpoint):
        def on_exception(self, trainer, pl_module, exception):
            super().on_exception(trainer, pl_module, exception)
            seen.append(is_wrapped(pl_module))

    class Stops(Net):
        def training_step(self, batch, batch_idx):
            raise error("on purpose")

    module, method = Stops(), Method()
    with pytest.raises((error, SystemExit)):
        run(module, method, Save(tmp_path, save_on_exception=True))
    assert seen == [True]
    assert method.undone == ["second", "first"]
    assert not is_wrapped(module)


def test_an_error_of_its_own_and_one_in_anothers_on_exception_still_undo():
    class Worse(MethodCallback):
        paper = Paper(slug="worse", title="T", authors=("A, B",), year=2020)

        def attach(self, trainer, pl_module, stage):
            self.keep(wrap(trainer.strategy, "on_exception", self.fail))

        def fail(self, call_next, *args):
            raise ValueError("worse")

    for others in ([], [Worse()]):
        module, method = Net(), Method(fails="step")
        with pytest.raises((RuntimeError, ValueError)):
            run(module, *others, method)
        assert not is_wrapped(module)
        assert method.undone == ["second", "first"]


def test_what_a_dead_run_left_is_undone_by_the_next_setup():
    module, method = Net(), Method()
    method.setup(Trainer(logger=False, accelerator="cpu"), module, "fit")  # and never a teardown
    run(other := Net(), method)
    assert method.undone == ["second", "first"] * 2
    assert not is_wrapped(module)
    assert not is_wrapped(other)


# ---- resuming -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_made_with_other_arguments_is_refused(tmp_path):
    run(Net(), Method(rate=0.1), ModelCheckpoint(tmp_path, save_last=True))
    path = tmp_path / "last.ckpt"
    run(Net(), same := Method(rate=0.1), ckpt_path=path, max_epochs=2)
    assert same.steps == 6
    module = Net()
    with pytest.raises(ConfigurationError, match="other arguments of Method"):
        run(module, Method(rate=0.2), ckpt_path=path, max_epochs=2)
    assert not is_wrapped(module, "on_load_checkpoint")
    run(Net(), Method(rate=0.1), new := Method(rate=0.2), ckpt_path=path, max_epochs=2)  # beside the old one
    assert new.steps == 3
    run(Net(), ModelCheckpoint(tmp_path / "plain", save_last=True))
    run(Net(), new := Method(), ckpt_path=tmp_path / "plain" / "last.ckpt", max_epochs=2)  # from a run without
    assert new.steps == 3

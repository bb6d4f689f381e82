"""Folding: every checkpoint is the plain model's, and a resumed run has the method's own state back."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from effdl.core.checkpoint import fold_checkpoints
from effdl.core.steps import wrap
from tests.support import quiet_trainer


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.tested = []

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().sum()

    def test_step(self, batch, batch_idx):
        self.tested.append(self.net[0].weight.clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


class Folding(Callback):
    """Sees a weight through ``view``: what is saved is the view, what is trained the raw weight."""

    def __init__(self, key="net.0.weight", view=torch.relu, name="folding"):
        self.key, self.view, self.name = key, view, name

    @property
    def state_key(self):
        return self.name

    def setup(self, trainer, pl_module, stage):
        self.handles = fold_checkpoints(pl_module, self.name, self.fold, lambda state, kept: state.update(kept))
        self.handles.append(wrap(trainer.strategy, "on_exception", self.after))

    def teardown(self, trainer, pl_module, stage):
        for handle in self.handles:
            handle.remove()

    def after(self, call_next, *args):
        call_next(*args)
        self.teardown(None, None, None)

    def fold(self, state):
        raw = state[self.key]
        state[self.key] = self.view(raw)
        return {self.key: raw.clone()}


def trainer(*callbacks, **kwargs):
    return quiet_trainer(*callbacks, **{"max_epochs": 2, **kwargs})


def data():
    g = torch.Generator().manual_seed(1)
    return DataLoader([torch.randn(3, 4, generator=g) for _ in range(4)], batch_size=None)


def fit(module, *callbacks, ckpt_path=None, **kwargs):
    trainer(*callbacks, **kwargs).fit(module, data(), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    assert "on_save_checkpoint" not in vars(module)
    return module


def saving(folder, **kwargs):
    return ModelCheckpoint(folder, save_last=True, save_on_train_epoch_end=True, **kwargs)


def read(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)


def same(a, b):
    return all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("weights_only", [False, True])
def test_what_is_saved_is_folded_and_what_is_trained_is_not(tmp_path, weights_only):
    module = fit(Net(), Folding(), saving(tmp_path, save_weights_only=weights_only), max_epochs=1)
    raw, checkpoint = module.net[0].weight, read(tmp_path)
    assert (raw < 0).any()
    assert torch.equal(checkpoint["state_dict"]["net.0.weight"], raw.relu())
    assert torch.equal(checkpoint["effdl"]["folding"]["state_dict"]["net.0.weight"], raw)
    Net().load_state_dict(checkpoint["state_dict"], strict=True)
    # versions of the layers, without which old formats are guessed, travel along
    assert checkpoint["state_dict"]._metadata["net.1"] == {"version": 2}


@pytest.mark.parametrize("order", [1, -1])
def test_beside_an_average_both_states_fold_and_the_resumed_run_is_the_uninterrupted_one(tmp_path, order):
    callbacks = lambda: [Folding(), EMAWeightAveraging(decay=0.5)][::order]  # noqa: E731
    whole = fit(Net(), *callbacks(), saving(tmp_path / "whole"), max_epochs=2)
    half = saving(tmp_path / "half")
    fit(Net(), *callbacks(), half, max_epochs=1)
    checkpoint = read(tmp_path / "half")
    for state in ("state_dict", "current_model_state"):
        raw = checkpoint["effdl"]["folding"][state]["net.0.weight"]
        assert torch.equal(checkpoint[state]["net.0.weight"], raw.relu())
        assert (raw < 0).any()
    assert not torch.equal(checkpoint["state_dict"]["net.2.weight"], checkpoint["current_model_state"]["net.2.weight"])
    resumed = fit(Net(), *callbacks(), saving(tmp_path / "on"), ckpt_path=tmp_path / "half" / "last.ckpt")
    assert same(whole.state_dict(), resumed.state_dict())
    for state in ("state_dict", "current_model_state"):
        assert same(read(tmp_path / "whole")[state], read(tmp_path / "on")[state])


def test_only_fitting_unfolds(tmp_path):
    fit(Net(), Folding(), saving(tmp_path), max_epochs=1)
    checkpoint, module = read(tmp_path), Net()
    path = {"ckpt_path": tmp_path / "last.ckpt", "weights_only": True}
    trainer(Folding()).test(module, data(), verbose=False, **path)
    assert torch.equal(module.tested[0], checkpoint["state_dict"]["net.0.weight"])
    trainer().test(module := Net(), data(), verbose=False, **path)  # nor does the method have to be there
    assert torch.equal(module.tested[0], checkpoint["state_dict"]["net.0.weight"])
    fit(module := Net(), Folding(), max_epochs=1, ckpt_path=path["ckpt_path"])  # nothing left to train
    assert torch.equal(module.net[0].weight, checkpoint["effdl"]["folding"]["state_dict"]["net.0.weight"])


def test_two_methods_fold_one_after_the_other_and_unfold_backwards(tmp_path):
    both = lambda: [Folding(name="a"), Folding(view=partial(torch.add, other=1), name="b")]  # noqa: E731
    whole = fit(Net(), *both(), max_epochs=2)
    half = fit(Net(), *both(), saving(tmp_path), max_epochs=1)
    checkpoint = read(tmp_path)
    raw = half.net[0].weight
    assert torch.equal(checkpoint["state_dict"]["net.0.weight"], raw.relu() + 1)  # the first one attached folds first
    assert torch.equal(checkpoint["effdl"]["b"]["state_dict"]["net.0.weight"], raw.relu())
    assert same(whole.state_dict(), fit(Net(), *both(), ckpt_path=tmp_path / "last.ckpt").state_dict())


def test_a_checkpoint_saved_behind_an_error_is_folded_and_the_module_let_go(tmp_path):
    class Fails(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 3:
                raise RuntimeError("on purpose")
            return super().training_step(batch, batch_idx)

    module = Fails()
    save = ModelCheckpoint(tmp_path, filename="last", save_on_exception=True, enable_version_counter=False)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(module, Folding(), save)
    (path,) = tmp_path.glob("*.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    assert torch.equal(state["net.0.weight"], module.net[0].weight.relu())
    assert not {"on_save_checkpoint", "on_load_checkpoint"} & set(vars(module))


def test_a_checkpoint_of_a_run_without_the_method_loads(tmp_path):
    plain = fit(Net(), saving(tmp_path), max_epochs=1)
    before = copy.deepcopy(plain.state_dict())
    assert same(before, fit(Net(), Folding(), max_epochs=1, ckpt_path=tmp_path / "last.ckpt").state_dict())

"""trained-rank-pruning: what happens in a step and at the end of a run (checks 4, 5, 8)."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader
from transformers.pytorch_utils import Conv1D

from effdl.compression import trained_rank_pruning
from effdl.compression.trained_rank_pruning import decompose, select_layers, truncate
from effdl.core.errors import ConfigurationError
from effdl.core.export import save_model
from effdl.core.factorize import factorize, load_factorized
from tests.compression.trained_rank_parts import CUT, GOLDEN, ONE, QUIET, Net, Scripted, data, fit, tensor, trp


def test_must_04_the_forward_sees_low_rank_at_a_cut_and_is_free_between():
    seen = []

    class Watch(Net):
        def training_step(self, batch, batch_idx):
            s = torch.linalg.svdvals(self.model[3].weight.detach().flatten(1))
            seen.append((callback.step, int(callback._ranks["model.3"]), s / s[0]))
            return super().training_step(batch, batch_idx)

    fit(Watch(), callback := trp())
    assert len(seen) == 16
    for step, rank, s in seen:
        assert rank < 16
        assert (s[rank:] < 1e-5).all() == (step % 3 == 0), step
        assert (s[:rank] > 1e-5).all()


def test_must_05_one_cut_per_optimizer_step_under_accumulation():
    counts = []
    for accumulate, batches in ((1, 8), (4, 32)):
        callback = trp(every=2)
        cut, at = callback._cut, []
        callback._cut = lambda cut=cut, at=at, callback=callback, **kw: (at.append(callback.step), cut(**kw))
        fit(Net(), callback, loader=data(batches), max_epochs=1, accumulate_grad_batches=accumulate)
        counts.append(at)
    assert counts == [[0, 2, 4, 6]] * 2


def test_subgradient_is_there_before_clipping_and_only_at_cuts():
    weight, lam = tensor(GOLDEN["weight"]), 0.5
    loader = DataLoader([torch.zeros(1)] * 3, batch_size=None)
    for every_step in (False, True):
        module = Scripted(weight, torch.zeros_like(weight), 0.0)  # W only moves by the cut at step 0
        callback = trp(every=2, stop=1, nuclear_weight=lam, nuclear_every_step=every_step, targets="layer")
        fit(module, callback, loader=loader, max_epochs=1, gradient_clip_val=1e-3)
        direction = truncate(weight, "channel", ("energy", 0.7)).subgradient
        assert torch.allclose(module.seen[0], lam * direction, atol=1e-6)
        once = truncate(weight, "channel", ("energy", 0.7)).weight  # the weight as it is at the second step
        again = lam * truncate(once, "channel", ("energy", 0.7)).subgradient
        assert torch.allclose(module.seen[1], again if every_step else torch.zeros_like(weight), atol=1e-5)
        assert not module.seen[2].any()  # after ``stop``


def test_must_08_resume_is_the_uninterrupted_run(tmp_path):
    fit(whole := Net(), trp(decompose=False), max_epochs=4)
    save = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    fit(Net(), trp(decompose=False), save)
    fit(resumed := Net(), trp(decompose=False), max_epochs=4, ckpt_path=tmp_path / "last.ckpt")
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.allclose(a, b, atol=1e-6, rtol=0), name


def test_training_leaves_the_small_model_that_rebuilds_itself(tmp_path):
    module, callback, save = Net(), trp(calibration_batches=2), ModelCheckpoint(tmp_path, save_last=True)
    run = fit(module, callback, save, val=data(2))
    assert set(callback.ranks) == set(CUT)
    assert type(module.model[3]) is nn.Sequential
    told = callback.report()
    accuracy = told["after"]["metrics"]["val/accuracy"]
    assert run.callback_metrics["val/accuracy"] == accuracy
    assert run.validate(module, data(2), verbose=False)[0]["val/accuracy"] == accuracy
    assert told["before"]["parameters"] == sum(p.numel() for p in Net().model.parameters())
    assert told["multiply_adds_after"] < told["multiply_adds_before"]
    assert told["layers"]["model.5"]["macs after"] < told["layers"]["model.5"]["macs before"]
    factorize(again := Net(), callback.ranks, inplace=True)
    again.load_state_dict(module.state_dict(), strict=True)
    assert save_model(module, tmp_path / "model") == "safetensors"
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(load_factorized(Net().model.eval(), tmp_path / "model")(x), module.model.eval()(x))
    # the checkpoint is the plain dense model
    dense = Net()
    dense.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"], strict=True)
    # the finished module tests its own dense checkpoint, and validation splits it again
    tester = Trainer(callbacks=[callback], enable_checkpointing=False, **QUIET)
    tester.test(module, data(2), ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False)
    assert type(module.model[3]) is nn.Conv2d
    ranks = callback.ranks
    tester.validate(module, data(2), ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False)
    assert callback.ranks == ranks
    assert type(module.model[3]) is nn.Sequential
    # another fit joins the factors and goes on
    fit(module, callback, max_epochs=1)
    assert type(module.model[3]) is nn.Sequential


def test_layers_of_transformers_and_those_that_stay_dense():
    torch.manual_seed(0)
    net = nn.Sequential(Conv1D(16, 16), nn.Conv1d(16, 16, 3, groups=16), nn.Linear(16, 16), nn.Linear(16, 4))
    with pytest.warns(UserWarning, match="stay dense: 1 has groups=16"):
        layers = select_layers(net, "channel")
    assert list(layers) == ["0", "2"]
    with pytest.raises(ConfigurationError, match="leave no layer to cut.*1 has groups=16"):
        select_layers(net, "channel", targets="1")

    class Words(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, batch_idx):
            return 0 * sum(p.sum() for p in self.net.parameters())

        configure_optimizers = Scripted.configure_optimizers
        lr = 1.0

    before = net[0].weight.detach().clone()
    fit(Words(), trp(keep_energy=0.6, nuclear_weight=0.1, decompose=False, targets="net.0"), loader=ONE, max_steps=1)
    cut = truncate(before.t(), "channel", ("energy", 0.6))
    assert torch.allclose(net[0].weight.t(), cut.weight - 0.1 * cut.subgradient, atol=1e-5)


def test_dead_broken_and_tied_layers_are_named():
    module = Net()
    with torch.no_grad():
        module.model[3].weight.zero_()
    with pytest.warns(UserWarning, match="rank 1 is kept: 3"):
        _, rows = decompose(module.model, select_layers(module.model, "channel"), "channel", ("value", 0.05))
    assert rows["3"]["rank"] == 1
    fit(module, trp(), max_steps=1)  # a cut of zeros is zeros
    module = Net()
    with torch.no_grad():
        module.model[5].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="model.5: .* NaN"):
        fit(module, trp())
    module = Net()
    module.model[5].weight = module.model[3].weight
    with pytest.raises(ConfigurationError, match="model.3 cannot be factorised: its weight is tied"):
        fit(module, trp())
    fit(module, callback := trp(decompose=False), max_steps=1)
    assert callback.matched(module) == ["model.3"]  # once


def test_an_average_is_cut_before_it_is_split_and_the_rate_finder_splits_nothing(tmp_path):
    for order in (1, -1):
        callback = trp(final_criterion=("value", 1e-3))
        fit(module := Net(), *[callback, EMAWeightAveraging(decay=0.9)][::order], val=data(1))
        assert all(row["rank"] < 16 for row in callback.rows.values())
        assert type(module.model[3]) is nn.Sequential
    trainer = Trainer(callbacks=[trp()], default_root_dir=tmp_path, max_epochs=1, **QUIET)
    Tuner(trainer).lr_find(module := Net(), data(), num_training=4, update_attr=False)
    assert type(module.model[3]) is nn.Conv2d


def test_resume_goes_on_from_the_saved_bases(tmp_path, monkeypatch):
    """A layer of low rank whose cuts start from one another: the resumed run takes the same ones."""

    class Wide(Net):
        def __init__(self):
            super().__init__(lambda: nn.Conv2d(16, 16, 3, padding=1))
            layer = nn.Linear(144, 160)
            g = torch.Generator().manual_seed(0)
            layer.weight.data = (torch.randn(160, 6, generator=g) @ torch.randn(6, 144, generator=g)) / 50
            self.model = nn.Sequential(*self.model[:-1], layer, nn.Linear(160, 3))

    starts, found = [], trained_rank_pruning.leading
    monkeypatch.setattr(trained_rank_pruning, "leading", lambda *a: (starts.append(a[2].clone()), found(*a))[1])
    kept = {"keep_energy": 0.9, "decompose": False, "targets": "model.8"}
    fit(whole := Wide(), trp(**kept), max_epochs=4)
    uninterrupted, starts[:] = list(starts), []
    save = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    fit(Wide(), trp(**kept), save)
    fit(resumed := Wide(), trp(**kept), max_epochs=4, ckpt_path=tmp_path / "last.ckpt")
    assert len(uninterrupted) == len(starts) > 8  # every cut but the first
    assert all(torch.equal(a, b) for a, b in zip(uninterrupted, starts))
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(a, b), name

"""gradual-pruning inside what users do around it: compile, optimizers of all kinds, averaging, resuming, precisions."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from effdl.callbacks import PruningCallback
from effdl.core.errors import ConfigurationError
from effdl.core.masks import keep_count
from effdl.tasks.tiny import tiny_gpt2
from tests.support import quiet_fit, quiet_trainer

PRUNED = sum(n - keep_count(n, 0.8) for n in (12 * 32, 32 * 3))
STEPS = 8  # in an epoch


class Plain(LightningModule):
    """A foreign module."""

    def __init__(self, optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
        self.make = optimizer

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return self.make(self.parameters())


class Net(Plain):
    """Notes, at each step, how many of its weights are zero."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen, self.losses = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(zeros(self))
        loss = super().training_step((batch[0].to(self.dtype), batch[1]), batch_idx)
        self.losses.append(loss.item())
        return loss

    test_step = training_step


def zeros(module):
    """Zeros as the layers see their weights."""
    return sum(int((m.weight == 0).sum()) for m in module.model.modules() if isinstance(m, nn.Linear))


def data(batches=STEPS):
    g = torch.Generator().manual_seed(1)
    rows = [(torch.randn(6, 12, generator=g), torch.randint(0, 3, (6,), generator=g)) for _ in range(batches)]
    return DataLoader(rows, batch_size=None)


def trainer(*callbacks, **kwargs):
    return quiet_trainer(*callbacks, **{"max_epochs": 3, **kwargs})


def fit(module, *callbacks, loader=None, **kwargs):
    return quiet_fit(module, loader or data(), *callbacks, **{"max_epochs": 3, **kwargs})


def pruning(**kwargs):
    return PruningCallback(**{"sparsity": 0.8, "start": 2, "stop": 14, "every": 3, **kwargs})


@pytest.mark.parametrize("how", ["submodule", "in place", "whole module"])
@pytest.mark.parametrize("retain", [False, True])
def test_compiled_networks_are_not_recompiled_at_mask_updates(how, retain):
    graphs, plain = [], Plain()
    fit(plain, pruning(retain=retain))

    class Watch(PruningCallback):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = given = Plain()
    if how == "submodule":
        module.model = torch.compile(module.model, backend="eager")
    elif how == "in place":
        module.model.compile(backend="eager")
    else:
        given = torch.compile(module, backend="eager")
    try:
        fit(given, Watch(0.8, start=2, stop=14, every=3, retain=retain))
        assert not torch._dynamo.utils.counters["graph_break"]
    finally:
        torch._dynamo.reset()
    # a retained weight gets its mask once, at the first update; masks that change later change no graph
    assert graphs == ([1, 1] + [2] * 22 if retain else [1] * 24)
    for a, b in zip(plain.parameters(), module.parameters()):
        assert torch.equal(a, b)


def test_lbfgs_counts_its_steps_and_keeps_zeros():
    callback = pruning(start=0, stop=16, every=4)
    fit(module := Net(lambda p: torch.optim.LBFGS(p, 0.1, max_iter=4)), callback)
    assert callback.step == 24  # its closure ran up to four times in each
    assert len(module.losses) > 24
    assert zeros(module) == PRUNED
    assert module.losses[-1] < module.losses[0]


class Two(Net):
    """Two optimizers by hand, each stepping on every so-manieth batch."""

    def __init__(self, periods, order):
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(12, 3)
        self.periods, self.order = periods, order

    def configure_optimizers(self):
        adam = torch.optim.AdamW(self.model.parameters(), 0.01, weight_decay=0.1)
        return adam, torch.optim.SGD(self.other.parameters(), 0.1, momentum=0.9)

    def training_step(self, batch, batch_idx):
        for i in self.order:
            if batch_idx % self.periods[i] == 0:
                optimizer = self.optimizers()[i]
                optimizer.zero_grad()
                self.manual_backward(nn.functional.cross_entropy((self.model, self.other)[i](batch[0]), batch[1]))
                optimizer.step()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(("periods", "steps"), [((1, 1), 24), ((1, 3), 24), ((2, 1), 12)])
def test_two_optimizers_update_once_per_step_of_the_first(periods, order, steps):
    updates = []

    class Watch(PruningCallback):
        def _update(self, trainer):
            updates.append(self.step)
            super()._update(trainer)

    fit(module := Two(periods, order), callback := Watch(0.8, start=0, stop=0.5, every=3))
    assert (updates, callback.step) == ([0, 3, 6, 9, 12], steps)
    assert zeros(module) == PRUNED
    assert (module.other.weight == 0).sum() == 36 - keep_count(36, 0.8)


def test_clipping_by_norm_sees_live_gradients_only():
    norms = []

    class Watch(Net):
        def configure_gradient_clipping(self, optimizer, **kwargs):
            assert not torch.cat([p.grad[p == 0] for p in self.parameters() if p.dim() > 1]).any()
            super().configure_gradient_clipping(optimizer, **kwargs)
            norms.append(float(torch.cat([p.grad.flatten() for p in self.parameters()]).norm()))

    fit(module := Watch(), pruning(), gradient_clip_val=0.1, gradient_clip_algorithm="norm")
    assert norms == pytest.approx([0.1] * 24, rel=1e-3)  # the live ones alone reach the bound
    assert zeros(module) == PRUNED


def test_frozen_weights_are_named_once_and_exclude_keeps_them_dense():
    module = Net()
    module.model[0].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"frozen and cannot heal: model\.0\.weight\. Name their layers in exclude"):
        fit(module, pruning())
    assert zeros(module) == PRUNED
    module = Net()
    module.model[0].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*frozen.*")
        fit(module, pruning(exclude="model.0"))
    assert zeros(module) == 96 - keep_count(96, 0.8)


class Words(LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def training_step(self, batch, batch_idx):
        tied = (self.model.transformer.wte.weight, self.model.lm_head.weight)
        self.seen.append([float((weight == 0).float().mean()) for weight in tied])
        return nn.functional.cross_entropy(self.model(batch).logits.flatten(0, 1), batch.flatten())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)


@pytest.mark.parametrize("retain", [False, True])
def test_tied_embeddings_of_a_gpt2_are_one_weight_in_training_and_in_the_checkpoint(retain, tmp_path):
    batches = DataLoader(list(torch.randint(0, 64, (6, 2, 16))), batch_size=None)
    make = lambda **kw: PruningCallback(0.8, start=0, stop=4, every=2, retain=retain, **kw)  # noqa: E731
    module, save = Words(tiny_gpt2(64, 16)), ModelCheckpoint(tmp_path, save_last=True)
    fit(module, callback := make(), EMAWeightAveraging(decay=0.5), save, loader=batches, max_epochs=1)
    assert "model.lm_head.weight" not in callback.report()["layers"]
    assert module.seen[-1] == pytest.approx([0.8, 0.8], abs=1e-3)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for state in (checkpoint["state_dict"], checkpoint["current_model_state"]):
        for name in ("transformer.wte", "lm_head"):
            assert (state[f"model.{name}.weight"] == 0).float().mean() == pytest.approx(0.8, abs=1e-3)
    assert module.model.lm_head.weight is module.model.transformer.wte.weight
    # excluded under one of its names, excluded
    fit(Words(tiny_gpt2(64, 16)), callback := make(exclude="wte"), loader=batches, max_epochs=1)
    assert not [name for name in callback.report()["layers"] if "wte" in name or "lm_head" in name]


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("first", ["pruning", "swa"])
def test_swa_ends_sparse_and_its_batch_norm_saw_the_sparse_network(first, retain):
    callbacks = [pruning(start=0, stop=20, every=4, retain=retain), StochasticWeightAveraging(0.05, swa_epoch_start=2)]
    fit(module := Net(), *(callbacks if first == "pruning" else callbacks[::-1]), max_epochs=4)
    assert len(module.seen) == 5 * STEPS  # SWA adds an epoch for the statistics
    assert set(module.seen[-STEPS:]) == {PRUNED}
    assert zeros(module) == PRUNED
    assert type(module.model[0]) is nn.Linear


def test_a_second_trainer_starts_anew_with_the_same_callback():
    callback, module = pruning(), Net()
    fit(module, callback)
    alive = module.seen[:3]
    again = Net()
    fit(again, callback)
    assert (callback.step, zeros(again)) == (24, PRUNED)
    assert again.seen[:3] == alive == [0, 0, 0]
    assert callback._probe.model is again.model
    for a, b in zip(module.parameters(), again.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("retain", [False, True])
def test_a_trainer_that_goes_on_keeps_its_masks(retain):
    module, callback = Net(lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.1)), pruning(retain=retain)
    run = fit(module, callback)
    run.fit_loop.max_epochs += 1
    run.fit(module, data())
    assert (callback.step, zeros(module)) == (32, PRUNED)
    assert set(module.seen[-STEPS:]) == {PRUNED}


@pytest.fixture
def saved(tmp_path):
    """A checkpoint at the very step where the ramp ended, 16 of 16."""
    make = lambda **kw: pruning(start=0.0, stop=1.0, every=0.25, **kw)  # noqa: E731
    fit(Net(), callback := make(), ModelCheckpoint(tmp_path, save_last=True), max_epochs=2)
    assert callback.step == callback.schedule.end == 16
    return SimpleNamespace(make=make, path=tmp_path / "last.ckpt", schedule=callback.schedule)


def test_resume_with_more_epochs_keeps_the_saved_schedule_and_masks(saved):
    fit(module := Net(), callback := saved.make(), max_epochs=5, ckpt_path=saved.path)
    assert callback.schedule == saved.schedule  # fractions were resolved once
    assert callback.step == 40
    assert set(module.seen) == {PRUNED}
    assert zeros(module) == PRUNED


def test_a_checkpoint_of_other_targets_is_refused_before_anything_changes(saved):
    module = Net()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ConfigurationError, match="other arguments of PruningCallback"):
        fit(module, saved.make(targets="model.0"), max_epochs=5, ckpt_path=saved.path)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not [name for name, value in vars(module).items() if hasattr(value, "_effdl_chain")]
    fit(Net(), saved.make(), pruning(targets="model.0"), max_epochs=3, ckpt_path=saved.path)  # beside it: a new one


def test_testing_a_checkpoint_does_not_start_the_next_run_from_it(saved):
    module, callback = Net(), saved.make()
    trainer(callback).test(module, data(), ckpt_path=saved.path, weights_only=True, verbose=False)
    assert zeros(module) == PRUNED
    fit(module := Net(), callback, max_epochs=1)
    assert (callback.step, module.seen[0]) == (8, 0)


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_low_and_high_precision_weights(dtype, retain):
    module = Net().to(dtype)
    fit(module, callback := pruning(retain=retain), precision="bf16-true" if dtype == torch.bfloat16 else "64-true")
    assert {mask.dtype for mask in callback.store.masks.values()} == {dtype}
    assert module.model[0].weight.dtype == dtype
    assert zeros(module) == PRUNED
    assert set(module.seen[15:]) == {PRUNED}

"""maestro on a Trainer: steps, epochs, validation, resume and what is left (checks 2, 3, 8-10)."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from effdl.callbacks import MaestroCallback
from effdl.compression.maestro import SplitAttention, decompose, deploy, hierarchical_lasso
from effdl.core.calibrate import recalibrate_batchnorm
from effdl.core.errors import ConfigurationError
from effdl.core.export import save_model
from effdl.core.factorize import factorize, load_factorized

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Net(LightningModule):
    """A foreign module with BatchNorm."""

    def __init__(self, model=None, lr=0.05):
        super().__init__()
        torch.manual_seed(0)
        self.model = model or nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3),
        )  # fmt: skip
        self.lr = lr

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val/accuracy", (self.model(batch[0]).argmax(-1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


def data(batches=8):
    g = torch.Generator().manual_seed(1)
    rows = [(torch.randn(6, 3, 8, 8, generator=g), torch.randint(0, 3, (6,), generator=g)) for _ in range(batches)]
    return DataLoader(rows, batch_size=None)


def fit(module, *callbacks, loader=None, val=None, ckpt_path=None, **kwargs):
    options = {"max_epochs": 2, **QUIET, **kwargs}
    options["enable_checkpointing"] = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    trainer = Trainer(callbacks=list(callbacks), num_sanity_val_steps=0, **options)
    loader = data() if loader is None else loader
    trainer.fit(module, loader, val, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


def maestro(**kwargs):
    """Ranks fall in every epoch."""
    return MaestroCallback(**{"lasso_weight": 1e-3, "threshold": 0.5, "relative": True, **kwargs})


class Watch(Callback):
    """What each training forward sees, as (step, active ranks, ranks)."""

    def __init__(self, method):
        self.method, self.seen = method, []

    def on_before_backward(self, trainer, pl_module, loss):
        pairs = self.method.prefixes.values()
        self.seen.append((self.method.step, [p.active for p in pairs], [p.rank for p in pairs]))


def test_must_03_one_layer_is_cut_in_an_optimizer_step_and_the_list_shrinks():
    runs = []
    for accumulate, batches in ((1, 8), (2, 16)):
        watch = Watch(method := maestro())
        fit(Net(), method, watch, loader=data(batches), accumulate_grad_batches=accumulate, max_epochs=3)
        for i, (_, active, ranks) in enumerate(watch.seen):
            assert sum(a < r for a, r in zip(active, ranks)) <= 1
            assert i % accumulate == 0 or active == watch.seen[i - 1][1]
        runs.append([active for _, active, _ in watch.seen[::accumulate]])
        totals = [sum(ranks) for _, _, ranks in watch.seen]
        assert totals == sorted(totals, reverse=True)
        assert totals[0] > totals[-1]
        assert method.draws.ranks == {name: row["rank"] for name, row in method.rows.items()}
    assert runs[0][:8] == runs[1][:8]


def test_must_02_the_penalty_is_in_the_gradient_once_per_optimizer_step():
    grads = {}

    class Look(Callback):
        def __init__(self, key):
            self.key = key

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            grads[self.key] = [p.grad.clone() for p in pl_module.parameters()]

    torch.manual_seed(0)
    for weight in (0.0, 0.5):
        for batches in (1, 2):
            loader = DataLoader([next(iter(data(1)))] * batches, batch_size=None)  # the same batch twice is one
            options = {"max_steps": 1, "accumulate_grad_batches": batches}
            fit(Net(), maestro(lasso_weight=weight), Look((weight, batches)), loader=loader, **options)
    reference = Net()
    names = decompose(reference)
    pairs = [reference.get_submodule(name) for name in names]
    sum(hierarchical_lasso(pair[0].weight, pair[1].weight).sum() for pair in pairs).backward()
    for batches in (1, 2):
        for p, with_penalty, without in zip(reference.parameters(), *(grads[w, batches] for w in (0.5, 0.0))):
            want = 0 if p.grad is None else 0.5 * p.grad
            assert torch.allclose(with_penalty - without, want + torch.zeros_like(p), atol=1e-4)


def test_start_waits_and_samplers_differ():
    watch = Watch(method := maestro(start="1ep"))
    fit(Net(), method, watch)
    assert all(active == [8, 8, 3] for _, active, _ in watch.seen[:8])
    assert any(active != [8, 8, 3] for _, active, _ in watch.seen[8:])
    watch = Watch(method := maestro(sampler="fixed", threshold=1e-9))
    fit(Net(), method, watch, max_epochs=1)
    assert {tuple(active) for _, active, _ in watch.seen} == {(2, 2, 1)}


def test_modes_train_alike():
    ends = []
    for mode in ("slice", "mask"):
        fit(module := Net(), maestro(mode=mode, smallest=False), loader=data(4))
        ends.append(module.state_dict())
    for (name, a), b in zip(ends[0].items(), ends[1].values()):
        assert torch.allclose(a.float(), b.float(), atol=1e-5), name


def test_full_pass_is_the_whole_loss_and_the_cut_networks_distance_to_it():
    torch.manual_seed(0)
    x, y = next(iter(data(1)))
    losses = {}

    class Look(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            losses[method.full_pass] = float(loss.detach())
            if method.full_pass:
                cut = pl_module.model(x)
                active = [p.active for p in method.prefixes.values()]
                method._show(None)
                full = pl_module.model(x)
                assert active != [p.active for p in method.prefixes.values()]
                want = nn.functional.cross_entropy(full, y) + nn.functional.cross_entropy(cut, full.softmax(-1))
                assert torch.allclose(loss, want, atol=1e-5)

    loader = DataLoader([(x, y)], batch_size=None)
    for full_pass in (False, True):
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 3))
        method = maestro(full_pass=full_pass, sampler="fixed")
        fit(Net(net), method, Look(), loader=loader, max_steps=1)
    assert losses[True] > losses[False]

    class Own(Net):
        def training_step(self, batch, batch_idx):
            return sum(p.square().sum() for p in self.parameters())

    with pytest.raises(ConfigurationError, match="full_pass=True needs the logits"):
        fit(Own(), maestro(full_pass=True), max_steps=1)


def test_must_08_resume_in_the_middle_is_the_uninterrupted_run(tmp_path):
    options = {"loader": data(8), "val": data(2)}
    fit(whole := Net(), one := maestro(smallest=False), max_epochs=4, **options)
    save = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    fit(Net(), first := maestro(smallest=False), save, max_epochs=2, **options)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][first.state_key]
    assert 0 < state["sampler"]["position"] < sum(state["sampler"]["ranks"].values())
    assert sum(state["sampler"]["ranks"].values()) < 19
    fit(resumed := Net(), two := maestro(smallest=False), max_epochs=4, ckpt_path=tmp_path / "last.ckpt", **options)
    assert one.rows == two.rows
    assert one.state_dict() == two.state_dict()
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.equal(a, b), name


def test_checkpoints_compute_what_the_run_does_and_are_sliced_when_validated(tmp_path):
    module, method, save = Net(), maestro(), ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    trainer = fit(module, method, save, val=data(2))
    path = tmp_path / "last.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    rebuilt = Net()
    factorize(rebuilt, {"model.0": 8, "model.3": 8, "model.7": 3}, inplace=True)
    rebuilt.load_state_dict(state, strict=True)
    assert not state["model.0.0.weight"][method.draws.ranks["model.0"] :].any()
    for part in ("running_mean", "running_var"):  # the finished ones were taken anew
        for name in ("model.1", "model.4"):
            setattr(rebuilt.get_submodule(name), part, getattr(module.get_submodule(name), part).clone())
    x = torch.randn(4, 3, 8, 8)
    assert torch.allclose(rebuilt.eval().model(x), module.eval().model(x), atol=1e-5)

    told = method.report()
    assert trainer.callback_metrics["val/accuracy"] == told["after"]["metrics"]["val/accuracy"]
    assert told["after"]["metrics"] == told["before"]["metrics"]
    assert told["before"]["parameters"] == sum(p.numel() for p in Net().parameters())
    assert told["multiply_adds_after"] < told["multiply_adds_before"]
    # a fresh module and callback: as training had it under test, as its end under validate
    fresh, other = Net(), maestro()
    tester = Trainer(callbacks=[other], enable_checkpointing=False, **QUIET)
    tester.test(fresh, data(2), ckpt_path=path, weights_only=True, verbose=False)
    assert fresh.model[0][0].weight.shape[0] == 8
    tester.validate(fresh, data(2), ckpt_path=path, weights_only=True, verbose=False)
    assert other.ranks == method.ranks
    for key, value in module.state_dict().items():
        if "running" not in key and "num_batches" not in key:
            assert torch.equal(value, fresh.state_dict()[key]), key
    # the finished one again, and a fit that goes on from it
    Trainer(callbacks=[method], enable_checkpointing=False, **QUIET).test(
        module, data(2), ckpt_path=path, weights_only=True, verbose=False
    )
    fit(module, method, max_epochs=1)
    assert method.rows


def test_must_10_the_finished_module_is_stock_and_loads_from_its_file(tmp_path):
    module, method = Net(), maestro()
    fit(module, method)
    assert {type(m) for m in module.model.modules()} == {
        nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Flatten, nn.Linear,
    }  # fmt: skip
    assert not any(m._forward_hooks or hasattr(type(m), "_effdl_swapped") for m in module.modules())
    save_model(module, tmp_path / "model")
    x = torch.randn(2, 3, 8, 8)
    again = load_factorized(Net().model.eval(), tmp_path / "model")
    assert torch.equal(again(x), module.model.eval()(x))
    factorize(rebuilt := Net(), method.ranks, inplace=True)
    rebuilt.load_state_dict(module.state_dict(), strict=True)


class Pictures(Net):
    """Scores its network on the batch that validation brings, and remembers what it was."""

    def on_validation_epoch_start(self):
        self.seen = []

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        active = [(p.active, p.rank) for p in self.method.prefixes.values()]
        norm = self.model[1]
        self.seen.append((active, norm.running_mean.clone(), norm.momentum))


def test_must_09_validation_sees_the_full_current_rank_and_statistics_of_its_own():
    seen = {}
    for batches in (0, 4):
        module, method = Pictures(), maestro(calibration_batches=batches, smallest=False)
        module.method, before, after = method, [], []

        class Around(Callback):
            def on_validation_start(self, trainer, pl_module, before=before, method=method):
                before.append((pl_module.model[1].running_mean.clone(), [p.active for p in method.prefixes.values()]))

            def on_validation_end(self, trainer, pl_module, after=after, method=method):
                after.append((pl_module.model[1].running_mean.clone(), [p.active for p in method.prefixes.values()]))

        fit(module, method, Around(), val=data(2), val_check_interval=4)
        assert len(before) == 4
        for (mean, active), (mean_after, active_after) in zip(before, after):
            assert torch.equal(mean, mean_after)
            assert active == active_after
        for active, mean, momentum in module.seen:
            assert all(a == r for a, r in active) or not active
            assert momentum == 0.1
            seen[batches] = mean
        assert torch.equal(seen[batches], before[-1][0]) or batches
    assert not torch.allclose(seen[0], seen[4])


def test_must_09_recalibration_changes_a_truncated_networks_accuracy():
    g = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (512,), generator=g)
    prototypes = torch.randn(3, 3, 8, 8, generator=g)
    x = prototypes[y] + 2 * torch.randn(512, 3, 8, 8, generator=g)
    loader = DataLoader(list(zip(x.split(32), y.split(32))), batch_size=None)
    module, method = Net(), MaestroCallback(smallest=False, calibration_batches=16)
    fit(module, method, loader=loader, max_epochs=3)
    cut, _ = deploy(module.model.eval(), {"0": 1, "3": 1, "7": 2})
    scores = []
    for _ in range(2):
        scores.append((cut(x).argmax(-1) == y).float().mean().item())
        recalibrate_batchnorm(cut, loader)
    print("truncated, before and after the recalibration:", scores)
    assert scores[1] > scores[0] + 0.02


def test_averages_are_sliced_and_validated_with_statistics_of_their_own():
    module, method = Net(), maestro()
    fit(module, method, EMAWeightAveraging(decay=0.5), val=data(2), max_epochs=3)
    assert any(row["rank"] < row["full"] for row in method.rows.values())
    assert method.report()["after"]["metrics"] == method.report()["before"]["metrics"]
    with pytest.raises(ConfigurationError, match="List MaestroCallback before"):
        fit(Net(), EMAWeightAveraging(decay=0.5), maestro())


def test_a_layer_of_which_nothing_is_left_keeps_its_bias():
    module, method = Net(lr=1e-3), MaestroCallback(lasso_weight=1.0, threshold=1e3, calibration_batches=0)
    with pytest.warns(UserWarning, match="Nothing but the bias is left of model.0, model.3, model.7"):
        fit(module, method)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.allclose(module.model.eval()(x), module.model[7][1].bias.expand(2, 3))


def test_attention_trains_as_pairs_and_its_checkpoint_loads(tmp_path):
    class Words(LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.model = nn.Sequential(nn.TransformerEncoder(layer, 1), nn.Flatten(), nn.Linear(24, 3))

        training_step, validation_step, test_step = Net.training_step, Net.validation_step, Net.validation_step
        configure_optimizers, lr = Net.configure_optimizers, 0.05

    g = torch.Generator().manual_seed(1)
    rows = [(torch.randn(6, 3, 8, generator=g), torch.randint(0, 3, (6,), generator=g)) for _ in range(8)]
    loader = DataLoader(rows, batch_size=None)
    module, save = Words(), ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    fit(module, method := maestro(targets="self_attn"), save, loader=loader)
    assert isinstance(module.model[0].layers[0].self_attn, SplitAttention)
    assert len(method.rows) == 4
    assert any(row["rank"] < 8 for row in method.rows.values())
    fresh, other = Words(), maestro(targets="self_attn")
    Trainer(callbacks=[other], enable_checkpointing=False, **QUIET).validate(
        fresh, loader, ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False
    )
    for key, value in module.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[key]), key
    fit(copy.deepcopy(module), maestro(), loader=loader, max_epochs=1)

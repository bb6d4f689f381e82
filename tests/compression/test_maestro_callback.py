"""maestro: the callback in a run: ranks, penalty, samplers, validation."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader

from effdl.callbacks import MaestroCallback
from effdl.compression.maestro import decompose, deploy, hierarchical_lasso
from effdl.core.calibrate import recalibrate_batchnorm
from effdl.core.errors import ConfigurationError
from tests.compression.maestro_parts import Net, data, fit, maestro


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

"""SAMCallback on real Trainers (slug: sam): its two passes, alone, accumulated, in low precision, on two processes."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional as F

from effdl.callbacks import SAMCallback
from effdl.training.sam import sam_step
from tests.support import golden, run_ranks
from tests.training.sam_parts import Net, batches, by_hand, fit, normalised, scaled, weights


@pytest.mark.parametrize("case", golden("sam")["cases"], ids=["SGD", "AdamW", "ASAM"])
def test_must_01_golden_parity_through_the_trainer(case):
    f64 = lambda v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    w1 = f64(case["W1"])
    network = nn.Sequential(nn.Linear(w1.shape[1], len(w1)), nn.GELU(), nn.Linear(len(w1), len(case["b2"]))).double()
    with torch.no_grad():
        for p, key in zip(network.parameters(), ("W1", "b1", "W2", "b2")):
            p.copy_(f64(case[key]))
    module = Net(network, lambda p: getattr(torch.optim, case["optimizer"])(p, **case["optimizer_kwargs"]))
    data = [(f64(x), torch.tensor(y)) for x, y in zip(case["X"], case["Y"])]
    fit(module, SAMCallback(case["rho"], case["adaptive"]), data=data, precision="64-true")
    for p, expected in zip(module.parameters(), case["steps"][-1]["params_after"]):
        assert torch.allclose(p, f64(expected), rtol=0, atol=1e-6)
    assert module.losses[0::2] == pytest.approx([s["loss_w"] for s in case["steps"]], abs=1e-6)
    assert module.losses[1::2] == pytest.approx([s["loss_perturbed"] for s in case["steps"]], abs=1e-6)


def test_must_03_rho_0_is_the_base_optimizer():
    plain, sam = Net(normalised()), Net(normalised())
    torch.manual_seed(3)
    fit(plain, epochs=2)
    torch.manual_seed(3)
    fit(sam, SAMCallback(rho=0.0), epochs=2)
    assert torch.equal(weights(plain), weights(sam))
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), sam.buffers()))
    assert sam.model[1].num_batches_tracked == 8


def test_must_03_a_vanishing_rho_leaves_everything_as_in_the_bare_run():
    """Two real passes, with e far below rounding: same weights, statistics, random stream, logs."""
    ends = []
    for callbacks in ([], [SAMCallback(rho=1e-30)]):
        module = Net(normalised())
        torch.manual_seed(3)
        run = fit(module, *callbacks, epochs=2, accumulate_grad_batches=2)
        ends.append((weights(module), *module.buffers(), torch.get_rng_state(), run.logged_metrics["train/loss"]))
        assert len(module.losses) == 8 * (1 + len(callbacks))
    assert all(torch.equal(a, b) for a, b in zip(*ends))


def test_must_04_batch_norm_moves_once_and_at_w():
    module = Net(normalised())
    first = module.model[0](batches(1)[0][0]).detach()
    fit(module, SAMCallback(rho=0.5), max_steps=1)
    norm = module.model[1]
    assert torch.allclose(norm.running_mean, 0.1 * first.mean(0), rtol=0, atol=1e-7)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("same", [True, False])
def test_must_05_dropout_masks(same, micro_batches):
    """Every micro-batch meets its own mask again in the second pass (unless told otherwise)."""
    network, masks = nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, 3)), []
    network[1].register_forward_hook(lambda m, i, output: masks.append((output != 0).detach()))
    module = Net(network)
    fit(module, SAMCallback(rho=1e-12, same_randomness=same), accumulate_grad_batches=micro_batches, max_steps=1)
    first, second = masks[:micro_batches], masks[micro_batches:]
    assert [torch.equal(a, b) for a, b in zip(first, second)] == [same] * micro_batches
    assert len({str(mask.tolist()) for mask in first}) == micro_batches
    if same:
        assert module.losses[:micro_batches] == pytest.approx(module.losses[micro_batches:], abs=1e-6)


def test_the_second_pass_draws_nothing_from_the_stream():
    class Draws(Net):
        def training_step(self, batch, batch_idx):
            torch.rand(1 + len(self.losses) % 2)  # not the same number in both passes
            return super().training_step(batch, batch_idx)

    torch.manual_seed(3)
    fit(Draws(), SAMCallback(0.5), max_steps=2)
    stream = torch.get_rng_state()
    torch.manual_seed(3)
    fit(Net(), max_steps=2)
    torch.rand(1), torch.rand(1)
    assert torch.equal(stream, torch.get_rng_state())


@pytest.mark.parametrize("adaptive", [False, True])
def test_accumulated_micro_batches_are_all_run_again(adaptive):
    data = batches(8)
    module = Net()
    run = fit(module, SAMCallback(0.3, adaptive), data=data, accumulate_grad_batches=4)
    assert torch.allclose(weights(module), weights(by_hand(Net(), data, 0.3, adaptive, 4)), atol=1e-6)
    assert run.global_step == 2
    assert len(module.losses) == 16


def test_an_incomplete_group_at_the_end_of_the_epoch():
    data = batches(3)
    module, expected = (Net(optimizer=lambda p: torch.optim.SGD(p, 0.1)) for _ in range(2))
    fit(module, SAMCallback(0.3), data=data, accumulate_grad_batches=2)
    by_hand(expected, data[:2], 0.3, micro_batches=2)
    x, y = data[2]
    optimizer = expected.configure_optimizers()

    def closure():  # Lightning divides the last, single batch by 2 as well
        optimizer.zero_grad()
        loss = F.cross_entropy(expected.model(x), y) / 2
        loss.backward()
        return loss

    sam_step(expected.parameters(), closure, optimizer, 0.3)
    assert torch.allclose(weights(module), weights(expected), atol=1e-6)


def test_interval_counts_optimizer_steps():
    module, data = Net(), batches(6)
    passes = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            passes.append(len(pl_module.losses))

    run = fit(module, SAMCallback(0.1, interval=3), Watch(), data=data)
    assert run.callbacks[0].state_dict() == {"rho": 0.1, "adaptive": False, "interval": 3, "step": 6}
    assert passes == [1, 2, 4, 5, 6, 8]


@pytest.mark.parametrize("kwargs", [{"precision": "bf16-mixed"}, {"plugins": [scaled()]}], ids=["bf16", "fp16"])
def test_mixed_precision_follows_the_full_precision_run(kwargs):
    module, plain = Net(), Net()
    run = fit(module, SAMCallback(0.3), **kwargs)
    fit(plain, **kwargs)
    expected = weights(by_hand(Net(), batches(), 0.3))
    error = (weights(module) - expected).norm()
    assert error < 0.02 * (weights(Net()) - expected).norm()
    assert (weights(plain) - expected).norm() > 5 * error  # and is not silently the plain optimizer
    assert run.global_step == 4


def test_fp16_overflow_skips_the_step_and_updates_the_scale_once():
    module, before = Net(), weights(Net())
    plugin = scaled(1e38)
    fit(module, SAMCallback(0.3), plugins=[plugin], max_steps=1)
    assert torch.equal(weights(module), before)
    assert plugin.scaler.get_scale() == pytest.approx(0.5e38, rel=1e-3)
    assert len(module.losses) == 2


def test_one_clip_of_the_second_gradient():
    norms, calls = [], []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            calls.append(torch.cat([p.grad.flatten() for p in pl_module.parameters()]))

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            norms.append(0)

    module = Net(optimizer=lambda p: torch.optim.SGD(p, 1.0))
    before = weights(module)
    fit(module, SAMCallback(0.3), Watch(), gradient_clip_val=0.01, max_steps=1)
    assert len(calls) == 1
    step = before - weights(module)
    assert torch.allclose(step.norm(), torch.tensor(0.01), rtol=1e-3)
    assert torch.allclose(F.cosine_similarity(step, calls[0], dim=0), torch.tensor(1.0))


def two_ranks_by_hand(rho, sync, micro_batches, steps=2):
    module = Net()
    optimizer, rows = module.configure_optimizers(), [batches(steps * micro_batches, seed=10 + r) for r in (0, 1)]

    def gradient(group):
        loss = sum(F.cross_entropy(module.model(x), y) for x, y in group) / micro_batches
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])

    def move(vector, sign=1):
        for p, piece in zip(module.parameters(), vector.split([p.numel() for p in module.parameters()])):
            p.data.add_(piece.view_as(p), alpha=sign)

    for step in range(steps):
        groups = [row[step * micro_batches : (step + 1) * micro_batches] for row in rows]
        local = [gradient(group) for group in groups]
        if sync:
            local = [sum(local) / 2] * 2
        total = 0
        for group, g in zip(groups, local):
            move(rho * g / g.norm())
            total = total + gradient(group) / 2
            move(rho * g / g.norm(), -1)
        for p, piece in zip(module.parameters(), total.split([p.numel() for p in module.parameters()])):
            p.grad = piece.view_as(p).clone()
        optimizer.step()
    return weights(module)


@pytest.mark.ddp
def test_must_06_two_processes(tmp_path):
    """Ranks agree bit for bit; e is local (the paper) or shared; accumulation is honoured; overflow does not hang."""
    run_ranks("tests.training.sam_ranks", tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    for micro_batches in (1, 2):
        local, shared = first[f"False-{micro_batches}"], first[f"True-{micro_batches}"]
        assert torch.allclose(local, two_ranks_by_hand(0.5, False, micro_batches), atol=1e-5)
        assert torch.allclose(shared, two_ranks_by_hand(0.5, True, micro_batches), atol=1e-5)
        assert not torch.allclose(local, shared, atol=1e-4)
    assert torch.equal(first["overflow"], weights(Net()))

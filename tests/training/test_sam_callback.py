"""SAMCallback on real Trainers (slug: sam)."""

import os
import socket

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from effdl.callbacks import RNGStateCallback, SAMCallback
from effdl.core.errors import ConfigurationError
from effdl.training.sam import sam_step
from tests.support import golden


class Net(LightningModule):
    """A foreign module; ``batches`` of 6 examples with 5 features in 3 classes."""

    def __init__(self, network=None, optimizer=None):
        super().__init__()
        torch.manual_seed(0)
        self.model = network or nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 3))
        self.make = optimizer or (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=5e-4))
        self.losses = []

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.model(batch[0]), batch[1])
        self.losses.append(loss.item())
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return self.make(self.parameters())


def batches(count=4, size=6, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 5, generator=g), torch.randint(3, (size,), generator=g)) for _ in range(count)]


def trainer(*callbacks, epochs=1, **kwargs):
    kwargs.setdefault("enable_checkpointing", any(isinstance(c, ModelCheckpoint) for c in callbacks))
    return Trainer(
        max_epochs=epochs, callbacks=list(callbacks), accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **kwargs,
    )  # fmt: skip


def fit(module, *callbacks, data=None, val=None, ckpt_path=None, **kwargs):
    run = trainer(*callbacks, **kwargs)
    loader = DataLoader(data or batches(), batch_size=None)
    run.fit(module, loader, val, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return run


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def by_hand(module, data, rho=0.05, adaptive=False, micro_batches=1):
    """The same run in plain torch."""
    optimizer = module.configure_optimizers()
    for i in range(0, len(data), micro_batches):

        def closure(group=data[i : i + micro_batches]):
            optimizer.zero_grad()
            total = sum(F.cross_entropy(module.model(x), y) / micro_batches for x, y in group)
            total.backward()
            return total

        sam_step(module.parameters(), closure, optimizer, rho, adaptive)
    return module


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


def normalised():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


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


def scaled(init_scale=1024.0):
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=init_scale))


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


class Measured(Net):
    """Logs metrics as users do: a torchmetrics object, a running mean, a list state."""

    def __init__(self):
        super().__init__()
        self.accuracy, self.mean = MulticlassAccuracy(3, average="micro"), MeanMetric()
        self.add_module("listed", MeanMetric())
        self.listed.add_state("seen", [], dist_reduce_fx=None)

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.model(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.mean.update(loss.detach())
        self.listed.seen.append(loss.detach())
        self.log_dict({"loss": loss, "accuracy": self.accuracy}, on_step=False, on_epoch=True)
        return {"loss": loss, "logits": logits.detach()}

    def on_train_epoch_end(self):
        self.seen = (self.mean.compute().item(), self.mean._update_count, len(self.listed.seen))


def test_logs_metrics_and_outputs_are_those_of_the_first_pass():
    outputs = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, outs, batch, batch_idx):
            outputs.append((outs["loss"].item(), outs["logits"]))

    ends = []
    for rho in (1e-30, 0.5):
        module = Measured()
        run = fit(module, SAMCallback(rho), Watch(), max_steps=1)
        ends.append((run.logged_metrics["loss"], run.logged_metrics["accuracy"], *module.seen))
    assert ends[0] == ends[1]
    assert ends[0][3:] == (1, 1)
    assert outputs[0][0] == outputs[1][0]
    assert torch.equal(outputs[0][1], outputs[1][1])


def test_sharpness_of_the_last_micro_batch_is_logged():
    module = Net()
    run = fit(module, SAMCallback(0.1), accumulate_grad_batches=2, max_steps=1)
    rise = module.losses[3] - module.losses[1]
    assert run.logged_metrics["sam/sharpness"].item() == pytest.approx(rise, abs=1e-6)
    assert rise > 0


def test_the_users_own_optimizer_step_and_scheduler_work():
    class Warm(Net):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            seen.append(weights(self))
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * (batch_idx + 1) / 4
            optimizer.step(closure=optimizer_closure)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    seen: list = []
    module = Warm()
    run = fit(module, SAMCallback(0.3), max_steps=3)
    assert torch.equal(seen[0], weights(Net()))
    assert run.lr_scheduler_configs[0].scheduler.last_epoch == 3
    assert type(run.optimizers[0]) is torch.optim.SGD
    assert "optimizer_step" not in module.__dict__


def test_a_skipped_batch_skips_both_passes():
    class Skips(Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    module = Skips()
    fit(module, SAMCallback(0.3))
    assert len(module.losses) == 6


def test_a_compiled_model_is_compiled_once():
    class Quiet(Net):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.model(batch[0]), batch[1])

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = Quiet()
    module.model = torch.compile(module.model, backend="eager")
    fit(module, SAMCallback(0.3))
    assert torch._dynamo.utils.counters["frames"]["ok"] == 1
    assert torch.allclose(weights(module), weights(by_hand(Net(), batches(), 0.3)), atol=1e-6)


def test_frozen_parameters_do_not_move():
    module = Net()
    module.model[0].requires_grad_(False)
    seen = []
    module.model[2].register_forward_pre_hook(lambda m, i: seen.append(module.model[0].weight.clone()))
    fit(module, SAMCallback(0.5), max_steps=1)
    assert torch.equal(seen[0], seen[1])


def test_average_validation_and_checkpoints_see_w_only(tmp_path):
    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen.append(weights(pl_module))

    seen: list = []
    module = Net()
    fit(module, SAMCallback(0.5), Watch(), EMAWeightAveraging(decay=0.5), epochs=2)
    expected = Net()
    optimizer = expected.configure_optimizers()
    average = weights(expected)
    for i, (x, y) in enumerate(batches() * 2):

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(expected.model(x), y)
            loss.backward()
            return loss

        sam_step(expected.parameters(), closure, optimizer, 0.5)
        assert torch.allclose(seen[i], weights(expected), atol=1e-6)
        average = weights(expected) if i == 0 else 0.5 * average + 0.5 * weights(expected)
    assert torch.allclose(weights(module), average, atol=1e-5)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_must_10_a_crash_in_the_second_pass_restores_w(error):
    class Crashes(Net):
        def training_step(self, batch, batch_idx):
            if len(self.losses) == 5:
                assert not torch.equal(self.before, weights(self))
                raise error("in the second pass of the third step")
            self.before = weights(self)
            return super().training_step(batch, batch_idx)

    module = Crashes(normalised())
    callback = SAMCallback(0.5)
    with pytest.raises((error, SystemExit)):
        fit(module, callback)
    assert torch.equal(module.before, weights(module))
    assert module.model[1].num_batches_tracked == 3
    assert not {"log", "optimizer_step"} & set(module.__dict__)
    assert callback.step == 2


@pytest.mark.parametrize("interval", [1, 3])
def test_must_10_resume_is_bit_identical(tmp_path, interval):
    make = lambda: [SAMCallback(0.2, interval=interval), RNGStateCallback()]  # noqa: E731
    ends = []
    for split in (False, True):
        torch.manual_seed(4)
        module = Net(normalised(), torch.optim.AdamW)
        if split:
            fit(module, *make(), ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True))
            module = Net(normalised(), torch.optim.AdamW)
        run = fit(module, *make(), epochs=2, ckpt_path=tmp_path / "last.ckpt" if split else None)
        ends.append((weights(module), *module.buffers()))
        assert run.callbacks[0].step == 8
    assert all(torch.equal(a, b) for a, b in zip(*ends))


def refused(module, match, *callbacks, **kwargs):
    before = weights(module)
    with pytest.raises(ConfigurationError, match=match):
        fit(module, *callbacks, **kwargs)
    assert torch.equal(before, weights(module))
    assert not {"log", "optimizer_step"} & set(module.__dict__)


def test_refusals():
    manual = Net()
    manual.automatic_optimization = False
    refused(manual, "automatic", SAMCallback())
    refused(Net(optimizer=torch.optim.LBFGS), "LBFGS", SAMCallback())
    refused(Net().to(torch.bfloat16), "torch.bfloat16", SAMCallback())
    refused(Net(), "two SAMCallbacks", SAMCallback(0.1), SAMCallback(0.2))
    refused(Net(), "bf16-true", SAMCallback(), precision="bf16-true")
    static = DDPStrategy(static_graph=True, process_group_backend="gloo")
    with pytest.raises(ConfigurationError, match="static_graph"):
        SAMCallback().setup(trainer(strategy=static, devices=1), Net(), "fit")

    class Iterates(Net):
        def training_step(self, dataloader_iter):
            raise AssertionError

    refused(Iterates(), "dataloader_iter", SAMCallback())


@pytest.mark.parametrize(
    "bad", [{"rho": -1.0}, {"rho": float("nan")}, {"adaptive": 1}, {"interval": 0}, {"same_randomness": None}]
)
def test_arguments(bad):
    with pytest.raises(ConfigurationError, match=next(iter(bad))):
        SAMCallback(**bad)


# ---- two processes -------------------------------------------------------------------------------------------------


def ddp_worker(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    torch.set_num_threads(1)
    found = {}
    for sync in (False, True):
        for micro_batches in (1, 2):
            module = Net()
            strategy = DDPStrategy(process_group_backend="gloo")
            fit(
                module, SAMCallback(0.5, sync_perturbation=sync), data=batches(2 * micro_batches, seed=10 + rank),
                strategy=strategy, devices=2, accumulate_grad_batches=micro_batches, use_distributed_sampler=False,
            )  # fmt: skip
            found[f"{sync}-{micro_batches}"] = weights(module)
    overflow = Net()  # only rank 1 overflows: the step is skipped on both, and nobody waits for ever
    data = [(x * (1e30 if rank else 1), y) for x, y in batches(1)]
    fit(
        overflow, SAMCallback(0.5), data=data, strategy=DDPStrategy(process_group_backend="gloo"), devices=2,
        plugins=[scaled(1e30)], use_distributed_sampler=False,
    )  # fmt: skip
    found["overflow"] = weights(overflow)
    torch.save(found, f"{folder}/{rank}.pt")


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
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(ddp_worker, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for key, value in first.items():
        assert torch.equal(value, second[key]), key
    for micro_batches in (1, 2):
        local, shared = first[f"False-{micro_batches}"], first[f"True-{micro_batches}"]
        assert torch.allclose(local, two_ranks_by_hand(0.5, False, micro_batches), atol=1e-5)
        assert torch.allclose(shared, two_ranks_by_hand(0.5, True, micro_batches), atol=1e-5)
        assert not torch.allclose(local, shared, atol=1e-4)
    assert torch.equal(first["overflow"], weights(Net()))

"""SAMCallback in other people's runs (slug: sam): their logs, steps and averages, what it refuses, crash, resume."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch.nn import functional as F
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from effdl.callbacks import RNGStateCallback, SAMCallback
from effdl.core.errors import ConfigurationError
from effdl.training.sam import sam_step
from tests.support import quiet_trainer
from tests.training.sam_parts import Net, batches, by_hand, fit, normalised, weights


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
        SAMCallback().setup(quiet_trainer(max_epochs=1, strategy=static, devices=1), Net(), "fit")

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

"""powernorm: the callback, alone and on two processes."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

from effdl.architectures.powernorm import PowerNorm
from effdl.architectures.powernorm_models import fold_power_norm, powernorm_model
from effdl.callbacks import PowerNormCallback
from effdl.core.errors import ConfigurationError
from tests.architectures import powernorm_ranks
from tests.architectures.powernorm_parts import tokens
from tests.support import quiet_fit

# --- the callback ---------------------------------------------------------------------------------------------------


class Net(LightningModule):
    """A foreign module: a torch encoder over sequences (B, 5, 8), SGD or anything."""

    def __init__(self, optimizers=lambda p: torch.optim.SGD(p, 0.05, momentum=0.9), norm_first=True):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
        self.norm, self.head, self.optimizers_of = nn.LayerNorm(8), nn.Linear(8, 3), optimizers
        self.losses: list[Tensor] = []

    def forward(self, x):
        return self.head(self.norm(self.encoder(x).mean(1)))

    def training_step(self, batch, batch_idx):
        x, y = (batch["x"], batch["y"]) if isinstance(batch, dict) else batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return self.optimizers_of(self.parameters())


def rows(count: int = 6, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 5, 8, generator=g), torch.randint(0, 3, (size,), generator=g)) for _ in range(count)]


def fit(module, callbacks, batches=None, **kwargs):
    loader = DataLoader(batches or rows(), batch_size=None)
    return quiet_fit(module, loader, *callbacks, **{"max_epochs": 2, **kwargs})


def norms_of(module: nn.Module) -> list[PowerNorm]:
    return [m for m in module.modules() if isinstance(m, PowerNorm)]


def test_must_09_resume_is_bit_identical(tmp_path):
    save = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)
    fit(whole := Net(), [PowerNormCallback(warmup_iters=4), save], rows(12), max_epochs=1)
    fit(
        again := Net(),
        [PowerNormCallback(warmup_iters=4)],
        rows(12)[7:],  # the loader of the resumed run goes on where the other was
        ckpt_path=tmp_path / "step=7.ckpt",
        max_steps=12,
        max_epochs=-1,
    )
    assert len(again.losses) == 5
    assert torch.equal(torch.stack(whole.losses[7:]), torch.stack(again.losses))
    state, state_again = whole.state_dict(), again.state_dict()
    assert state.keys() == state_again.keys()
    assert all(torch.equal(state[key], state_again[key]) for key in state)
    assert norms_of(again)[0].iters == 12


def test_checkpoint_opens_in_the_rebuilt_architecture_without_a_trainer(tmp_path):
    save = ModelCheckpoint(tmp_path, save_last=True)
    fit(module := Net(), [PowerNormCallback(warmup_iters=4), save])
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    fresh = powernorm_model(Net())
    fresh.load_state_dict(state)
    x = rows()[0][0]
    assert torch.equal(fresh.eval()(x), module.eval()(x))
    dense = fold_power_norm(module, x)
    torch.testing.assert_close(dense(x), module(x), atol=1e-5, rtol=0)


def test_every_stage_alone_and_again_replaces_once(tmp_path):
    callback, loader = PowerNormCallback(warmup_iters=4, exclude="norm"), DataLoader(rows(2), batch_size=None)
    trainer = fit(module := Net(), [callback, ModelCheckpoint(tmp_path, save_last=True)], val=loader)
    layers = norms_of(module)
    trainer.validate(module, loader, verbose=False)
    fit(module, [callback])
    assert norms_of(module) == layers
    assert list(callback.layers) == ["encoder.norm1", "encoder.norm2"]
    assert isinstance(module.norm, nn.LayerNorm)
    assert all(layer.padding_mask is None and layer.loss_scale is None for layer in layers)
    fresh = Net()
    alone = Trainer(callbacks=[PowerNormCallback(warmup_iters=4, exclude="norm")], logger=False, accelerator="cpu")
    alone.validate(fresh, loader, ckpt_path=tmp_path / "last.ckpt", verbose=False, weights_only=True)
    assert norms_of(fresh)[0].iters == 12


def test_accumulation_counts_micro_batches_and_state_is_logged():
    trainer = fit(module := Net(), [PowerNormCallback(warmup_iters=4)], accumulate_grad_batches=3)
    assert trainer.global_step == 4
    assert norms_of(module)[0].iters == 12
    expected = max(float(norm.ema_gz.abs().max()) for norm in norms_of(module))
    assert float(trainer.callback_metrics["powernorm/ema_gz_absmax"]) == pytest.approx(expected)


def test_report_names_layers():
    callback = PowerNormCallback(warmup_iters=4)
    with pytest.raises(ConfigurationError, match="needs a fit"):
        callback.report()
    fit(Net(), [callback])
    assert callback.matched(None) == ["encoder.norm1", "encoder.norm2", "norm"]
    row = callback.report()["layers"]["encoder.norm1"]
    assert (row["features"], row["groups"], row["iters"]) == (8, 2, 12)


def scheduled(make, interval="step"):
    def optimizers(parameters):
        optimizer = torch.optim.SGD(parameters, 0.01)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), "interval": interval}}

    return optimizers


def sequential(optimizer):
    from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

    return SequentialLR(optimizer, [LinearLR(optimizer, 0.1), CosineAnnealingLR(optimizer, 9)], milestones=[2])


def transformers_warmup(optimizer):
    from transformers import get_cosine_schedule_with_warmup

    return get_cosine_schedule_with_warmup(optimizer, 3, 10)


@pytest.mark.parametrize(
    ("make", "interval", "expected"),
    [
        (sequential, "step", 2 * 2),
        (transformers_warmup, "step", 3 * 2),
        (lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=10, pct_start=0.3), "step", 3 * 2),
        (lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=1), "epoch", 6),
    ],
)
def test_warmup_auto_follows_the_scheduler(make, interval, expected):
    callback = PowerNormCallback(warmup_iters="auto")
    fit(module := Net(scheduled(make, interval)), [callback], accumulate_grad_batches=2)
    assert [norm.warmup_iters for norm in norms_of(module)] == [expected] * 3
    assert callback.state_dict() == {"warmup_iters": expected}


def test_warmup_auto_needs_a_scheduler_that_tells():
    steps = scheduled(lambda o: torch.optim.lr_scheduler.StepLR(o, 2))
    for module in (Net(), Net(steps)):
        with pytest.raises(ConfigurationError, match="warmup_iters"):
            fit(module, [PowerNormCallback(warmup_iters="auto")])


def test_training_that_ends_in_the_warmup_warns():
    with pytest.warns(UserWarning, match="warm-up"):
        fit(Net(), [PowerNormCallback(warmup_iters=100)])


def test_layers_left_in_eval_mode_are_pointed_out():
    module = Net()
    module.eval()
    with pytest.warns(UserWarning, match="in eval mode"):
        fit(module, [PowerNormCallback(warmup_iters=4)])


def test_sanity_check_does_not_warn_of_untrained_statistics(recwarn):
    fit(Net(), [PowerNormCallback(warmup_iters=4)], val=DataLoader(rows(1), batch_size=None))
    assert not [w for w in recwarn if "before any training step" in str(w.message)]


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_mixed_precision(kind):
    from lightning.pytorch.plugins.precision import MixedPrecision

    if kind == "bf16":
        options = {"precision": "bf16-mixed"}
    else:  # the first scales overflow: those steps are skipped and must not reach the statistics
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
        options = {"plugins": MixedPrecision("16-mixed", "cpu", scaler=scaler)}
    fit(reference := Net(), [PowerNormCallback(warmup_iters=4)])
    fit(module := Net(), [PowerNormCallback(warmup_iters=4)], **options)
    for norm, exact in zip(norms_of(module), norms_of(reference)):
        assert norm.running_phi.dtype == norm.ema_gz.dtype == torch.float32
        skipped = 0.0 if kind == "bf16" else 2.0
        torch.testing.assert_close(norm.running_phi, exact.running_phi, atol=0.1, rtol=0.1 + skipped)
        # in units of the unscaled loss
        torch.testing.assert_close(norm.ema_gz.norm(), exact.ema_gz.norm(), atol=0.1, rtol=0.1 + skipped)
    assert kind == "bf16" or scaler.get_scale() < 2.0**20


def test_padding_of_the_batch_stays_out_of_the_statistics():
    x, y = rows(1)[0]
    keep = torch.ones(4, 5, dtype=torch.int64)
    keep[:, 3:] = 0
    loud = torch.where(keep.bool().unsqueeze(-1), x, 1000.0)

    def phi(data, **options):
        batch = {"x": data, "y": y, "attention_mask": keep}
        fit(module := Net(), [PowerNormCallback(warmup_iters=4, group_num=None, **options)], [batch], max_epochs=1)
        return module.encoder.norm1.running_phi

    torch.testing.assert_close(phi(x), phi(loud))
    assert phi(loud, padding_key=None).max() > 1000


def test_late_layers_and_weight_averaging():
    class Late(Net):
        def configure_model(self):
            if not isinstance(self.norm, PowerNorm):
                self.norm = nn.LayerNorm(8)

        def __init__(self):
            super().__init__()
            self.norm, self.encoder = None, nn.Identity()

    fit(module := Late(), [PowerNormCallback(warmup_iters=4, group_num=2)])
    assert isinstance(module.norm, PowerNorm)
    fit(module := Net(), [PowerNormCallback(warmup_iters=4), EMAWeightAveraging(decay=0.9)])
    assert len(norms_of(module)) == 3
    with pytest.raises(ConfigurationError, match="before EMAWeightAveraging"):
        fit(Net(), [EMAWeightAveraging(decay=0.9), PowerNormCallback()])


def test_compiled_training_does_not_crash_and_agrees():
    model = nn.Sequential(nn.Linear(8, 8), PowerNorm(8, group_num=2, warmup_iters=1), nn.Linear(8, 3))
    again, x = copy.deepcopy(model), tokens(4, 6, 8, dtype=torch.float32)
    compiled = torch.compile(again, backend="aot_eager")
    for _ in range(3):
        model(x).square().mean().backward()
        compiled(x).square().mean().backward()
    for value, value_again in zip(model.state_dict().values(), again.state_dict().values()):
        torch.testing.assert_close(value, value_again)
    torch.testing.assert_close(compiled.eval()(x), model.eval()(x))


def test_bad_callback_arguments_are_named():
    example = PowerNormCallback.contract_example()
    for argument, values in example.bad.items():
        for value in values if isinstance(values, list) else [values]:
            module = Net()
            with pytest.raises(ConfigurationError, match=argument):
                fit(module, [PowerNormCallback(**{**example.kwargs, argument: value})])
            assert not norms_of(module)


# --- two processes --------------------------------------------------------------------------------------------------


@pytest.mark.ddp
def test_two_processes_end_where_one_does(tmp_path):
    torch.multiprocessing.spawn(powernorm_ranks.run, (str(tmp_path),), nprocs=2)
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for options, first, second in zip(powernorm_ranks.OPTIONS, *states):
        single = powernorm_ranks.train(powernorm_ranks.batches(), ddp=False, **options)
        for key, value in single.items():
            assert torch.equal(first[key], second[key])
            torch.testing.assert_close(first[key], value, msg=f"{options} {key}")

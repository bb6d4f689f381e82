"""SharpnessCallback on real Trainers (slug: sam)."""

import json

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from effdl.callbacks import SAMCallback, SharpnessCallback
from effdl.core.errors import ConfigurationError
from tests.support import quiet_fit


class Net(LightningModule):
    """A foreign module with BatchNorm, Dropout and a frozen layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(5, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Dropout(0.5), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)
        )
        self.model[4].requires_grad_(False)
        self.model[5].eval()

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", F.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1, momentum=0.9)


def loader(shuffle=False):
    g = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(22, 5, generator=g), torch.randint(3, (22,), generator=g))
    return DataLoader(data, batch_size=8, shuffle=shuffle)


def fit(module, *callbacks, train=None, val=True, epochs=2, **kwargs):
    torch.manual_seed(5)
    options = {"max_epochs": epochs, "log_every_n_steps": 1, "val": loader() if val else None, **kwargs}
    return quiet_fit(module, train or loader(True), *callbacks, **options)


def everything(module):
    return [v.clone() for v in module.state_dict().values()]


def test_the_run_is_not_disturbed():
    """Shuffling, dropout, BatchNorm: with the analysis the run ends in the same bits."""
    ends = []
    for callbacks in ([], [SharpnessCallback(trace_samples=2)]):
        module = Net()
        fit(module, *callbacks)
        assert [p.requires_grad for p in module.parameters()] == [True] * 4 + [False] * 2 + [True] * 2
        ends.append([*everything(module), torch.get_rng_state()])
    assert all(torch.equal(a, b) for a, b in zip(*ends))
    assert len(callbacks[0].rows) == 2


def test_everything_is_restored_when_the_loss_raises():
    calls = []

    def loss(module, batch):
        calls.append(module.training)
        if len(calls) == 6:  # in the middle of the Lanczos run
            raise RuntimeError("in the analysis")
        module.model[1].running_mean.add_(1)
        torch.rand(3)
        return F.cross_entropy(module(batch[0]), batch[1])

    class Catches(SharpnessCallback):
        def _measure(self, trainer, pl_module):
            flags, before = [m.training for m in pl_module.modules()], everything(pl_module)
            stream = torch.get_rng_state()
            with pytest.raises(RuntimeError, match="analysis"):
                super()._measure(trainer, pl_module)
            assert flags == [m.training for m in pl_module.modules()]
            assert all(torch.equal(a, b) for a, b in zip(before, everything(pl_module)))
            assert torch.equal(stream, torch.get_rng_state())
            assert not any(m._forward_hooks for m in pl_module.modules())
            calls.append("restored")

    fit(Net(), Catches(loss=loss, trace_samples=0), epochs=1)
    assert calls[-1] == "restored"
    assert not any(calls[:6])


def dense(module, parameters, x, y):
    names = [n for n, p in module.named_parameters() if any(p is q for q in parameters)]
    flat = torch.cat([p.detach().flatten() for p in parameters])

    def loss(vector):
        pieces = vector.split([p.numel() for p in parameters])
        state = {n: piece.view_as(p) for n, piece, p in zip(names, pieces, parameters)}
        return F.cross_entropy(torch.func.functional_call(module, state, (x,)), y)

    return torch.func.hessian(loss)(flat)


def test_numbers_are_those_of_the_dense_hessian_and_of_a_manual_count():
    module = Net()
    sharpness = SharpnessCallback(calibration_batches=3, targets=["model.0", "model.6"], trace_samples=300)
    run = fit(module, sharpness, epochs=1)
    row = sharpness.rows[-1]
    module.eval()
    x, y = loader().dataset.tensors
    free = [p for p in module.parameters() if p.requires_grad]
    H = dense(module, free, x, y)
    values = torch.linalg.eigvalsh(H)
    assert row["lambda_max"] == pytest.approx(values[-1].item(), rel=1e-3)
    assert row["lambda_min"] == pytest.approx(values[0].item(), abs=1e-3 * values[-1].item())
    assert row["trace"] == pytest.approx(H.trace().item(), rel=0.3)
    block = torch.linalg.eigvalsh(dense(module, list(module.model[6].parameters()), x, y))[-1].item()
    assert row["lambda_max/model.6"] == pytest.approx(block, rel=1e-3)
    assert row["weight_norm"] == pytest.approx(torch.cat([p.flatten() for p in free]).norm().item(), rel=1e-5)
    with torch.no_grad():
        before = module.model[:2](x)
        assert row["active_fraction/model.2"] == (before > 0).double().mean().item()
        assert row["active_fraction/model.5"] == (module.model[:5](x) > 0).double().mean().item()
        assert row["active_fraction/model.0"] == (module.model[0](x) > 0).double().mean().item()
        assert row["activation_norm/model.2"] == pytest.approx(F.gelu(before).norm(dim=1).mean().item(), rel=1e-5)
        assert row["probe_loss"] == pytest.approx(F.cross_entropy(module(x), y).item(), rel=1e-5)
    assert run.callback_metrics["sam/lambda_max"].item() == pytest.approx(row["lambda_max"], rel=1e-6)


def test_report_is_written_logged_and_resumed(tmp_path):
    save = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    first = SharpnessCallback(every="2ep", trace_samples=1)
    fit(Net(), first, save, epochs=3)
    assert [row["step"] for row in first.rows] == [6]
    again = SharpnessCallback(every="2ep", trace_samples=1)
    run = fit(Net(), again, epochs=4, ckpt_path=tmp_path / "last.ckpt", logger=CSVLogger(tmp_path))
    assert again.rows[0] == first.rows[0]
    assert [(row["step"], row["epoch"]) for row in again.rows] == [(6, 1), (12, 3)]
    written = json.loads((tmp_path / "lightning_logs/version_0/sharpness.json").read_text())
    assert written["rows"] == again.rows
    assert {"lambda_max", "trace", "lambda_max/model.0", "lambda_max/model.6"} <= set(again.rows[0])
    report = again.report()
    assert report["lambda_max"] == again.rows[-1]["lambda_max"]
    assert {"active_fraction", "activation_norm"} <= set(report["layers"]["model.2"])
    assert "sam/lambda_max" in run.callback_metrics


def test_default_blocks_are_first_middle_and_last_trainable():
    sharpness = SharpnessCallback(trace_samples=0)
    fit(Net(), sharpness, epochs=1)
    assert [k for k in sharpness.rows[0] if k.startswith("lambda_max/")] == ["lambda_max/model.0", "lambda_max/model.6"]


def test_without_validation_and_validation_alone():
    class NoData(Net):
        def val_dataloader(self):
            return []

    for module, kwargs in [(Net(), {}), (NoData(), {}), (NoData(), {"limit_val_batches": 0})]:
        sharpness = SharpnessCallback(trace_samples=0)
        fit(module, sharpness, val=False, **kwargs)
        assert [row["step"] for row in sharpness.rows] == [3, 6]
    alone = SharpnessCallback(trace_samples=0)
    Trainer(accelerator="cpu", callbacks=[alone], logger=False, enable_progress_bar=False).validate(Net(), loader())
    assert len(alone.rows) == 1


def test_a_loss_that_does_not_fit_is_told_before_the_first_step():
    module = Net()
    before = everything(module)
    for arguments, train, match in [
        ({"loss": lambda module, batch: module(batch[0])}, None, "loss"),
        ({}, DataLoader([(torch.randn(4, 5),)], batch_size=None), "labels"),
        ({"targets": "modle.0"}, None, "targets='modle.0'"),
    ]:
        with pytest.raises(ConfigurationError, match=match):
            fit(module, SharpnessCallback(**arguments), train=train, num_sanity_val_steps=0)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(module)))


def test_tokens_and_images_have_labels_of_one_dimension_less():
    from effdl.callbacks.sharpness import _cross_entropy

    tokens, pixels = torch.randn(2, 5, 7), torch.randn(2, 7, 4, 4)
    of_tokens, of_pixels = torch.randint(7, (2, 5)), torch.randint(7, (2, 4, 4))
    assert torch.equal(_cross_entropy(lambda x: x, (tokens, of_tokens)), F.cross_entropy(tokens.mT, of_tokens))
    assert torch.equal(_cross_entropy(lambda x: x, (pixels, of_pixels)), F.cross_entropy(pixels, of_pixels))


def test_beside_sam_and_in_mixed_precision():
    sharpness = SharpnessCallback(trace_samples=1)
    module = Net()
    fit(module, SAMCallback(0.1), sharpness, precision="bf16-mixed")
    assert len(sharpness.rows) == 2
    assert torch.isfinite(torch.tensor(sharpness.rows[-1]["lambda_max"]))


@pytest.mark.parametrize(
    "bad", [{"every": 0}, {"calibration_batches": 0}, {"targets": 3}, {"trace_samples": -1}, {"max_iterations": 0}]
)
def test_arguments(bad):
    with pytest.raises(ConfigurationError, match=next(iter(bad))):
        SharpnessCallback(**bad)

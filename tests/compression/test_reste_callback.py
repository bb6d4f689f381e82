"""ReSTECallback on a Trainer: binary in every batch, latent weights underneath, bits at the end."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from effdl.callbacks import ReSTECallback
from effdl.compression.reste import BinaryConv2d, binarize, o_schedule
from effdl.core.errors import ConfigurationError
from effdl.core.quantized import quantized_weights
from tests.compression.test_reste import network
from tests.support import check_quantized_artifact, quiet_fit


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.model = network()

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def data():
    g = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 1, 6, 6, generator=g), torch.randint(0, 3, (8,), generator=g)) for _ in range(4)]
    return DataLoader(batches, batch_size=None)


def fit(module, *callbacks, epochs=2, **kwargs):
    return quiet_fit(module, data(), *callbacks, val=data(), max_epochs=epochs, log_every_n_steps=1, **kwargs)


class Looks(Callback):
    """What binary layers take in and compute with, in training and validation; and the power of each epoch."""

    def __init__(self):
        self.weights, self.inputs, self.modes, self.power = [], [], set(), []

    def on_train_epoch_start(self, trainer, pl_module):
        self.power.append(float(pl_module.model[3].reste_power))

    def on_sanity_check_end(self, trainer, pl_module):
        conv = pl_module.model[3]
        original = conv._conv_forward

        def look(x, weight, bias):
            self.inputs.append(x.detach().unique().tolist())
            self.weights.append(weight.detach().unique().tolist())
            self.modes.add(conv.training)
            return original(x, weight, bias)

        conv._conv_forward = look

    def on_train_end(self, trainer, pl_module):
        del pl_module.model[3]._conv_forward


def test_must_03_a_fit_sees_signs_only_and_trains_latent_weights():
    module, looks = Module(), Looks()
    latent = []

    class Latent(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            latent.append(trainer.optimizers[0].param_groups[0]["params"][4].detach().clone())

    callback = ReSTECallback()
    fit(module, callback, looks, Latent())
    assert looks.modes == {True, False}
    assert all(values == [-1.0, 1.0] for values in looks.inputs)
    assert all(len(values) == 2 and values[0] == -values[1] for values in looks.weights)
    assert latent[0].shape == (8, 8, 3, 3)
    assert latent[0].unique().numel() > 500
    assert not torch.equal(latent[0], latent[-1])


def test_must_06_the_schedule_survives_a_resume(tmp_path):
    straight, looks = ReSTECallback(), Looks()
    module = Module()
    fit(module, straight, looks, epochs=6)
    assert looks.power == pytest.approx([o_schedule(e, 6) for e in range(6)])
    save = ModelCheckpoint(tmp_path, save_last=True)
    fit(Module(), ReSTECallback(total_epochs=6), save, epochs=3)
    resumed, again = Looks(), ReSTECallback(total_epochs=6)
    fit(Module(), again, resumed, epochs=6, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.power == pytest.approx(looks.power[3:])
    assert again.o == straight.o


def test_must_07_the_finished_model_is_bits(tmp_path):
    module, callback = Module(), ReSTECallback(scale="channel")
    fit(module, callback)
    records = quantized_weights(module.model)
    assert set(records) == {"3.weight", "6.weight"}
    assert all(record.bits == 1 for record in records.values())
    assert isinstance(module.model[3], BinaryConv2d)
    x = next(iter(data()))[0]
    check_quantized_artifact(module.model, lambda: binarize(network(), scale="channel"), (x,), tmp_path)
    report = callback.report()
    assert report["bits_per_weight"] < 3.5
    assert 0 <= report["after"]["metrics"]["val/accuracy"] <= 1


def test_a_checkpoint_is_the_binary_network(tmp_path):
    module = Module()
    fit(module, ReSTECallback(), ModelCheckpoint(tmp_path, save_last=True))
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    bare = Module()
    bare.load_state_dict(state, strict=True)
    assert state["model.3.weight"].unique().numel() == 2
    binarize(bare.model)
    x = next(iter(data()))[0]
    torch.testing.assert_close(bare.eval()(x), module.eval()(x), rtol=0, atol=1e-5)
    trainer = Trainer(logger=False, accelerator="cpu", callbacks=[ReSTECallback()], enable_progress_bar=False)
    fresh = Module()
    trainer.validate(fresh, data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False)
    torch.testing.assert_close(fresh.eval()(x), module.eval()(x), rtol=0, atol=1e-5)


def test_indicators_are_logged():
    trainer = fit(Module(), ReSTECallback())
    logged = trainer.callback_metrics
    assert float(logged["reste/o"]) == pytest.approx(o_schedule(1, 2))
    assert float(logged["reste/estimating_error"]) > 0
    assert float(logged["reste/gradient_stability"]) > 0
    assert float(logged["reste/dead_fraction"]) == 0.0


def test_must_09_a_relu_before_a_binary_layer_is_told():
    class Dead(Module):
        def __init__(self):
            super().__init__()
            self.model = network(relu_first=True)

    with pytest.warns(UserWarning, match=r"3 takes the output of the ReLU 2"):
        fit(Dead(), ReSTECallback(), epochs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*takes the output of the ReLU.*")
        fit(Module(), ReSTECallback(), epochs=1)
        fit(Dead(), ReSTECallback(activations=False), epochs=1)


def test_a_run_without_epochs_needs_their_number():
    with pytest.raises(ConfigurationError, match="total_epochs"):
        fit(Module(), ReSTECallback(), epochs=-1, max_steps=3)
    fit(Module(), ReSTECallback(schedule="constant"), epochs=-1, max_steps=3)
    fit(Module(), ReSTECallback(total_epochs=5), epochs=-1, max_steps=3)


def test_targets_and_what_cannot_be_binary():
    module = Module()
    fit(module, ReSTECallback(targets="model.6"), epochs=1)
    assert list(quantized_weights(module.model)) == ["6.weight"]
    with pytest.raises(ConfigurationError, match="matches no layer"):
        fit(Module(), ReSTECallback(targets="model.4"), epochs=1)


def test_fitted_again_it_goes_on_from_the_signs():
    module, callback = Module(), ReSTECallback()
    fit(module, callback, epochs=1)
    with pytest.warns(UserWarning, match="held quantised weights"):
        fit(module, callback, epochs=1)
    assert set(quantized_weights(module.model)) == {"3.weight", "6.weight"}

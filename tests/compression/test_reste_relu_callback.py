"""reste: the moved ReLU on a Trainer: artifact, resume, errors, synchronised BatchNorms, averages."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

from effdl.callbacks import ReSTECallback
from effdl.compression._reste_relu import (
    ReLUBatchNorm2d,
    ReLUSyncBatchNorm,
    keep_relu_first,
    relu_first_norms,
    reorder_relus,
)
from effdl.compression.reste import binarize
from effdl.core.errors import ConfigurationError
from effdl.core.quantized import quantized_weights
from tests.compression.test_reste import draw, network
from tests.compression.test_reste_callback import Module, data, fit
from tests.compression.test_reste_relu import Functional
from tests.support import check_quantized_artifact


class Dead(Module):
    def __init__(self):
        super().__init__()
        self.model = network(relu_first=True)


def rebuilt():
    return binarize(network(relu_first=True), reorder_relu=True)


def test_a_fit_moves_it_and_the_artifact_keeps_it(tmp_path):
    module, callback = Dead(), ReSTECallback(reorder_relu=True)
    names, low = list(module.state_dict()), []

    class Look(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            low.append(pl_module.model[:3](batch[0]).min())

    fit(module, callback, Look(), ModelCheckpoint(tmp_path, save_last=True))
    assert max(low) < 0
    assert set(quantized_weights(module.model)) == {"3.weight", "6.weight"}
    assert list(relu_first_norms(module.model)) == ["1"]
    x = next(iter(data()))[0]
    check_quantized_artifact(module.model, rebuilt, (x,), tmp_path)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert list(state) == names
    bare = Dead()
    bare.load_state_dict(state, strict=True)
    binarize(bare.model, reorder_relu=True)
    torch.testing.assert_close(bare.eval()(x), module.eval()(x), rtol=0, atol=1e-5)
    fresh = Dead()
    trainer = fit(Dead(), ReSTECallback(reorder_relu=True), epochs=1)
    trainer.validate(fresh, data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False)
    torch.testing.assert_close(fresh.eval()(x), module.eval()(x), rtol=0, atol=1e-5)
    assert callback.report()["bits_per_weight"] < 4
    fit(module, ReSTECallback(reorder_relu=True), epochs=1)  # again: it is where it belongs
    assert list(relu_first_norms(module.model)) == ["1"]


def test_resume_is_exact(tmp_path):
    whole, first, second = Dead(), Dead(), Dead()
    callback = lambda: ReSTECallback(total_epochs=4, reorder_relu=True)  # noqa: E731
    fit(whole, callback(), epochs=4)
    fit(first, callback(), ModelCheckpoint(tmp_path, save_last=True), epochs=2)
    fit(second, callback(), epochs=4, ckpt_path=tmp_path / "last.ckpt")
    for (name, a), b in zip(whole.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_after_an_error_all_is_as_it_was():
    class Stop(Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("stop")

    module = Dead()
    kinds = [type(m) for m in module.modules()]
    with pytest.raises(RuntimeError, match="stop"):
        fit(module, ReSTECallback(reorder_relu=True), Stop())
    assert [type(m) for m in module.modules()] == kinds

    class Other(Module):
        def __init__(self):
            super().__init__()
            self.model = nn.Sequential(Functional(), nn.Flatten(), nn.Linear(144, 3))

    with pytest.raises(ConfigurationError, match="no known layout"):
        fit(Other(), ReSTECallback(reorder_relu=True), epochs=1)


def test_synchronised_batch_norms_keep_it():
    """What ``sync_batchnorm=True`` does to the layers, at the start and at the end."""
    from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm

    model, x = network(relu_first=True).eval(), draw(4, 1, 6, 6)
    norms = reorder_relus(model, ["3"]).norms
    want, sync = model(x), TorchSyncBatchNorm()
    sync.apply(model)
    assert not relu_first_norms(model)
    keep_relu_first(model, norms)
    assert type(model[1]) is ReLUSyncBatchNorm
    assert torch.equal(model(x), want)
    sync.revert(model)
    keep_relu_first(model, norms)
    assert type(model.eval()[1]) is ReLUBatchNorm2d  # a reverted one is in training mode
    assert torch.equal(model(x), want)


def test_beside_an_average():
    module = Dead()
    fit(module, ReSTECallback(reorder_relu=True), EMAWeightAveraging(decay=0.5))
    assert list(relu_first_norms(module.model)) == ["1"]
    with pytest.raises(ConfigurationError, match="List ReSTECallback before"):  # its copy lacks buffers by then
        fit(Module(), EMAWeightAveraging(decay=0.5), ReSTECallback())

"""maestro: resuming, sliced checkpoints, averages, the finished module."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from effdl.callbacks import MaestroCallback
from effdl.compression.maestro import SplitAttention
from effdl.core.errors import ConfigurationError
from effdl.core.export import save_model
from effdl.core.factorize import factorize, load_factorized
from tests.compression.maestro_parts import QUIET, Net, data, fit, maestro


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

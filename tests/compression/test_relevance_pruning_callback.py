"""relevance-pruning: the callback."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from effdl.callbacks import RelevancePruningCallback
from effdl.compression.relevance_pruning import prune_filters
from effdl.core.errors import ConfigurationError
from effdl.core.structure import compact
from tests.compression.relevance_pruning_nets import Residual, X, Y
from tests.support import quiet_fit


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = Residual()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/accuracy", (self.model(batch[0]).argmax(1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def fit(module, callbacks, epochs=3, **kwargs):
    data = DataLoader([(X[i : i + 3], Y[i : i + 3]) for i in (0, 3, 6)], batch_size=None)
    return quiet_fit(module, data, *callbacks, val=data, max_epochs=epochs, **kwargs)


def callback(**kwargs):
    return RelevancePruningCallback(
        **{"sparsity": 0.5, "step_sparsity": 0.12, "start": 1, "every": 2, "samples_per_class": 3, **kwargs}
    )


def test_the_callback_prunes_as_the_function_does_and_compacts(tmp_path):
    module, pruning = Classifier(), callback(every=None, start=1.0)
    trained = Classifier()
    fit(trained, [])
    expected = prune_filters(trained.model, X, Y, 0.5, step_sparsity=0.12)
    fit(module, [pruning])
    assert [pytest.approx(row) for row in expected.history] == pruning.history
    small, _ = compact(trained.model, X[:2], expected.dead)
    assert torch.allclose(module.model.eval()(X), small.eval()(X), atol=1e-5)
    report = pruning.report()
    assert report["filters_removed"] == 8
    assert report["before"]["parameters"] > sum(p.numel() for p in module.model.parameters())
    assert json.loads(json.dumps(report["channels"])) == pruning.counts
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.validate(module, DataLoader([(X, Y)], batch_size=None), verbose=False)


def test_masks_hold_while_the_rest_trains_and_a_resumed_run_goes_on(tmp_path):
    save = ModelCheckpoint(tmp_path, filename="{step}", save_on_train_epoch_end=True, save_top_k=-1)
    whole, pruning = Classifier(), callback()
    fit(whole, [pruning, save])
    assert [round(row["sparsity"] * 17) for row in pruning.history] == [0, 2, 4, 6, 8]
    state = torch.load(tmp_path / "step=6.ckpt", weights_only=True)["state_dict"]
    assert state["model.a.weight"].shape == (6, 1, 3, 3)
    Classifier().load_state_dict(state, strict=True)
    resumed, again = Classifier(), callback()
    fit(resumed, [again], ckpt_path=tmp_path / "step=3.ckpt")
    assert again.history == pruning.history
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    # a checkpoint of full size goes back into the module that was compacted, and is compacted after a validation
    trainer = Trainer(callbacks=[pruning], accelerator="cpu", logger=False, enable_progress_bar=False)
    data = DataLoader([(X, Y)], batch_size=None)
    how = {"ckpt_path": tmp_path / "step=6.ckpt", "weights_only": True}
    trainer.test(whole, data, verbose=False, **how)
    assert whole.model.a.weight.shape == (6, 1, 3, 3)
    want = whole.model.eval()(X)
    for module, own in ((whole, pruning), (Classifier(), callback())):
        Trainer(callbacks=[own], accelerator="cpu", logger=False).validate(module, data, verbose=False, **how)
        assert sum(p.numel() for p in module.model.parameters()) < 900
        assert torch.allclose(module.model.eval()(X), want, atol=1e-5)
    with pytest.raises(ConfigurationError, match="other arguments"):
        fit(Classifier(), [callback(sparsity=0.4)], ckpt_path=tmp_path / "step=3.ckpt")


def test_without_compaction_zeros_stay_and_a_given_reference_is_used():
    module, pruning = Classifier(), callback(compact=False, coupled=False, reference=[(X[:6], Y[:6])])
    fit(module, [pruning])
    assert module.model.a.weight.shape == (6, 1, 3, 3)
    for name, dead in pruning._pruner.dead.items():
        assert not module.model.get_submodule(name).weight[dead].any()
    assert not module.model.na.bias[pruning._pruner.dead["a"]].any()
    assert pruning.report()["after"]["name"] == "masked"


def test_the_reference_of_data_sorted_by_class_has_all_classes():
    from types import SimpleNamespace

    from effdl.core.calibrate import calibration_batches

    labels = torch.arange(60) // 20  # twenty of each class on end
    rows = [(torch.full((1,), float(i)), label) for i, label in enumerate(labels)]
    loader = SimpleNamespace(train_dataloader=DataLoader(rows, batch_size=6, shuffle=True))
    module = SimpleNamespace(device="cpu")
    plain = calibration_batches(loader, module, 3)
    assert torch.cat([y for _, y in plain]).unique().tolist() == [0]
    drawn, again = (calibration_batches(loader, module, 3, seed=1) for _ in range(2))
    assert torch.cat([y for _, y in drawn]).unique().tolist() == [0, 1, 2]
    assert all(torch.equal(a[0], b[0]) for a, b in zip(drawn, again))

"""gradual-pruning: kinds of layers, per-layer targets, averages, copies, refusals."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

from effdl.callbacks import PruningCallback
from effdl.compression.gradual_pruning import SparsitySchedule, layer_shares, magnitude_masks, storage_bits, to_sparse
from effdl.core.errors import ConfigurationError
from effdl.core.masks import global_top_k_masks, keep_count, pack, unpack
from effdl.core.select import select_weights
from tests.compression.gradual_pruning_parts import Net, data, fit, zeros
from tests.compression.tied_sequence import Sequence


def test_retain_lets_a_weight_return_and_saves_plain_zeros(tmp_path):
    masks = []

    class Watch(PruningCallback):
        def _update(self, trainer):
            super()._update(trainer)
            masks.append(torch.cat([m.flatten() for m in self.store.masks.values()]).bool().clone())

    module = Net(lambda p: torch.optim.SGD(p, 0.5))
    save = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    fit(module, [Watch(0.8, 0.7, start=0, stop=22, every=1, retain=True), save])
    assert any((later & ~earlier).any() for earlier, later in zip(masks, masks[1:]))
    assert type(module.model[0]) is nn.Linear
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert (state["model.0.weight"] == 0).float().mean() > 0.75
    Net().load_state_dict(state, strict=True)


def test_weight_averaging_does_not_unprune(tmp_path):
    for order in (0, 1):
        module, save = Net(), ModelCheckpoint(tmp_path / str(order), save_last=True, save_on_train_epoch_end=True)
        seen = []

        class Watch(Net):
            def on_validation_epoch_start(self, seen=seen):
                pass

            def validation_step(self, batch, batch_idx, seen=seen):
                seen.append(sum(zeros(self).values()))

        module = Watch()
        callbacks = [PruningCallback(0.8, start=0, stop=12, every=2), EMAWeightAveraging(decay=0.9)]
        fit(module, [*(callbacks if order else callbacks[::-1]), save], val=data(1), num_sanity_val_steps=0)
        want = 12 * 32 + 32 * 3 - keep_count(12 * 32, 0.8) - keep_count(32 * 3, 0.8)
        assert seen[-1] == want
        assert sum(zeros(module).values()) == want
        state = torch.load(tmp_path / str(order) / "last.ckpt", weights_only=True)["state_dict"]
        assert sum(int((v == 0).sum()) for k, v in state.items() if k.endswith("weight")) == want


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("granularity", ["unstructured", "channel", "2:4", "4x4"])
def test_recurrent_attention_and_tied_weights(granularity, retain):
    module = Net(network=Sequence())
    sparsity = None if granularity == "2:4" else 0.75
    pruning = PruningCallback(sparsity, start=0, stop=16, every=4, granularity=granularity, retain=retain)
    fit(module, [pruning], epochs=2)
    layers = pruning.report()["layers"]
    assert len(layers) == 7  # tied weight once; in_proj, out_proj; four recurrent matrices
    expected = 0.5 if granularity == "2:4" else 0.75
    for name, row in layers.items():
        assert row["sparsity"] == pytest.approx(expected, abs=0.02), name
    weight = module.model.lstm.weight_hh_l0
    if granularity == "2:4":
        assert (weight.view(64, 4, 4) != 0).sum(-1).eq(2).all()
    if granularity == "channel":
        alive = weight.ne(0).any(1)
        assert weight[alive].ne(0).all()
    if granularity == "4x4":
        assert (weight.view(16, 4, 4, 4).ne(0).float().mean((1, 3)) % 1 == 0).all()


def test_global_scope_uses_one_threshold_and_keeps_one_weight_everywhere():
    module = Net()
    with torch.no_grad():
        module.model[2].weight.mul_(1e-3)
    fit(module, [PruningCallback(0.9, start=0, stop=0, scope="global")], epochs=1, max_steps=1)
    alive = [int((layer.weight != 0).sum()) for layer in (module.model[0], module.model[2])]
    assert sum(alive) == keep_count(12 * 32 + 32 * 3, 0.9)
    assert alive[1] == 1
    masks = global_top_k_masks([torch.tensor([5.0, 4.0]), torch.tensor([1.0, 2.0])], 2)
    assert [m.tolist() for m in masks] == [[True, False], [False, True]]


def test_layer_sparsity_overrides_and_exclude():
    module = Net()
    pruning = PruningCallback(0.9, start=0, stop=8, every=2, layer_sparsity={"model.2.weight": 0.5})
    fit(module, [pruning], epochs=2)
    shares = {n: row["sparsity"] for n, row in pruning.report()["layers"].items()}
    assert shares["model.0.weight"] == pytest.approx(0.9, abs=0.01)
    assert shares["model.2.weight"] == pytest.approx(0.5, abs=0.01)
    fit(module := Net(), [PruningCallback(0.9, start=0, stop=8, every=2, exclude="model.2")])
    assert zeros(module)["model.2.weight"] == 0


def test_layer_sparsity_that_would_be_ignored_is_refused():
    own = {"layer_sparsity": {"*": 0.5}}
    for kwargs, name in (({"scope": "global"}, "scope"), ({"sparsity": None, "granularity": "2:4"}, "layer_sparsity")):
        with pytest.raises(ConfigurationError, match=f"{name}="):
            PruningCallback(**{"sparsity": 0.8, **kwargs, **own})


def test_shares_of_layers_that_end_elsewhere():
    weights = [SimpleNamespace(name=name) for name in ("fc.weight", "conv.weight")]
    ramp = SparsitySchedule(0.2, 0.8, begin=0, updates=2, frequency=10)
    assert layer_shares(weights, ramp, 0, {"fc.*": 0.4}) == {"fc.weight": pytest.approx(0.1), "conv.weight": 0.2}
    assert layer_shares(weights, ramp, 20, {"fc.*": 0.4}) == {"fc.weight": 0.4, "conv.weight": 0.8}
    dense = SparsitySchedule(0.0, 0.0, begin=0, updates=2, frequency=10)  # but for the layer that is named
    assert layer_shares(weights, dense, 10, {"fc.*": 0.4}) == {"fc.weight": pytest.approx(0.35), "conv.weight": 0.0}


def test_layers_built_in_configure_model():
    class Late(Net):
        def __init__(self):
            super().__init__()
            self.model = None

        def configure_model(self):
            if self.model is None:
                self.model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 3))

    fit(module := Late(), [PruningCallback(0.8, start=0, stop=8, every=2)])
    assert zeros(module)["model.0.weight"] == 12 * 32 - keep_count(12 * 32, 0.8)

    with pytest.raises(ConfigurationError, match="no.such"):
        fit(Late(), [PruningCallback(0.8, targets="no.such")])


def test_stopping_early_and_a_spent_learning_rate_warn():
    with pytest.warns(UserWarning, match="Training stopped at step 24 before stop"):
        fit(Net(), [PruningCallback(0.8, start=0, stop=100, every=10)])

    def spent(parameters):
        optimizer = torch.optim.SGD(parameters, 0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 if t < 4 else 1e-4)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    with pytest.warns(UserWarning, match="cannot heal"):
        fit(Net(spent), [PruningCallback(0.8, start=0, stop=20, every=2)])


def test_nan_weights_are_named():
    module = Net()
    with torch.no_grad():
        module.model[0].weight[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"model\.0\.weight"):
        fit(module, [PruningCallback(0.8, start=0, stop=4)])


def test_unknown_length_needs_steps():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield from data(1)

    trainer = Trainer(max_epochs=1, limit_train_batches=None, callbacks=[PruningCallback(0.8, stop=0.5)], logger=False,
                      accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False)  # fmt: skip
    with pytest.raises(ConfigurationError, match="stop=0.5 needs a run of known length"):
        trainer.fit(Net(), torch.utils.data.DataLoader(Endless(), batch_size=None))


def test_functional_form_packing_and_accounting():
    weights = select_weights(Net())
    masks = magnitude_masks(weights, 0.5)
    assert {n: int(m.sum()) for n, m in masks.items()} == {"model.0.weight": 192, "model.2.weight": 48}
    for shape in [(1,), (7,), (3, 5), (2, 2, 3)]:
        mask = torch.rand(shape) > 0.5
        assert torch.equal(unpack(pack(mask)), mask)
    assert storage_bits(1000, 100) == {"dense": 32000, "bitmask": 1000 + 3200, "csr5": 3700}
    pruned = weights[0].data * masks["model.0.weight"]
    assert torch.equal(to_sparse(pruned).to_dense(), pruned)


def test_module_deepcopied_while_training_is_independent():
    copies = []

    class Copy(PruningCallback):
        def on_train_end(self, trainer, pl_module):
            copies.append(copy.deepcopy(pl_module.model))

    fit(module := Net(), [Copy(0.8, start=0, stop=8, every=2, retain=True)])
    x = next(iter(data(1)))[0]
    assert torch.allclose(copies[0](x), module.model(x))

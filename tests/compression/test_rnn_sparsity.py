"""rnn-sparsity: pruning, checks 1-3, 5 and what users of the callback and of ``sweep`` rely on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from effdl.callbacks import RNNPruningCallback
from effdl.callbacks.rnn_sparsity import epochs_to_regain, sweep
from effdl.compression.rnn_sparsity import percentile, percentile_masks, prune_recurrent_, recurrent_weights
from effdl.compression.rnn_sparsity_models import RecurrentClassifier
from effdl.core.errors import ConfigurationError
from effdl.data.reber import ReberData
from tests.support import QUIET, golden, quiet_fit

TRAINER = {**QUIET, "enable_checkpointing": False}
GOLDEN = golden("rnn-sparsity")
MODES = ("RNN_TANH", "RNN_RELU", "GRU", "LSTM")


def layer(mode, *sizes, **kwargs):
    if mode.startswith("RNN"):
        return nn.RNN(*sizes, nonlinearity=mode[4:].lower(), **kwargs)
    return getattr(nn, mode)(*sizes, **kwargs)


class Stack(nn.Module):
    """One-layer stock networks of different widths, [T, B, C] -> last step [B, H]."""

    def __init__(self, case):
        super().__init__()
        widths = [case["input_size"], *case["hidden_layers"]]
        self.layers = nn.ModuleList(layer(case["mode"], a, b) for a, b in zip(widths, widths[1:]))
        for k, stock in enumerate(self.layers):
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(stock, f"{name}_l0").data.copy_(torch.tensor(case["weights"][f"recurrent_layers.{k}.{name}"]))

    def forward(self, x):
        for stock in self.layers:
            x = stock(x)[0]
        return x[-1]


@pytest.mark.parametrize("case", GOLDEN["prune"], ids=lambda c: c["mode"])
def test_must_01_golden_pruning(case):
    x, errors = torch.tensor(case["x"]), []
    errors.append((Stack(case)(x) - torch.tensor(case["dense_output"])).abs().max().item())
    assert len(case["prune"]) == 6
    for pruned in case["prune"]:
        network = Stack(case)
        group = "both" if pruned["i2h"] and pruned["h2h"] else "i2h" if pruned["i2h"] else "h2h"
        prune_recurrent_(network, pruned["percent"] / 100, weights=group)
        for kept, name in (("kept_i2h", "weight_ih_l0"), ("kept_h2h", "weight_hh_l0")):
            assert [int(getattr(stock, name).count_nonzero()) for stock in network.layers] == pruned[kept]
        errors.append((network(x) - torch.tensor(pruned["output"])).abs().max().item())
    print(f"golden, {case['mode']}: {max(errors):.1e}")
    assert max(errors) <= 1e-5


def test_must_02_example_of_the_text():
    case = GOLDEN["percentile_example"]
    weight = torch.tensor(case["weight"])
    threshold = percentile(weight.abs(), case["percent"] / 100)
    assert threshold == pytest.approx(0.0388, abs=1e-7)
    mask = weight.abs() >= threshold
    assert mask.int().tolist() == case["mask"]
    assert weight[~mask].tolist() == pytest.approx([-0.014])


def test_percentile_is_numpys_in_float64():
    values = np.random.default_rng(0).normal(size=1001).astype(np.float32)
    for p in range(101):
        assert percentile(torch.from_numpy(values), p / 100) == np.percentile(values.astype(np.float64), p)


def reference(rnn, x):
    """The cell equations, step by step, over a batch-first stock layer stack."""
    mode, sigmoid = rnn.mode, torch.sigmoid
    for k in range(rnn.num_layers):
        w_ih, w_hh, b_ih, b_hh = (getattr(rnn, f"{n}_l{k}") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        h = c = x.new_zeros(len(x), rnn.hidden_size)
        outputs = []
        for step in x.unbind(1):
            ig, hg = step @ w_ih.T + b_ih, h @ w_hh.T + b_hh
            if mode == "GRU":
                (i_r, i_z, i_n), (h_r, h_z, h_n) = ig.chunk(3, 1), hg.chunk(3, 1)
                n = torch.tanh(i_n + sigmoid(i_r + h_r) * h_n)
                h = n + sigmoid(i_z + h_z) * (h - n)
            elif mode == "LSTM":
                i, f, g, o = (ig + hg).chunk(4, 1)
                c = sigmoid(f) * c + sigmoid(i) * torch.tanh(g)
                h = sigmoid(o) * torch.tanh(c)
            else:
                h = (torch.tanh if mode == "RNN_TANH" else torch.relu)(ig + hg)
            outputs.append(h)
        x = torch.stack(outputs, 1)
    return x


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("group", ["both", "i2h", "h2h"])
def test_must_03_pruned_stock_layer_equals_the_cell_loop(mode, group):
    torch.manual_seed(0)
    network = nn.Sequential(layer(mode, 5, 6, num_layers=2, batch_first=True))
    before = {name: p.clone() for name, p in network.named_parameters()}
    flat = [p.data_ptr() for p in network.parameters()]
    prune_recurrent_(network, 0.6, weights=group)
    x = torch.randn(3, 9, 5)
    assert torch.allclose(network(x)[0], reference(network[0], x), atol=1e-5)
    assert flat == [p.data_ptr() for p in network.parameters()]  # cuDNN's buffer stays whole
    for name, parameter in network.named_parameters():
        touched = name.split(".")[1].startswith({"both": ("weight_",), "i2h": "weight_ih", "h2h": "weight_hh"}[group])
        assert torch.equal(parameter, before[name]) != touched, name
        assert torch.equal(parameter[parameter != 0], before[name][parameter != 0])


class Mixed(nn.Module):
    """Bidirectional, projected, cells, and what must stay dense."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(9, 5)
        self.both_ways = nn.GRU(5, 4, bidirectional=True)
        self.projected = nn.LSTM(8, 6, proj_size=3)
        self.cell = nn.GRUCell(3, 4)
        self.head = nn.Linear(4, 2)


def test_bidirectional_projected_and_cells():
    names = {w.name for w in recurrent_weights(Mixed())}
    assert names == {
        *(f"both_ways.weight_{kind}_l0{way}" for kind in ("ih", "hh") for way in ("", "_reverse")),
        *(f"projected.weight_{kind}_l0" for kind in ("ih", "hh", "hr")),
        "cell.weight_ih", "cell.weight_hh",
    }  # fmt: skip
    h2h = {w.name for w in recurrent_weights(Mixed(), "h2h")}
    assert h2h == {name for name in names if "_hh" in name or "_hr" in name}
    assert {w.name for w in recurrent_weights(Mixed(), exclude="GRU")} == {n for n in names if "both_ways" not in n}
    with pytest.raises(ConfigurationError, match="RNNBase"):
        recurrent_weights(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("scope", ["layer", "gate"])
def test_scopes_have_one_threshold_each(scope):
    network = Mixed()
    with torch.no_grad():
        network.both_ways.weight_ih_l0[:4] *= 1e-3  # one gate far smaller than the rest
    weights = recurrent_weights(network)
    masks = percentile_masks(weights, 0.5, scope=scope)
    kept = {name: mask.float().mean().item() for name, mask in masks.items()}
    small = masks["both_ways.weight_ih_l0"][:4].float().mean().item()
    if scope == "layer":
        assert small == 0
        assert kept["both_ways.weight_ih_l0"] < 0.5 < kept["both_ways.weight_hh_l0"]
    else:
        both = torch.cat([masks[f"both_ways.weight_{kind}_l0"][:4].flatten() for kind in ("ih", "hh")])
        assert both.float().mean() == 0.5
        assert kept["projected.weight_hr_l0"] == 0.5


def test_global_scope_is_one_threshold_over_all_layers():
    weights = recurrent_weights(Mixed())
    masks = percentile_masks(weights, 0.5)
    gone = max(float(w.data.abs()[~masks[w.name]].max()) for w in weights)
    assert gone < min(float(w.data.abs()[masks[w.name]].min()) for w in weights)
    assert sum(int(mask.sum()) for mask in masks.values()) == -(-sum(mask.numel() for mask in masks.values()) // 2)


def test_percentile_100_keeps_the_largest_weight_unless_told():
    network = Mixed()
    masks = prune_recurrent_(network, 1.0, weights="h2h")
    assert sum(int(mask.sum()) for mask in masks.values()) == 1
    assert network.both_ways.weight_ih_l0.ne(0).all()
    prune_recurrent_(network, 1.0, weights="h2h", keep_largest=False)
    assert not any(network.get_parameter(name).any() for name in masks)
    tied = nn.GRU(1, 2)
    tied.weight_ih_l0.data.fill_(0.5)
    assert prune_recurrent_(tied, 0.9, weights="i2h")["gru.weight_ih_l0"].all()  # ties at the threshold stay


class Net(LightningModule):
    """A foreign module around a GRU."""

    def __init__(self, optimizer=lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1)):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head, self.make = nn.GRU(3, 6, num_layers=2, batch_first=True), nn.Linear(6, 2), optimizer

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.head(self.rnn(x)[0][:, -1]), y)

    def configure_optimizers(self):
        return self.make(self.parameters())


def batches(count):
    g = torch.Generator().manual_seed(1)
    rows = [(torch.randn(4, 5, 3, generator=g), torch.randint(0, 2, (4,), generator=g)) for _ in range(count)]
    return DataLoader(rows, batch_size=None)


def zeros(module, name="rnn.weight"):
    return sum(int((p == 0).sum()) for n, p in module.named_parameters() if n.startswith(name))


def fit(module, callbacks, steps=8, **kwargs):
    return quiet_fit(module, batches(steps), *callbacks, **{"max_epochs": 1, **kwargs})


def test_must_05_masked_weights_have_no_gradient_and_stay_zero_for_50_adamw_steps():
    class Watch(RNNPruningCallback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            super().on_before_optimizer_step(trainer, pl_module, optimizer)
            if self.step >= 5:
                for name, mask in self.store.masks.items():
                    assert not pl_module.get_parameter(name).grad[mask == 0].any()

        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            counts.append(zeros(pl_module))

    counts = []
    module = Net()
    fit(module, [Watch(0.7, start=5)], steps=55, gradient_clip_val=1.0)
    total = sum(p.numel() for n, p in module.rnn.named_parameters() if n.startswith("weight"))
    assert counts[:5] == [0] * 5
    assert set(counts[5:]) == {int(np.ceil(0.7 * (total - 1)))}
    assert zeros(module, "rnn.bias") == zeros(module, "head") == 0


def test_start_and_what_comes_of_it(tmp_path):
    pruned = Net()
    fit(pruned, [callback := RNNPruningCallback(0.5, start=1.0)])  # the finished model, not trained again
    plain = Net()
    fit(plain, [])
    prune_recurrent_(plain, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), plain.parameters()))
    report = callback.report()
    assert report["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert report["before"]["parameters"] == sum(p.numel() for p in plain.parameters())
    with pytest.warns(UserWarning, match="before start"):
        fit(Net(), [RNNPruningCallback(0.5, start=100)])
    # in front of the first batch from then on: the epoch's validation before it still sees the dense network
    save = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    fit(Net(), [RNNPruningCallback(0.5, start="1ep"), save])
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert state["rnn.weight_ih_l0"].ne(0).all()
    resumed, whole = Net(), Net()
    fit(resumed, [RNNPruningCallback(0.5, start="1ep")], max_epochs=2, ckpt_path=tmp_path / "last.ckpt")
    fit(whole, [RNNPruningCallback(0.5, start="1ep")], max_epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters()))
    assert zeros(whole) > 0


@pytest.fixture(scope="module")
def strings():
    return ReberData(train=256, val=64, test=64, batch_size=32)


def test_sweep_runs_the_protocol_and_tells_when_accuracy_is_regained(strings):
    torch.manual_seed(0)
    module = RecurrentClassifier("GRU", hidden_size=8, num_layers=1, embedding_size=8)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    rows = sweep(module, strings, sparsities=(0.5, 1.0), weights=("both", "h2h"), epochs=1, trainer=TRAINER)
    assert [(r["sparsity"], r["weights"], r["epoch"]) for r in rows] == [
        (0.0, "none", 0), *((s, w, e) for s in (0.5, 1.0) for w in ("both", "h2h") for e in (0, 1)),
    ]  # fmt: skip
    assert all(0 <= row["accuracy"] <= 1 for row in rows)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items() if name in before)
    told = [{"weights": w, "sparsity": 0.8, "epoch": e, "accuracy": a} for w, e, a in
            [("none", 0, 0.9), ("both", 0, 0.5), ("both", 1, 0.89), ("both", 2, 0.95), ("i2h", 0, 0.5)]]  # fmt: skip
    assert epochs_to_regain(told) == {(0.8, "both"): 2, (0.8, "i2h"): None}
    assert epochs_to_regain(told, tolerance=0.02)[0.8, "both"] == 1
    with pytest.raises(ConfigurationError, match="metric"):
        sweep(module, strings, (0.5,), ("both",), epochs=0, metric="val/f1", trainer=TRAINER)

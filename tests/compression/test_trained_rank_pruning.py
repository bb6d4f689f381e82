"""trained-rank-pruning: golden numbers, identities, and what happens in a step (checks 1-5, 7, 8)."""

from __future__ import annotations

import itertools

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from torch import nn
from torch.utils.data import DataLoader
from transformers.pytorch_utils import Conv1D

from effdl.callbacks import TrainedRankPruningCallback
from effdl.compression.trained_rank_pruning import decompose, final_ranks, kept_rank, select_layers, truncate
from effdl.core.errors import ConfigurationError
from effdl.core.export import save_model
from effdl.core.factorize import SCHEMES, dense_weight, factorize, load_factorized, matricise, split
from tests.support import golden

GOLDEN = golden("trained-rank-pruning")
NAMES = {"NC": "channel", "VH": "spatial", "ND": "decouple"}
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def tensor(value):
    return torch.tensor(value, dtype=torch.float32)


def close(name, a, b, atol=1e-5):
    """Prints the largest difference (``-s`` shows it), and compares."""
    b = tensor(b) if isinstance(b, list) else b
    print(f"golden {name}: {float((a - b).abs().max()):.1e}")
    return torch.allclose(a, b, atol=atol, rtol=0)


class Net(LightningModule):
    """A foreign module: two convolutions to cut, between a first one and a head that stay."""

    def __init__(self, conv=lambda: nn.Conv2d(16, 16, 3, padding=1)):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), conv(), nn.ReLU(),
            nn.Conv2d(16, 16, 3, stride=2), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(144, 3),
        )  # fmt: skip
        self.lr = 0.05

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val/accuracy", (self.model(batch[0]).argmax(-1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr, momentum=0.9)


CUT = ["model.3", "model.5"]


def data(batches=8):
    g = torch.Generator().manual_seed(1)
    rows = [(torch.randn(6, 3, 8, 8, generator=g), torch.randint(0, 3, (6,), generator=g)) for _ in range(batches)]
    return DataLoader(rows, batch_size=None)


def fit(module, *callbacks, loader=None, val=None, ckpt_path=None, **kwargs):
    options = {"max_epochs": 2, **QUIET, **kwargs}
    options["enable_checkpointing"] = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    trainer = Trainer(callbacks=list(callbacks), num_sanity_val_steps=0, **options)
    loader = data() if loader is None else loader
    trainer.fit(module, loader, val, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


def trp(**kwargs):
    return TrainedRankPruningCallback(**{"keep_energy": 0.7, "every": 3, **kwargs})


def share(rank, full):
    """The criterion that keeps exactly this rank."""
    return "linear", (rank + 0.5) / full if rank < full else 1.0


def test_must_01_golden_criteria():
    s, want = tensor(GOLDEN["singular_values_NC"]), GOLDEN["criteria_on_singular_values_NC"]
    rules = {"energy_0.9_squared": ("energy", 0.9), "energy_0.9_plain": ("energy_plain", 0.9)}
    rules |= {"value_0.05": ("value", 0.05), "linear_0.5": ("linear", 0.5)}
    assert {name: int(kept_rank(s, rule)) for name, rule in rules.items()} == want


class Scripted(LightningModule):
    """loss = <weight, gradient>, plain SGD."""

    def __init__(self, weight, gradient, lr):
        super().__init__()
        self.layer = nn.Conv2d(*weight.shape[1::-1], 3, bias=False)
        self.layer.weight = nn.Parameter(weight.clone())
        self.gradient, self.lr, self.seen = gradient, lr, []

    def training_step(self, batch, batch_idx):
        return (self.layer.weight * self.gradient).sum()

    def configure_gradient_clipping(self, optimizer, **kwargs):
        self.seen.append(self.layer.weight.grad.clone())
        super().configure_gradient_clipping(optimizer, **kwargs)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


ONE = DataLoader([torch.zeros(1)], batch_size=None)


@pytest.mark.parametrize("key", NAMES)
def test_must_01_golden_truncation_subgradient_step_and_decomposition(key):
    scheme, want = NAMES[key], GOLDEN["schemes"][key]
    weight, gradient = tensor(GOLDEN["weight"]), tensor(GOLDEN["grad"])
    cut = truncate(weight, scheme, ("energy", GOLDEN["energy"]))
    assert close(f"{key} T(W)", cut.weight, want["truncated_weight"])
    assert close(f"{key} G", cut.subgradient, want["nuclear_subgradient"])

    module = Scripted(weight, gradient, GOLDEN["lr"])
    callback = TrainedRankPruningCallback(
        scheme, GOLDEN["energy"], every=1, nuclear_weight=GOLDEN["nuclear_weight"], decompose=False, targets="layer"
    )
    fit(module, callback, loader=ONE, max_steps=1)
    assert close(f"{key} step", module.layer.weight.detach(), want["weight_after_one_sgd_step"])

    conv = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    conv.weight = nn.Parameter(weight)
    rank = final_ranks({"conv": conv}, scheme, ("energy", GOLDEN["energy"]))["conv"]
    pair = split(conv, rank, scheme)
    x, y = tensor(GOLDEN["x"]), pair(tensor(GOLDEN["x"])).detach()
    exact = split(conv.double(), rank, scheme)(x.double()).detach()
    assert close(f"{key} y, float64", y.double(), exact)
    # the official float32 outputs, as large as 20, are themselves 1.8e-5 from the exact ones
    assert close(f"{key} y", y, want["decomposed_forward_y"], atol=3e-5)
    shapes = [list(p.shape) for p in pair.parameters()]
    if key == "ND":  # the r paths of the official code stand side by side in two layers
        assert len(want["decomposed_param_shapes"]) == 2 * rank
        (out, *pointwise), (_, _, *depthwise) = want["decomposed_param_shapes"][:2]
        assert shapes == [[rank * out, *pointwise], [out, rank, *depthwise]]
    else:
        assert shapes == want["decomposed_param_shapes"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_must_02_eckart_young_and_idempotence(scheme):
    weight = torch.randn(9, 7, 3, 5, generator=torch.Generator().manual_seed(0))
    s = torch.linalg.svdvals(matricise(weight, scheme).double())
    for rank in (1, s.shape[-1] // 2, s.shape[-1]):
        cut = truncate(weight, scheme, share(rank, s.shape[-1]))
        lost = (weight.double() - cut.weight).square().sum()
        assert torch.allclose(lost, s[..., rank:].square().sum(), rtol=1e-5, atol=1e-9)
        assert torch.allclose(truncate(cut.weight, scheme, share(rank, s.shape[-1])).weight, cut.weight, atol=1e-5)
        assert (cut.rank == rank).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_must_02_full_rank_is_the_layer(scheme):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 11, 9)
    for kernel, stride, padding in itertools.product((1, 3, 5, (3, 1)), (1, 2), (0, 1, 2)):
        conv = nn.Conv2d(5, 7, kernel, stride, padding)
        full = torch.linalg.svdvals(matricise(conv.weight.detach(), scheme)).shape[-1]
        assert torch.allclose(split(conv, full, scheme)(x), conv(x), atol=1e-5), (kernel, stride, padding)


def test_must_03_subgradient_is_that_of_the_nuclear_norm():
    for scheme, shape in itertools.product(SCHEMES, [(8, 5, 3, 3), (6, 20), (20, 6)]):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
        matrix = matricise(weight, scheme)
        full = min(matrix.shape[-2:])
        (want,) = torch.autograd.grad(torch.linalg.matrix_norm(matrix, "nuc").sum(), weight)
        assert torch.allclose(truncate(weight, scheme, ("linear", 1.0)).subgradient, want, atol=1e-4)
        for rank in (1, full // 2, full):
            direction = matricise(truncate(weight, scheme, share(rank, full)).subgradient, scheme)
            assert torch.allclose(torch.linalg.matrix_norm(direction, 2), torch.tensor(1.0), atol=1e-5)
            norm = torch.linalg.matrix_norm(direction).square()
            assert torch.allclose(norm, torch.full_like(norm, rank), rtol=1e-4)


def test_must_04_the_forward_sees_low_rank_at_a_cut_and_is_free_between():
    seen = []

    class Watch(Net):
        def training_step(self, batch, batch_idx):
            s = torch.linalg.svdvals(self.model[3].weight.detach().flatten(1))
            seen.append((callback.step, int(callback._ranks["model.3"]), s / s[0]))
            return super().training_step(batch, batch_idx)

    fit(Watch(), callback := trp())
    assert len(seen) == 16
    for step, rank, s in seen:
        assert rank < 16
        assert (s[rank:] < 1e-5).all() == (step % 3 == 0), step
        assert (s[:rank] > 1e-5).all()


def test_must_05_one_cut_per_optimizer_step_under_accumulation():
    counts = []
    for accumulate, batches in ((1, 8), (4, 32)):
        callback = trp(every=2)
        cut, at = callback._cut, []
        callback._cut = lambda cut=cut, at=at, callback=callback, **kw: (at.append(callback.step), cut(**kw))
        fit(Net(), callback, loader=data(batches), max_epochs=1, accumulate_grad_batches=accumulate)
        counts.append(at)
    assert counts == [[0, 2, 4, 6]] * 2


def test_subgradient_is_there_before_clipping_and_only_at_cuts():
    weight, lam = tensor(GOLDEN["weight"]), 0.5
    loader = DataLoader([torch.zeros(1)] * 3, batch_size=None)
    for every_step in (False, True):
        module = Scripted(weight, torch.zeros_like(weight), 0.0)  # W only moves by the cut at step 0
        callback = trp(every=2, stop=1, nuclear_weight=lam, nuclear_every_step=every_step, targets="layer")
        fit(module, callback, loader=loader, max_epochs=1, gradient_clip_val=1e-3)
        direction = truncate(weight, "channel", ("energy", 0.7)).subgradient
        assert torch.allclose(module.seen[0], lam * direction, atol=1e-6)
        once = truncate(weight, "channel", ("energy", 0.7)).weight  # the weight as it is at the second step
        again = lam * truncate(once, "channel", ("energy", 0.7)).subgradient
        assert torch.allclose(module.seen[1], again if every_step else torch.zeros_like(weight), atol=1e-5)
        assert not module.seen[2].any()  # after ``stop``


@pytest.mark.parametrize("scheme", SCHEMES)
def test_must_07_decomposed_model_is_smaller_and_equals_the_truncated_one(scheme):
    model = Net().model.eval()
    layers = select_layers(model, scheme)
    assert list(layers) == ["3", "5"]
    for name, layer in layers.items():
        weight = dense_weight(layer)
        weight.copy_(truncate(weight, scheme, share(3, min(matricise(weight, scheme).shape[-2:])), name).weight)
    small, rows = decompose(model, layers, scheme, ("value", 1e-4))
    count = lambda net: sum(v.numel() for v in net.state_dict().values())  # noqa: E731
    assert [row["rank"] for row in rows.values()] == [3, 3]
    assert count(small) < count(model)
    assert count(model) - count(small) == sum(row["before"] - row["after"] for row in rows.values())
    x = torch.randn(4, 3, 8, 8)
    assert torch.allclose(small(x), model(x), atol=1e-4)


def test_must_08_resume_is_the_uninterrupted_run(tmp_path):
    fit(whole := Net(), trp(decompose=False), max_epochs=4)
    save = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    fit(Net(), trp(decompose=False), save)
    fit(resumed := Net(), trp(decompose=False), max_epochs=4, ckpt_path=tmp_path / "last.ckpt")
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()):
        assert torch.allclose(a, b, atol=1e-6, rtol=0), name


def test_training_leaves_the_small_model_that_rebuilds_itself(tmp_path):
    module, callback, save = Net(), trp(calibration_batches=2), ModelCheckpoint(tmp_path, save_last=True)
    run = fit(module, callback, save, val=data(2))
    assert set(callback.ranks) == set(CUT)
    assert type(module.model[3]) is nn.Sequential
    told = callback.report()
    accuracy = told["after"]["metrics"]["val/accuracy"]
    assert run.callback_metrics["val/accuracy"] == accuracy
    assert run.validate(module, data(2), verbose=False)[0]["val/accuracy"] == accuracy
    assert told["before"]["parameters"] == sum(p.numel() for p in Net().model.parameters())
    assert told["multiply_adds_after"] < told["multiply_adds_before"]
    assert told["layers"]["model.5"]["macs after"] < told["layers"]["model.5"]["macs before"]
    factorize(again := Net(), callback.ranks, inplace=True)
    again.load_state_dict(module.state_dict(), strict=True)
    assert save_model(module, tmp_path / "model") == "safetensors"
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(load_factorized(Net().model.eval(), tmp_path / "model")(x), module.model.eval()(x))
    # the checkpoint is the plain dense model
    dense = Net()
    dense.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"], strict=True)
    # the finished module tests its own dense checkpoint, and validation splits it again
    tester = Trainer(callbacks=[callback], enable_checkpointing=False, **QUIET)
    tester.test(module, data(2), ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False)
    assert type(module.model[3]) is nn.Conv2d
    ranks = callback.ranks
    tester.validate(module, data(2), ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False)
    assert callback.ranks == ranks
    assert type(module.model[3]) is nn.Sequential
    # another fit joins the factors and goes on
    fit(module, callback, max_epochs=1)
    assert type(module.model[3]) is nn.Sequential


def test_layers_of_transformers_and_those_that_stay_dense():
    torch.manual_seed(0)
    net = nn.Sequential(Conv1D(16, 16), nn.Conv1d(16, 16, 3, groups=16), nn.Linear(16, 16), nn.Linear(16, 4))
    with pytest.warns(UserWarning, match="stay dense: 1 has groups=16"):
        layers = select_layers(net, "channel")
    assert list(layers) == ["0", "2"]
    with pytest.raises(ConfigurationError, match="leave no layer to cut.*1 has groups=16"):
        select_layers(net, "channel", targets="1")

    class Words(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net

        def training_step(self, batch, batch_idx):
            return 0 * sum(p.sum() for p in self.net.parameters())

        configure_optimizers = Scripted.configure_optimizers
        lr = 1.0

    before = net[0].weight.detach().clone()
    fit(Words(), trp(keep_energy=0.6, nuclear_weight=0.1, decompose=False, targets="net.0"), loader=ONE, max_steps=1)
    cut = truncate(before.t(), "channel", ("energy", 0.6))
    assert torch.allclose(net[0].weight.t(), cut.weight - 0.1 * cut.subgradient, atol=1e-5)


def test_dead_broken_and_tied_layers_are_named():
    module = Net()
    with torch.no_grad():
        module.model[3].weight.zero_()
    with pytest.warns(UserWarning, match="rank 1 is kept: 3"):
        _, rows = decompose(module.model, select_layers(module.model, "channel"), "channel", ("value", 0.05))
    assert rows["3"]["rank"] == 1
    fit(module, trp(), max_steps=1)  # a cut of zeros is zeros
    module = Net()
    with torch.no_grad():
        module.model[5].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="model.5: .* NaN"):
        fit(module, trp())
    module = Net()
    module.model[5].weight = module.model[3].weight
    with pytest.raises(ConfigurationError, match="model.3 cannot be factorised: its weight is tied"):
        fit(module, trp())
    fit(module, callback := trp(decompose=False), max_steps=1)
    assert callback.matched(module) == ["model.3"]  # once


def test_an_average_is_cut_before_it_is_split_and_the_rate_finder_splits_nothing(tmp_path):
    for order in (1, -1):
        callback = trp(final_criterion=("value", 1e-3))
        fit(module := Net(), *[callback, EMAWeightAveraging(decay=0.9)][::order], val=data(1))
        assert all(row["rank"] < 16 for row in callback.rows.values())
        assert type(module.model[3]) is nn.Sequential
    trainer = Trainer(callbacks=[trp()], default_root_dir=tmp_path, max_epochs=1, **QUIET)
    Tuner(trainer).lr_find(module := Net(), data(), num_training=4, update_attr=False)
    assert type(module.model[3]) is nn.Conv2d

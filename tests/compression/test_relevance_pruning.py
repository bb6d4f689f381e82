"""relevance-pruning: its checks 1-6 and 8-10, arguments, and the callback on a Trainer."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from effdl.callbacks import RelevancePruningCallback
from effdl.compression.relevance_pruning import (
    FilterPruner,
    filter_scores,
    normalised,
    prunable,
    prune_filters,
    reference_samples,
)
from effdl.core.errors import ConfigurationError
from effdl.core.lrp import Composite, Epsilon, relevance
from effdl.core.structure import compact, multiply_accumulates, rebuild
from tests.support import golden

pytest.importorskip("torch_pruning")
CASES = golden("relevance-pruning")["cases"]


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def golden_network(case):
    c, w = case["config"], case["weights"]
    net = nn.Sequential(
        nn.Conv2d(c["ci"], c["c1"], 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(c["c1"], c["c2"], 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(len(w["6.weight"][0]), len(w["6.weight"])), nn.ReLU(),
        nn.Linear(len(w["8.weight"][0]), c["ncls"]),
    ).double()  # fmt: skip
    net.load_state_dict({name: doubles(value) for name, value in w.items()})
    return net, doubles(case["x"]), torch.tensor(case["y"])


def agree(got, want, errors):
    want = doubles(want)
    errors.append(float((got - want).abs().max()))
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", CASES, ids=["first", "second"])
def test_must_01_golden_parity(case):
    net, x, y = golden_network(case)
    errors = []
    for rule, key in (("zplus", "zplus"), ("epsilon", "z_simple")):
        found, want = relevance(net, x, y, rule=rule), case[key]
        agree(found.logits, case["logits"], errors)
        agree(found.inputs.flatten(1).sum(1), want["input_relevance_sum_per_sample"], errors)
        scores = filter_scores(net, x, y, ["0", "3"], rule=rule, batch_size=2)
        for layer in ("0", "3"):
            agree(scores[layer], want[f"filter_scores_conv{layer}"], errors)
            if rule == "zplus":
                agree(found.layers[layer].flatten(1).sum(1), want[f"total_relevance_conv{layer}_per_sample"], errors)
        if "relevance_conv3" in want:
            agree(found.layers["3"][0], want["relevance_conv3"], errors)
    pruner = FilterPruner(net, x, y, 0.5, rule="zplus")
    ranking = [(float(pruner.groups[g].makers[0]), float(c), s) for g, c, s in pruner.ranking(pruner.scores())]
    agree(doubles(ranking), case["prune_order_lowest_first"], errors)
    for criterion, key in (("taylor", "taylor_raw"), ("gradient", "grad_raw"), ("weight", "weight_raw")):
        raw = filter_scores(net, x, y, ["0", "3"], criterion, batch_size=2)
        for layer, want in case[key].items():
            agree(raw[layer], want, errors)
    print(f"largest golden error {max(errors):.1e}")


class Residual(nn.Module):
    """Convolutions with BatchNorm in a residual sum; layers by name."""

    def __init__(self, norm=True):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.na, self.nb = (nn.BatchNorm2d(6), nn.BatchNorm2d(6)) if norm else (nn.Identity(), nn.Identity())
        self.c, self.head = nn.Conv2d(6, 5, 3, padding=1), nn.Linear(5 * 16, 3)

    def forward(self, x):
        x = F.relu(self.na(self.a(x)))
        x = F.relu(x + self.nb(self.b(x)))
        return self.head(F.max_pool2d(F.relu(self.c(x)), 2).flatten(1))


def settle(net):
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.2)
            layer.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.2)
    return net.eval()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return settle(Residual())


X = torch.rand(9, 1, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(9) % 3


def plain(bias=False):
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=bias), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 4, 3, bias=bias), nn.ReLU(),
        nn.Flatten(), nn.Linear(16, 3, bias=bias),
    )  # fmt: skip


def test_must_02_relevance_is_conserved():
    net = plain().double()
    with torch.no_grad():
        net[6].weight[2] = -net[6].weight[2].abs()  # no positive contribution: relevance 0 everywhere, no NaN
    found = relevance(net, X.double(), Y, rule="zplus")
    for value in (*found.layers.values(), found.inputs):
        if value is not found.layers["6"]:
            assert torch.allclose(value.flatten(1).sum(1), (Y != 2).double(), atol=1e-5)


def test_must_03_epsilon_is_gradient_times_input():
    net = plain().double()
    x = X.double().requires_grad_()
    logit = net(x).gather(1, Y[:, None])
    slope = torch.autograd.grad(logit.sum(), x)[0]
    tiny = Epsilon(1e-12)
    found = relevance(net, x.detach(), Y, rule=Composite(conv=tiny, linear=tiny, other=tiny)).inputs
    assert torch.allclose(found * logit.view(-1, 1, 1, 1), x * slope, atol=1e-4)
    composite = relevance(net, x.detach(), Y).inputs
    assert not torch.allclose(composite * logit.view(-1, 1, 1, 1), x * slope, atol=1e-2)


def test_must_04_dead_inhibiting_and_duplicate_filters():
    net = plain().double()
    with torch.no_grad():
        net[0].weight[0] = 0  # dead
        net[3].weight[:, 1] = -net[3].weight[:, 1].abs()  # only inhibits
        net[0].weight[2] = net[0].weight[2].abs()
        net[3].weight[:, 2] = net[3].weight[:, 2].abs()
        net[0].weight[3] = net[0].weight[2]  # twice the same
        net[3].weight[:, 3] = net[3].weight[:, 2]
    scores = filter_scores(net, X.double(), Y, ["0"], rule="zplus")["0"]
    assert scores[0] == 0
    assert scores[1] == 0
    assert torch.allclose(scores[2], scores[3], rtol=1e-9)
    assert scores[2] > 0


def test_must_05_batchnorm_is_folded(net):
    folded = copy.deepcopy(net)
    for conv, norm in (("a", "na"), ("b", "nb")):
        fused = nn.utils.fuse_conv_bn_eval(getattr(net, conv), getattr(net, norm))
        setattr(folded, conv, fused)
        setattr(folded, norm, nn.Identity())
    for rule in ("composite", "epsilon", "zplus"):
        one, two = relevance(net, X, Y, rule=rule), relevance(folded, X, Y, rule=rule)
        assert torch.allclose(one.logits, two.logits, atol=1e-5)
        assert torch.allclose(one.inputs, two.inputs, rtol=1e-3, atol=1e-5)
        assert torch.allclose(one.layers["a"], two.layers["a"], rtol=1e-3, atol=1e-5)


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.p, self.q, self.head = (nn.Linear(4, 5, bias=False) for _ in range(3))
        self.head = nn.Linear(5, 2, bias=False)

    def forward(self, x):
        return self.head(self.p(x) + self.q(x))


def test_must_06_a_sum_splits_in_proportion():
    torch.manual_seed(3)
    net, x = Sum().double(), torch.rand(3, 4, dtype=torch.float64)
    found = relevance(net, x, torch.tensor([0, 1, 0]), rule="epsilon").layers
    p, q = net.p(x), net.q(x)
    weight = net.head.weight[[0, 1, 0]]
    total = (p + q) * weight / ((p + q) * weight).sum(1, keepdim=True)
    assert torch.allclose(found["p"] + found["q"], total, rtol=1e-5)
    assert torch.allclose(found["p"], total * p / (p + q), rtol=1e-5)


@pytest.mark.parametrize("coupled", [True, False])
def test_must_08_compaction_is_exact_and_counted(net, coupled):
    full = copy.deepcopy(net)
    done = prune_filters(net, X, Y, 0.5, step_sparsity=0.12, coupled=coupled)
    small, counts = compact(net, X[:2], done.dead)
    x = torch.randn(4, 1, 8, 8)
    assert torch.allclose(net(x), small(x), atol=1e-5)
    last = done.history[-1]
    assert last["parameters"] == sum(p.numel() for p in small.parameters())
    assert last["macs"] == multiply_accumulates(small, X)
    a, c = small.a.out_channels, small.c.out_channels
    hand = 64 * 9 * (a + a * small.b.out_channels + a * c) + 3 * 16 * c
    assert last["macs"] == hand
    assert done.history[0]["macs"] == 64 * 9 * (6 + 36 + 30) + 3 * 80
    again = rebuild(full, json.loads(json.dumps(counts)))
    again.load_state_dict(small.state_dict(), strict=True)
    assert torch.equal(again(x), small(x))
    if coupled:
        assert torch.equal(done.dead["a"], done.dead["b"])
        assert sum(int(d.sum()) for d in done.dead.values()) >= 8
        assert a < 6 or c < 5


def test_must_09_scoring_leaves_no_trace(net):
    net.train()
    net.a.eval()
    net.a.weight.requires_grad_(False)
    calls = []
    net.c.register_forward_hook(lambda *a: calls.append(1))
    net.head.weight.grad = torch.ones_like(net.head.weight)
    before = copy.deepcopy(net.state_dict())
    look = lambda: [  # noqa: E731
        (m.training, len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__) for m in net.modules()
    ]
    flags, wants = look(), [p.requires_grad for p in net.parameters()]
    rng = torch.get_rng_state()
    for criterion in ("lrp", "gradient", "taylor", "weight", "random"):
        filter_scores(net, X, Y, ["a", "b", "c"], criterion)
    FilterPruner(net, X, Y, 0.4).advance()
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert look() == flags
    assert [p.requires_grad for p in net.parameters()] == wants
    assert torch.equal(net.head.weight.grad, torch.ones_like(net.head.weight))
    assert torch.equal(rng, torch.get_rng_state())


def test_must_10_iterating_differs_from_one_shot():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 3),
    )  # fmt: skip
    one_shot = FilterPruner(net, X, Y, 0.6)
    first = [(g, c) for g, c, _ in one_shot.ranking(one_shot.scores())][: one_shot.goal]
    done = prune_filters(net, X, Y, 0.6, step_sparsity=0.05, history=False)
    dead = {(g, c) for g, name in enumerate(("0", "2")) for c in done.dead[name].nonzero().flatten().tolist()}
    assert len(dead) == one_shot.goal == 19
    assert dead != set(first)


def test_one_filter_of_each_layer_stays_and_strict_says_so():
    net = plain()
    with torch.no_grad():
        net[3].weight[1:] = 0
        net[3].weight[0] = net[3].weight[0].abs() * 1e-3
        net[6].weight[:] = -net[6].weight.abs()  # no relevance anywhere: ties, in the order of layers
    settings = {"step_sparsity": 1.0, "rule": "zplus", "history": False}
    done = prune_filters(copy.deepcopy(net), X, Y, 0.8, **settings)
    assert {name: int(d.sum()) for name, d in done.dead.items()} == {"0": 5, "3": 3}
    with pytest.raises(ConfigurationError, match="last filter of '0'"):
        prune_filters(net, X, Y, 0.8, strict=True, **settings)
    with pytest.raises(ConfigurationError, match="sparsity=0.9"):
        FilterPruner(net, X, Y, 0.9)


def test_neurons_of_an_mlp_and_the_networks_output_stay():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    assert prunable(net) == ["1", "3", "5"]
    done = prune_filters(net, X, Y, 0.5, step_sparsity=0.1)
    assert set(done.dead) == {"1", "3"}
    small, counts = compact(net, X[:2], done.dead)
    assert torch.allclose(net(X), small(X), atol=1e-5)
    assert counts["5"]["out_features"] == 3


@pytest.mark.parametrize("name", ["resnet", "bottleneck", "mobilenet", "vgg"])
def test_stock_networks(name):
    from torchvision.models import mobilenet_v2, resnet
    from torchvision.models.vgg import VGG, make_layers

    torch.manual_seed(0)
    make = {
        "resnet": lambda: resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=3),
        "bottleneck": lambda: resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=3, width_per_group=16),
        "mobilenet": lambda: mobilenet_v2(num_classes=3, width_mult=0.25),
        "vgg": lambda: VGG(make_layers([8, "M", 16, "M"], batch_norm=True), num_classes=3),
    }
    net, x = settle(make[name]()), torch.rand(6, 3, 32, 32)
    if name == "vgg":
        net.avgpool, net.classifier = nn.AdaptiveAvgPool2d(2), nn.Linear(64, 3)
    done = prune_filters(net, x, torch.arange(6) % 3, 0.3, step_sparsity=0.3)
    small, _ = compact(net, x[:2], done.dead)
    scale = net(x).abs().max()
    assert torch.allclose(net(x) / scale, small(x) / scale, atol=1e-5)
    assert done.history[-1]["sparsity"] >= 0.29
    assert done.history[-1]["parameters"] < 0.9 * done.history[0]["parameters"]


def test_scores_are_normalised_over_live_filters_and_few_steps_warn(net):
    raw = {"a": doubles([3.0, -1.0, 100.0]), "b": doubles([0.0, 0.0, 0.0])}
    alive = {"a": torch.tensor([True, True, False]), "b": torch.ones(3, dtype=torch.bool)}
    found = normalised(raw, alive)
    assert torch.allclose(found["a"][:2], doubles([0.75, -0.25]))
    assert torch.equal(found["b"], raw["b"])
    assert torch.allclose(normalised(raw, alive, "taylor")["a"][:2].norm(), doubles(1.0))
    with pytest.warns(UserWarning, match="less than one"):
        FilterPruner(net, X, Y, 0.5, step_sparsity=0.01)


def test_reference_samples():
    with pytest.warns(UserWarning, match="Fewer than 4"):
        reference_samples([(X, Y)], 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x, y = reference_samples([(X[:5], Y[:5]), {"image": X[5:], "label": Y[5:]}], 2)
    assert y.tolist() == [0, 1, 2, 0, 1, 2]
    assert torch.equal(x, X[:6])
    for bad in ([], [X], [(X, None)]):
        with pytest.raises(ConfigurationError, match="reference"):
            reference_samples(bad, 2)


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


def fit(module, callbacks, ckpt_path=None, epochs=3, **kwargs):
    data = DataLoader([(X[i : i + 3], Y[i : i + 3]) for i in (0, 3, 6)], batch_size=None)
    trainer = Trainer(
        max_epochs=epochs, callbacks=callbacks, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        **kwargs,
    )  # fmt: skip
    trainer.fit(module, data, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


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


def test_bad_settings_of_the_functions(net):
    bad = [
        ({"criterion": "saliency"}, "criterion"), ({"rule": "z"}, "rule"), ({"step_sparsity": 0.0}, "step_sparsity"),
        ({"targets": "no.such"}, "targets"), ({"targets": "head"}, "output"), ({"targets": "a"}, "coupled"),
    ]  # fmt: skip
    for settings, message in bad:
        with pytest.raises(ConfigurationError, match=message):
            FilterPruner(net, X, Y, 0.5, **settings)
    with torch.no_grad():
        net.b.weight[0, 0, 0, 0] = float("nan")
    for criterion in ("lrp", "taylor", "gradient"):
        with pytest.raises(RuntimeError, match="not finite"):
            filter_scores(net, X, Y, ["a", "b", "c"], criterion)


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

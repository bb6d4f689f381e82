"""relevance-pruning: folding, compaction, scoring, iterations, stock networks, refusals."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from torch import nn

from effdl.compression.relevance_pruning import (
    FilterPruner,
    filter_scores,
    normalised,
    prunable,
    prune_filters,
    reference_samples,
)
from effdl.core.errors import ConfigurationError
from effdl.core.lrp import relevance
from effdl.core.structure import compact, multiply_accumulates, rebuild
from tests.compression.relevance_pruning_nets import Residual, X, Y, doubles, plain, settle


@pytest.fixture
def net():
    torch.manual_seed(0)
    return settle(Residual())


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

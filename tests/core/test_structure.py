"""Compaction is exact, rebuildable, and refuses what it cannot do exactly."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effdl.core.errors import ConfigurationError
from effdl.core.structure import (
    channel_groups,
    channel_parameters,
    compact,
    multiply_accumulates,
    rebuild,
    silence_,
)

pytest.importorskip("torch_pruning")


class Residual(nn.Module):
    """Two convolutions into one sum, with BatchNorm, then flatten -> Linear."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.back = nn.Conv2d(6, 5, 3, padding=1), nn.Conv2d(5, 6, 3, padding=1)
        self.fc, self.head = nn.Linear(6 * 16, 7), nn.Linear(7, 4)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        x = F.relu(x + self.back(F.relu(self.inner(x))))
        return self.head(F.relu(self.fc(F.max_pool2d(x, 2).flatten(1))))


class Grouped(nn.Module):
    """Depthwise, grouped and transposed convolutions."""

    def __init__(self):
        super().__init__()
        self.a, self.dw = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.bn, self.g = nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.up, self.e = nn.ConvTranspose2d(12, 6, 2), nn.Conv2d(6, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.bn(self.dw(F.relu(self.a(x)))))
        x = self.e(F.relu(self.up(F.relu(self.g(x)))))
        return self.head(x.mean((2, 3)))


def made(kind):
    torch.manual_seed(0)
    net = kind()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            nn.init.uniform_(layer.weight)
            nn.init.normal_(layer.bias)
    return net


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def masked(net, share=0.5):
    """All groups, about half of each silenced; the dead channels by layer."""
    layers = [n for n, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))]
    g, pruned = torch.Generator().manual_seed(1), {}
    for group in channel_groups(net, X, layers):
        if not group.is_output:
            dead = torch.rand(group.size, generator=g) < share
            silence_(net, group, dead)
            for member in group.of_role("out"):
                pruned[member.name] = member.index[dead[member.channel]]
    return pruned


@pytest.mark.parametrize("kind", [Residual, Grouped])
def test_compacted_equals_masked_and_is_rebuilt_from_its_counts(kind):
    net = made(kind)
    full = copy.deepcopy(net)
    pruned = masked(net)
    before = copy.deepcopy(net.state_dict())
    small, counts = compact(net, X, pruned)
    for x in (X, torch.randn(3, 3, 8, 8)):
        assert torch.allclose(net.eval()(x), small.eval()(x), atol=1e-5)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in before.items())
    assert sum(p.numel() for p in small.parameters()) < 0.7 * sum(p.numel() for p in net.parameters())
    again = rebuild(full, json.loads(json.dumps(counts)))
    again.load_state_dict(small.state_dict(), strict=True)
    assert torch.equal(again.eval()(X), small(X))
    assert small.training is False


def test_a_channel_of_a_residual_sum_goes_only_where_both_partners_are_dead():
    net = made(Residual)
    (group, _) = channel_groups(net, X, ["back", "inner"])
    assert {m.name for m in group.of_role("out")} == {"stem", "back"}
    assert [name for name, _, _ in channel_parameters(net, group) if name.startswith("bn")] == ["bn.weight", "bn.bias"]
    with torch.no_grad():
        net.back.weight[:3], net.back.bias[:3] = 0, 0
    small, counts = compact(net, X, {"back": [0, 1, 2]})
    assert counts == {}
    silence_(net, group, torch.arange(6) < 2)
    small, counts = compact(net, X, {"back": [0, 1, 2], "stem": [0, 1]})
    assert small.back.out_channels == small.stem.out_channels == small.bn.num_features == small.inner.in_channels == 4
    assert counts["fc"] == {"in_features": 4 * 16, "out_features": 7}


def test_a_dead_channel_that_emits_a_constant_is_refused():
    net = made(Residual)
    with torch.no_grad():
        for layer in (net.stem, net.back):
            layer.weight[0], layer.bias[0] = 0, 0
        net.bn.bias[0], net.bn.running_mean[0] = 0.5, 0.0
    dead = {"stem": [0], "back": torch.tensor([True, *[False] * 5])}
    with pytest.raises(ConfigurationError, match="constant"):
        compact(net, X, dead)
    with torch.no_grad():
        net.bn.bias[0] = -0.5  # nothing of it passes the ReLU
    assert compact(net, X, dead)[0].stem.out_channels == 5


def test_one_channel_stays_and_mixing_norms_keep_theirs():
    net = made(Residual)
    (group,) = channel_groups(net, X, ["inner"])
    silence_(net, group, torch.ones(5, dtype=torch.bool))
    assert compact(net, X, {"inner": range(5)})[0].inner.out_channels == 1
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    with torch.no_grad():
        net[0].weight[0], net[0].bias[0], net[1].bias[0] = 0, 0, 0
    assert compact(net, X, {"0": [0]})[1] == {}


@pytest.mark.parametrize(
    ("pruned", "message"),
    [
        ({"inne": [0]}, "Did you mean 'inner'"),
        ({"bn": [0]}, "convolution or Linear"),
        ({"inner": [5]}, "from 0 to 4"),
        ({"inner": torch.ones(6, dtype=torch.bool)}, r"shape \(5,\)"),
        ({"inner": [1]}, "not zero"),
    ],
)
def test_errors(pruned, message):
    with pytest.raises(ConfigurationError, match=message):
        compact(made(Residual), X, pruned)
    with pytest.raises(ConfigurationError, match="counts"):
        rebuild(made(Residual), {"inner": {"colour": 3}})


def test_half_precision_networks_are_compacted_too():
    net = made(Residual).bfloat16()
    x = X.bfloat16()
    (group,) = channel_groups(net, x, ["inner"])
    silence_(net, group, torch.arange(5) < 2)
    small, _ = compact(net, x, {"inner": [0, 1]})
    assert small.inner.weight.dtype == torch.bfloat16
    assert small.inner.out_channels == 3


def test_outputs_of_the_network_stay():
    net = made(Residual)
    with torch.no_grad():
        net.head.weight[0], net.head.bias[0] = 0, 0
    assert compact(net, X, {"head": [0]})[1] == {}


def test_multiply_accumulates_match_a_hand_count():
    net = made(Residual)
    hand = 64 * (6 * 3 * 9 + 5 * 6 * 9 + 6 * 5 * 9) + 7 * 6 * 16 + 4 * 7
    assert multiply_accumulates(net, X) == hand

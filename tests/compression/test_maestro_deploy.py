"""maestro: what leaves training: deployed and extracted networks, and which layers are factorised (check 10)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effdl.compression.maestro import Prefix, decompose, deploy, extract
from effdl.core.errors import ConfigurationError
from effdl.core.factorize import factorize, narrow, pair_shape, split


@torch.no_grad()
def test_must_10_the_deployed_network_is_stock_small_and_the_masked_one():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 6)).eval()
    names = decompose(net)
    ranks, x = dict(zip(names, (2, 8, 0))), torch.randn(4, 3, 8, 8)
    prefixes = [Prefix(net.get_submodule(name)) for name in names]
    handles = [handle for prefix in prefixes for handle in prefix.attach()]
    for prefix, rank in zip(prefixes, ranks.values()):
        prefix.show(rank)
    masked = net(x)
    for handle in handles:
        handle.remove()
    small, rows = deploy(net, ranks)
    assert torch.allclose(small(x), masked, atol=1e-5)
    assert {row["form"] for row in rows.values()} == {"factors", "dense"}
    sizes = {"0": 2 * (27 + 8), "2": 8 * 72, "4": 128 + 6}  # the second is no smaller at rank 8, the third keeps one
    assert {name: row["after"] for name, row in rows.items()} == sizes
    assert sum(p.numel() for p in small.parameters()) == sum(sizes.values()) + 8 + 8 + 6
    assert {type(m) for m in small.modules()} <= {nn.Sequential, nn.Conv2d, nn.ReLU, nn.Flatten, nn.Linear}
    pairs, _ = deploy(net, ranks, smallest=False)
    assert torch.allclose(pairs(x), masked, atol=1e-5)
    assert type(pairs[2]) is nn.Sequential


@torch.no_grad()
def test_extraction_meets_its_budget_from_one_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=2), nn.Flatten(), nn.Linear(64, 10))
    dense = sum(p.numel() for p in net.parameters())
    x = torch.randn(2, 3, 8, 8)
    names = decompose(net)
    full = {name: net.get_submodule(name)[0].weight.shape[0] for name in names}
    sizes, previous = [], full
    for budget in (1.0, 0.6, 0.3):
        small, rows = extract(net, full, budget)
        size = sum(p.numel() for p in small.parameters())
        assert size <= budget * dense
        sizes.append(size)
        ranks = {name: row["rank"] for name, row in rows.items()}
        assert all(ranks[name] <= previous[name] for name in ranks)  # nested
        want, _ = deploy(net, ranks)
        assert torch.equal(small(x), want(x))
        previous = ranks
    assert sizes == sorted(sizes, reverse=True)
    _, rows = extract(net, full, 0.5, (x[:1],))  # of the multiply-adds
    before = {"0": 36 * 432, "2": 4 * 2304, "4": 640}
    spent = sum(before[name] * row["after"] / row["before"] for name, row in rows.items())
    assert spent <= 0.5 * sum(before.values())
    with pytest.raises(ConfigurationError, match="rank 1 everywhere"):
        extract(net, full, 0.01)
    with pytest.raises(ConfigurationError, match="budget"):
        extract(net, full, 0.0)


def test_selection_warns_of_what_stays_dense_and_refuses_ties():
    net = nn.Sequential(nn.Conv1d(16, 16, 3, groups=16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 1))
    with pytest.warns(UserWarning, match="stay dense: 0 has groups=16"):
        assert decompose(net) == ["1", "2"]  # of rank 1 there is nothing to leave out
    assert pair_shape(net[1]) == (16, 16)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ConfigurationError, match="its weight is tied"):
        decompose(tied)
    assert type(tied[0]) is nn.Linear
    rebuilt = factorize(nn.Sequential(nn.Linear(6, 4)), {"0": 2})
    rebuilt.load_state_dict(nn.Sequential(narrow(split(nn.Linear(6, 4), 4), 2)).state_dict(), strict=True)

"""maestro: golden numbers, the penalty, the sampler, pairs and their prefixes (checks 1-3)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers.pytorch_utils import Conv1D

from effdl.compression.maestro import (
    MODES,
    Prefix,
    RankSampler,
    SplitAttention,
    decompose,
    hierarchical_lasso,
    importance,
    kept_rank,
    lasso_scale,
    split_attention,
    squared_norms,
)
from effdl.core.errors import ConfigurationError
from effdl.core.factorize import is_cheaper, merge, narrow, split
from tests.compression.image_parts import close, tensor
from tests.support import golden

GOLDEN = golden("maestro")


def filled(layer, want):
    layer.weight, layer.bias = nn.Parameter(tensor(want["weight"])), nn.Parameter(tensor(want["bias"]))
    return layer


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_must_01_golden_layers_and_their_prefixes(mode):
    layers = {"linear": nn.Linear(7, 5), "conv": nn.Conv2d(3, 6, 3, padding=GOLDEN["conv"]["padding"])}
    for key, layer in layers.items():
        want = GOLDEN[key]
        x, pair = tensor(want["x"]), split(filled(layer, want), want["rank_full"])
        assert close(f"{key} full output", pair(x), want["full_output"])
        assert close(f"{key} lasso", hierarchical_lasso(*weights(pair)), want["lasso_hierarchical"])
        assert close(f"{key} importance", importance(*weights(pair)), want["importance_hierarchical"])
        prefix = Prefix(pair, mode)
        handles = prefix.attach()
        for share, output in want["outputs_at_p"].items():
            prefix.show(math.ceil(want["rank_full"] * float(share)))
            assert want.get("rank_at_p", {}).get(share, prefix.active) == prefix.active
            assert close(f"{key} at {share}, {mode}", pair(x), output)
        for handle in handles:
            handle.remove()


@torch.no_grad()
def test_must_01_golden_norms_and_pruning():
    want, pair = GOLDEN["linear"], split(filled(nn.Linear(7, 5), GOLDEN["linear"]), 5)
    u, v = (squared.sqrt() for squared in squared_norms(*weights(pair)))
    assert close("product", merge(pair).weight, want["factor_product"])
    assert close("plain lasso", u + v, want["lasso_plain"])
    assert close("plain importance", u * v, want["importance_plain"])
    rank = int(kept_rank(importance(*weights(pair)), want["threshold"]))
    assert rank == want["pruned_rank"]
    assert close("pruned output", narrow(pair, rank)(tensor(want["x"])), want["pruned_output"])
    assert is_cheaper((5, 7), rank, "channel") != want["keep_dense_instead"]
    values = importance(*weights(pair))
    assert int(kept_rank(values, 0.5, relative=True)) == int((values >= 0.5 * values[0]).sum())
    assert int(kept_rank(torch.zeros(3), 1e-5, relative=True)) == 0


def weights(pair):
    return pair[0].weight, pair[1].weight


LAYERS = {
    "Linear": (lambda: nn.Linear(9, 6), (3, 9)),
    "Linear, no bias": (lambda: nn.Linear(6, 9, bias=False), (2, 3, 6)),
    "Conv2d, stride 2": (lambda: nn.Conv2d(3, 6, 3, stride=2, padding=1), (2, 3, 9, 8)),
    "Conv2d, dilation 2, no bias": (lambda: nn.Conv2d(5, 4, (3, 1), dilation=2, bias=False), (2, 5, 9, 8)),
    "Conv1d": (lambda: nn.Conv1d(3, 5, 3, padding="same", padding_mode="circular"), (2, 3, 9)),
    "Conv1D": (lambda: Conv1D(6, 4), (2, 3, 4)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_must_01_a_pair_is_the_layer_and_a_prefix_the_truncated_product(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    net, x = nn.Sequential(make()), torch.randn(shape)
    before = net(x)
    assert decompose(net) == ["0"]
    assert torch.allclose(net(x), before, atol=1e-5)
    pair, full = net[0], net[0][0].weight.shape[0]
    truncated = {rank: merge(narrow(pair, rank))(x) for rank in range(full + 1)}
    for mode in MODES:
        prefix = Prefix(pair, mode)
        handles = prefix.attach()
        for rank, want in truncated.items():
            prefix.show(rank)
            assert torch.allclose(pair(x), want, atol=1e-5), (mode, rank)
        for handle in handles:
            handle.remove()
    assert torch.equal(truncated[0], net(torch.zeros_like(x)))  # rank 0: the bias, in the shape of the output


@torch.no_grad()
def test_must_01_attention_is_split_into_four_projections():
    torch.manual_seed(0)
    for batch_first, kwargs in ((True, {}), (False, {"kdim": 6, "vdim": 5}), (True, {"bias": False})):
        fused = nn.MultiheadAttention(8, 2, batch_first=batch_first, **kwargs).eval()
        net = nn.ModuleDict({"attention": fused})
        names = decompose(net)
        assert names == [f"attention.{part}_proj" for part in ("q", "k", "v", "out")]
        batch, length = (3, 4) if batch_first else (4, 3)
        q, k, v = (torch.randn(3, 4, size) for size in (8, kwargs.get("kdim", 8), kwargs.get("vdim", 8)))
        padding = torch.arange(length).repeat(batch, 1) == length - 1
        causal = torch.ones(length, length, dtype=torch.bool).triu(1)
        for masks in ({}, {"key_padding_mask": padding}, {"attn_mask": causal, "key_padding_mask": padding}):
            for each in (True, False):
                want = fused(q, k, v, need_weights=each, average_attn_weights=False, **masks)
                have = net["attention"](q, k, v, need_weights=each, average_attn_weights=False, **masks)
                assert torch.allclose(have[0], want[0], atol=1e-5)
                assert torch.allclose(have[1], want[1], atol=1e-5) if each else have[1] is None
    single = torch.randn(5, 8)
    assert torch.allclose(net["attention"](single, single, single)[0], fused(single, single, single)[0], atol=1e-5)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    x = torch.randn(2, 5, 8)
    want = encoder(x)
    assert len(decompose(encoder)) == 6
    assert torch.allclose(encoder(x), want, atol=1e-5)
    odd = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, add_zero_attn=True)})
    assert not isinstance(split_attention(odd)["attention"], SplitAttention)
    with pytest.raises(ConfigurationError, match="leave no layer to factorise"):
        decompose(odd)


def test_must_02_gradient_of_the_penalty():
    want = GOLDEN["hierarchical_lasso_grad"]
    first, second = (nn.Parameter(tensor(want[key])) for key in ("V_in", "U_out"))
    total = hierarchical_lasso(first, second).sum()
    assert close("R", total.detach(), tensor(want["sum"]))
    by_autograd = torch.autograd.grad(total, (first, second))
    u, v = squared_norms(first.detach(), second.detach())
    closed = (first * lasso_scale(v).unsqueeze(1), second * lasso_scale(u))
    for key, a, b in zip(("grad_V_in", "grad_U_out"), by_autograd, closed):
        assert close(f"{key}, autograd", a, want[key])
        assert close(f"{key}, closed form", b.detach(), want[key])
    norms = [second[:, b:].norm() for b in range(5)]
    for k in range(5):
        assert torch.allclose(closed[1][:, k], second[:, k] * sum(1 / norm for norm in norms[: k + 1]))

    with torch.no_grad():  # an all-zero suffix, and all zeros
        first[3:], second[:, 2:] = 0, 0
    pair = nn.Sequential(nn.Linear(7, 5, bias=False), nn.Linear(5, 5))
    pair[0].weight, pair[1].weight = first, second
    for scale in (1, 0):
        first.data *= scale
        second.data *= scale
        gradients = torch.autograd.grad(hierarchical_lasso(first, second).sum(), (first, second))
        first.grad, second.grad = torch.zeros_like(first), torch.zeros_like(second)
        Prefix(pair).add_penalty_(1.0, {id(first), id(second)})
        for gradient, parameter in zip(gradients, (first, second)):
            assert gradient.isfinite().all()
            assert torch.allclose(parameter.grad, gradient, atol=1e-6)
        assert not gradients[0][3:].any()
        assert not gradients[1][:, 2:].any()


def test_must_03_every_layer_and_rank_once_in_a_cycle():
    ranks = {"a": 3, "b": 1, "dead": 0, "c": 5}
    sampler = RankSampler("per_layer", ranks, seed=3)
    orders = []
    for _ in range(3):
        seen = []
        for _ in range(9):
            active = sampler.draw()
            cut = [(name, rank) for name, rank in active.items() if rank < ranks[name]]
            assert len(cut) <= 1
            seen += cut or [None]
        orders.append(seen)
        pairs = [(name, j) for name, rank in ranks.items() for j in range(1, rank)]
        assert sorted(filter(None, seen)) == sorted(pairs)  # at j = r_i nothing is cut: three of the nine
        assert seen.count(None) == 3
    assert orders[0] != orders[1]
    sampler.draw()
    sampler.shrink({"a": 2, "b": 1, "dead": 0, "c": 1})
    assert [sampler.draw()["a"] for _ in range(4)].count(1) == 1
    again = RankSampler("per_layer", ranks, seed=3)
    sampler.draw()
    again.load_state_dict(sampler.state_dict())
    assert [again.draw() for _ in range(9)] == [sampler.draw() for _ in range(9)]


def test_must_03_other_samplers():
    ranks = {"a": 5, "b": 8, "dead": 0}
    assert RankSampler("fixed", ranks).draw() == {"a": 2, "b": 2, "dead": 0}
    sampler = RankSampler("across_layers", ranks)
    draws = [tuple(sampler.draw().values()) for _ in range(600)]
    assert {a for a, _, _ in draws} == set(range(1, 6))
    assert {b for _, b, _ in draws} == set(range(1, 9))
    assert len(set(draws)) == 40
    assert all(sum(a == j for a, _, _ in draws) > 80 for j in range(1, 6))
    dead = RankSampler("per_layer", {"dead": 0})
    assert dead.draw() == {"dead": 0}


def test_a_graph_made_for_masks_serves_every_rank():
    torch.manual_seed(0)
    net, x = nn.Sequential(split(nn.Conv2d(3, 6, 3), 6), nn.ReLU()), torch.randn(2, 3, 6, 6)
    want = [narrow(net[0], rank)(x).relu() for rank in range(7)]
    prefix = Prefix(net[0], "mask")
    handles = prefix.attach()
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for rank in (6, 2, 5, 0):
        prefix.show(rank)
        assert torch.allclose(compiled(x), want[rank], atol=1e-5)
    assert counter.frame_count == 1
    for handle in handles:
        handle.remove()

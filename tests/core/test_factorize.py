"""Low rank: splitting keeps what a layer computes, merging undoes it, refusals name the layer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from effdl.core.calibrate import recalibrate_batchnorm
from effdl.core.errors import ConfigurationError
from effdl.core.export import save_safetensors
from effdl.core.factorize import (
    SCHEMES,
    dense_weight,
    factorize,
    is_cheaper,
    join,
    load_factorized,
    matricise,
    max_rank,
    merge,
    multiply_adds,
    principal,
    select_factorizable,
    split,
    split_parameters,
    svd,
    unmatricise,
)


def conv(*args, **kwargs):
    return lambda: nn.Conv2d(*args, **kwargs)


LAYERS = {
    "linear": (lambda: nn.Linear(10, 7), (5, 10)),
    "linear-no-bias": (lambda: nn.Linear(6, 9, bias=False), (2, 3, 6)),
    "hf-conv1d": (lambda: Conv1D(7, 10), (5, 10)),
    "1x1": (conv(6, 8, 1), (2, 6, 5, 5)),
    "3x3": (conv(4, 6, 3, padding=1), (2, 4, 7, 6)),
    "3x3-stride": (conv(4, 6, 3, stride=2), (2, 4, 9, 8)),
    "5x5": (conv(3, 5, 5, stride=2, padding=2, bias=False), (2, 3, 11, 9)),
    "3x1": (conv(4, 6, (3, 1), padding=(1, 0)), (2, 4, 7, 6)),
    "1x3": (conv(4, 6, (1, 3), stride=(2, 1), padding=(0, 2)), (2, 4, 7, 6)),
    "uneven": (conv(3, 5, (3, 5), stride=(2, 3), padding=(2, 1), dilation=(1, 2)), (2, 3, 13, 17)),
    "same": (conv(4, 4, 3, padding="same", dilation=2), (2, 4, 7, 6)),
    "reflect": (conv(4, 4, 3, padding=(2, 1), padding_mode="reflect"), (2, 4, 7, 6)),
    "one-dimensional": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9)),
    "three-dimensional": (lambda: nn.Conv3d(2, 3, (1, 3, 3), padding=1), (2, 2, 4, 5, 5)),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", LAYERS)
def test_split_keeps_the_output_at_full_rank_and_cuts_by_svd_below(name, scheme):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    weight = dense_weight(layer)
    full = max_rank(weight.shape, scheme)
    whole = split(layer, full, scheme)
    assert torch.allclose(whole(x), layer(x), atol=1e-5)
    assert all(type(part) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) for part in whole)
    assert torch.allclose(merge(whole)(x), layer(x), atol=1e-5)

    rank = max(1, full // 2)
    matrix = matricise(weight, scheme)
    u, s, vh = svd(matrix, name)
    s[..., rank:] = 0
    cut = copy.deepcopy(layer)
    dense_weight(cut).copy_(unmatricise(u @ (s.unsqueeze(-1) * vh), weight.shape, scheme))
    part = split(layer, rank, scheme)
    assert torch.allclose(part(x), cut(x), atol=1e-5)
    dense = merge(part)
    assert torch.allclose(dense_weight(dense), dense_weight(cut), atol=1e-5)
    assert torch.allclose(dense(x), cut(x), atol=1e-5)
    assert sum(p.weight.numel() for p in part) == split_parameters(weight.shape, rank, scheme)
    assert is_cheaper(weight.shape, rank, scheme) == (sum(p.weight.numel() for p in part) < weight.numel())
    assert torch.equal(unmatricise(matrix, weight.shape, scheme), weight)


def test_split_keeps_device_dtype_and_flags_and_draws_no_random_number():
    layer = nn.Conv2d(4, 6, 3).bfloat16().eval()
    layer.requires_grad_(False)
    state = torch.get_rng_state()
    net = factorize(nn.Sequential(layer), {"0": 2})
    assert torch.equal(torch.get_rng_state(), state)
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in net.parameters())
    assert not net[0].training
    assert not net[0][1].training
    assert split(nn.Linear(4, 4, device="meta"), 2)[0].weight.is_meta


def test_factorize_rebuilds_what_was_saved_and_leaves_the_model_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 8), nn.Linear(8, 2))
    x, ranks = torch.randn(2, 3, 4, 4), {"0": 3, "2": 2}
    small = factorize(net, ranks, "spatial")
    assert type(net[0]) is nn.Conv2d
    assert type(small[3]) is nn.Linear
    torch.manual_seed(1)
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 8), nn.Linear(8, 2))
    factorize(other, ranks, "spatial", inplace=True)
    other.load_state_dict(small.state_dict(), strict=True)
    assert torch.equal(other(x), small(x))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_saved_weights_tell_their_own_architecture(scheme, tmp_path):
    make = lambda: nn.Sequential(nn.Conv2d(3, 8, (1, 3)), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 8))  # noqa: E731
    torch.manual_seed(0)
    ranks, x = {"0": 2, "1": 3, "3": 4}, torch.randn(2, 3, 4, 6)
    small = factorize(make(), ranks, scheme)
    path = save_safetensors(small, tmp_path / "model.safetensors")
    assert torch.equal(load_factorized(make(), tmp_path)(x), small(x))
    dense = make()
    assert join(small, ["0", "1", "3", "gone"]) == ["0", "1", "3"]
    dense.load_state_dict(small.state_dict(), strict=True)
    with pytest.raises(ConfigurationError, match="another network"):
        load_factorized(nn.Sequential(nn.Linear(8, 8)), path)
    with pytest.raises(ConfigurationError, match="path="):
        load_factorized(make(), tmp_path / "none")


def test_what_a_transformer_layer_reads_directly():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    net = nn.TransformerEncoder(layer, 1)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        small = factorize(net, {"layers.0.linear1": 8, "layers.0.linear2": 8})
        assert torch.allclose(small(x), net(x), atol=1e-5)
    with pytest.raises(ConfigurationError, match="out_proj cannot be factorised: it is read by nn.MultiheadAttention"):
        factorize(net, {"layers.0.self_attn.out_proj": 4})


class Own(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (nn.Conv2d(8, 8, 3, groups=8), "groups=8"),
        (Own(4, 4), "a forward of its own"),
        (nn.ConvTranspose2d(4, 4, 3), "neither a Linear nor a convolution"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "parametrised"),
    ],
)
def test_layers_that_cannot_be_split_are_named(layer, said):
    net = nn.Sequential(nn.Linear(4, 4), layer)
    with pytest.raises(ConfigurationError, match="1 cannot be factorised") as raised:
        factorize(net, {"0": 1, "1": 2}, inplace=True)
    assert said in str(raised.value)
    assert type(net[0]) is nn.Linear
    if not isinstance(layer, nn.ConvTranspose2d):
        fit, left = select_factorizable(net)
        assert (list(fit), list(left)) == (["0"], ["1"])
        assert said in left["1"]


def test_refusals_of_names_ranks_ties_and_sequences():
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False), nn.Linear(5, 4))
    for ranks, said in (({"3": 1}, "no layer '3'"), ({"2": 5}, "rank of 2=5"), ({"2": 0}, "rank of 2=0")):
        with pytest.raises(ConfigurationError, match=said):
            factorize(net, ranks)
    with pytest.raises(ConfigurationError, match="scheme='chanel'.*Did you mean 'channel'"):
        factorize(net, {}, "chanel")
    net[1].weight = net[0].weight
    with pytest.raises(ConfigurationError, match=r"1 cannot be factorised: its weight is tied \(0.weight = 1.weight\)"):
        factorize(net, {"1": 2})
    with pytest.raises(ConfigurationError, match="head is no pair of factors"):
        merge(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "head")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_svd_of_bad_weights_names_the_layer(value):
    layer = nn.Conv2d(4, 4, 3)
    with torch.no_grad():
        layer.weight[0, 0, 0, 0] = value
    for scheme in SCHEMES:
        with pytest.raises(RuntimeError, match="stem.conv: .* NaN or infinite"):
            split(layer, 2, scheme, "stem.conv")
        with pytest.raises(RuntimeError, match="stem.conv: .* NaN or infinite"):
            principal(matricise(layer.weight, scheme), "stem.conv")


@pytest.mark.parametrize("shape", [(6, 36), (5, 3, 9), (4, 4)])
def test_the_gram_matrix_in_double_precision_gives_the_svd(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape) * torch.logspace(0, -4, shape[-2]).unsqueeze(-1)
    u, s, vh = svd(matrix, "a")
    vectors, values = principal(matrix, "a")
    assert torch.allclose(values, s, atol=2e-7 * float(s.max()), rtol=0)
    signs = (vectors * u).sum(-2, keepdim=True).sign()
    assert torch.allclose(vectors * signs, u, atol=1e-3)
    assert torch.allclose(vectors.mT @ matrix, signs.mT * s.unsqueeze(-1) * vh, atol=1e-6)


@pytest.mark.parametrize(("precision", "atol"), [(torch.float32, 1e-5), (torch.float64, 2e-7)])
def test_the_gram_matrix_of_a_large_matrix_is_made_block_by_block(precision, atol):
    matrix = torch.randn(2, 300, 400, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.svdvals(matrix.double())
    vectors, values = principal(matrix, "a", precision)
    assert torch.allclose(values.double() / exact[:, :1], exact / exact[:, :1], atol=atol, rtol=0)
    rows = (vectors.mT @ matrix).double()
    assert torch.allclose(rows.norm(dim=-1) / exact[:, :1], exact / exact[:, :1], atol=2e-6, rtol=0)
    matrix[1, 250, 7] = math.inf
    with pytest.raises(RuntimeError, match="a: .* NaN or infinite"):
        principal(matrix, "a", precision)


def test_multiply_adds_are_counted_at_the_outputs():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Flatten(), nn.Linear(128, 5), nn.Dropout())
    x = torch.randn(2, 3, 8, 8)
    assert multiply_adds(net, (x,)) == {"0": 2 * 16 * 8 * 27, "2": 2 * 128 * 5}
    small = factorize(net, {"0": 3}, "spatial")
    assert multiply_adds(small, (x,))["0.0"] == 2 * (4 * 8) * 3 * 9
    assert net.training
    assert not net[0]._forward_hooks


def test_batch_norm_statistics_are_the_average_of_the_batches():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    net[1].eval()
    batches = [(torch.randn(6, 3), 0) for _ in range(3)]
    net(batches[0][0])
    seen = torch.stack([net[0](x) for x, _ in batches]).detach()
    state = torch.get_rng_state()
    recalibrate_batchnorm(net, batches)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.allclose(net[2].running_mean, seen.mean((0, 1)), atol=1e-6)
    assert torch.allclose(net[2].running_var, seen.var(1).mean(0), atol=1e-6)
    assert [m.training for m in net] == [True, False, True]
    assert net[2].momentum == 0.1
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ConfigurationError, match="calibration_batches"):
        recalibrate_batchnorm(net, [])
    with pytest.raises(RuntimeError):
        recalibrate_batchnorm(net, [batches[0], torch.randn(2, 99)])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))
    assert net[2].momentum == 0.1
    recalibrate_batchnorm(net[:2], [])  # nothing to do

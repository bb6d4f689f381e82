"""trained-rank-pruning: golden numbers and identities (checks 1-3, 7)."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from effdl.callbacks import TrainedRankPruningCallback
from effdl.compression import trained_rank_pruning
from effdl.compression.trained_rank_pruning import decompose, final_ranks, kept_rank, select_layers, truncate
from effdl.core.factorize import SCHEMES, dense_weight, matricise, split
from tests.compression.trained_rank_parts import GOLDEN, ONE, Net, Scripted, close, fit, share, tensor

NAMES = {"NC": "channel", "VH": "spatial", "ND": "decouple"}


def test_must_01_golden_criteria():
    s, want = tensor(GOLDEN["singular_values_NC"]), GOLDEN["criteria_on_singular_values_NC"]
    rules = {"energy_0.9_squared": ("energy", 0.9), "energy_0.9_plain": ("energy_plain", 0.9)}
    rules |= {"value_0.05": ("value", 0.05), "linear_0.5": ("linear", 0.5)}
    assert {name: int(kept_rank(s, rule)) for name, rule in rules.items()} == want


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


@pytest.mark.parametrize("reach", [0.2, 0.01])
def test_large_matrices_are_cut_in_float32_down_to_where_it_is_exact(monkeypatch, reach):
    """The last singular value that is kept is ``reach`` times the first."""
    torch.manual_seed(0)
    (u, _), (v, _) = (torch.linalg.qr(torch.randn(size, 256, dtype=torch.float64)) for size in (256, 300))
    s = torch.cat([torch.logspace(0, math.log10(reach), 200), torch.full((56,), reach / 2)]).double()
    weight = ((u * s) @ v.mT).float()
    kept, exact = u[:, :200] * s[:200] @ v.mT[:200], u[:, :200] @ v.mT[:200]
    asked = []
    principal = trained_rank_pruning.principal
    spy = lambda *args: (asked.append(args[-1]), principal(*args))[1]  # noqa: E731
    monkeypatch.setattr(trained_rank_pruning, "principal", spy)
    for turned in (False, True):
        cut = truncate(weight.t() if turned else weight, "channel", ("value", 0.75 * reach))
        assert int(cut.rank) == 200
        found = [part.t() if turned else part for part in (cut.weight, cut.subgradient)]
        assert torch.allclose(found[0].double(), kept, atol=1e-6)
        assert torch.allclose(found[1].double(), exact, atol=2e-5)
    assert asked == [torch.float32] * 2 if reach > trained_rank_pruning.FLAT else [torch.float32, torch.float64] * 2


def low_rank_weight(seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(160, 8, generator=g) @ torch.randn(8, 20 * 9, generator=g)
    return (weight + 0.3 * torch.randn(160, 180, generator=g)).view(160, 20, 3, 3)


@pytest.mark.parametrize("turned", [False, True])
def test_a_cut_that_starts_from_the_last_one_is_the_svds(monkeypatch, turned):
    asked, principal = [], trained_rank_pruning.principal
    monkeypatch.setattr(trained_rank_pruning, "principal", lambda *a: (asked.append(a[1]), principal(*a))[1])
    rule = "energy", 0.9
    weight = low_rank_weight().flatten(1).t() if turned else low_rank_weight()
    cut = truncate(weight, "channel", rule)
    assert cut.basis.shape == (160, int(cut.rank))
    moved = cut.weight + 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * weight.std()
    exact = truncate(moved, "channel", rule)
    assert len(asked) == 2
    warm = truncate(moved, "channel", rule, basis=cut.basis)
    assert len(asked) == 2  # nothing was decomposed whole
    assert int(warm.rank) == int(exact.rank)
    for a, b in ((warm.weight, exact.weight), (warm.subgradient, exact.subgradient)):
        assert (a - b).norm() < 1e-3 * b.norm()
    foreign = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))  # full of rank: nothing is near
    again = truncate(foreign, "channel", rule, basis=cut.basis)
    assert len(asked) == 3
    assert again.basis is None
    assert torch.equal(again.weight, truncate(foreign, "channel", rule).weight)

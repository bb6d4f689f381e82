"""The bracketed selection equals torch's own, whatever the scores and wherever the place."""

from __future__ import annotations

import pytest
import torch

from effdl.core import selection
from effdl.core.selection import by_sorting, group_neighbours, neighbours


def scores(kind: str, n: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, generator=g)
    return {
        "normal": x.abs(),
        "signed": x,
        "tied": (x * 3).round(),
        "constant": torch.full((n,), 0.25),
        "sorted": x.sort().values,
        "half zeros": x.relu(),
        "outliers": torch.where(torch.rand(n, generator=g) < 1e-3, x * 1e30, x),
        # every sampled entry is small: the bracket misses and the plain selection takes over
        "against the sample": torch.where(torch.arange(n) % selection.STRIDE == 0, x * 1e-6, x.abs() + 1),
        "float64": x.double().abs(),
        "bfloat16": x.bfloat16(),
    }[kind]


KINDS = ["normal", "signed", "tied", "constant", "sorted", "half zeros", "outliers", "against the sample", "float64"]


@pytest.mark.parametrize("n", [2, 3, 1000, selection.SMALL + 1, 200_003])
@pytest.mark.parametrize("kind", [*KINDS, "bfloat16"])
def test_neighbours_are_those_of_kthvalue(kind, n):
    x = scores(kind, n)
    for place in sorted({0, n // 1000, n // 10, n // 2, int(0.97 * n), n - 2} & set(range(n - 1))):
        want = torch.stack([x.kthvalue(n - place).values, x.kthvalue(n - place - 1).values])
        assert torch.equal(neighbours(x, torch.tensor(place)), want), place
        assert torch.equal(by_sorting(x, torch.tensor(place)), want), place


def test_the_bracket_is_narrow_and_misses_only_an_untypical_sample(monkeypatch):
    searched, two = [], selection._two
    monkeypatch.setattr(selection, "_two", lambda flat, place: searched.append(flat.numel()) or two(flat, place))
    for kind in KINDS:
        neighbours(scores(kind, 500_000), torch.tensor(50_000))
    fully = {kind for kind, count in zip(KINDS, searched) if count > 25_000}
    assert fully == {"tied", "constant", "against the sample"}


def test_neighbours_take_any_shape_detach_and_break_no_graph():
    x = torch.randn(300, 20, 7, requires_grad=True)
    compiled = torch.compile(lambda x, i: neighbours(x.abs(), i) * 2, backend="eager", fullgraph=True)
    for place in (5, 40_000):
        got = neighbours(x.abs(), torch.tensor(place))
        assert not got.requires_grad
        assert torch.equal(compiled(x, torch.tensor(place)), 2 * got)
    torch.library.opcheck(torch.ops.effdl.neighbours.default, (x.detach(), torch.tensor(3)))


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (1, 2), (4, 8)])
def test_group_neighbours_are_those_of_a_sort(n, m):
    x = torch.randn(3, 2 * m, 5)
    for dim, rows in ((1, x.movedim(1, -1)), (2, torch.randn(3, 7, 2 * m))):
        y = x if dim == 1 else rows
        ordered = rows.unflatten(-1, (-1, m)).sort(-1, descending=True).values
        for got, place in zip(group_neighbours(y, n, m, dim), (n - 1, n)):
            want = ordered[..., place : place + 1].expand_as(ordered).flatten(-2)
            assert torch.equal(got, want.movedim(-1, dim))

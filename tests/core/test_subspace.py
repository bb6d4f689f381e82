"""The leading singular vectors from a start nearby."""

from __future__ import annotations

import pytest
import torch

from effdl.core.subspace import leading


def low_rank(rank, noise, rows=160, columns=300, seed=0):
    """A float32 matrix whose singular values fall from 1 to 0.5 over ``rank`` of them, and a flat rest."""
    g = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(size, rank, generator=g)).Q for size in (rows, columns))
    rest = torch.randn(rows, columns, generator=g) * noise / (rows**0.5 + columns**0.5)
    return u * torch.linspace(1, 0.5, rank) @ v.mT + rest, u


def moved(matrix, by, seed=1):
    change = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(seed))
    return matrix + by * matrix.norm() * change / change.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_it_is_the_svd_cut_to_that_share_of_the_energy(dtype, keep):
    matrix, start = low_rank(10, 0.05)
    matrix = moved(matrix, 0.1).to(dtype)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    energy = s.square().cumsum(0) / s.square().sum()
    rank = int((energy < keep).sum()) + 1
    part = leading(matrix, keep, start)
    assert part.s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert part.s.tolist() == pytest.approx(s[:rank].tolist(), rel=1e-4)
    exact = u[:, :rank] * s[:rank] @ vh[:rank]
    assert (part.u @ part.rows - exact).norm() < 1e-3 * exact.norm()
    assert torch.allclose(part.u.mT @ part.u, torch.eye(rank, dtype=part.u.dtype), atol=1e-5)
    assert (part.rows / part.s[:, None] @ (part.rows / part.s[:, None]).mT - torch.eye(rank)).abs().max() < 1e-5


def test_the_start_matters_only_to_the_time():
    matrix, start = low_rank(10, 0.05)
    other = torch.linalg.qr(torch.randn(160, 10, generator=torch.Generator().manual_seed(5))).Q
    near, far = (leading(matrix, 0.9, columns) for columns in (start, other))
    assert len(near.s) == len(far.s)
    assert torch.allclose(near.u @ near.rows, far.u @ far.rows, atol=1e-4)


def test_what_cannot_be_found_there_is_not_given():
    matrix, start = low_rank(10, 0.05)
    assert leading(matrix, 0.9, start) is not None
    flat = torch.randn(160, 300, generator=torch.Generator().manual_seed(0))
    assert leading(flat, 0.9, start) is None  # 18 directions do not hold so much
    assert leading(flat, 0.1, start) is None  # nor do they settle
    assert leading(torch.zeros_like(matrix), 0.9, start) is None
    for bad in (float("nan"), float("inf")):
        broken = matrix.clone()
        broken[3, 7] = bad
        assert leading(broken, 0.9, start) is None


def test_the_global_random_stream_is_left_alone_and_two_calls_agree():
    matrix, start = low_rank(10, 0.05)
    before = torch.get_rng_state()
    first = leading(matrix, 0.9, start)
    torch.manual_seed(123)
    second = leading(matrix, 0.9, start)
    torch.set_rng_state(before)
    leading(matrix, 0.9, start)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.u, second.u)
    assert torch.equal(first.rows, second.rows)

"""Hessian products, both ends of the spectrum and traces against dense matrices."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effdl.core.errors import ConfigurationError
from effdl.core.hessian import HessianOperator, block_traces, extreme_eigenvalues


def quadratic(matrix):
    """The operator of 0.5 w^T A w, whose Hessian is A."""
    w = torch.ones(len(matrix), dtype=matrix.dtype, requires_grad=True)
    return HessianOperator(lambda _: 0.5 * w @ matrix @ w, [w], [None])


def small_net(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    return net, torch.randn(12, 4, dtype=dtype), torch.randint(3, (12,))


def dense_hessian(net, x, y):
    """(P, P) by torch.func, independent of the operator."""
    names = list(dict(net.named_parameters()))
    shapes = [p.shape for p in net.parameters()]
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])

    def loss(vector):
        pieces = vector.split([s.numel() for s in shapes])
        state = {n: piece.view(s) for n, piece, s in zip(names, pieces, shapes)}
        return F.cross_entropy(torch.func.functional_call(net, state, (x,)), y)

    return torch.func.hessian(loss)(flat)


def test_product_is_the_dense_hessian_times_v():
    net, x, y = small_net()
    H = HessianOperator(lambda b: F.cross_entropy(net(b[0]), b[1]), list(net.parameters()), [(x, y)])
    v = torch.randn(H.size, dtype=torch.float64)
    assert torch.allclose(H(v), dense_hessian(net, x, y) @ v, atol=1e-12)


def test_batches_are_weighted_by_size():
    net, x, y = small_net()
    batches = [(x[:9], y[:9]), (x[9:], y[9:])]
    parts = HessianOperator(lambda b: F.cross_entropy(net(b[0]), b[1]), list(net.parameters()), batches, sizes=[9, 3])
    v = torch.randn(parts.size, dtype=torch.float64)
    assert torch.allclose(parts(v), dense_hessian(net, x, y) @ v, atol=1e-12)


def test_a_block_is_the_operator_of_its_parameters():
    net, x, y = small_net()
    block = HessianOperator(lambda b: F.cross_entropy(net(b[0]), b[1]), [net[2].weight], [(x, y)])
    start = sum(p.numel() for p in net[0].parameters())
    dense = dense_hessian(net, x, y)[start : start + 30, start : start + 30]
    assert extreme_eigenvalues(block, 1e-6).largest == pytest.approx(torch.linalg.eigvalsh(dense)[-1].item(), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_must_07_dense_net_spectrum(seed, dtype):
    """lambda_max and lambda_min of a net with 83 parameters agree with eigvalsh within 1e-3."""
    net, x, y = small_net(seed, dtype)
    H = HessianOperator(lambda b: F.cross_entropy(net(b[0]), b[1]), list(net.parameters()), [(x, y)])
    assert H.size <= 100
    expected = torch.linalg.eigvalsh(dense_hessian(net.double(), x.double(), y))
    net.to(dtype)
    found = extreme_eigenvalues(H)
    assert found.converged
    assert found.largest == pytest.approx(expected[-1].item(), rel=1e-3)
    assert found.smallest == pytest.approx(expected[0].item(), abs=1e-3 * expected[-1].item())


def test_must_07_largest_by_sign_not_by_magnitude():
    """Eigenvalues (5, -8): the maximum is 5 and the minimum -8, where plain power iteration says 8."""
    q, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    A = q @ torch.diag(torch.tensor([5.0, -8.0, 1.0, -2.0, 0.5, 3.0], dtype=torch.float64)) @ q.T
    for matrix in (A, torch.diag(torch.tensor([5.0, -8.0]))):
        found = extreme_eigenvalues(quadratic(matrix))
        assert found.largest == pytest.approx(5.0, rel=1e-4)
        assert found.smallest == pytest.approx(-8.0, rel=1e-4)


@pytest.mark.parametrize("size", [1, 2, 300])
def test_spectrum_of_awkward_matrices(size):
    """One parameter; a multiple of the identity; a wide spectrum where copies of Ritz values appear; zero."""
    assert extreme_eigenvalues(quadratic(3.0 * torch.eye(size)))[:2] == pytest.approx((3.0, 3.0), rel=1e-5)
    assert extreme_eigenvalues(quadratic(torch.zeros(size, size)))[:2] == (0.0, 0.0)
    wide = torch.diag(torch.logspace(-3, 3, size, dtype=torch.float64)) if size > 1 else torch.eye(1)
    found = extreme_eigenvalues(quadratic(wide), 1e-8, max_iterations=200)
    top = wide.diagonal().max().item()
    assert found.largest == pytest.approx(top, rel=1e-6)
    assert found.smallest == pytest.approx(wide.diagonal().min().item(), abs=1e-4 * top)


def test_linear_loss_unused_parameter_and_divergence():
    w, unused = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    linear = HessianOperator(lambda _: w.sum(), [w, unused], [None])
    assert not linear(torch.ones(5)).any()
    nan = HessianOperator(lambda _: (w * float("nan")).square().sum(), [w], [None])
    found = extreme_eigenvalues(nan)
    assert found.largest != found.largest
    assert not found.converged


def test_trace_is_exact_for_a_diagonal_and_unbiased_otherwise():
    diagonal = quadratic(torch.diag(torch.arange(1.0, 6.0)))
    assert block_traces(diagonal, 1).sum() == pytest.approx(15.0)
    net, x, y = small_net()
    H = HessianOperator(lambda b: F.cross_entropy(net(b[0]), b[1]), list(net.parameters()), [(x, y)])
    samples = block_traces(H, 500).sum(1)
    error = (samples.mean() - dense_hessian(net, x, y).trace()).abs()
    assert error <= 3 * samples.std() / 500**0.5


def test_attention_has_a_double_backward():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 4, 8)
    weight = attention.in_proj_weight
    H = HessianOperator(lambda b: attention(b, b, b, need_weights=False)[0].square().mean(), [weight], [x])
    assert H(torch.ones(H.size)).abs().sum() > 0


def test_nothing_is_disturbed():
    net, x, y = small_net()
    H = HessianOperator(lambda b: F.cross_entropy(net(b[0]), b[1]), list(net.parameters()), [(x, y)])
    state, rng = [p.clone() for p in net.parameters()], torch.get_rng_state()
    with torch.no_grad():  # as inside a validation loop
        extreme_eigenvalues(H)
        block_traces(H, 2)
    assert all(torch.equal(a, b) for a, b in zip(state, net.parameters()))
    assert torch.equal(rng, torch.get_rng_state())
    assert all(p.grad is None for p in net.parameters())


def test_arguments():
    w = torch.ones(2, requires_grad=True)
    for arguments in ([], [None]), ([w], []), ([torch.ones(2)], [None]):
        with pytest.raises(ConfigurationError):
            HessianOperator(lambda _: w.sum(), *arguments)
    with pytest.raises(ConfigurationError, match="sizes"):
        HessianOperator(lambda _: w.sum(), [w], [None], sizes=[1, 2])
    for call, arguments in [(extreme_eigenvalues, (0.0,)), (extreme_eigenvalues, (1e-3, 0)), (block_traces, (0,))]:
        with pytest.raises(ConfigurationError):
            call(quadratic(torch.eye(2)), *arguments)

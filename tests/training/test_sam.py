"""Sharpness-aware minimisation (slug: sam): maths, callbacks, diagnostics."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effdl.core.errors import ConfigurationError
from effdl.core.hessian import HessianOperator, block_traces, extreme_eigenvalues
from effdl.training.sam import perturbation, perturbed, sam_step
from effdl.training.sharpness import (
    loss_plane,
    ntk_condition_number,
    preactivation_hessians,
    record_activity,
    weight_norm,
)
from tests.support import golden

GOLDEN = golden("sam")


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def golden_net(case):
    h, din = f64(case["W1"]).shape
    net = nn.Sequential(nn.Linear(din, h), nn.GELU(), nn.Linear(h, len(case["b2"]))).double()
    load(net, [case[k] for k in ("W1", "b1", "W2", "b2")])
    return net


def load(net, values):
    with torch.no_grad():
        for p, value in zip(net.parameters(), values):
            p.copy_(f64(value))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: c["optimizer"] + ("-ASAM" if c["adaptive"] else ""))
def test_must_01_golden_parity(case):
    """Losses, norm, SAM gradient and parameters after every step, to the golden file's seven decimals."""
    net = golden_net(case)
    optimizer = getattr(torch.optim, case["optimizer"])(net.parameters(), **case["optimizer_kwargs"])
    compared = 0
    for x, y, step in zip(case["X"], case["Y"], case["steps"]):
        x, y = f64(x), torch.tensor(y)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            return loss

        found = sam_step(net.parameters(), closure, optimizer, case["rho"], case["adaptive"])
        assert found.loss.item() == pytest.approx(step["loss_w"], abs=1e-6)
        assert found.grad_norm.item() == pytest.approx(step["grad_norm"], abs=1e-6)
        assert found.loss_perturbed.item() == pytest.approx(step["loss_perturbed"], abs=1e-6)
        assert torch.allclose(net[0].weight.grad, f64(step["sam_grad_W1"]), rtol=0, atol=1e-6)
        for p, expected in zip(net.parameters(), step["params_after"] or []):
            assert torch.allclose(p, f64(expected), rtol=0, atol=1e-6)
            compared += 1
    assert compared == 8  # the first and the last step


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: c["optimizer"] + ("-ASAM" if c["adaptive"] else ""))
def test_must_01_golden_hessian_and_active_fraction(case):
    """Hessian numbers of the final net to 1e-4 relative; the active fraction exactly (seven decimals)."""
    net, expected = golden_net(case), case["hessian_final"]
    load(net, case["steps"][-1]["params_after"])
    x, y = f64(case["X"][expected["on_batch"]]), torch.tensor(case["Y"][expected["on_batch"]])

    def operator(parameters):
        return HessianOperator(lambda b: F.cross_entropy(net(b[0]), b[1]), parameters, [(x, y)])

    whole, block = operator(list(net.parameters())), operator([net[0].weight])
    found = extreme_eigenvalues(whole, 1e-4)
    assert found.largest == pytest.approx(expected["lambda_max_full"], rel=1e-4)
    assert found.smallest == pytest.approx(expected["lambda_min_full"], rel=1e-4)
    assert extreme_eigenvalues(block, 1e-4).largest == pytest.approx(expected["lambda_max_block_W1"], rel=1e-4)
    rows = torch.stack([whole(v) for v in torch.eye(whole.size, dtype=torch.float64)])
    assert rows.trace().item() == pytest.approx(expected["trace"], rel=1e-4)
    samples = block_traces(whole, 400).sum(1)
    assert abs(samples.mean() - expected["trace"]) <= 3 * samples.std() / 400**0.5
    with record_activity({"act": net[1]}) as activity, torch.no_grad():
        net(f64(case["X"][0]))
    assert round(activity()["act"].active_fraction, 7) == case["active_fraction_hidden_batch0"]


def quadratic_step(w, gradient, lr, rho):
    w = w.clone().requires_grad_()
    optimizer = torch.optim.SGD([w], lr=lr)

    def closure():
        w.grad = gradient(w.detach())
        return (w * w.grad).sum() / 2

    sam_step([w], closure, optimizer, rho)
    return w


def test_must_02_quadratic_closed_form():
    """w1 = w - lr A (w + rho A w / ||A w||), to 1e-7."""
    q = GOLDEN["quadratic"]
    a, w = f64(q["a"]), f64(q["w"])
    w1 = quadratic_step(w, lambda v: a * v, q["lr"], q["rho"])
    assert torch.allclose(w1, f64(q["w1"]), rtol=0, atol=1e-7)
    closed = w - q["lr"] * a * (w + q["rho"] * a * w / (a * w).norm())
    assert torch.allclose(w1, closed, rtol=0, atol=1e-12)


def test_must_02_isotropic_quadratic_is_radial():
    """L = ||w||^2 / 2: e is radial, and g_sam = w (1 + rho / ||w||)."""
    w, rho = f64([3.0, -4.0]), 0.7
    (e,), _ = perturbation([w], [w], rho)
    assert torch.allclose(e, rho * w / 5)
    stepped = quadratic_step(w, torch.clone, 1.0, rho)
    assert torch.allclose(w - stepped, w * (1 + rho / 5), rtol=0, atol=1e-7)


def test_one_norm_over_all_parameters():
    """Not per tensor, not per parameter group: the whole perturbation has length rho."""
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=generator) for shape in [(3, 4), (5,), ()]]
    e, norm = perturbation(grads, grads, rho=0.3)
    assert torch.allclose(torch.cat([t.flatten() for t in e]).norm(), torch.tensor(0.3))
    assert torch.allclose(norm, torch.cat([g.flatten() for g in grads]).norm())


def test_adaptive_perturbation_in_units_of_the_weights():
    """||e / |w||| = rho, so a rescaled layer is perturbed as before in its own units."""
    w, g = f64([2.0, -3.0, 0.5]), f64([0.1, 0.4, -1.0])
    (e,), norm = perturbation([w], [g], rho=0.5, adaptive=True)
    assert torch.allclose((e / w).norm(), f64(0.5))
    assert torch.allclose(e, 0.5 * w**2 * g / (w.abs() * g).norm())
    (scaled,), _ = perturbation([10 * w], [g / 10], rho=0.5, adaptive=True)
    assert torch.allclose(scaled, 10 * e)


@pytest.mark.parametrize("bad", [0.0, float("inf"), float("nan")])
@pytest.mark.parametrize("adaptive", [False, True])
def test_zero_or_overflowed_gradient_gives_no_perturbation(bad, adaptive):
    grads = [torch.tensor([bad, 1.0 if bad else 0.0]), torch.zeros(2)]
    e, _ = perturbation([torch.ones(2)] * 2, grads, 0.1, adaptive)
    assert all(not t.any() for t in e)


def test_half_precision_gradients_give_a_float32_perturbation():
    g = torch.full((4096,), 3e-4, dtype=torch.float16)  # squares underflow in fp16
    (e,), norm = perturbation([torch.ones(4096, dtype=torch.float16)], [g], 0.05)
    assert e.dtype == torch.float32
    assert torch.allclose(e.norm(), torch.tensor(0.05), rtol=1e-3)
    assert norm > 0


def test_perturbed_moves_only_what_is_trained_and_restores_exactly():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    net[0].requires_grad_(False)
    net[1](torch.randn(2, 3)).sum().backward()  # the last layer has no gradient
    before, storage = [p.clone() for p in net.parameters()], [p.data_ptr() for p in net.parameters()]

    def crash():
        with perturbed(net.parameters(), 0.1):
            moved = [not torch.equal(a, b) for a, b in zip(before, net.parameters())]
            assert moved == [False, False, True, True, False, False]
            assert torch.is_grad_enabled()
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        crash()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
    assert storage == [p.data_ptr() for p in net.parameters()]


def test_complex_parameters_are_two_real_ones():
    w = torch.tensor([1 + 2j, 3 - 1j], requires_grad=True)
    w.abs().square().sum().backward()
    with perturbed([w], 0.1):
        moved = (w.detach() - torch.tensor([1 + 2j, 3 - 1j])).abs().norm()
    assert torch.allclose(moved, torch.tensor(0.1), rtol=1e-5)


@pytest.mark.parametrize("rho", [-0.1, float("nan"), float("inf"), "big", None])
def test_rho_is_checked(rho):
    with pytest.raises(ConfigurationError, match="rho"):
        sam_step([], lambda: None, None, rho)


def test_no_gradient_is_an_error():
    with pytest.raises(ConfigurationError, match="gradient"), perturbed([nn.Parameter(torch.ones(1))], 0.1):
        pass


@pytest.mark.parametrize("depth", [2, 3])
def test_must_08_one_example_block_identity(depth):
    """lambda_max(H_W) = ||a||^2 lambda_max(Hcal) to 1e-5 on a GELU MLP, for every layer."""
    torch.manual_seed(0)
    widths = [4, 6, 5, 3] if depth == 3 else [4, 6, 3]
    layers = [nn.Linear(i, o).double() for i, o in zip(widths, widths[1:])]
    x, y = torch.randn(4, dtype=torch.float64), torch.tensor(1)

    def network(batch):
        h = batch
        for layer in layers[:-1]:
            h = F.gelu(layer(h))
        return F.cross_entropy(layers[-1](h), y)

    found = preactivation_hessians(layers, F.gelu, lambda z: F.cross_entropy(z, y), x)
    for layer, (a, curvature) in zip(layers, found):
        H = HessianOperator(network, [layer.weight], [x])
        dense = torch.stack([H(v) for v in torch.eye(H.size, dtype=torch.float64)])
        assert torch.allclose(dense, torch.kron(curvature, torch.outer(a, a)), atol=1e-10)
        top = a.square().sum() * torch.linalg.eigvalsh(curvature)[-1]
        assert extreme_eigenvalues(H, 1e-4).largest == pytest.approx(top.item(), rel=1e-5)


def test_active_fraction_equals_a_manual_count():
    """Activation modules at their input, other layers at their output, over several batches of unequal size."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    batches = [torch.randn(5, 3, 4), torch.randn(2, 3, 4)]  # (example, token, feature)
    with record_activity({"act": net[1], "fc2": net[2]}) as activity, torch.no_grad():
        for batch in batches:
            net(batch)
    x = torch.cat(batches)
    h1 = net[0](x)
    h2 = net[2](F.gelu(h1))
    found = activity()
    assert found["act"].active_fraction == (h1 > 0).double().mean().item()
    assert found["fc2"].active_fraction == (h2 > 0).double().mean().item()
    assert found["act"].norm == pytest.approx(F.gelu(h1).flatten(1).norm(dim=1).mean().item(), rel=1e-5)
    assert not any(module._forward_hooks for module in net)


def test_ntk_condition_number_of_a_linear_model():
    """f(x) = w.x has the kernel X X^T."""
    torch.manual_seed(0)
    x, layer = torch.randn(4, 7), nn.Linear(7, 3, bias=False)
    values = torch.linalg.eigvalsh(x.double() @ x.double().T)
    found = ntk_condition_number(layer, [layer.weight], x, logit=2)
    assert found == pytest.approx((values[-1] / values[0]).item(), rel=1e-4)
    assert ntk_condition_number(layer, [layer.weight], torch.cat([x, x[:1]])) == float("inf")


def test_loss_plane_is_filter_normalised_and_restores():
    torch.manual_seed(0)
    layer = nn.Linear(5, 3)
    before = [p.clone() for p in layer.parameters()]
    rows = loss_plane(lambda: (layer.weight - before[0]).square().sum(), list(layer.parameters()), 0.5, 3)
    assert rows[1, 1] == 0
    expected = 0.25 * before[0].square().sum()  # every filter of the direction is as long as that of w
    assert torch.allclose(torch.stack([rows[0, 1], rows[1, 0]]), expected.expand(2), rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters()))
    assert torch.allclose(weight_norm(before), torch.cat([p.flatten() for p in before]).norm())

"""polycom: the closed-form backward pass, its memory, and torch's transforms of it (check 5)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from effdl.architectures.polycom import PolyNorm, PolyReLU, poly_norm, poly_relu


def coefficients(order: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(order, dtype=torch.float64, generator=generator).requires_grad_()
    return weight, torch.randn(1, dtype=torch.float64, generator=generator).requires_grad_()


FORMS = [("relu", {})] + [("norm", {"norm": n, "dim": d, "eps": e}) for n, d, e in (("rms", -1, 1e-6), ("l2", 1, 1e-3))]


@pytest.mark.parametrize("order", [1, 2, 3, 8])
@pytest.mark.parametrize(("kind", "options"), FORMS, ids=["relu", "rms", "l2-dim1"])
def test_must_05_fused_backward_equals_autograd(kind, options, order):
    function = poly_relu if kind == "relu" else poly_norm
    weight, bias = coefficients(order)
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(3, 5, 6, dtype=torch.float64)
    grads = [
        torch.autograd.grad(function(x, weight, bias, checkpoint=lean, **options), (x, weight, bias), grad)
        for lean in (True, False)
    ]
    for lean, reference in zip(*grads):
        torch.testing.assert_close(lean, reference, rtol=1e-6, atol=1e-6 * reference.abs().max().item())


@pytest.mark.parametrize(("kind", "options"), FORMS, ids=["relu", "rms", "l2-dim1"])
def test_must_05_gradcheck(kind, options):
    function = poly_relu if kind == "relu" else poly_norm
    inputs = (torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True), *coefficients())
    assert torch.autograd.gradcheck(lambda *t: function(*t, **options), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: function(*t, **options), inputs)  # Hessian-vector products


def naive_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The formula as it is written down: an independent reference."""

    def normed(v):
        return v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-6)

    return weight[0] * normed(x**3) + weight[1] * normed(x**2) + weight[2] * normed(x) + bias


def naive_relu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    h = torch.relu(x)
    return weight[0] * h**3 + weight[1] * h**2 + weight[2] * h + bias


def saved_bytes(act: Callable, x: torch.Tensor) -> int:
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = act(x)
    assert kept.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize(("kind", "naive", "times"), [(PolyNorm, naive_norm, 6), (PolyReLU, naive_relu, 3)])
def test_must_05_saved_for_backward(kind, naive, times):
    act, x = kind(), torch.randn(16, 512, requires_grad=True)
    size = x.numel() * x.element_size()
    assert saved_bytes(act, x) <= 1.5 * size
    assert times * size <= saved_bytes(lambda x: naive(x, act.weight, act.bias), x) <= (times + 0.5) * size
    torch.testing.assert_close(act(x), naive(x, act.weight, act.bias))
    half = x.detach().bfloat16().requires_grad_()
    assert saved_bytes(kind(), half) <= 1.5 * size / 2  # bf16 is kept as bf16


@pytest.mark.parametrize("kind", [PolyNorm, PolyReLU])
def test_fused_form_works_under_functorch_and_compile_and_export(kind):
    act, x = kind(), torch.randn(6, 16)

    def loss(weight, sample):
        return torch.func.functional_call(act, {"weight": weight}, (sample,)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(act.weight.detach(), x)
    torch.testing.assert_close(per_sample.sum(0), torch.func.grad(loss)(act.weight.detach(), x), rtol=1e-4, atol=1e-4)
    exported = torch.export.export(act, (x,)).module()
    torch.testing.assert_close(exported(x), act(x))
    torch.compiler.reset()
    compiled = torch.compile(act, fullgraph=True, backend="aot_eager")  # fullgraph: a graph break is an error
    leaf = x.clone().requires_grad_()
    mine = x.clone().requires_grad_()
    compiled(leaf).square().sum().backward()
    act(mine).square().sum().backward()
    torch.testing.assert_close(leaf.grad, mine.grad)

"""What sharpness-aware training changes in a network: the paper's diagnostics (slug: ``sam``).

Chen, Hsieh, Gong, "When Vision Transformers Outperform ResNets ..." (ICLR 2022, arXiv 2106.01548): Hessian eigenvalues
of the network and of its blocks (``effdl.core.hessian``), the share of active neurons, norms, the condition number of
the neural tangent kernel, and the loss along a random plane. Plain torch; every function leaves the model as it found
it. Evaluation mode is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effdl.core.capture import first_tensor
from effdl.core.errors import check, check_integer
from effdl.core.hessian import HessianOperator, block_traces, extreme_eigenvalues

_ACTIVATIONS = ("relu", "gelu", "silu", "swish", "mish", "softplus", "elu")


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation function, by the name of its class (timm and transformers have their own)."""
    name = type(module).__name__.lower()
    return not any(module.children()) and any(word in name for word in _ACTIVATIONS)


class LayerActivity(NamedTuple):
    """One hidden layer over a probe set."""

    active_fraction: float
    """Share of (token, neuron) entries with a positive pre-activation."""
    norm: float
    """Mean over examples of the Euclidean norm of the layer's output."""


@contextmanager
def record_activity(layers: Mapping[str, nn.Module]):
    """Measure layers during the forwards run inside the block; yields a function that returns the result.

    An activation module is measured at its input (the pre-activation). Any other layer, such as the ``fc1`` before a
    functional ``F.gelu``, is measured at its output. Examples are the first dimension.

    Example::

        with record_activity({"act": model.act}) as result, torch.no_grad():
            model(x)
        result()["act"].active_fraction
    """
    sums = {name: torch.zeros(4, dtype=torch.float64) for name in layers}  # positive, entries, norms, examples

    def hook_for(name: str):
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            before = inputs[0] if is_activation(module) else output
            norms = output.detach().flatten(1).float().norm(dim=1)
            parts = [(before > 0).sum(), norms.new_tensor(before.numel()), norms.sum(), norms.new_tensor(len(norms))]
            sums[name] += torch.stack([p.double() for p in parts]).cpu()

        return hook

    def result() -> dict[str, LayerActivity]:
        seen = {name: s.tolist() for name, s in sums.items() if s[1] > 0}
        return {name: LayerActivity(s[0] / s[1], s[2] / s[3]) for name, s in seen.items()}

    handles = [layer.register_forward_hook(hook_for(name)) for name, layer in layers.items()]
    try:
        yield result
    finally:
        for handle in handles:
            handle.remove()


def weight_norm(parameters: Iterable[Tensor]) -> Tensor:
    """``||w||_2`` of all parameters as one vector, in float32 or better."""
    norms = [p.detach().to(torch.promote_types(p.dtype, torch.float32)).norm() for p in parameters]
    return torch.stack(norms).norm()


def preactivation_hessians(
    layers: Sequence[nn.Linear], activation: Callable[[Tensor], Tensor], loss: Callable[[Tensor], Tensor], x: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """``(a_{k-1}, Hcal_k)`` for every layer of an MLP ``h_k = W_k a_{k-1} + b_k``, ``a_k = act(h_k)``, one example.

    The block of the Hessian that belongs to ``W_k`` is ``Hcal_k kron a_{k-1} a_{k-1}^T`` (rows of ``W_k`` outermost),
    so its top eigenvalue is ``||a_{k-1}||^2 * lambda_max(Hcal_k)``: large activations make a sharp layer. Recursion,
    with ``B_k = diag(act'(h_k))`` and ``D_k = diag(act''(h_k) * dL/da_k)``::

        Hcal_k = B_k W_{k+1}^T Hcal_{k+1} W_{k+1} B_k + D_k

    Args:
        layers: from input to output; the last one gives the logits and has no activation.
        activation: elementwise, twice differentiable.
        loss: logits (classes,) -> 0-d.
        x: one example, (features,).

    Example::

        a, H = preactivation_hessians([fc1, fc2], F.gelu, lambda z: F.cross_entropy(z, y), x)[0]
        top = a.square().sum() * torch.linalg.eigvalsh(H)[-1]
    """
    check(x.dim() == 1, "x", tuple(x.shape), "one example, of shape (features,)")
    inputs, h = [], x.detach()
    for k, layer in enumerate(layers):
        inputs.append(h if k == 0 else activation(h))
        h = torch.nn.functional.linear(inputs[-1], layer.weight.detach(), _detached(layer.bias))
    curvature = torch.func.hessian(loss)(h).contiguous()
    slope = torch.func.grad(loss)(h)
    found = [(inputs[-1], curvature)]
    first = torch.func.vmap(torch.func.grad(activation))
    second = torch.func.vmap(torch.func.grad(torch.func.grad(activation)))
    for k in range(len(layers) - 1, 0, -1):
        weight = layers[k].weight.detach()
        h = torch.nn.functional.linear(inputs[k - 1], layers[k - 1].weight.detach(), _detached(layers[k - 1].bias))
        down = weight * first(h)  # W_{k+1} B_k
        to_a = weight.T @ slope  # dL/da_k
        curvature = down.T @ curvature @ down + torch.diag(second(h) * to_a)
        slope = first(h) * to_a
        found.append((inputs[k - 1], curvature))
    return found[::-1]


def ntk_condition_number(
    outputs: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], x: Tensor, logit: int = 0
) -> float:
    """``lambda_max / lambda_min`` of the tangent kernel ``J J^T`` of one logit on a small batch: low trains fast.

    Args:
        outputs: inputs (n, ...) -> logits (n, classes), evaluation mode.
        parameters: with respect to which; ``n * size`` numbers are held at once.
        x: the batch, n examples.
        logit: which output.

    Returns:
        The condition number; ``inf`` when the kernel is singular to float32.
    """
    check_integer("logit", logit, 0)
    rows = []
    with torch.enable_grad():
        for example in x:
            value = outputs(example[None])[0, logit]
            grads = torch.autograd.grad(value, parameters, materialize_grads=True)
            rows.append(torch.cat([g.flatten().float() for g in grads]))
    jacobian = torch.stack(rows).double()
    eigenvalues = torch.linalg.eigvalsh(jacobian @ jacobian.T)
    top, bottom = eigenvalues[-1].item(), eigenvalues[0].item()
    return top / bottom if bottom > top * torch.finfo(torch.float32).eps else float("inf")


@torch.no_grad()
def loss_plane(
    loss: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    radius: float = 1.0,
    points: int = 11,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The loss on the plane ``w + a d1 + b d2`` with filter-normalised random directions (Li et al. 2018).

    Each filter (slice of the first dimension) of a direction gets the norm of the filter of ``w`` that it moves;
    vectors (biases, norms' scales) stay. ``w`` is put back bit for bit, also when ``loss`` raises.

    Args:
        loss: no argument -> 0-d loss at the parameters' present values.
        parameters: moved in place.
        radius: ``a`` and ``b`` run over ``[-radius, radius]``.
        points: per axis; an odd number has ``w`` itself in the middle.
        generator: of the directions, on the CPU; ``None``: seed 0.

    Returns:
        (points, points) float32 on the CPU, rows along ``a``.
    """
    check_integer("points", points, 2)
    generator = generator or torch.Generator().manual_seed(0)
    moved = [p.detach() for p in parameters if p.dim() > 1]
    saved = [p.clone() for p in moved]
    d1, d2 = ([_like_filters(p, generator) for p in moved] for _ in range(2))
    axis = torch.linspace(-radius, radius, points).tolist()
    surface = torch.empty(points, points)
    try:
        for i, a in enumerate(axis):
            for j, b in enumerate(axis):
                for p, w, u, v in zip(moved, saved, d1, d2):
                    p.copy_(w + a * u + b * v)
                surface[i, j] = loss()
    finally:
        torch._foreach_copy_(moved, saved)
    return surface


def measure_sharpness(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    batches: Sequence[Any],
    blocks: Mapping[str, nn.Module] | None = None,
    layers: Mapping[str, nn.Module] | None = None,
    trace_samples: int = 10,
    max_iterations: int = 100,
) -> dict[str, float]:
    """The numbers of the paper's tables 1 and 4 on a probe set, with respect to the trainable parameters.

    Args:
        model: in the mode to be measured in (evaluation).
        loss: batch -> mean loss of the batch (0-d), through ``model``.
        batches: the probe set; a batch counts by the first dimension of its first tensor.
        blocks: name -> module whose parameters' diagonal block of the Hessian is measured.
        layers: name -> module for :func:`record_activity`.
        trace_samples: of Hutchinson's estimate; 0: no trace.
        max_iterations: Lanczos steps at most, per spectrum.

    Returns:
        ``lambda_max``, ``lambda_min``, ``probe_loss``, ``weight_norm``, perhaps ``trace``; ``lambda_max/NAME`` per
        block; ``active_fraction/NAME`` and ``activation_norm/NAME`` per layer.

    Example::

        loss = lambda batch: F.cross_entropy(model(batch[0]), batch[1])
        measure_sharpness(model.eval(), loss, [(x, y)], blocks={"fc1": model.fc1}, layers={"act": model.act})
    """
    sizes = [len(first_tensor(batch)) for batch in batches]

    def operator(module: nn.Module) -> HessianOperator:
        return HessianOperator(loss, [p for p in module.parameters() if p.requires_grad], batches, sizes)

    with record_activity(layers or {}) as activity, torch.no_grad():
        total = sum(loss(batch) * size for batch, size in zip(batches, sizes))
    whole = operator(model)
    ends = extreme_eigenvalues(whole, max_iterations=max_iterations)
    found = {"lambda_max": ends.largest, "lambda_min": ends.smallest}
    if trace_samples:
        found["trace"] = block_traces(whole, trace_samples).sum(1).mean().item()
    found |= {"probe_loss": (total / sum(sizes)).item(), "weight_norm": weight_norm(whole.parameters).item()}
    for name, module in (blocks or {}).items():
        found[f"lambda_max/{name}"] = extreme_eigenvalues(operator(module), max_iterations=max_iterations).largest
    for name, layer in activity().items():
        found |= {f"active_fraction/{name}": layer.active_fraction, f"activation_norm/{name}": layer.norm}
    return found


def _like_filters(weight: Tensor, generator: torch.Generator) -> Tensor:
    direction = torch.randn(weight.shape, generator=generator).to(weight)
    dims = tuple(range(1, weight.dim()))
    norms = [torch.linalg.vector_norm(t, dim=dims, keepdim=True) for t in (weight, direction)]
    return direction * norms[0] / norms[1].clamp_min(1e-10)


def _detached(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach()

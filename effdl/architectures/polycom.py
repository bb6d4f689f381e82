"""polycom: polynomial compositions of ReLU and of normalised powers as activations (ICLR 2025, arXiv 2411.03884).

Plain torch: the two activations as functions and as layers (whole models: ``polycom_models``). Symbols: ``r`` order,
``a_p`` coefficient of the p-th power, ``a_0`` bias, ``H`` size of the normalised dimension.

Example::

    ffn = nn.Sequential(nn.Linear(64, 256), PolyNorm(), nn.Linear(256, 64))
    y = ffn(torch.randn(8, 16, 64))                      # [8, 16, 64]
    loss = y.square().mean()
    loss.backward()
    print(ffn[1].weight)                                 # a_3, a_2, a_1: the cube comes first
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effdl.core.errors import check, check_choice, check_integer, check_number


def poly_relu(x: Tensor, weight: Tensor, bias: Tensor, *, checkpoint: bool = True) -> Tensor:
    """``y = a_r h^r + ... + a_1 h + a_0`` with ``h = relu(x)`` (type I, eq. 3).

    Args:
        x: any shape, floating point. Powers are computed in float32 (float64 where ``x`` is), ``y`` has ``x``'s dtype.
        weight: ``[r]``, descending as in the official checkpoints: ``weight[0]`` multiplies ``h^r``.
        bias: ``[1]``, ``a_0``.
        checkpoint: keep only ``x`` for the backward pass; ``False`` leaves it to autograd (forward-mode AD needs that).

    Raises:
        ConfigurationError: ``x`` is not floating point, or ``weight``/``bias`` have another shape.
    """
    _check_tensors(x, weight, bias)
    if checkpoint and _differentiated(x, weight, bias):
        return _PolyReLU.apply(x, weight, bias)
    return _poly_relu(x, weight, bias)


def poly_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-6,
    norm: str = "rms",
    dim: int = -1,
    checkpoint: bool = True,
) -> Tensor:
    """``y = a_r n(x^r) + ... + a_1 n(x) + a_0``, ``n(v) = v / sqrt(mean_j v_j^2 + eps)`` (type II, eq. 4).

    Args:
        x: any shape, floating point; ``dim`` is the FFN's hidden dimension of size ``H``, whole (no shard, no
            padding). Powers and norms are computed in float32 (float64 where ``x`` is); finite for ``|x|`` up to
            about 10^6 at order 3 and 200 at order 8.
        weight: ``[r]``, descending as in the official checkpoints: ``weight[0]`` multiplies ``n(x^r)``.
        bias: ``[1]``, ``a_0``.
        eps: added to the mean (``"rms"``, the official code) or to the sum (``"l2"``, the paper's formula) of squares.
        norm: ``"rms"`` or ``"l2"``, which is ``sqrt(H)`` times smaller.
        dim: 1 for NCHW feature maps.
        checkpoint: keep only ``x`` and ``r`` scalars per row for the backward pass (closed form); ``False`` leaves it
            to autograd (forward-mode AD needs that).

    Raises:
        ConfigurationError: ``x`` is not floating point, its ``dim`` is empty, or another argument is out of range.
    """
    _check_tensors(x, weight, bias)
    _check_norm(eps, norm, dim)
    check(-x.ndim <= dim < x.ndim and x.shape[dim] > 0, "dim", dim, f"a non-empty dimension of x, {list(x.shape)}")
    if checkpoint and _differentiated(x, weight, bias):
        return _PolyNorm.apply(x, weight, bias, eps, norm, dim)[0]
    return _poly_norm(x, weight, bias, eps, norm, dim)[0]


class PolyReLU(nn.Module):
    """Learned polynomial of ReLU, elementwise: 'Polynomial Composition Activations', arXiv 2411.03884, eq. 3.

    ``state_dict``: ``weight [order]`` (descending powers, the official order) and ``bias [1]``; shared over channels
    and tokens. Input and output: any shape, same dtype. Contains every ReLU net: ``init="relu"`` is ReLU exactly, so a
    trained ReLU net converts without loss. Keep the pre-activations near unit scale: a cube of 5 is 125.

    Args:
        order: ``r``, 1..8; the paper uses 3.
        init: ``"third"``: every coefficient ``1/r``; ``"relu"``: ``a_1 = 1``, the rest 0.
        checkpoint: see :func:`poly_relu`.

    Raises:
        ConfigurationError: an argument out of range; an integer input.

    Example::

        act = PolyReLU(init="relu")
        x = torch.randn(4, 32)
        assert torch.equal(act(x), torch.relu(x))
        act(x).sum().backward()
        print(act.weight.grad)                           # the cube's coefficient learns from the first step
    """

    def __init__(self, order: int = 3, init: str = "third", checkpoint: bool = True) -> None:
        super().__init__()
        check_integer("order", order, 1, 8, fix="The paper uses 3.")
        check_choice("init", init, ("third", "relu"))
        check_choice("checkpoint", checkpoint, (True, False))
        self.order, self.checkpoint = order, checkpoint
        self.weight = nn.Parameter(torch.full((order,), 1 / order))
        self.bias = nn.Parameter(torch.zeros(1))
        if init == "relu":
            with torch.no_grad():
                self.weight.zero_()[-1] = 1

    def forward(self, x: Tensor) -> Tensor:
        return poly_relu(x, self.weight, self.bias, checkpoint=self.checkpoint)

    def extra_repr(self) -> str:
        return f"order={self.order}"


class PolyNorm(nn.Module):
    """Learned mix of normalised powers: 'Polynomial Composition Activations', arXiv 2411.03884, eq. 4.

    ``state_dict``: ``weight [order]`` (descending powers, the official order) and ``bias [1]``; shared over channels
    and tokens. Input and output: any shape, same dtype. Belongs between the up- and the down-projection, on the whole
    hidden vector of a token.

    Args:
        order: ``r``, 1..8; the paper uses 3.
        eps, norm, dim, checkpoint: see :func:`poly_norm`.
        init: ``"third"``: every coefficient ``1/r``. (``"relu"`` exists for :class:`PolyReLU` only.)

    Raises:
        ConfigurationError: an argument out of range; an integer input.

    Example::

        act = PolyNorm(dim=1)                            # NCHW
        x = torch.randn(2, 32, 8, 8)
        y = act(x)                                       # [2, 32, 8, 8]
        print(y.square().mean(), act(10 * x).square().mean())   # the scale of x does not matter
    """

    def __init__(
        self,
        order: int = 3,
        eps: float = 1e-6,
        norm: str = "rms",
        dim: int = -1,
        init: str = "third",
        checkpoint: bool = True,
    ) -> None:
        super().__init__()
        check_integer("order", order, 1, 8, fix="The paper uses 3.")
        check_choice("init", init, ("third", "relu"))
        check(init == "third", "init", init, "'third' for PolyNorm", "init='relu' needs PolyReLU.")
        check_choice("checkpoint", checkpoint, (True, False))
        _check_norm(eps, norm, dim)
        self.order, self.eps, self.norm, self.dim, self.checkpoint = order, eps, norm, dim, checkpoint
        self.weight = nn.Parameter(torch.full((order,), 1 / order))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return poly_norm(
            x, self.weight, self.bias, eps=self.eps, norm=self.norm, dim=self.dim, checkpoint=self.checkpoint
        )

    def extra_repr(self) -> str:
        return f"order={self.order}, eps={self.eps}, norm={self.norm!r}, dim={self.dim}"


def polynomial(
    kind: str = "polynorm",
    order: int = 3,
    eps: float = 1e-6,
    norm: str = "rms",
    init: str = "third",
    dim: int = -1,
    checkpoint: bool = True,
) -> PolyReLU | PolyNorm:
    """A :class:`PolyReLU` (which has no eps, norm, dim) or a :class:`PolyNorm`; all arguments are checked."""
    check_choice("kind", kind, ("polyrelu", "polynorm"))
    if kind == "polyrelu":
        _check_norm(eps, norm, dim)
        return PolyReLU(order, init, checkpoint)
    return PolyNorm(order, eps, norm, dim, init, checkpoint)


def _check_tensors(x: Tensor, weight: Tensor, bias: Tensor) -> None:
    check(x.is_floating_point(), "x", x.dtype, "a floating-point tensor", "Cast it with x.float().")
    check(weight.ndim == 1 and len(weight) > 0, "weight", list(weight.shape), "a vector of coefficients")
    check(list(bias.shape) == [1], "bias", list(bias.shape), "shape [1]")


def _check_norm(eps: float, norm: str, dim: int) -> None:
    check_number("eps", eps, 0, float("inf"), closed="()", fix="The official code uses 1e-6.")
    check_choice("norm", norm, ("rms", "l2"))
    check(isinstance(dim, int) and not isinstance(dim, bool), "dim", dim, "an integer")


def _differentiated(*tensors: Tensor) -> bool:
    """Without a backward pass to come, plain operations trace and export more widely than a Function."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _wide(tensor: Tensor) -> Tensor:
    """Powers lose bf16's digits and overflow fp16: at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _poly_relu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    u = _wide(x)
    h, a = F.relu(u), weight.to(u.dtype)
    y = a[0]
    for p in range(1, len(a)):  # Horner's scheme: with a_1 = 1 alone it is relu(x) to the bit, however large x
        y = torch.addcmul(a[p], y, h)
    return torch.addcmul(bias.to(u.dtype)[0], y, h).to(x.dtype)


def _rstd(power: Tensor, eps: float, norm: str, dim: int) -> Tensor:
    square = power.square()
    total = square.mean(dim, keepdim=True) if norm == "rms" else square.sum(dim, keepdim=True)
    return torch.rsqrt(total + eps)


def _poly_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, norm: str, dim: int) -> tuple[Tensor, Tensor]:
    """``(y, rstd)``, ``rstd [r, ...]`` with ``dim`` of size 1: the r norms of a row, first power first."""
    u = _wide(x)
    a, y, power, rstd = weight.to(u.dtype).flip(0), bias.to(u.dtype)[0], u, []
    for p in range(len(a)):
        power = power * u if p else u
        rstd.append(_rstd(power, eps, norm, dim))
        y = torch.addcmul(y, a[p] * rstd[p], power)
    return y.to(x.dtype), torch.stack(rstd)


class _PolyReLU(torch.autograd.Function):
    """Keeps ``x`` alone; the powers are computed again. Can be differentiated twice."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return _poly_relu(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        x, weight = ctx.saved_tensors
        u, g = _wide(x), _wide(grad_y)
        a, h, order = weight.to(u.dtype).flip(0), F.relu(u), len(weight)
        slope, power, grad_a = a[-1] * order, g, []
        for p in range(order, 1, -1):
            slope = torch.addcmul((p - 1) * a[p - 2], slope, h)
        for _ in range(order):
            power = power * h  # g h^p
            grad_a.append(power.sum())
        grad_x = torch.where(u > 0, g * slope, 0)
        return grad_x.to(x.dtype), torch.stack(grad_a).flip(0).to(weight.dtype), g.sum().reshape(1).to(weight.dtype)


class _PolyNorm(torch.autograd.Function):
    """Keeps ``x`` and ``rstd``. With ``n_p = x^p rstd_p``, ``c_p = <g, n_p>`` and ``D = H`` ("rms") or 1 ("l2"):

    ``dx = sum_p a_p p rstd_p x^(p-1) (g - n_p c_p / D)``, ``da_p = sum over rows c_p``, ``da_0 = sum g``.
    Can be differentiated twice.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float, norm: str, dim: int) -> tuple[Tensor, Tensor]:
        return _poly_norm(x, weight, bias, eps, norm, dim)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, _, *ctx.settings = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, output[1])

    @staticmethod
    def backward(ctx, grad_y: Tensor, _):
        x, weight, rstds = ctx.saved_tensors
        eps, norm, dim = ctx.settings
        u, g = _wide(x), _wide(grad_y)
        a, size = weight.to(u.dtype).flip(0), x.shape[dim] if norm == "rms" else 1
        grad_x, below, power, grad_a = 0, None, u, []
        for p in range(1, len(a) + 1):
            # a second derivative must see how the norm depends on x
            rstd = _rstd(power, eps, norm, dim) if torch.is_grad_enabled() else rstds[p - 1]
            c = (g * power).sum(dim, keepdim=True) * rstd
            grad_a.append(c.sum())
            inner, scale = torch.addcmul(g, power, -rstd * c / size), a[p - 1] * p * rstd
            grad_x = inner * scale if below is None else torch.addcmul(grad_x, inner * below, scale)
            below, power = power, power * u
        grad_weight = torch.stack(grad_a).flip(0).to(weight.dtype)
        return grad_x.to(x.dtype), grad_weight, g.sum().reshape(1).to(weight.dtype), None, None, None

"""polycom: polynomial compositions of ReLU and of normalised powers as activations (ICLR 2025, arXiv 2411.03884).

Plain torch: the two activations as functions and as layers, and :func:`ungate`, which rebuilds a gated MLP without
its gate at equal parameters. Symbols: ``r`` order, ``a_p`` coefficient of the p-th power, ``a_0`` bias, ``H`` size of
the normalised dimension.

Example::

    ffn = nn.Sequential(nn.Linear(64, 256), PolyNorm(), nn.Linear(256, 64))
    y = ffn(torch.randn(8, 16, 64))                      # [8, 16, 64]
    loss = y.square().mean()
    loss.backward()
    print(ffn[1].weight)                                 # a_3, a_2, a_1: the cube comes first
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from effdl.architectures import _polycom_fused as fused
from effdl.core.errors import ConfigurationError, check, check_choice, check_integer, check_number

#: Children (gate, up, down) of the gated MLPs that can be rebuilt without their gate: Llama and its heirs, T5 v1.1.
GATED_LAYOUTS = (("gate_proj", "up_proj", "down_proj"), ("wi_0", "wi_1", "wo"))


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
        return fused.FusedPolyReLU.apply(x, weight, bias)
    return fused.poly_relu(x, weight, bias)


def poly_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-6, norm: str = "rms", dim: int = -1,
              checkpoint: bool = True) -> Tensor:
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
        return fused.FusedPolyNorm.apply(x, weight, bias, eps, norm, dim)[0]
    return fused.poly_norm(x, weight, bias, eps, norm, dim)[0]


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

    def __init__(self, order: int = 3, eps: float = 1e-6, norm: str = "rms", dim: int = -1, init: str = "third",
                 checkpoint: bool = True) -> None:
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
        return poly_norm(x, self.weight, self.bias, eps=self.eps, norm=self.norm, dim=self.dim,
                         checkpoint=self.checkpoint)

    def extra_repr(self) -> str:
        return f"order={self.order}, eps={self.eps}, norm={self.norm!r}, dim={self.dim}"


def matched_width(width: int, multiple: int = 8) -> int:
    """Hidden width at which an MLP without gate has a gated one's parameters: ``3 * width / 2``, rounded."""
    return max(multiple, round(1.5 * width / multiple) * multiple)


def gated_layout(mlp: nn.Module) -> tuple[str, str, str] | None:
    """The names of ``mlp``'s gate, up- and down-projection, or ``None`` where it is not a gated MLP known here."""
    children = dict(mlp.named_children())
    for names in GATED_LAYOUTS:
        if all(isinstance(children.get(name), nn.Linear) for name in names):
            return names
    return None


def ungate(mlp: nn.Module, activation: nn.Module, *, match_params: bool = True,
           generator: torch.Generator | None = None) -> nn.Sequential:
    """``down(act(up(x)))`` in place of ``down(silu(gate(x)) * up(x))``: a plain ``nn.Sequential`` with the same names.

    Args:
        mlp: a gated MLP of a known layout, hidden width ``f``; left as it is.
        activation: the one to put between the projections.
        match_params: width :func:`matched_width` of ``f``, with new projections drawn from a normal distribution with
            the old ones' standard deviation (and zero bias); ``False``: width ``f`` and the old up- and
            down-projections themselves, a third fewer parameters.
        generator: draws the new projections; CPU. ``None``: a new one with seed 0.

    Raises:
        ConfigurationError: ``mlp`` has no known layout.

    Example::

        mlp = model.model.layers[0].mlp                  # a LlamaMLP, d = 256, f = 688
        model.model.layers[0].mlp = ungate(mlp, PolyNorm())
        print(model.model.layers[0].mlp.up_proj)         # Linear(256 -> 1032): as many parameters as before
    """
    names = gated_layout(mlp)
    if names is None:
        known = "; ".join("/".join(layout) for layout in GATED_LAYOUTS)
        raise ConfigurationError(f"mlp={type(mlp).__name__} is not a gated MLP known here (linear layers {known}).")
    _, up, down = (mlp.get_submodule(name) for name in names)
    if match_params:
        generator = generator or torch.Generator().manual_seed(0)
        width = matched_width(up.out_features)
        up, down = _redraw(up, up.in_features, width, generator), _redraw(down, width, down.out_features, generator)
    between = [("dropout", mlp.dropout)] if isinstance(getattr(mlp, "dropout", None), nn.Module) else []
    act_name = "act" if hasattr(mlp, "act") else "act_fn"
    activation = activation.to(up.weight.device, up.weight.dtype)
    return nn.Sequential(OrderedDict([(names[1], up), (act_name, activation), *between, (names[2], down)]))


@torch.no_grad()
def _redraw(linear: nn.Linear, in_features: int, out_features: int, generator: torch.Generator) -> nn.Linear:
    """A ``linear`` of another size, weights normal with the old standard deviation."""
    device, dtype = linear.weight.device, linear.weight.dtype
    new = nn.utils.skip_init(nn.Linear, in_features, out_features, linear.bias is not None, device=device, dtype=dtype)
    new.weight.copy_(torch.randn(new.weight.shape, generator=generator)).mul_(linear.weight.std())
    if new.bias is not None:
        new.bias.zero_()
    return new.train(linear.training).requires_grad_(linear.weight.requires_grad)


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

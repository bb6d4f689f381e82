"""reste: 1-bit weights and activations, trained with a gradient that anneals from the identity to sign.

Forward: b = sign(z). Backward: the derivative of f_o(z) = sign(z) |z|^(1/o), made finite (arXiv 2308.06689)::

    |z| > t          0
    m < |z| <= t     (1/o) |z|^((1-o)/o)
    |z| <= m         f_o(m)/m = m^((1-o)/o), the slope of the secant

With o = 1 that is the identity clipped at t (1.5, not 1). A layer computes ``conv(sign(x), alpha sign(W))`` with
alpha = mean |W|, which is not detached: W gets a second gradient through it.

Example::

    binarize(model)                         # Conv and Linear become binary, but for the first and the last
    set_power(model, o_schedule(epoch, epochs=12))
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from effdl.compression._reste_relu import check_reordering, reorder_relus
from effdl.core.errors import ConfigurationError, check, check_choice, check_integer, check_number
from effdl.core.quantized import is_quantized

ZeroSign = Literal["plus", "zero"]
Scale = Literal["layer", "channel"]
SCHEDULES = ("cosine", "linear", "constant")


# ---- the estimator -------------------------------------------------------------------------------------------------


def sign(z: Tensor, zero_sign: ZeroSign = "plus") -> Tensor:
    """-1 and +1; zero (of either sign) is +1, or with ``"zero"`` 0 as in the official code."""
    signs = torch.sign(z)
    return signs if zero_sign == "zero" else signs.add_(0.5).sign_()


def reste_slope(z: Tensor, o: Tensor | float, t: float = 1.5, m: float = 0.1) -> Tensor:
    """The surrogate's derivative at ``z`` (module docstring); float32 or wider, the shape of ``z``.

    The constant part is the curve ``(1/o) size^power`` at ``size = m o^(1/power)``, which lies below m: one power
    serves both parts, its base is never 0, and no boolean mask is made.
    """
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    o = torch.as_tensor(o, dtype=z.dtype, device=z.device)
    power = (1 - o) / o
    size = z.abs()
    base = F.threshold(size, m, 0.0).clamp(min=m * o ** (1 / power))
    curve = (base**power).div_(o)
    return curve.sub_(torch.ops.aten.threshold_backward(curve, size, t))  # its second argument where size > t, else 0


class _ReSTESign(torch.autograd.Function):
    """``alpha sign(z)``, in one node because weights are large; ``alpha=None`` is 1."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, alpha: Tensor | None, o: Tensor, t: float, m: float, zero_sign: ZeroSign) -> Tensor:
        return sign(z, zero_sign) if alpha is None else alpha * sign(z, zero_sign)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        z, alpha, o, ctx.t, ctx.m, ctx.zero_sign = inputs
        ctx.save_for_backward(z, alpha, o)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, alpha, o = ctx.saved_tensors
        by_alpha = None
        if ctx.needs_input_grad[1]:
            by_alpha = (grad * sign(z, ctx.zero_sign)).sum_to_size(alpha.shape)
        grad = grad if alpha is None else alpha * grad
        return (grad * reste_slope(z, o, ctx.t, ctx.m)).to(z.dtype), by_alpha, None, None, None, None


def reste_sign(
    z: Tensor,
    o: Tensor | float = 1.0,
    t: float = 1.5,
    m: float = 0.1,
    zero_sign: ZeroSign = "plus",
    alpha: Tensor | None = None,
) -> Tensor:
    """``sign(z)`` whose gradient is :func:`reste_slope`; differentiable once (a second backward raises).

    Args:
        z: any floating tensor.
        o: the power, >= 1; a scalar tensor under ``torch.compile``, so that annealing does not recompile.
        t, m: where the gradient ends, and below which it is constant.
        zero_sign: what sign(0) is.
        alpha: a factor that broadcasts to ``z``; it gets its gradient.
    """
    if not torch.is_grad_enabled():  # nothing but stock operations, for export
        return sign(z, zero_sign) if alpha is None else alpha * sign(z, zero_sign)
    power = torch.as_tensor(o, dtype=torch.float32, device=z.device)
    return _ReSTESign.apply(z, alpha, power, t, m, zero_sign)


def o_schedule(epoch: float, epochs: int, o_end: float = 3.0, schedule: str = "cosine") -> float:
    """The power in epoch ``epoch`` (from 0): 1 in the first, below ``o_end`` in the last.

    ``"cosine"``: ``1 + (1 - cos(pi/2 e/E)) (o_end - 1)``; ``"linear"``: ``1 + e/E (o_end - 1)``; ``"constant"``.
    """
    check_choice("schedule", schedule, SCHEDULES)
    share = epoch / epochs
    grown = {"cosine": 1 - math.cos(math.pi / 2 * share), "linear": share, "constant": 1.0}[schedule]
    return 1 + grown * (o_end - 1)


# ---- the two indicators --------------------------------------------------------------------------------------------


def estimating_error(weight: Tensor, o: Tensor | float) -> Tensor:
    """``||f_o(W) - sign(W)||_2`` of one layer, f_o the plain power: how far the estimator is from sign."""
    w = weight.float()
    return (w.sign() * w.abs() ** (1 / torch.as_tensor(o, device=w.device)) - w.sign()).norm()


def gradient_stability(gradient: Tensor) -> Tensor:
    """``Var(|dL/dW|)`` of one layer, unbiased: what a steeper estimator pays."""
    return gradient.float().abs().var()


# ---- layers --------------------------------------------------------------------------------------------------------


class Binary(NamedTuple):
    """How a layer is binary; see :func:`binarize`."""

    activations: bool = True
    scale: Scale = "layer"
    detach_scale: bool = False
    t: float = 1.5
    m: float = 0.1
    zero_sign: ZeroSign = "plus"
    pad_value: float = 0.0


def binary_weight(weight: Tensor, o: Tensor | float, settings: Binary = Binary()) -> Tensor:  # noqa: B008
    """``alpha sign(W)``, the shape of W; alpha = mean |W| of the layer, or of each output channel."""
    alpha = weight.abs().mean() if settings.scale == "layer" else _per_channel(weight.abs())
    alpha = alpha.detach() if settings.detach_scale else alpha
    return reste_sign(weight, o, settings.t, settings.m, settings.zero_sign, alpha)


def _per_channel(size: Tensor) -> Tensor:
    return size.flatten(1).mean(1).view(-1, *[1] * (size.dim() - 1))


class _BinaryLayer:
    """What the binary classes add: settings, and the power as a buffer that no state dict holds."""

    _reste: Binary
    reste_power: Tensor

    def signs(self, x: Tensor) -> Tensor:
        """The input as the layer sees it."""
        s = self._reste
        return reste_sign(x, self.reste_power, s.t, s.m, s.zero_sign) if s.activations else x

    def seen(self) -> Tensor:
        """The weight as the layer sees it; codes decode to it as they are."""
        if is_quantized(self):  # type: ignore[arg-type]
            return self.weight  # type: ignore[attr-defined]
        return binary_weight(self.weight, self.reste_power, self._reste)  # type: ignore[attr-defined]


class BinaryLinear(_BinaryLayer, nn.Linear):
    """``linear(sign(x), alpha sign(W)) + b``; made by :func:`binarize`, the same parameters as ``nn.Linear``."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.signs(x), self.seen(), self.bias)


class _BinaryConv(_BinaryLayer):
    def forward(self, x: Tensor) -> Tensor:
        x, pad = self.signs(x), self._reste.pad_value
        if pad == 0.0 or self.padding_mode != "zeros":
            return self._conv_forward(x, self.seen(), self.bias)
        x = F.pad(x, self._reversed_padding_repeated_twice, value=pad)
        run = F.conv1d if isinstance(self, nn.Conv1d) else F.conv2d
        return run(x, self.seen(), self.bias, self.stride, 0, self.dilation, self.groups)


class BinaryConv2d(_BinaryConv, nn.Conv2d):
    """``conv2d(sign(x), alpha sign(W)) + b``; the border is padded with ``pad_value`` behind the sign."""


class BinaryConv1d(_BinaryConv, nn.Conv1d):
    """As :class:`BinaryConv2d`, in one dimension."""


BINARY = {nn.Linear: BinaryLinear, nn.Conv2d: BinaryConv2d, nn.Conv1d: BinaryConv1d}


def make_binary(layer: nn.Module, settings: Binary) -> None:
    """Swap the class of one stock layer, in place: parameters, their names and their order stay."""
    layer.__class__ = BINARY[type(layer)]
    layer._reste = settings
    layer.register_buffer("reste_power", torch.ones((), device=layer.weight.device), persistent=False)


def make_plain(layer: nn.Module) -> None:
    """The stock class again."""
    layer.__class__ = next(kind for kind, binary in BINARY.items() if isinstance(layer, binary))
    del layer._reste, layer.reste_power


def binary_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The binary layers by name, quantised ones too."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, _BinaryLayer)}


def set_power(model: nn.Module, o: float) -> None:
    """The same o for weights and activations of all binary layers; written into a buffer: nothing recompiles."""
    for layer in binary_layers(model).values():
        layer.reste_power.fill_(o)


def check_settings(scale: str, detach_scale: bool, t: float, m: float, zero_sign: str, pad_value: float) -> None:
    """Raise for a value out of range, naming the argument."""
    check_choice("scale", scale, ("layer", "channel"))
    check(isinstance(detach_scale, bool), "detach_scale", detach_scale, "True or False")
    check_number("t", t, 0, math.inf, closed="()")
    check_number("m", m, 0, t, closed="()", fix="It must lie below t.")
    check_choice("zero_sign", zero_sign, ("plus", "zero"))
    check_choice("pad_value", pad_value, (0, -1, 1))


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Linear, Conv1d and Conv2d layers that are binary by default: all but the first, the last, and those in a part
    called "downsample" or "shortcut"."""
    layers = {name: layer for name, layer in model.named_modules() if type(layer) in BINARY}
    inner = list(layers)[1:-1]
    return {name: layers[name] for name in inner if not any(word in name for word in ("downsample", "shortcut"))}


def binarize(
    model: nn.Module,
    names: list[str] | None = None,
    activations: bool = True,
    scale: Scale = "layer",
    detach_scale: bool = False,
    t: float = 1.5,
    m: float = 0.1,
    zero_sign: ZeroSign = "plus",
    pad_value: float = 0.0,
    reorder_relu: bool = False,
) -> nn.Module:
    """Make layers binary, in place; with this a checkpoint's or a file's weights compute what they did in training.

    Args:
        model: any module with stock Linear, Conv1d or Conv2d layers.
        names: of layers; ``None``: :func:`candidates`.
        activations: binarise the layers' inputs too (1W/1A); ``False``: 1W/32A.
        scale: alpha of the whole ``"layer"``, or of each output ``"channel"`` (XNOR-Net).
        detach_scale: no gradient through alpha.
        t, m: of the gradient, 0 < m < t.
        zero_sign: sign(0) is +1 (``"plus"``: truly binary) or 0 (``"zero"``, the official code).
        pad_value: 0 as in the code (ternary at the border), -1 or 1 for XNOR hardware.
        reorder_relu: first move ReLUs away that feed the layers (``_reste_relu.reorder_relus``), as training did.

    Raises:
        ConfigurationError: a bad value, a name that is no such layer, or a ReLU that cannot be moved.
    """
    check_settings(scale, detach_scale, t, m, zero_sign, pad_value)
    modules = dict(model.named_modules())
    chosen = candidates(model) if names is None else {name: modules.get(name) for name in names}
    wrong = [name for name, layer in chosen.items() if type(layer) not in BINARY]
    if wrong or not chosen:
        raise ConfigurationError(f"names: {wrong or 'nothing'} is no Linear, Conv1d or Conv2d that can be binary.")
    check_reordering(reorder_relu, activations)
    settings = Binary(activations, scale, detach_scale, t, m, zero_sign, float(pad_value))
    if reorder_relu:
        reorder_relus(model, list(chosen))
    for layer in chosen.values():
        make_binary(layer, settings)
    return model


def check_numbers(o_end: float, schedule: str, total_epochs: int | None) -> None:
    """Raise for a schedule that cannot be."""
    check_number("o_end", o_end, 1, math.inf, closed="[)")
    check_choice("schedule", schedule, SCHEDULES)
    if total_epochs is not None:
        check_integer("total_epochs", total_epochs, 1)

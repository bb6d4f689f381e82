"""reste, finished: a bit a weight, and integers that run on it.

No stock operation of torch or ONNX counts bits: :func:`xnor_popcount_linear` is a reference. On a CPU, +-1 are exact in
int8 matrix products: :func:`deploy_signs`.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effdl.compression._reste_relu import ReLUFirst
from effdl.compression.reste import BinaryConv2d, BinaryLinear, Scale, binary_layers
from effdl.core.errors import ConfigurationError
from effdl.core.quantized import is_quantized, record_of
from effdl.core.quantizers import QuantizedWeight

# ---- bits ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def signs_record(weight: Tensor, scale: Scale = "layer") -> QuantizedWeight:
    """One bit a weight and alpha: decodes to exactly -alpha and +alpha (a zero weight is +alpha)."""
    alpha = weight.abs().mean().view(1) if scale == "layer" else weight.abs().flatten(1).mean(1)
    codes = torch.where(weight >= 0, 0, -1).to(torch.int8)
    points = torch.tensor([-1.0, 1.0], device=weight.device)
    layout = "tensor" if scale == "layer" else "row"
    return QuantizedWeight(codes, 1, alpha.float(), codebook=points, layout=layout)


def xnor_popcount_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` of +-1 entries by counting bits: K - 2 popcount(a xor w). A reference, no kernel.

    Args:
        x: [B, K] of -1 and +1.
        weight: [N, K] of -1 and +1.

    Returns:
        int32 [B, N].
    """
    a, w = _bits(x), _bits(weight)
    table = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.int32, device=x.device)
    differing = table[torch.bitwise_xor(a[:, None], w[None]).long()].sum(-1, dtype=torch.int32)
    return x.shape[1] - 2 * differing


def _bits(rows: Tensor) -> Tensor:
    """[R, K] of +-1 as [R, ceil(K / 8)] bytes, filled up with equal bits."""
    ones = F.pad(rows.gt(0).to(torch.uint8), (0, -rows.shape[1] % 8)).view(len(rows), -1, 8)
    return (ones << torch.arange(8, dtype=torch.uint8, device=rows.device)).sum(-1, dtype=torch.uint8)


class Threshold(NamedTuple):
    """``sign(BN(x))`` as a comparison: +1 where ``rising * (x - value) >= 0``."""

    value: Tensor
    rising: Tensor


def fold_thresholds(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> Threshold:
    """sign(gamma (x - mu) / sigma + beta) = sign(gamma) sign(x - (mu - beta sigma / gamma)), per channel.

    Where a ReLU comes first (``reorder_relu``), a threshold that none of its outputs reaches from below is -inf.

    Raises:
        ConfigurationError: a gamma of 0, whose channel has no threshold.
    """
    gamma, sigma = norm.weight.detach(), (norm.running_var + norm.eps).sqrt()
    if bool((gamma == 0).any()):
        raise ConfigurationError("a BatchNorm channel with weight 0 is constant: it has no threshold to fold.")
    value, rising = norm.running_mean - norm.bias.detach() * sigma / gamma, gamma.sign()
    if isinstance(norm, ReLUFirst):
        value = torch.where((value > 0) | ((value == 0) & (rising < 0)), value, -torch.inf)
    return Threshold(value, rising)


# ---- integers --------------------------------------------------------------------------------------------------------


class SignLayer(nn.Module):
    """A finished binary Linear or Conv2d on int8 signs: ``alpha * (sign(x) @ sign(W).T) + b``, the sums exact.

    Args:
        layer: a layer that holds codes, binary in weights and activations.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        record = record_of(layer)
        rows = record.codes.flatten(1) * 2 + 1  # -1, 0 -> -1, +1
        self.register_buffer("signs", rows.t().contiguous())
        self.register_buffer("alpha", record.scale.expand(len(rows)).clone())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.outputs, self.settings = len(rows), layer._reste
        self.window = None
        if isinstance(layer, nn.Conv2d):
            self.window = {"kernel_size": layer.kernel_size, "stride": layer.stride, "dilation": layer.dilation}
            self.border = layer._reversed_padding_repeated_twice

    def forward(self, x: Tensor) -> Tensor:
        signs = torch.where(x >= 0, 1.0, -1.0).to(x.dtype)
        if self.window is None:
            return self._product(signs.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.outputs).to(x.dtype)
        signs = F.pad(signs, self.border, value=self.settings.pad_value)
        size, step, wide = (self.window[key] for key in ("kernel_size", "stride", "dilation"))
        rows, columns = ((n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(signs.shape[2:], size, step, wide))
        patches = F.unfold(signs, size, wide, 0, step).transpose(1, 2)
        out = self._product(patches.reshape(-1, patches.shape[-1])).to(x.dtype)
        return out.view(len(x), -1, self.outputs).transpose(1, 2).reshape(len(x), self.outputs, rows, columns)

    def _product(self, rows: Tensor) -> Tensor:
        out = torch._int_mm(rows.to(torch.int8), self.signs) * self.alpha
        return out if self.bias is None else out + self.bias


def deploy_signs(model: nn.Module) -> nn.Module:
    """A copy of a finished model whose binary layers (weights and activations) run on int8 signs.

    Raises:
        ConfigurationError: no such layer, or one with groups or ``zero_sign="zero"``, naming it.
    """
    result = copy.deepcopy(model).eval()
    layers = {name: layer for name, layer in binary_layers(result).items() if is_quantized(layer)}
    if not layers:
        raise ConfigurationError(f"{type(model).__name__} has no finished binary layer.")
    for name, layer in layers.items():
        kind = isinstance(layer, (BinaryLinear, BinaryConv2d)) and getattr(layer, "groups", 1) == 1
        settings = layer._reste
        if not kind or not settings.activations or settings.zero_sign != "plus":
            raise ConfigurationError(f"{name}: only ungrouped Linear and Conv2d with 1-bit activations run on signs.")
        parent, _, child = name.rpartition(".")
        result.get_submodule(parent)._modules[child] = SignLayer(layer)
    return result

"""One layer at low rank: its weight as a matrix, the exact SVD, two stock layers for one, and back.

The public names are those of :mod:`effdl.core.factorize`, which says what the schemes are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from effdl.core.errors import ConfigurationError, check_choice, check_integer

SCHEMES = ("channel", "spatial", "decouple")
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


# ---- weights as matrices -----------------------------------------------------------------------------------------


def oriented(layer: nn.Module, tensor: Tensor) -> Tensor:
    """A tensor of the shape of the layer's weight as (out, in, *kernel): transformers' ``Conv1D`` is transposed."""
    return tensor.t() if type(layer).__name__ == "Conv1D" else tensor


def dense_weight(layer: nn.Module) -> Tensor:
    """The layer's weight as (out, in, *kernel); a view of it, so what is written there is written to the layer."""
    return oriented(layer, layer.weight.detach())


def scheme_of(shape: Iterable[int], scheme: str) -> str:
    """The scheme by which a weight of this shape is really read."""
    check_choice("scheme", scheme, SCHEMES)
    _, _, *kernel = shape
    pointwise = math.prod(kernel) == 1
    return "channel" if pointwise or (scheme == "spatial" and len(kernel) != 2) else scheme


def matricise(weight: Tensor, scheme: str) -> Tensor:
    """A weight (out, in, *kernel) as the scheme's matrix, or batch of matrices (out, in, prod kernel)."""
    kind = scheme_of(weight.shape, scheme)
    if kind == "channel":
        return weight.flatten(1)
    if kind == "spatial":
        return weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)
    return weight.flatten(2)


def unmatricise(matrix: Tensor, shape: Iterable[int], scheme: str) -> Tensor:
    """The inverse of :func:`matricise`, for a weight of the given shape."""
    out, inputs, *kernel = shape
    if scheme_of((out, inputs, *kernel), scheme) == "spatial":
        return matrix.view(inputs, kernel[0], out, kernel[1]).permute(2, 0, 1, 3)
    return matrix.view(out, inputs, *kernel)


def max_rank(shape: Iterable[int], scheme: str) -> int:
    """The rank at which the factors hold the weight exactly: the shorter side of its matrix."""
    return min(matricise(torch.empty(tuple(shape), device="meta"), scheme).shape[-2:])


@torch.no_grad()
def svd(matrix: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """``U (..., m, k), S (..., k) descending, V^T (..., k, n)`` in float32 (float64 stays), k = min(m, n).

    Raises:
        RuntimeError: NaN or infinite entries, or no convergence; ``name`` says of which layer.
    """
    full = matrix if matrix.dtype == torch.float64 else matrix.float()
    failed = f"{name}: the singular value decomposition of its weight failed: it"
    try:
        u, s, vh = torch.linalg.svd(full, full_matrices=False)
    except torch.linalg.LinAlgError as error:
        reason = "did not converge" if bool(full.isfinite().all()) else "has NaN or infinite entries"
        raise RuntimeError(f"{failed} {reason}.") from error
    # an infinity passes without an error; the decomposition waited for the device already
    if not bool(s.isfinite().all()):
        raise RuntimeError(f"{failed} has NaN or infinite entries.")
    return u, s, vh


@torch.no_grad()
def principal(matrix: Tensor, name: str, precision: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Left singular vectors ``(..., m, m)`` and values ``(..., m)``, descending, of a wide matrix (m <= n).

    Through its Gram matrix, in float64 where squaring costs what float32 never had: values are exact to 1e-7 of the
    largest, as :func:`svd`'s are, in a fifth of the time. What is made of them in training is made every few steps.

    Args:
        matrix: any floating type.
        name: of the layer, for errors.
        precision: of the Gram matrix. In float32, at half the time, the i-th value is exact to 1e-7 s_0 (s_0 / s_i).

    Raises:
        RuntimeError: as :func:`svd`.
    """
    wide = matrix.cpu() if matrix.device.type == "mps" else matrix  # which has no float64
    gram = _lower_gram(wide.to(precision))
    if not bool(gram.diagonal(dim1=-2, dim2=-1).isfinite().all()):  # sums of squares: of every entry
        raise RuntimeError(f"{name}: the decomposition of its weight failed: it has NaN or infinite entries.")
    try:
        values, vectors = torch.linalg.eigh(gram)
    except torch.linalg.LinAlgError as error:
        raise RuntimeError(f"{name}: the decomposition of its weight failed: it did not converge.") from error
    kind = torch.float64 if matrix.dtype == torch.float64 else torch.float32
    own = {"device": matrix.device, "dtype": kind}
    return vectors.flip(-1).to(**own), values.flip(-1).clamp(min=0).sqrt().to(**own)


def _lower_gram(wide: Tensor, block: int = 128) -> Tensor:
    """The lower triangle of ``wide wide^T``, block by block: ``eigh`` reads no more."""
    size = wide.shape[-2]
    if size <= block:
        return wide @ wide.mT
    gram = wide.new_zeros(*wide.shape[:-1], size)
    for start in range(0, size, block):
        gram[..., start:, start : start + block] = wide[..., start:, :] @ wide[..., start : start + block, :].mT
    return gram


# ---- one layer -----------------------------------------------------------------------------------------------------


def obstacle(layer: nn.Module) -> str:
    """Why a layer cannot be split (``""``: it can): groups, a forward of its own, a weight that is no plain tensor."""
    bases = [kind for kind in (nn.Linear, *CONVOLUTIONS.values()) if isinstance(layer, kind)]
    if not bases and type(layer).__name__ != "Conv1D":
        return f"is a {type(layer).__name__}, neither a Linear nor a convolution"
    if getattr(layer, "groups", 1) != 1:
        return f"has groups={layer.groups}, whose blocks are small already"
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "is read by nn.MultiheadAttention, which never calls it"
    methods = ("forward", "_conv_forward")
    if bases and any(getattr(type(layer), m, None) is not getattr(bases[0], m, None) for m in methods):
        return f"is a {type(layer).__name__} with a forward of its own"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "has a parametrised weight: remove the parametrisation first"
    return "" if weight.is_floating_point() else f"has a weight of type {weight.dtype}"


def split(layer: nn.Module, rank: int, scheme: str = "channel", name: str = "layer") -> nn.Sequential:
    """A layer at a rank, as two stock layers: equal to the layer with its weight cut to this rank by SVD.

    Singular values go half into each factor, for ``spatial`` all into the second. Stride, padding, dilation, bias,
    device, dtype and training flag are the layer's. No random number is drawn; on the meta device nothing is computed.

    Raises:
        ConfigurationError: an :func:`obstacle`, or a rank outside 1 ... :func:`max_rank`; ``name`` is in the message.

    Example::

        small = split(nn.Conv2d(64, 64, 3, stride=2, padding=1), rank=16)
        small(images).shape == conv(images).shape
    """
    reason = obstacle(layer)
    if reason:
        raise ConfigurationError(f"{name} cannot be factorised: it {reason}.")
    weight = dense_weight(layer)
    check_integer(f"rank of {name}", rank, 1, max_rank(weight.shape, scheme))
    kind = scheme_of(weight.shape, scheme)
    first, second = pair = _empty_pair(layer, weight, rank, kind)
    if not weight.is_meta:
        with torch.no_grad():
            _fill(first.weight, second.weight, *svd(matricise(weight, kind), name), kind)
            if second.bias is not None:
                second.bias.copy_(layer.bias)
    return nn.Sequential(*pair).train(layer.training)


def _empty_pair(layer: nn.Module, weight: Tensor, rank: int, kind: str) -> tuple[nn.Module, nn.Module]:
    out, inputs, *kernel = weight.shape
    own = {"device": weight.device, "dtype": weight.dtype}
    last = {**own, "bias": layer.bias is not None}
    if not kernel:
        return skip_init(nn.Linear, inputs, rank, bias=False, **own), skip_init(nn.Linear, rank, out, **last)
    conv = CONVOLUTIONS[len(kernel)]
    own["padding_mode"] = last["padding_mode"] = layer.padding_mode
    ones, geometry = (1,) * len(kernel), (kernel, layer.stride, layer.padding, layer.dilation)
    if kind == "channel":
        first = skip_init(conv, inputs, rank, *geometry, bias=False, **own)
        return first, skip_init(conv, rank, out, ones, **last)
    if kind == "decouple":
        first = skip_init(conv, inputs, out * rank, ones, bias=False, **own)
        return first, skip_init(conv, out * rank, out, *geometry, groups=out, **last)
    rest = (1, 1, 0, 1)  # what kernel, stride, padding and dilation are along the other axis
    down = [g if isinstance(g, str) else (g[0], r) for g, r in zip(geometry, rest)]
    across = [g if isinstance(g, str) else (r, g[1]) for g, r in zip(geometry, rest)]
    return skip_init(conv, inputs, rank, *down, bias=False, **own), skip_init(conv, rank, out, *across, **last)


def _fill(first: Tensor, second: Tensor, u: Tensor, s: Tensor, vh: Tensor, kind: str) -> None:
    """The ``rank`` leading triplets into the weights of the pair."""
    if kind == "decouple":
        rank = second.shape[1]
        root = s[..., :rank].sqrt()
        first.copy_((u[..., :rank] * root.unsqueeze(-2)).mT.reshape(first.shape))
        second.copy_((root.unsqueeze(-1) * vh[..., :rank, :]).reshape(second.shape))
        return
    rank = second.shape[1]
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    if kind == "spatial":
        inputs, height = first.shape[1:3]
        first.copy_(u.reshape(inputs, 1, height, rank).permute(3, 0, 2, 1))
        out, width = second.shape[0], second.shape[3]
        second.copy_((s.unsqueeze(1) * vh).reshape(rank, out, width, 1).permute(1, 0, 3, 2))
    else:
        first.copy_((s.sqrt().unsqueeze(1) * vh).reshape(first.shape))
        second.copy_((u * s.sqrt()).reshape(second.shape))


def pair_shape(pair: nn.Sequential) -> tuple[int, ...]:
    """Shape (out, in, *kernel) of the layer that a pair of the ``channel`` scheme stands for."""
    first, second = pair
    return (second.weight.shape[0], *first.weight.shape[1:])


def narrow(pair: nn.Sequential, rank: int) -> nn.Sequential:
    """A copy of a pair of the ``channel`` scheme with its first ``rank`` components; ``rank=0``: one, of zeros.

    Example::

        small = narrow(split(nn.Linear(64, 64), 32), 8)      # Linear(64, 8), Linear(8, 64)
    """
    size = max(rank, 1)
    parts = []
    for layer, weight, side in zip(pair, (pair[0].weight[:size], pair[1].weight[:, :size]), ("out", "in")):
        part = copy.copy(layer)
        part._parameters = {"weight": nn.Parameter(weight.detach() * (rank > 0)), "bias": None}
        if layer.bias is not None:
            part._parameters["bias"] = nn.Parameter(layer.bias.detach().clone())
        setattr(part, f"{side}_features" if isinstance(layer, nn.Linear) else f"{side}_channels", size)
        parts.append(part)
    return nn.Sequential(*parts).train(pair.training)


def merge(pair: nn.Sequential, name: str = "layer") -> nn.Module:
    """The inverse of :func:`split`: one dense Linear or convolution that computes what the two layers compute.

    Multiplied in float32. A pair that came from transformers' ``Conv1D`` becomes an ``nn.Linear``.

    Raises:
        ConfigurationError: not a pair of factors.
    """
    kinds = [type(part) for part in pair]
    if kinds != [nn.Linear, nn.Linear] and not (len(kinds) == 2 and kinds[0] is kinds[1] in CONVOLUTIONS.values()):
        raise ConfigurationError(f"{name} is no pair of factors: it is a Sequential of {[k.__name__ for k in kinds]}.")
    first, second = pair
    weight = _product(first, second)
    own = {"bias": second.bias is not None, "device": weight.device, "dtype": first.weight.dtype}
    if isinstance(first, nn.Linear):
        dense = skip_init(nn.Linear, first.in_features, second.out_features, **own)
    else:
        stride = [a * b for a, b in zip(first.stride, second.stride)]
        dilation = [max(a, b) for a, b in zip(first.dilation, second.dilation)]
        texts = [p for p in (first.padding, second.padding) if isinstance(p, str)]
        padding = texts[0] if texts else [a + b for a, b in zip(first.padding, second.padding)]
        own["padding_mode"] = first.padding_mode
        size = (first.in_channels, second.out_channels, tuple(weight.shape[2:]))
        dense = skip_init(type(first), *size, stride=stride, padding=padding, dilation=dilation, **own)
    with torch.no_grad():
        dense.weight.copy_(weight)
        if second.bias is not None:
            dense.bias.copy_(second.bias)
    return dense.train(pair.training)


@torch.no_grad()
def _product(first: nn.Module, second: nn.Module) -> Tensor:
    """The dense weight (out, in, *kernel) of two factors."""
    a, b = (w if w.dtype == torch.float64 else w.float() for w in (first.weight, second.weight))
    if math.prod(a.shape[2:]) == 1:  # pointwise first: Linear, decouple (one group per output), kernels 1 x kw
        groups = getattr(second, "groups", 1)
        a = a.flatten(1).unflatten(0, (groups, -1))
        b = b.unflatten(0, (groups, -1))
        return torch.einsum("gjc,gnj...->gnc...", a, b).flatten(0, 1)
    if math.prod(b.shape[2:]) == 1:
        return torch.einsum("nr,rc...->nc...", b.flatten(1), a)
    return torch.einsum("nraw,rchb->nchw", b, a)

"""Low rank: a Linear or convolution as two stock layers of a given rank, back again, and what that saves.

A weight W of shape (out, in, *kernel) is read as a matrix A by one of three schemes, cut by its SVD A = U S V^T:

========== ============================== ==========================================================
scheme     A                              rank r becomes
========== ============================== ==========================================================
channel    (out, in kh kw)                conv(in -> r, kh x kw), conv(r -> out, 1 x 1)
spatial    (in kh, out kw)                conv(in -> r, kh x 1), conv(r -> out, 1 x kw)
decouple   out matrices (in, kh kw)       conv(in -> out r, 1 x 1), conv(out r -> out, kh x kw, groups=out)
========== ============================== ==========================================================

Linear layers, transformers' ``Conv1D`` and pointwise convolutions are always read by ``channel``; under ``spatial`` so
are convolutions of one or three dimensions. :func:`split` and :func:`merge` are for one layer, :func:`factorize` for a
model; BatchNorm statistics after a cut that lost something: ``core.calibrate.recalibrate_batchnorm``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effdl.core._factors import (
    CONVOLUTIONS,
    SCHEMES,
    dense_weight,
    matricise,
    max_rank,
    merge,
    narrow,
    obstacle,
    oriented,
    pair_shape,
    principal,
    scheme_of,
    split,
    svd,
    unmatricise,
)
from effdl.core.capture import evaluating
from effdl.core.errors import ConfigurationError, check, check_choice
from effdl.core.export import WEIGHTS
from effdl.core.select import Targets, Weight, refuse_sharded, select_modules
from effdl.core.surgery import disable_transformer_fast_path, replace_modules

__all__ = [
    "SCHEMES",
    "dense_weight",
    "factorize",
    "factors_of",
    "is_cheaper",
    "join",
    "join_before_load",
    "load_factorized",
    "matricise",
    "max_rank",
    "merge",
    "multiply_adds",
    "narrow",
    "obstacle",
    "oriented",
    "pair_shape",
    "principal",
    "ranks_in",
    "refuse_tied",
    "row",
    "scheme_of",
    "select_factorizable",
    "split",
    "split_parameters",
    "svd",
    "unmatricise",
]

FACTORIZABLE = (nn.Linear, *CONVOLUTIONS.values(), "Conv1D")


# ---- what it costs -------------------------------------------------------------------------------------------------


def split_parameters(shape: Iterable[int], rank: int, scheme: str) -> int:
    """Weights of the pair (without bias); per position of a stride-1 layer also its multiply-adds."""
    out, inputs, *kernel = shape = tuple(shape)
    kind, size = scheme_of(shape, scheme), math.prod(kernel)
    if kind == "spatial":
        return rank * (inputs * kernel[0] + out * kernel[1])
    if kind == "decouple":
        return rank * out * (inputs + size)
    return rank * (inputs * size + out)


def is_cheaper(shape: Iterable[int], rank: int, scheme: str) -> bool:
    """The break-even test: whether the pair has fewer weights than the dense layer of this shape."""
    return split_parameters(shape := tuple(shape), rank, scheme) < math.prod(shape)


def row(shape: Iterable[int], rank: int, scheme: str) -> dict[str, Any]:
    """What a report tells of a layer at a rank: ``form`` (``"factors"``, or ``"dense"`` where they would be no
    smaller), ``rank``, ``full`` rank, weights ``before`` and ``after``."""
    cheaper, size = is_cheaper(shape := tuple(shape), rank, scheme), math.prod(shape)
    return {
        "form": "factors" if cheaper else "dense",
        "rank": rank,
        "full": max_rank(shape, scheme),
        "before": size,
        "after": split_parameters(shape, rank, scheme) if cheaper else size,
    }


def factors_of(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Rank of the layers that are factors, from their rows: what :func:`factorize` rebuilds them with."""
    return {name: row["rank"] for name, row in rows.items() if row["form"] == "factors"}


@torch.no_grad()
def multiply_adds(model: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> dict[str, int]:
    """Multiply-adds of each Linear, ``Conv1D`` and convolution in one forward pass, by name; run in eval mode."""
    counts: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, _args: Any, output: Tensor) -> None:
            outputs = dense_weight(layer).shape[0]
            counts[name] = counts.get(name, 0) + output.numel() // outputs * layer.weight.numel()

        return hook

    kinds = (nn.Linear, *CONVOLUTIONS.values())
    layers = {n: m for n, m in model.named_modules() if isinstance(m, kinds) or type(m).__name__ == "Conv1D"}
    handles = [layer.register_forward_hook(count(name)) for name, layer in layers.items()]
    try:
        with evaluating(model):
            model(*args, **(kwargs or {}))
    finally:
        for handle in handles:
            handle.remove()
    return counts


# ---- a model -------------------------------------------------------------------------------------------------------


def select_factorizable(
    model: nn.Module, targets: Targets = None, exclude: Targets = None, also: tuple[type[nn.Module], ...] = ()
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The selected Linear, ``Conv1D`` and convolution layers that can be split, and the others with their obstacle.

    Layers of the types ``also`` are selected with them, and end among the others.

    Raises:
        ConfigurationError: nothing matched, or a weight is sharded or on the meta device.
    """
    fit, left = {}, {}
    for name, layer in select_modules(model, targets, exclude, (*FACTORIZABLE, *also)).items():
        reason = obstacle(layer)
        if reason:
            left[name] = reason
            continue
        refuse_sharded(Weight(f"{name}.weight", layer, "weight"))
        fit[name] = layer
    return fit, left


def refuse_tied(model: nn.Module, names: Iterable[str]) -> None:
    """Raise where the weight of a named layer is also another layer's: split, the two would drift apart."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                place = f"{name}.{key}" if name else key
                owners.setdefault(parameter.data_ptr() or id(parameter), []).append(place)
    for name in names:
        weight = model.get_submodule(name)._parameters["weight"]
        shared = owners[weight.data_ptr() or id(weight)]
        if len(shared) > 1:
            raise ConfigurationError(
                f"{name} cannot be factorised: its weight is tied ({' = '.join(shared)}). Add exclude={name!r}."
            )


def factorize(
    model: nn.Module, ranks: dict[str, int], scheme: str = "channel", *, inplace: bool = False
) -> nn.Module:
    """The model with each named layer split at its rank; dense everywhere else.

    With ``ranks`` from a finished run this rebuilds its architecture, into which its weights load strictly.

    Args:
        model: any model; copied unless ``inplace``.
        ranks: layer name to rank.
        scheme: of all of them.
        inplace: change the model itself (nothing is changed when an error is raised).

    Raises:
        ConfigurationError: an unknown name, a tied weight, a layer that cannot be split, a rank out of range.

    Example::

        small = factorize(timm.create_model("resnet18"), {"layer1.0.conv1": 16, "layer1.0.conv2": 12})
        small.load_state_dict(safetensors.torch.load_file("model.safetensors"))
    """
    check_choice("scheme", scheme, SCHEMES)
    model = model if inplace else copy.deepcopy(model)
    modules = dict(model.named_modules())
    unknown = [name for name in ranks if not name or name not in modules]
    if unknown:
        raise ConfigurationError(f"ranks: {type(model).__name__} has no layer {', '.join(map(repr, unknown))}.")
    refuse_tied(model, [name for name in ranks if not obstacle(modules[name])])
    chosen = {name: modules[name] for name in ranks}
    replace_modules(model, chosen, lambda name, layer: split(layer, ranks[name], scheme, name))
    disable_transformer_fast_path(model)
    return model


def join(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Make the named pairs dense again (:func:`merge`), in place; names that are no pair are passed over.

    Returns:
        What was joined.
    """
    modules = dict(model.named_modules())
    pairs = {name: modules[name] for name in names if isinstance(modules.get(name), nn.Sequential)}
    if pairs:
        replace_modules(model, pairs, lambda name, pair: merge(pair, name))
    return list(pairs)


def join_before_load(model: nn.Module, names: Callable[[], Iterable[str]]) -> Callable[..., None]:
    """A wrapper of ``on_load_checkpoint``: :func:`join` those of the names that are dense in the checkpoint."""

    def load(call_next: Callable[..., None], checkpoint: dict[str, Any]) -> None:
        join(model, [name for name in names() if f"{name}.weight" in checkpoint["state_dict"]])
        call_next(checkpoint)

    return load


def ranks_in(model: nn.Module, state: Mapping[str, Tensor]) -> tuple[dict[str, int], str]:
    """Rank per layer and the scheme of a factorised model's state dict, read from its shapes; ``model`` is dense."""
    ranks, scheme = {}, "channel"
    for name in (key.removesuffix(".0.weight") for key in state if key.endswith(".0.weight")):
        if f"{name}.1.weight" not in state or f"{name}.weight" not in dict(model.named_parameters()):
            continue
        first, second = state[f"{name}.0.weight"].shape, state[f"{name}.1.weight"].shape
        ranks[name] = second[1]
        if math.prod(second[2:]) > 1:
            scheme = "spatial" if first[0] == second[1] else "decouple"
    return ranks, scheme


def load_factorized(model: nn.Module, path: str | Path) -> nn.Module:
    """The dense model, rebuilt in place as a factorised one was saved, with its weights; no list of ranks is needed.

    Args:
        model: the stock network with any weights.
        path: a ``.safetensors`` file of its factorised weights, or the folder with ``model.safetensors``.

    Raises:
        ConfigurationError: no such file, or the weights of another network.

    Example::

        small = load_factorized(timm.create_model("resnet18", num_classes=10), "runs/.../model")
    """
    from safetensors.torch import load_file

    path = Path(path) / WEIGHTS if Path(path).is_dir() else Path(path)
    check(path.is_file(), "path", str(path), "a safetensors file, or a folder with model.safetensors")
    state = load_file(path)
    factorize(model, *ranks_in(model, state), inplace=True)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ConfigurationError(f"path={str(path)!r} holds the weights of another network: {error}") from error
    return model

"""Layers that hold packed codes instead of a float weight, and the folder that opens them again.

A quantised layer stays what it was (an ``nn.Linear``, a convolution, an embedding, a recurrent layer): its class is
swapped for a subclass that decodes ``weight`` from buffers when it is read, and the float parameter is gone. It moves,
copies, exports and compiles as before; for speed see :mod:`effdl.core.deploy`. A linear layer or a convolution with
codes may quantise its input too (:mod:`effdl.core.input_quantizers`), an attention module the operands of its products
(:mod:`effdl.core.attention_matmuls`).

Example::

    quantize_(model, {"head.weight": symmetric(model.head.weight, bits=4)})
    save_model(module, Path("model"))                  # codes and scales only, and quantization.json
    model = load_quantized(fresh_model, Path("model"))
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effdl.core.attention_matmuls import (
    QuantizedMatmuls,
    check_attention,
    install_matmuls,
    matmuls_of,
    remove_matmuls,
)
from effdl.core.errors import ConfigurationError
from effdl.core.input_quantizers import QuantizedInput, check_input, input_of, install_input, remove_input
from effdl.core.quantizers import QuantizedWeight, decode, pack, unpack

DESCRIPTION = "quantization.json"
_TABLES = ("scale", "offset", "codebook", "exponent")


class Spec(NamedTuple):
    """What the buffers of one quantised attribute do not tell."""

    bits: int
    layout: str
    shape: tuple[int, ...]
    tied_to: str | None = None
    """The weight (by name) whose codes this one shares; they are stored there alone."""


def quantize_(
    model: nn.Module, records: dict[str, QuantizedWeight], inputs: dict[str, QuantizedInput] | None = None
) -> None:
    """Put codes in the place of float weights, in place; a tied weight under all its names.

    Args:
        model: any module.
        records: by the name of the parameter in ``model.named_parameters()``, e.g. ``"layer1.0.conv1.weight"``.
        inputs: fixed ranges of inputs, by the name of a layer that holds codes then, e.g. ``"layer1.0.conv1"``, and
            :class:`~effdl.core.attention_matmuls.QuantizedMatmuls` by the name of an attention module.

    Raises:
        ConfigurationError: no such parameter or layer, or codes of another shape; before anything is changed.
    """
    places = {name: _places(model, name, record) for name, record in records.items()}
    holders = {owner for every in places.values() for owner, _ in every}
    layers = {name: _holder(model, name, record, holders) for name, record in (inputs or {}).items()}
    for name, record in records.items():
        (owner, attribute), *others = places[name]
        buffers = _install(owner, attribute, Spec(record.bits, record.layout, tuple(record.shape)), _buffers(record))
        for module, other in others:
            spec = Spec(record.bits, record.layout, tuple(record.shape), tied_to=name)
            _install(module, other, spec, buffers)
    for name, layer in layers.items():
        install = install_matmuls if isinstance(inputs[name], QuantizedMatmuls) else install_input
        install(layer, inputs[name])


def quantized_inputs(model: nn.Module) -> dict[str, QuantizedInput]:
    """The records of a model's quantised inputs, by the name of the layer (or of the attention module)."""
    found = {name: input_of(module) or matmuls_of(module) for name, module in model.named_modules()}
    return {name: record for name, record in found.items() if record is not None}


def quantized_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """The records of a model's quantised weights, by name; tied ones once."""
    found = {}
    for name, module, attribute, spec in _walk(model):
        if spec.tied_to is None:
            found[name] = _record(module, attribute, spec)
    return found


def is_quantized(module: nn.Module, attribute: str = "weight") -> bool:
    """Whether this layer's attribute is decoded from codes."""
    return attribute in module.__dict__.get("_effdl_quantized", {})


def record_of(module: nn.Module, attribute: str = "weight") -> QuantizedWeight:
    """The codes and tables behind one layer's quantised attribute."""
    return _record(module, attribute, module.__dict__["_effdl_quantized"][attribute])


def dequantize_(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Decode once: stock layers with float weights again (fast, as large as before), whose inputs are not quantised.
    In place; returns the model."""
    shared: dict[str, nn.Parameter] = {}
    for name, module, attribute, spec in list(_walk(model)):
        if spec.tied_to is None:
            weight = _record(module, attribute, spec).dequantize(dtype)
            shared[name] = nn.Parameter(weight, requires_grad=False)
        _uninstall(module, attribute, shared[spec.tied_to or name])
    for module in model.modules():
        remove_matmuls(module)
    return model


def describe(model: nn.Module) -> dict[str, Any]:
    """The content of ``quantization.json``: per weight its bits, layout, shape, tables and ties; ``{}`` for none."""
    weights = {}
    for name, module, attribute, spec in _walk(model):
        tables = [t for t in _TABLES if getattr(module, f"{attribute}_{t}", None) is not None]
        weights[name] = {**spec._asdict(), "tables": tables}
    inputs = {n: _told(record) for n, record in quantized_inputs(model).items()}
    told = {"format": 1, "weights": weights} if weights else {}
    return {**told, "inputs": inputs} if inputs else told


def load_quantized(model: nn.Module, folder: Path | str) -> nn.Module:
    """The model as it was saved, quantised: a stock architecture in, the same object out.

    Args:
        model: the architecture with any weights.
        folder: with ``quantization.json`` and ``model.safetensors``.

    Raises:
        ConfigurationError: the folder holds no quantised model, or one of another architecture.
    """
    from safetensors.torch import load_file

    from effdl.core.export import WEIGHTS

    folder = Path(folder)
    if not (folder / DESCRIPTION).is_file():
        raise ConfigurationError(f"{folder} holds no {DESCRIPTION}: it is not a quantised model.")
    told = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    state = load_file(folder / WEIGHTS)
    own = {n: entry for n, entry in told["weights"].items() if entry["tied_to"] is None}
    inputs = {n: _stored_input(n, entry, state) for n, entry in told.get("inputs", {}).items()}
    quantize_(model, {n: _stored(n, entry, state) for n, entry in own.items()}, inputs)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ConfigurationError(f"{folder} is of another architecture: {[*missing, *unexpected][:5]} do not fit.")
    return model


def _stored(name: str, entry: dict[str, Any], state: dict[str, Tensor]) -> QuantizedWeight:
    try:
        tables = {table: state[f"{name}_{table}"] for table in entry["tables"]}
        codes = unpack(state[f"{name}_codes"], entry["bits"], tuple(entry["shape"]))
    except KeyError as error:
        raise ConfigurationError(f"the file lacks {error.args[0]!r}, which {DESCRIPTION} promises") from error
    return QuantizedWeight(codes, entry["bits"], layout=entry["layout"], **tables)


def _told(record: QuantizedInput) -> dict[str, Any]:
    matmuls, output = isinstance(record, QuantizedMatmuls), record.site == "output"
    told = {"bits": record.bits, "channels": list(record.channels)}
    told |= {} if record.exponent is None else {"power": True}
    return {**told, **({"site": "matmuls"} if matmuls else {"site": "output"} if output else {})}


def _stored_input(name: str, entry: dict[str, Any], state: dict[str, Tensor]) -> QuantizedInput:
    site = entry.get("site", "input")
    kind = "matmul" if site == "matmuls" else "input"
    keys = [f"{kind}_scale", f"{kind}_zero_point", *["input_exponent"] * bool(entry.get("power"))]
    try:
        scale, zero, *power = (state[f"{name}.{key}" if name else key] for key in keys)
    except KeyError as error:
        raise ConfigurationError(f"the file lacks {error.args[0]!r}, which {DESCRIPTION} promises") from error
    if site == "matmuls":
        return QuantizedMatmuls(scale, zero, entry["bits"])
    return QuantizedInput(scale, zero, entry["bits"], tuple(entry["channels"]), site, *power)


# ---- one attribute -----------------------------------------------------------------------------------------------


def _places(model: nn.Module, name: str, record: QuantizedWeight) -> list[tuple[nn.Module, str]]:
    parent, _, attribute = name.rpartition(".")
    try:
        owner = model.get_submodule(parent)
        parameter = owner._parameters[attribute]
    except (AttributeError, KeyError):
        raise ConfigurationError(f"{name!r} is no parameter of {type(model).__name__}.") from None
    if parameter is None or parameter.shape != record.shape:
        shape = None if parameter is None else tuple(parameter.shape)
        raise ConfigurationError(f"{name} has shape {shape}, its codes {tuple(record.shape)}.")
    others = [(m, key) for m in model.modules() for key, p in m._parameters.items() if p is parameter]
    return [(owner, attribute), *[place for place in others if place != (owner, attribute)]]


def _holder(model: nn.Module, name: str, record: QuantizedInput, holders: set[nn.Module]) -> nn.Module:
    """The layer of this name, whose input may be quantised: it holds codes, or will."""
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise ConfigurationError(f"{name!r} is no layer of {type(model).__name__}.") from None
    if isinstance(record, QuantizedMatmuls):
        check_attention(name, layer)
        return layer
    check_input(name, layer, record)
    if layer not in holders and "_effdl_quantized" not in layer.__dict__:
        raise ConfigurationError(f"{name}: its input cannot be quantised, its weight is float. Give it codes as well.")
    return layer


def _buffers(record: QuantizedWeight) -> dict[str, Tensor]:
    return {"codes": pack(record.codes, record.bits), **record.tables()}


def _install(module: nn.Module, attribute: str, spec: Spec, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    parameter = module._parameters[attribute]
    buffers = {key: tensor.to(parameter.device) for key, tensor in buffers.items()}
    if "_effdl_quantized" not in module.__dict__:
        base = type(module)
        body: dict[str, Any] = {"_effdl_base": base}
        if isinstance(module, nn.RNNBase):  # these read a cached list of their weights, not the attributes
            body["_flat_weights"] = property(_flat_weights, lambda self, value: None)
        module.__class__ = type(f"Quantized{base.__name__}", (base,), body)
        module.__dict__["_effdl_quantized"] = {}
    del module._parameters[attribute]
    module.__dict__.pop("_flat_weights", None)
    setattr(type(module), attribute, property(lambda self: _decoded(self, attribute)))
    module.__dict__["_effdl_quantized"][attribute] = spec
    for key, tensor in buffers.items():
        module.register_buffer(f"{attribute}_{key}", tensor, persistent=spec.tied_to is None)
    return buffers


def _uninstall(module: nn.Module, attribute: str, parameter: nn.Parameter) -> None:
    del module.__dict__["_effdl_quantized"][attribute]
    for key in ("codes", *_TABLES):
        module._buffers.pop(f"{attribute}_{key}", None)
        module._non_persistent_buffers_set.discard(f"{attribute}_{key}")
    module._parameters[attribute] = parameter
    if not module.__dict__["_effdl_quantized"]:
        del module.__dict__["_effdl_quantized"]
        remove_input(module)
        module.__class__ = type(module)._effdl_base
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [module._parameters[n] for n in module._flat_weights_names]


def _flat_weights(module: nn.RNNBase) -> list[Tensor]:
    return [getattr(module, name) for name in module._flat_weights_names]


def _decoded(module: nn.Module, attribute: str) -> Tensor | None:
    spec: Spec | None = module.__dict__["_effdl_quantized"].get(attribute)
    if spec is None:  # put back here; a copy, which shares the class, may still hold codes
        return module._parameters[attribute]
    codes = unpack(module._buffers[f"{attribute}_codes"], spec.bits, spec.shape)
    tables = {table: module._buffers.get(f"{attribute}_{table}") for table in _TABLES}
    return decode(codes, spec.bits, spec.layout, **tables)


def _record(module: nn.Module, attribute: str, spec: Spec) -> QuantizedWeight:
    codes = unpack(module._buffers[f"{attribute}_codes"], spec.bits, spec.shape)
    tables = {table: module._buffers.get(f"{attribute}_{table}") for table in _TABLES}
    return QuantizedWeight(codes, spec.bits, layout=spec.layout, **tables)


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Spec]]:
    for name, module in model.named_modules():
        for attribute, spec in list(module.__dict__.get("_effdl_quantized", {}).items()):
            yield f"{name}.{attribute}" if name else attribute, module, attribute, spec


def payload(model: nn.Module) -> dict[str, float]:
    """Of all quantised weights: ``weights`` (how many entries), ``bytes`` (codes and tables), ``bits_per_weight``."""
    records = quantized_weights(model).values()
    weights, stored = sum(r.codes.numel() for r in records), sum(r.payload_bytes for r in records)
    return {"weights": weights, "bytes": stored, "bits_per_weight": 8 * stored / max(weights, 1)}

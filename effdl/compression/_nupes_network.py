"""nupes: the layers of a network learned one after the other, each on the outputs of those before it.

X_q, the input of a layer, is what the network makes of a batch when all layers that ran before are quantised; f(X), its
target, is the layer's output in the float network.

Example::

    from effdl.compression._nupes_learning import Learning
    from effdl.compression._nupes_network import learn_network

    records = power_records({w.name: w.data for w in select_weights(network)}, bits=2)
    records = learn_network(network, records, batches, Learning(iterations=800))
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from effdl.compression._nupes_learning import Learning, learn_layer
from effdl.core.blockwise import call_model
from effdl.core.capture import first_tensor
from effdl.core.distributed import broadcast, world_size
from effdl.core.input_quantizers import QuantizedInput, taking
from effdl.core.quantizers import QuantizedWeight

LEARNABLE = (nn.Linear, nn.modules.conv._ConvNd)


def learn_network(
    network: nn.Module,
    records: Mapping[str, QuantizedWeight],
    batches: Sequence[Any],
    how: Learning,
    forward: Callable[[nn.Module, Any], Any] = call_model,
    taken: Mapping[nn.Module, QuantizedInput] | None = None,
) -> dict[str, QuantizedWeight]:
    """Learned records for all linear layers and convolutions among ``records``, in the order in which they run.

    Args:
        network: with its float weights, in eval mode. They are exchanged on the way, and as they were at the end.
        records: by parameter name; those of other layers (embeddings, recurrent ones) are returned as they are.
        batches: calibration batches; all inputs and outputs of one layer are in memory at a time.
        how: see :class:`Learning`.
        forward: ``(network, batch) -> anything``.
        taken: layers whose inputs are quantised too; X_q is then made of quantised inputs, the layer's own among them.

    Cost: per layer two forward passes up to it, and the steps of :func:`learn_layer`. Under distributed training each
    process learns from its own batches, and all take what the first one found.
    """
    parameters = {name: network.get_parameter(name) for name in records}
    floats = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    owners = {name: network.get_submodule(name.rpartition(".")[0]) for name in records}
    calls = _calls(network, owners, batches[0], forward)
    learned, todo = dict(records), set(calls)

    def put(quantized: bool) -> None:
        for name, parameter in parameters.items():
            now = learned[name].dequantize() if quantized and name not in todo else floats[name]
            parameter.data.copy_(now)

    try:
        for name, count in calls.items():
            layer = owners[name]
            put(quantized=False)
            targets = _caught(network, layer, count, batches, forward)[1]
            put(quantized=True)
            waiting = {owners[other] for other in todo} - {layer}
            with taking({owner: record for owner, record in (taken or {}).items() if owner not in waiting}):
                inputs = _caught(network, layer, count, batches, forward)[0]
            bias = {} if layer.bias is None else {"bias": layer.bias.detach().float()}

            def run(weight: Tensor, x: Tensor, layer: nn.Module = layer, bias: dict[str, Tensor] = bias) -> Tensor:
                return torch.func.functional_call(layer, {"weight": weight, **bias}, (x,))

            learned[name] = _as_first(
                learn_layer(floats[name], records[name], run, inputs, targets, how, _outputs(layer))
            )
            todo.discard(name)
    finally:
        put(quantized=False)
    return learned


def _outputs(layer: nn.Module) -> int:
    """Dimension of the weight that counts output channels."""
    return 1 if type(layer).__name__ == "Conv1D" or isinstance(layer, nn.modules.conv._ConvTransposeNd) else 0


def _learnable(layer: nn.Module) -> bool:
    return isinstance(layer, LEARNABLE) or type(layer).__name__ == "Conv1D"


@torch.no_grad()
def _calls(network: nn.Module, owners: dict[str, nn.Module], batch: Any, forward: Callable) -> dict[str, int]:
    """How often each learnable layer is called with one batch, in the order of the first calls."""
    seen: dict[str, int] = {}
    handles = []
    try:
        for name, owner in owners.items():
            if _learnable(owner) and name.endswith("weight"):
                count = lambda *_, name=name: seen.update({name: seen.get(name, 0) + 1})  # noqa: E731
                handles.append(owner.register_forward_hook(count))
        forward(network, batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


class _SeenEnoughError(Exception):
    """Leaves a forward behind the layer that was waited for."""


@torch.no_grad()
def _caught(
    network: nn.Module, layer: nn.Module, count: int, batches: Sequence[Any], forward: Callable
) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of one layer over all batches, float32; tokens of a linear layer as rows."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def hook(_layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        inputs.append(_rows(layer, first_tensor((args, kwargs)).detach()))
        outputs.append(_rows(layer, output.detach()))
        if len(inputs) % count == 0:
            raise _SeenEnoughError

    handle = layer.register_forward_hook(hook, with_kwargs=True)
    try:
        for batch in batches:
            with contextlib.suppress(_SeenEnoughError):
                forward(network, batch)
    finally:
        handle.remove()
    return torch.cat(inputs), torch.cat(outputs)


def _rows(layer: nn.Module, value: Tensor) -> Tensor:
    """A convolution's examples as they are, else (rows, features); copies, since a later layer may work in place."""
    conv = isinstance(layer, nn.modules.conv._ConvNd)
    return (value if conv else value.reshape(-1, value.shape[-1])).float().clone()


def _as_first(record: QuantizedWeight) -> QuantizedWeight:
    """The record of the first process, on all of them."""
    if world_size() == 1:
        return record
    exponent = torch.full((1,), math.nan) if record.exponent is None else record.exponent.clone()
    codes, scale, exponent = record.codes.clone(), record.scale.clone(), exponent.to(record.codes.device)
    broadcast(codes, scale, exponent)
    return replace(record, codes=codes, scale=scale, exponent=None if bool(exponent.isnan()) else exponent)

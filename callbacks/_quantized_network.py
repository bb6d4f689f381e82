"""Codes in a LightningModule: put there, taken out again, by the names that its network has in it."""

from __future__ import annotations

from typing import Any

from torch import nn

from effdl.core.export import product
from effdl.core.input_quantizers import QuantizedInput
from effdl.core.quantized import dequantize_, quantize_, quantized_weights
from effdl.core.quantizers import QuantizedWeight


def network_prefix(pl_module: nn.Module) -> str:
    """What a name in the network begins with in the LightningModule: ``"model."``, or nothing."""
    network = product(pl_module)
    return next(f"{name}." if name else "" for name, module in pl_module.named_modules() if module is network)


def install(
    pl_module: nn.Module, records: dict[str, QuantizedWeight], inputs: dict[str, QuantizedInput] | None = None
) -> None:
    """Codes in the place of weights, by their names in the LightningModule; described as of its network.

    ``inputs`` are ranges of its layers' inputs, where these are quantised too.
    """
    network, prefix = product(pl_module), network_prefix(pl_module)

    def part(named: dict[str, Any], inside: bool) -> dict[str, Any]:
        return {n[len(prefix) * inside :]: r for n, r in named.items() if n.startswith(prefix) == inside}

    for owner, inside in ((network, True), (pl_module, False)):
        quantize_(owner, part(records, inside), part(inputs or {}, inside))


def thaw(pl_module: nn.Module) -> bool:
    """Codes of an earlier run become float weights that train; whether there were any."""
    names = list(quantized_weights(pl_module))
    dequantize_(product(pl_module))
    dequantize_(pl_module)
    for name in names:
        pl_module.get_parameter(name).requires_grad_()
    return bool(names)

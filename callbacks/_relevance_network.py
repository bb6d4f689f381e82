"""The user's network inside a module: its parameters, its place, and what it was before it was compacted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from effdl.core.calibrate import to_device
from effdl.core.export import product
from effdl.core.report import ForwardProbe, latencies_ms
from effdl.core.select import Weight
from effdl.core.structure import Counts, compact, dead_channels, swap_children


def prefix_of(pl_module: Any) -> str:
    """What the names of the network's parameters begin with in the module."""
    network = product(pl_module)
    name = next(name for name, module in pl_module.named_modules() if module is network)
    return f"{name}." if name else ""


def parameters(pl_module: Any) -> list[Weight]:
    """All parameters of the network, a shared one once, under their names in the module."""
    prefix, seen, found = prefix_of(pl_module), set(), []
    for name, module in product(pl_module).named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found.append(Weight(f"{prefix}{name}.{attribute}" if name else prefix + attribute, module, attribute))
    return found


def of_full_size(pl_module: Any, full: nn.Module, call_next: Callable, checkpoint: dict[str, Any]) -> None:
    """A checkpoint of the masked network comes back to the module whose network was compacted."""
    network, prefix = product(pl_module), prefix_of(pl_module)
    state = {name: value.shape for name, value in checkpoint["state_dict"].items()}
    own = {prefix + name: value.shape for name, value in network.state_dict().items()}
    if any(state.get(name, shape) != shape for name, shape in own.items()):
        swap_children(network, copy.deepcopy(full).to(next(network.parameters()).device))
    call_next(checkpoint)


def validates_checkpoint(trainer: Any) -> bool:
    """Under ``trainer.validate(ckpt_path=...)``, not in a validation inside a fit."""
    return str(getattr(trainer.state.fn, "value", trainer.state.fn)) == "validate" and bool(trainer.ckpt_path)


def compacted_again(
    network: nn.Module, layers: list[str], probe: ForwardProbe | None
) -> tuple[nn.Module, Counts] | None:
    """A loaded network without the dead filters of the named layers; ``None`` where it has none."""
    dead = {name: gone for name, gone in dead_channels(network).items() if name in layers and gone.any()}
    return compact(network, probe.inputs[0], dead) if dead and probe is not None and probe.inputs else None


def columns(
    dense: dict[str, Any], full: nn.Module | None, network: nn.Module, probe: ForwardProbe | None
) -> dict[str, Any]:
    """The network before and after; both latencies measured in turns, the first on the network of full size."""
    before, after = {"name": "dense", **dense}, {"name": "masked" if full is None else "compacted"}
    if probe is not None and probe.inputs is not None and full is not None:
        device = next(network.parameters()).device
        full = copy.deepcopy(full).to(device)
        with torch.no_grad():
            for parameter in full.parameters():
                parameter.masked_fill_(parameter == 0, 0.01)  # zeros may run faster or slower than numbers
        args, kwargs = to_device(probe.inputs, device)
        before["latency_ms"], after["latency_ms"] = latencies_ms([full, network], args, kwargs)
    return {**({"before": before} if dense else {}), "after": after}

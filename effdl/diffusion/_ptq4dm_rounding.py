"""ptq4dm: weights rounded up or down as a block's output wants it (AdaRound, with QDrop's half-quantised inputs).

The codes are ``clip(floor(W / delta) + h(V), -2^(b-1), 2^(b-1) - 1)``, h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1), learnt
block by block: mean square error of the block's output plus 0.01 sum(1 - |2 h - 1|^beta), which drives h to 0 or 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from effdl.core.calibrate import to_device
from effdl.core.capture import first_tensor
from effdl.core.input_quantizers import QuantizedInput, channel_dim
from effdl.core.quantizers import QuantizedWeight
from effdl.core.random import generator
from effdl.diffusion._ptq4dm_ranges import at_site, rounded_weights
from effdl.diffusion._ptq4dm_samples import Samples, call
from effdl.diffusion._ptq4dm_settings import Settings

BLOCKS = ("ResnetBlock2D", "BasicTransformerBlock", "JointTransformerBlock", "Attention", "TimestepEmbedding")
RATE, PENALTY, KEPT_FLOAT, WARM_UP = 1e-3, 0.01, 0.5, 0.2


def soft_rounding(v: Tensor) -> Tensor:
    """h(V), in [0, 1]."""
    return (1.2 * torch.sigmoid(v) - 0.1).clamp(0, 1)


def rounding_start(weight: Tensor, delta: Tensor) -> Tensor:
    """The V for which h(V) is the fractional part of W / delta; ``delta`` as it broadcasts against the weight."""
    rest = weight / delta - (weight / delta).floor()
    return -torch.log(1.2 / (rest + 0.1) - 1)


def rounded_by(weight: Tensor, delta: Tensor, h: Tensor, bits: int) -> Tensor:
    """Codes ``clip(floor(W / delta) + h, -2^(b-1), 2^(b-1) - 1)``, as floats."""
    half = 2 ** (bits - 1)
    return ((weight / delta).floor() + h).clamp(-half, half - 1)


def penalty(h: Tensor, done: float) -> Tensor:
    """``sum(1 - |2 h - 1|^beta)``, beta from 20 to 2 after the warm-up; 0 before. ``done``: share of the iterations."""
    if done < WARM_UP:
        return h.new_zeros(())
    beta = 2 + 18 * (1 - (done - WARM_UP) / (1 - WARM_UP))
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


@dataclass
class _Call:
    """One batch of a block: what it is given behind quantised layers, and what it says in float on float inputs."""

    args: tuple
    kwargs: dict[str, Any]
    target: Tensor


def learn_rounding(
    network: nn.Module,
    layers: dict[str, nn.Module],
    records: dict[str, QuantizedWeight],
    inputs: dict[str, QuantizedInput],
    samples: Samples,
    settings: Settings,
) -> dict[str, QuantizedWeight]:
    """Records with the same scales, whose codes are one of the two neighbours of each weight.

    Every block sees inputs from blocks that are quantised already. Where rounding to nearest has the smaller error on
    the samples, it stays. Activations of one block at a time are kept.
    """
    found = dict(records)
    done: list[str] = []
    modules = dict(network.named_modules())
    for block, names in _blocks(modules, layers).items():
        calls = _calls(network, modules[block], layers, done, found, inputs, samples, settings.batch_size)
        own = {name: layers[name] for name in names}
        found |= _learn_block(modules[block], own, found, inputs, calls, settings)
        done += names
    return found


def _blocks(modules: dict[str, nn.Module], layers: dict[str, nn.Module]) -> dict[str, list[str]]:
    """The outermost block around each layer, else the layer itself; in the order of the network."""
    groups: dict[str, list[str]] = {}
    for name in layers:
        parents = [".".join(name.split(".")[:i]) for i in range(1, name.count(".") + 1)]
        block = next((parent for parent in parents if type(modules[parent]).__name__ in BLOCKS), name)
        groups.setdefault(block, []).append(name)
    return groups


@contextlib.contextmanager
def _through(
    layers: dict[str, nn.Module], inputs: dict[str, QuantizedInput], change: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[None]:
    """Inside, each layer takes ``change(x, quantised x)`` instead of its input x (or answers it)."""
    def take(name: str, x: Tensor) -> Tensor:
        seen = inputs[name].apply(x.detach(), channel_dim(layers[name]))
        return change(x, x + (seen - x).detach())

    with contextlib.ExitStack() as hooks:
        for name in [name for name in layers if name in inputs]:
            hooks.callback(at_site(layers[name], inputs[name].site, partial(take, name)).remove)
        yield


def _calls(
    network: nn.Module,
    block: nn.Module,
    layers: dict[str, nn.Module],
    done: list[str],
    records: dict[str, QuantizedWeight],
    inputs: dict[str, QuantizedInput],
    samples: Samples,
    size: int,
) -> list[_Call]:
    heard: list[tuple] = []

    def hear(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        heard.append((args, dict(kwargs), first_tensor(output)))

    before = {name: layers[name] for name in done}
    made: list[_Call] = []
    with contextlib.ExitStack() as hooks:
        hooks.callback(block.register_forward_hook(hear, with_kwargs=True).remove)
        for batch in samples.batches(size):
            heard.clear()
            call(network, *batch)
            targets = [output for _, _, output in heard]
            heard.clear()
            with rounded_weights(before, records), _through(before, inputs, lambda x, seen: seen):
                call(network, *batch)
            made += [_Call(*to_device((args, kwargs), "cpu"), target.cpu())
                     for (args, kwargs, _), target in zip(heard, targets)]  # fmt: skip
    return made


def _learn_block(
    block: nn.Module,
    layers: dict[str, nn.Module],
    records: dict[str, QuantizedWeight],
    inputs: dict[str, QuantizedInput],
    calls: list[_Call],
    settings: Settings,
) -> dict[str, QuantizedWeight]:
    own = {module: name for name, module in block.named_modules()}
    key = {name: f"{own[layer]}.weight".lstrip(".") for name, layer in layers.items()}
    weights = {name: layer.weight.detach().float() for name, layer in layers.items()}
    deltas = {n: records[n].scale.float().view(-1, *[1] * (w.dim() - 1)) for n, w in weights.items()}
    device = next(iter(weights.values())).device
    v = {n: rounding_start(w, deltas[n]).requires_grad_() for n, w in weights.items()}
    optimizer = torch.optim.Adam(v.values(), RATE)
    stream = generator(settings.seed)

    def output(seen: dict[str, Tensor], one: _Call) -> Tensor:
        replaced = {key[n]: w.to(layers[n].weight.dtype) for n, w in seen.items()}
        args, kwargs = to_device((one.args, one.kwargs), device)
        return first_tensor(torch.func.functional_call(block, replaced, args, kwargs)).float()

    def half_float(x: Tensor, seen: Tensor) -> Tensor:
        keep = torch.rand(x.shape, generator=stream).to(device) < KEPT_FLOAT
        return torch.where(keep, x, seen)

    with torch.enable_grad(), _through(layers, inputs, half_float):
        for step in range(settings.iterations):
            one = calls[int(torch.randint(len(calls), (), generator=stream))]
            h = {n: soft_rounding(x) for n, x in v.items()}
            soft = {n: deltas[n] * rounded_by(w, deltas[n], h[n], records[n].bits) for n, w in weights.items()}
            error = (output(soft, one) - one.target.to(device).float()).square().sum(1).mean()
            loss = error + PENALTY * sum(penalty(x, step / settings.iterations) for x in h.values())
            optimizer.zero_grad()
            loss.backward(inputs=list(v.values()))  # the network is not touched
            optimizer.step()

    made = {}
    for n, w in weights.items():
        codes = rounded_by(w, deltas[n], (v[n].detach() >= 0).float(), records[n].bits).to(torch.int8)
        made[n] = replace(records[n], codes=codes)

    def error_of(candidates: dict[str, QuantizedWeight]) -> float:
        seen = {n: candidates[n].dequantize() for n in layers}
        with _through(layers, inputs, lambda x, seen: seen):
            return sum(float((output(seen, one) - one.target.to(device).float()).square().sum()) for one in calls)

    return made if error_of(made) < error_of(records) else {n: records[n] for n in layers}

"""ptq4dm: ranges of the inputs of a network's layers, over many calls and without keeping any activation."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from effdl.core.attention_matmuls import OPERANDS, QuantizedMatmuls, attentions, watch_matmuls
from effdl.core.errors import ConfigurationError
from effdl.core.input_quantizers import QuantizedInput, channel_dim
from effdl.core.input_ranges import BINS, best_candidate, candidate_errors, side_of
from effdl.core.quantizers import QuantizedWeight
from effdl.diffusion._ptq4dm_samples import Samples, call
from effdl.diffusion._ptq4dm_settings import Settings


@contextlib.contextmanager
def rounded_weights(layers: dict[str, nn.Module], records: dict[str, QuantizedWeight]) -> Iterator[None]:
    """Inside, the layers compute with their rounded weights; the float ones were not touched."""
    floats = {name: layer.weight.data for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.weight.data = records[name].dequantize(floats[name].dtype)
        yield
    finally:
        for name, layer in layers.items():
            layer.weight.data = floats[name]


def at_site(layer: nn.Module, site: str, act: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """``act(x)`` on each call, of what the layer is given or answers; a tensor that it returns takes the place of x."""

    def before(module: nn.Module, args: tuple) -> tuple | None:
        made = act(args[0])
        return None if made is None else (made, *args[1:])

    if site == "input":
        return layer.register_forward_pre_hook(before)
    return layer.register_forward_hook(lambda module, args, output: act(output))


class RangeSearch:
    """One range over many tensors, each shown three times: extremes, then a histogram, which tells the few candidates
    that can be best, then the errors of these.

    It is the search of all tensors at once: the result does not depend on the order or the size of the batches.
    """

    def __init__(self, bits: int, p: float, candidates: int) -> None:
        self.find = (bits, p, candidates)
        self.low, self.high = float("inf"), float("-inf")
        self.counts = self.errors = None
        self.among: set[int] = set()
        self.count = 0

    def see(self, x: Tensor) -> None:
        """First pass."""
        low, high = torch.aminmax(x.detach().float())
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))

    @property
    def side(self) -> str:
        return side_of(self.low, self.high)

    def _largest(self, device: torch.device) -> Tensor:
        return torch.tensor([max(abs(self.low), abs(self.high))], device=device)

    def tally(self, x: Tensor) -> None:
        """Second pass, over the same tensors."""
        low, high = self.low, max(self.high, self.low + 1e-30)  # of constants
        now = torch.histc(x.detach().float(), BINS, low, high).double()
        self.counts = now if self.counts is None else self.counts + now

    def shorten(self) -> None:
        """The candidates whose error is within a twentieth of the best, by the middles of the bins."""
        filled = torch.nonzero(self.counts)[:, 0]
        middles = self.low + (filled + 0.5) * ((self.high - self.low) / BINS)
        given = (middles[None], self._largest(filled.device), self.side, *self.find)
        errors = candidate_errors(*given, counts=self.counts[filled])[:, 0]
        self.among = {int(i) + 1 for i in torch.nonzero(errors <= 1.05 * errors.min())}
        self.counts = None

    def score(self, x: Tensor) -> None:
        """Third pass."""
        row = x.detach().float().reshape(1, -1)
        errors = candidate_errors(row, self._largest(x.device), self.side, *self.find, among=self.among)
        self.errors = errors if self.errors is None else self.errors + errors
        self.count += row.shape[1]

    def record(self) -> QuantizedInput:
        """The best range."""
        bits = self.find[0]
        found = best_candidate(self.errors, self._largest(self.errors.device), self.side, bits, self.count)
        zero = torch.tensor([found.zero_point], dtype=torch.int32, device=found.delta.device)
        return QuantizedInput(found.delta, zero, bits)


class Measurement:
    """The ranges of the inputs (or outputs) of a network's layers over a calibration set, and of its attention's
    operands where they are asked for.

    Args:
        network: as it will run, with rounded weights.
        layers: whose inputs, by name.
        samples: what it is called with.
        bits: of each layer's input.
        settings: search, batch size, order, site.
    """

    def __init__(
        self,
        network: nn.Module,
        layers: dict[str, nn.Module],
        samples: Samples,
        bits: dict[str, int],
        settings: Settings,
    ) -> None:
        self.network, self.layers, self.samples, self.bits, self.settings = network, layers, samples, bits, settings
        self.attentions = attentions(network) if settings.quantize_matmul else {}
        self._times = samples.times

    def run(self) -> dict[str, QuantizedInput]:
        """A record for each layer, and for each attention module.

        Raises:
            ConfigurationError: a layer that is never called; an input that is not finite.
        """
        if self.settings.quantize_matmul and not self.attentions:
            kind = type(self.network).__name__
            raise ConfigurationError(f"quantize_matmul=True: {kind} has no attention module of diffusers. Use False.")
        self._cuts = skip_channels(self.network, self.layers, self.samples) if self.settings.split_shortcut else {}
        if not self.settings.sequential:
            return self._measure({**self.layers, **self.attentions}, {})
        done: dict[str, QuantizedInput] = {}
        for name in self._order():
            done |= self._measure({name: self.layers[name]}, done)
        done = {name: done[name] for name in self.layers}
        return {**done, **self._measure(self.attentions, done)}

    def _measure(
        self, modules: dict[str, nn.Module], upstream: dict[str, QuantizedInput]
    ) -> dict[str, QuantizedInput]:
        searches = {name: self._searches(name) for name in modules}

        def note(name: str, parts: list[Tensor | None], act: Callable[[RangeSearch, Tensor], None]) -> None:
            for search, part in zip(searches[name], parts):
                if part is not None:
                    act(search, part)

        def first(search: RangeSearch, x: Tensor, name: str) -> None:
            self._check_finite(name, x)
            search.see(x)

        self._pass(modules, upstream, lambda name, x: note(name, x, lambda search, part: first(search, part, name)))
        self._check_called(searches)
        self._pass(modules, upstream, lambda name, x: note(name, x, RangeSearch.tally))
        for search in itertools.chain(*searches.values()):
            search.shorten()
        self._pass(modules, upstream, lambda name, x: note(name, x, RangeSearch.score))
        return {name: self._record(name, [search.record() for search in parts]) for name, parts in searches.items()}

    def _searches(self, name: str) -> list[RangeSearch]:
        """One for each part of a layer's input, or for each operand."""
        count = len(OPERANDS) if name in self.attentions else len(self._cuts.get(name, (0,)))
        bits = self.bits.get(name, self.settings.bits[1])
        return [RangeSearch(bits, self.settings.p, self.settings.candidates) for _ in range(count)]

    def _record(self, name: str, parts: list[QuantizedInput]) -> QuantizedInput:
        if name in self.attentions:
            return QuantizedMatmuls.of(parts)
        if name in self._cuts:
            return QuantizedInput.joined(parts, self._cuts[name])
        return replace(parts[0], site=self.settings.site)

    def _check_called(self, searches: dict[str, list[RangeSearch]]) -> None:
        missing = [name for name, found in searches.items() if found[0].high == float("-inf")]
        if any(name in self.attentions for name in missing):
            raise ConfigurationError(
                f"quantize_matmul=True: {missing[:5]} never ask scaled_dot_product_attention. Use a processor that "
                "does: module.set_processor(AttnProcessor2_0())."
            )
        if missing:
            raise ConfigurationError(
                f"exclude: the network never calls {missing[:5]} (attention of torch.nn reads its weights directly). "
                "Exclude them, or use layers that are called."
            )

    def _pass(
        self,
        modules: dict[str, nn.Module],
        upstream: dict[str, QuantizedInput],
        see: Callable[[str, list[Tensor | None]], None],
    ) -> None:
        """All samples through the network, inputs of ``modules`` shown in parts, those of ``upstream`` quantised."""

        def look(name: str, x: Tensor) -> None:
            cut = self._cuts.get(name)
            see(name, list(x.split(list(cut), channel_dim(self.layers[name]))) if cut else [x])

        def look_at_operand(name: str, i: int, x: Tensor) -> Tensor:
            see(name, [x if i == k else None for k in range(len(OPERANDS))])
            return x

        with contextlib.ExitStack() as hooks:
            for name, record in upstream.items():
                layer = self.layers[name]
                hooks.callback(at_site(layer, record.site, partial(record.apply, dim=channel_dim(layer))).remove)
            for name, module in modules.items():
                if name in self.attentions:
                    hooks.callback(watch_matmuls(module, partial(look_at_operand, name)).remove)
                else:
                    hooks.callback(at_site(module, self.settings.site, partial(look, name)).remove)
            for x, t, condition in self.samples.batches(self.settings.batch_size):
                self._times = t
                call(self.network, x, t, condition)

    def _check_finite(self, name: str, x: Tensor) -> None:
        finite = torch.isfinite(x).flatten(1).all(1)
        if not bool(finite.all()):
            row = int((~finite).to(torch.int8).argmax())
            time = self._times[row].item() if len(x) == len(self._times) else self._times.tolist()
            raise ConfigurationError(f"{name}: its input at time step {time} has NaN or infinite entries.")

    def _order(self) -> list[str]:
        """Names in the order of the first calls, then what is never called."""
        order: dict[str, None] = {}
        (batch, *_) = self.samples.batches(min(2, len(self.samples)))
        names = {layer: name for name, layer in self.layers.items()}
        with contextlib.ExitStack() as hooks:
            for layer in self.layers.values():
                hook = layer.register_forward_pre_hook(lambda module, args: order.setdefault(names[module]))
                hooks.callback(hook.remove)
            call(self.network, *batch)
        return [*order, *[name for name in self.layers if name not in order]]


class _Concatenations(TorchFunctionMode):
    """Remembers which tensors ``torch.cat`` made of two along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[Tensor, tuple[int, ...]]] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        dim = (kwargs or {}).get("dim", args[1] if len(args) > 1 else 0)
        if function is torch.cat and dim == 1 and len(args[0]) == 2:
            self.made[id(out)] = (out, tuple(part.shape[1] for part in args[0]))  # kept alive: ids are not used again
        return out


def skip_channels(network: nn.Module, layers: dict[str, nn.Module], samples: Samples) -> dict[str, tuple[int, int]]:
    """Both parts of the layers that read a skip concatenation, or stand in a block that does, with as many channels.

    Found by watching one call; normalisation and activation in between keep channels where they are.
    """
    found: dict[str, tuple[int, int]] = {}
    names = {module: name for name, module in network.named_modules()}

    def look(module: nn.Module, args: tuple) -> None:
        made = watch.made.get(id(args[0])) if args else None
        if made is None:
            return
        inside = {n: m for n, m in layers.items() if m is module or n.startswith(f"{names[module]}.")}
        for name, layer in inside.items():
            if getattr(layer, "in_channels", None) == sum(made[1]) and layer.groups == 1:
                found[name] = made[1]

    (batch, *_) = samples.batches(min(2, len(samples)))
    with contextlib.ExitStack() as hooks, _Concatenations() as watch:
        for module in network.modules():
            hooks.callback(module.register_forward_pre_hook(look).remove)
        call(network, *batch)
    return found

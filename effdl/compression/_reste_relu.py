"""reste: the ReLU that makes a network dead, and the place where it does no harm.

A binary layer behind a ReLU sees nothing but +1. In the paper's block, ``x + BN(ReLU(BinConv(x)))``, the BatchNorm
comes between the two: :func:`reorder_relus` makes a network of BN, ReLU, convolution look like that.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, Node

from effdl.core.errors import ConfigurationError, check

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
_KEEP_SIGN = (nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Dropout, nn.Identity, nn.Flatten)
_RELUS = {F.relu, torch.relu, torch.relu_, "relu", "relu_"}
_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}


# ---- BN(ReLU(x)) -----------------------------------------------------------------------------------------------------


class ReLUFirst:
    """``BN(ReLU(x))``: a BatchNorm whose class was swapped, so that its parameters and their names stay."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.relu(x))  # type: ignore[misc]


class ReLUBatchNorm1d(ReLUFirst, nn.BatchNorm1d):
    """:class:`ReLUFirst` of [B, C] or [B, C, L]."""


class ReLUBatchNorm2d(ReLUFirst, nn.BatchNorm2d):
    """:class:`ReLUFirst` of [B, C, H, W]."""


class ReLUSyncBatchNorm(ReLUFirst, nn.SyncBatchNorm):
    """:class:`ReLUFirst` with the statistics of all processes."""


_FIRST = {nn.BatchNorm1d: ReLUBatchNorm1d, nn.BatchNorm2d: ReLUBatchNorm2d, nn.SyncBatchNorm: ReLUSyncBatchNorm}
_STOCK = {first: stock for stock, first in _FIRST.items()}


# ---- where ReLUs feed binary layers ----------------------------------------------------------------------------------


class _Whole(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, qualname: str) -> bool:
        return isinstance(m, (*_LAYERS, ReLUFirst)) or super().is_leaf_module(m, qualname)


class _Outline(torch.fx.Tracer):
    """Of an ``nn.Sequential``: nothing is run but the order of its parts."""

    def is_leaf_module(self, m: nn.Module, qualname: str) -> bool:
        return not isinstance(m, nn.Sequential)


class _Graph:
    """Who feeds whom in a model, or in one ``nn.Sequential`` of it."""

    def __init__(self, model: nn.Module, prefix: str, graph: Graph) -> None:
        self.prefix, self.nodes = prefix, list(graph.nodes)
        self._modules = dict(model.named_modules())
        self.calls: dict[str, list[Node]] = defaultdict(list)
        for node in self.nodes:
            if node.op == "call_module":
                self.calls[self.name(node)].append(node)

    def name(self, node: Node) -> str:
        return f"{self.prefix}{node.target}"

    def module(self, node: object) -> nn.Module | None:
        called = isinstance(node, Node) and node.op == "call_module"
        return self._modules.get(self.name(node)) if called else None

    def source(self, node: object) -> tuple[Node | None, bool]:
        """What a value comes from, behind pooling, dropout and the like; whether no other node takes any of these."""
        alone = True
        while isinstance(self.module(node), _KEEP_SIGN):
            alone, node = alone and len(node.users) == 1, _first(node)
        return (node, alone and len(node.users) == 1) if isinstance(node, Node) else (None, False)

    def takers(self, node: Node) -> Iterator[Node]:
        """The nodes that take a value, pooling and the like passed over."""
        for user in node.users:
            yield from self.takers(user) if isinstance(self.module(user), _KEEP_SIGN) else (user,)

    def is_relu(self, node: Node) -> bool:
        function = node.op in ("call_function", "call_method") and node.target in _RELUS
        return function or isinstance(self.module(node), nn.ReLU)

    def dead(self, names: set[str]) -> Iterator[tuple[Node, str]]:
        """A ReLU, and the name of a layer that it feeds."""
        for node in self.nodes:
            if node.op == "call_module" and self.name(node) in names:
                source, _ = self.source(_first(node))
                if source is not None and self.is_relu(source):
                    yield source, self.name(node)


def _first(node: Node) -> object:
    return node.args[0] if node.args else None


def _graphs(model: nn.Module) -> Iterator[_Graph]:
    try:
        whole = _Whole().trace(model)
    except Exception:  # a forward of the user's that no tracer follows may raise anything; it is not run here
        for name, part in model.named_modules():
            if isinstance(part, nn.Sequential):
                yield _Graph(model, f"{name}." if name else "", _Outline().trace(part))
        return
    yield _Graph(model, "", whole)


def relus_before(model: nn.Module, names: list[str]) -> Iterator[tuple[str, str]]:
    """``(relu, layer)``: a named layer whose input is the output of a ReLU, all of whose signs are +1.

    Pooling, dropout and flattening in between change nothing. Read from a symbolic trace; where the model cannot be
    traced, from the order in ``nn.Sequential``.
    """
    found = {}
    for graph in _graphs(model):
        for relu, layer in graph.dead(set(names)):
            found[layer] = graph.name(relu) if relu.op == "call_module" else relu.name
    yield from ((relu, layer) for layer, relu in found.items())


def advice(relu: str, layer: str) -> str:
    """What the user should know of a pair that :func:`relus_before` finds."""
    return (
        f"{layer} takes the output of the ReLU {relu}: all its signs are +1, and the layer is dead. Put a BatchNorm "
        "between them (convolution, ReLU, BatchNorm), or use another activation."
    )


# ---- moving them -----------------------------------------------------------------------------------------------------


class Reordered(NamedTuple):
    """What :func:`reorder_relus` changed: the ReLUs that are an ``nn.Identity`` now, and the BatchNorms, by name."""

    relus: list[nn.Module]
    norms: dict[str, type]


def check_reordering(reorder_relu: bool, activations: bool) -> None:
    """Raise where ReLUs are to be moved and no input is binary."""
    ok = isinstance(reorder_relu, bool) and (activations or not reorder_relu)
    check(ok, "reorder_relu", reorder_relu, "True or False, False without 1-bit activations")


def reorder_relus(model: nn.Module, names: list[str]) -> Reordered:
    """Let no ReLU feed the named layers, in place; parameters, buffers and their names stay.

    ===================================== =============================================
    before                                after
    ===================================== =============================================
    ``layer(ReLU(BN(x)))``                ``layer(BN(ReLU(x)))``
    ``layer(ReLU(BN(x) + shortcut))``     ``layer(BN(ReLU(x)) + shortcut)``
    ``layer(ReLU(convolution(x)))``       ``layer(convolution(x))``: sign is its non-linearity
    ===================================== =============================================

    The BatchNorm's class becomes one of :class:`ReLUFirst`, the ReLU an ``nn.Identity``. Whatever else took the ReLU's
    output (the next shortcut, say) takes that of the BatchNorm or the sum. Of two BatchNorms before a sum it is the one
    outside a "downsample" or "shortcut".

    Args:
        model: a model that ``torch.fx`` can trace (timm's and torchvision's ResNets), or with the layers and what is
            before them in an ``nn.Sequential``.
        names: of the binary layers.

    Raises:
        ConfigurationError: another layout, one where something else takes the output of the BatchNorm or of the sum,
            a ReLU that is called as a function; before anything is changed.
    """
    relus, norms = _plan(model, names)
    modules = dict(model.named_modules())
    for relu in relus:
        modules[relu].__class__ = nn.Identity
    for norm in norms:
        modules[norm].__class__ = _FIRST[type(modules[norm])]
    return Reordered([modules[relu] for relu in relus], {norm: type(modules[norm]) for norm in norms})


def _plan(model: nn.Module, names: list[str]) -> tuple[list[str], list[str]]:
    relus: dict[str, None] = {}  # in order, each once
    norms: dict[str, None] = {}
    for graph in _graphs(model):
        for relu, layer in graph.dead(set(names)):
            name = graph.name(relu) if relu.op == "call_module" else relu.name
            if name in relus:
                continue
            calls = graph.calls[name] if type(graph.module(relu)) is nn.ReLU else []
            places = [_place(graph, call, set(names)) for call in calls]  # one module may serve several times
            if not places or None in places:
                raise ConfigurationError(f"reorder_relu: no known layout. {advice(name, layer)}")
            relus[name] = None
            norms |= {place: None for place in places if place}
    return list(relus), list(norms)


def _place(graph: _Graph, relu: Node, names: set[str]) -> str | None:
    """The BatchNorm that a ReLU can go before; ``""``: it can be left out; ``None``: neither."""
    source, alone = graph.source(_first(relu))
    if isinstance(graph.module(source), _LAYERS):
        fed = [graph.name(taker) if taker.op == "call_module" else "" for taker in graph.takers(relu)]
        return "" if set(fed) <= names else None
    if not alone:
        return None
    if source.op in ("call_function", "call_method") and source.target in _SUMS:
        branches = [(node, alone) for node, alone in map(graph.source, source.args) if _is_norm(graph, node)]
        if len(branches) > 1:
            branches = [b for b in branches if not any(w in graph.name(b[0]) for w in ("downsample", "shortcut"))]
        source, alone = branches[0] if len(branches) == 1 else (None, False)
    once = _is_norm(graph, source) and len(graph.calls[graph.name(source)]) == 1
    return graph.name(source) if alone and once else None


def _is_norm(graph: _Graph, node: Node | None) -> bool:
    return type(graph.module(node)) in _FIRST


def restore_relus(model: nn.Module, reordered: Reordered) -> None:
    """Undo :func:`reorder_relus`."""
    for relu in reordered.relus:
        relu.__class__ = nn.ReLU
    for name in reordered.norms:
        norm = model.get_submodule(name)
        norm.__class__ = _STOCK.get(type(norm), type(norm))


def relu_first_norms(model: nn.Module) -> dict[str, type]:
    """The BatchNorms that begin with a ReLU, and their classes."""
    return {name: type(module) for name, module in model.named_modules() if isinstance(module, ReLUFirst)}


def keep_relu_first(model: nn.Module, norms: dict[str, type]) -> None:
    """Once more: a Trainer with ``sync_batchnorm=True`` puts other modules in the place of BatchNorms, and others again
    at the end."""
    for name, kind in norms.items():
        norm = model.get_submodule(name)
        if not isinstance(norm, ReLUFirst):
            norm.__class__ = ReLUSyncBatchNorm if isinstance(norm, nn.SyncBatchNorm) else kind

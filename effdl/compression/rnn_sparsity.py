"""rnn-sparsity: percentile pruning of recurrent weights, and recurrent nets wired by a random graph (arXiv 2407.20601).

Plain torch. Pruning: thr = percentile_p(|w|) over the input-to-hidden and/or hidden-to-hidden matrices, mask =
|w| >= thr. Graph net: layer by layer over the whole sequence, with a masked cell for each pair of joined layers.
Graphs and their statistics: ``rnn_sparsity_graphs``; classifiers: ``rnn_sparsity_models``.

Example::

    lstm = nn.LSTM(16, 32, num_layers=2, batch_first=True)
    masks = prune_recurrent_(lstm, 0.8)                      # one threshold over both layers' matrices
    wired = SparseGraphRNN(random_graph("ws", 20, seed=0), "GRU")
    y = wired(torch.randn(4, 7, wired.input_size))           # [4, 7, nodes of the last layer]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from effdl.compression.gradual_pruning import magnitude
from effdl.compression.rnn_sparsity_graphs import Graph, as_dag, check_layers, layers_of, skip_pairs
from effdl.core.errors import check, check_choice, check_integer, check_number
from effdl.core.masks import MaskStore
from effdl.core.paper import Paper
from effdl.core.select import NothingMatched, Targets, Weight, select_modules, select_weights

PAPER = Paper(
    slug="rnn-sparsity",
    title="Investigating Sparsity in Recurrent Neural Networks",
    authors=("Darji, Harshil",),
    year=2021,
    arxiv="2407.20601",
)
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
GATES = {"RNN_TANH": 1, "RNN_RELU": 1, "GRU": 3, "LSTM": 4}
#: A projected LSTM's weight_hr is part of the way from hidden state to hidden state.
GROUPS = {"i2h": ("weight_ih",), "h2h": ("weight_hh", "weight_hr"), "both": ("weight_ih", "weight_hh", "weight_hr")}
SCOPES = ("global", "layer", "gate")


def check_pruning(sparsity: float, weights: str, scope: str, keep_largest: bool) -> None:
    """Raise ConfigurationError for an argument of :func:`prune_recurrent_` out of range."""
    check_number("sparsity", sparsity, 0, 1, fix="0.8 prunes below the 80th percentile.")
    check_choice("weights", weights, GROUPS)
    check_choice("scope", scope, SCOPES)
    check(isinstance(keep_largest, bool), "keep_largest", keep_largest, "True or False")


def recurrent_weights(
    root: nn.Module, weights: str = "both", targets: Targets = None, exclude: Targets = None
) -> list[Weight]:
    """Matrices of the RNN, GRU and LSTM layers and cells below ``root``: ``"i2h"``, ``"h2h"`` or ``"both"``.

    All layers and both directions; biases, embeddings and heads never, nor the cells of a :class:`SparseGraphRNN`,
    which are sparse as they are.

    Raises:
        ConfigurationError: nothing matched, or the network has no recurrent layer.
    """
    check_choice("weights", weights, GROUPS)
    modules = select_modules(root, targets, exclude, RECURRENT).values()
    chosen = {id(module) for module in modules if not isinstance(module, MaskedCell)}
    found = [w for w in select_weights(root, exclude=exclude, min_numel=1) if id(w.module) in chosen]
    found = [w for w in found if w.attribute.startswith(GROUPS[weights])]
    if not found:
        raise NothingMatched(f"targets={targets!r}: no {weights} weight of a recurrent layer is left to prune.")
    return found


def percentile(values: Tensor, share: float) -> float:
    """``numpy.percentile(values, 100 * share)`` with its linear interpolation, in float64 whatever the dtype."""
    ranked = values.detach().reshape(-1).cpu().double().sort().values
    place = (len(ranked) - 1) * share
    low = min(math.floor(place), len(ranked) - 1)
    high, t = min(low + 1, len(ranked) - 1), place - low
    a, b = ranked[low].item(), ranked[high].item()
    return b - (b - a) * (1 - t) if t >= 0.5 else a + (b - a) * t  # from the nearer end, as numpy does


def percentile_masks(
    weights: Sequence[Weight], sparsity: float, *, scope: str = "global", keep_largest: bool = True
) -> dict[str, Tensor]:
    """Bool masks ``|w| >= percentile``, ``True`` where a weight stays; ties at the threshold stay.

    Args:
        weights: the matrices to prune.
        sparsity: the percentile / 100, in [0, 1]. It is a rank, not a count: of N different magnitudes
            ceil((N - 1) sparsity) go.
        scope: ``"global"``: one threshold over all of them; ``"layer"``: one for each layer and direction;
            ``"gate"``: one for each gate of these.
        keep_largest: at sparsity 1 the threshold is the largest magnitude itself, which stays, as in the thesis's code;
            ``False`` empties the matrices there.

    Raises:
        ConfigurationError: an argument out of range. RuntimeError: NaN or infinity in a weight.
    """
    check_pruning(sparsity, "both", scope, keep_largest)
    scores = {w.name: magnitude(w) for w in weights}
    masks = {name: torch.zeros_like(score, dtype=torch.bool) for name, score in scores.items()}
    if sparsity == 1 and not keep_largest:
        return masks
    groups: dict[object, list[tuple[str, slice]]] = {}
    for weight in weights:
        for key, rows in _blocks(weight, scope):
            groups.setdefault(key, []).append((weight.name, rows))
    for blocks in groups.values():
        threshold = percentile(torch.cat([scores[name][rows].reshape(-1) for name, rows in blocks]), sparsity)
        for name, rows in blocks:
            masks[name][rows] = scores[name][rows].double() >= threshold
    return masks


def _blocks(weight: Weight, scope: str) -> list[tuple[object, slice]]:
    """Groups of one threshold that a matrix belongs to, and the rows of it that do."""
    if scope == "global":
        return [("all", slice(None))]
    kind, layer = weight.attribute[:9], weight.attribute[9:]  # weight_ih, _l0_reverse
    owner = (id(weight.module), layer)
    if scope == "layer" or kind == "weight_hr":  # the projection has no gates
        return [(owner if scope == "layer" else (owner, "projection"), slice(None))]
    size = weight.module.hidden_size
    return [((owner, gate), slice(gate * size, (gate + 1) * size)) for gate in range(len(weight.data) // size)]


@torch.no_grad()
def prune_recurrent_(
    root: nn.Module,
    sparsity: float,
    *,
    weights: Literal["both", "i2h", "h2h"] = "both",
    scope: Literal["global", "layer", "gate"] = "global",
    keep_largest: bool = True,
    targets: Targets = None,
    exclude: Targets = None,
) -> dict[str, Tensor]:
    """Zero the smallest recurrent weights of ``root`` in place, once; cuDNN's flat buffer stays whole.

    Arguments as of :func:`percentile_masks`, ``weights`` as of :func:`recurrent_weights`.

    Returns:
        Bool masks by weight name.

    Raises:
        ConfigurationError: an argument out of range, or no recurrent layer.
    """
    check_pruning(sparsity, weights, scope, keep_largest)
    if isinstance(root, RECURRENT):
        root = nn.ModuleDict({type(root).__name__.lower(): root})  # layers are selected below a root
    store = MaskStore(recurrent_weights(root, weights, targets, exclude))
    masks = percentile_masks(list(store.weights.values()), sparsity, scope=scope, keep_largest=keep_largest)
    for name, mask in masks.items():
        store.set(name, mask)
    store.apply_()
    return masks


class MaskedCell(nn.RNNCellBase):
    """Weights of a recurrent cell whose W_ih (gates * hidden, input) has a fixed 0/1 pattern; no forward of its own.

    Drawn from U(-1/sqrt(hidden), 1/sqrt(hidden)), zero where there is no edge. ``mask`` is rebuilt from the graph, so
    it is not in the state dict.
    """

    def __init__(self, mask: Tensor, gates: int, layout: str) -> None:
        super().__init__(mask.shape[1], mask.shape[0], bias=True, num_chunks=gates)
        wide = mask.repeat(gates, 1) if layout == "tile" else mask.repeat_interleave(gates, 0)
        self.register_buffer("mask", wide, persistent=False)
        self.gates = gates
        with torch.no_grad():
            self.weight_ih.mul_(wide)

    def wired(self) -> Tensor:
        """W_ih * mask: the gradient of what is masked is exactly zero."""
        return self.weight_ih * self.mask


class SparseGraphRNN(nn.Module):
    """A recurrent network whose wiring between layers is a directed acyclic graph (Darji 2021, chapter 4).

    A node is a neuron, its layer the longest path to it from a source. Layer l is a cell of |layer l| neurons with
    dense W_hh, whose W_ih has an entry where an edge comes from layer l-1; for each layer s <= l-2 with edges into l
    a cell of its own runs over the stored sequence of s, and its output is added to l's. A layer's cells run as one
    kernel call with block-diagonal weights, over the whole sequence. Nodes without an edge onward before the last layer
    (``dead_ends``) act on their own layer alone, through W_hh.

    Args:
        graph: an undirected networkx graph with integer nodes, or a list of edges (each directed from the lower to the
            higher node), or a ``DiGraph`` without cycles. Connected.
        mode: ``"RNN_TANH"``, ``"RNN_RELU"``, ``"GRU"`` or ``"LSTM"``.
        input_size: features of the input, densely wired to layer 0; ``None``: the size of layer 0.
        gate_layout: ``"tile"``: each gate block of W_ih has the graph's pattern. ``"repeat"``: the thesis's code, which
            repeats each row for all gates and so wires gates of different neurons together (the same for RNN_*).
        batch_first: input [B, T, input_size] instead of [T, B, input_size].
        layers: order of the nodes within each layer, which is the order of the output's features; ``None``: ascending.

    Returns:
        Output sequence of the last layer, [B, T, output_size] ([T, B, output_size]), in the input's dtype.

    Raises:
        ConfigurationError: unknown mode, a graph with cycles, self loops, several components or one node.

    Example::

        rnn = SparseGraphRNN([(0, 2), (1, 2), (1, 3), (2, 3), (2, 4), (3, 4)], "LSTM")
        print(rnn.layers, rnn.skips)                           # [[0, 1], [2], [3], [4]] [(2, 0), (3, 1)]
        y = rnn(torch.randn(8, 20, 2))[:, -1]                  # [8, 1]
    """

    paper: ClassVar[Paper] = PAPER

    def __init__(
        self,
        graph: Graph,
        mode: str = "GRU",
        input_size: int | None = None,
        gate_layout: Literal["tile", "repeat"] = "tile",
        batch_first: bool = True,
        layers: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        check_choice("mode", mode, GATES)
        check_choice("gate_layout", gate_layout, ("tile", "repeat"))
        check(isinstance(batch_first, bool), "batch_first", batch_first, "True or False")
        dag = as_dag(graph)
        self.layers = layers_of(dag) if layers is None else check_layers(dag, layers)
        if input_size is not None:
            check_integer("input_size", input_size, 1)
        self.mode, self.gate_layout, self.batch_first = mode, gate_layout, batch_first
        self.edges = sorted((int(u), int(v)) for u, v in dag.edges)
        self.input_size = len(self.layers[0]) if input_size is None else input_size
        self.output_size = len(self.layers[-1])
        self.skips = skip_pairs(dag, self.layers)
        last = set(self.layers[-1])
        self.dead_ends = sorted(int(node) for node in dag if dag.out_degree(node) == 0 and node not in last)
        first = torch.ones(len(self.layers[0]), self.input_size)
        pairs = [(target, target - 1) for target in range(1, len(self.layers))]
        self.recurrent_layers = nn.ModuleList([self._cell(first), *(self._cell(self._pattern(*p)) for p in pairs)])
        self.skip_layers = nn.ModuleList(self._cell(self._pattern(*pair)) for pair in self.skips)

    def _cell(self, mask: Tensor) -> MaskedCell:
        return MaskedCell(mask, GATES[self.mode], self.gate_layout)

    def _pattern(self, target: int, source: int) -> Tensor:
        """|target| x |source|, 1 where there is an edge."""
        edges, columns = set(self.edges), self.layers[source]
        return torch.tensor([[float((u, v) in edges) for u in columns] for v in self.layers[target]])

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, input_size] -> [B, T, output_size] (``batch_first=False``: T before B)."""
        check(x.dim() == 3 and x.shape[-1] == self.input_size, "x", tuple(x.shape), f"[B, T, {self.input_size}]")
        outputs: list[Tensor] = []
        for layer, main in enumerate(self.recurrent_layers):
            into = [(cell, source) for cell, (target, source) in zip(self.skip_layers, self.skips) if target == layer]
            inputs = [outputs[-1] if outputs else x, *(outputs[source] for _, source in into)]
            outputs.append(self._run([main, *(cell for cell, _ in into)], inputs))
        return outputs[-1]

    def _run(self, cells: list[MaskedCell], inputs: list[Tensor]) -> Tensor:
        """The sum of the cells' output sequences: one call, as none of their states sees another."""
        x = torch.cat(inputs, dim=-1) if len(inputs) > 1 else inputs[0]
        batch = x.shape[0] if self.batch_first else x.shape[1]
        size = cells[0].hidden_size
        state = x.new_zeros(1, batch, size * len(cells))
        hidden = (state, state) if self.mode == "LSTM" else state
        kernel = getattr(torch, self.mode.lower())  # torch.gru and its like: what nn.GRU calls
        out = kernel(x, hidden, block_diagonal(cells), True, 1, 0.0, self.training, False, self.batch_first)[0]
        return out.unflatten(-1, (len(cells), size)).sum(-2) if len(cells) > 1 else out

    def extra_repr(self) -> str:
        return f"{self.mode}, {len(self.edges)} edges, layers of {[len(layer) for layer in self.layers]} nodes"


def block_diagonal(cells: Sequence[MaskedCell]) -> list[Tensor]:
    """``[W_ih, W_hh, b_ih, b_hh]`` of the one cell that runs all of ``cells`` side by side, gate by gate."""
    if len(cells) == 1:
        return [cells[0].wired(), cells[0].weight_hh, cells[0].bias_ih, cells[0].bias_hh]

    def gates(tensor: Tensor, cell: MaskedCell) -> Tensor:
        return tensor.unflatten(0, (cell.gates, cell.hidden_size))

    def matrix(parts: list[Tensor]) -> Tensor:
        return torch.cat([torch.block_diag(*(part[gate] for part in parts)) for gate in range(cells[0].gates)])

    ih = matrix([gates(cell.wired(), cell) for cell in cells])
    hh = matrix([gates(cell.weight_hh, cell) for cell in cells])
    biases = [torch.cat([gates(getattr(c, name), c) for c in cells], 1).flatten() for name in ("bias_ih", "bias_hh")]
    return [ih, hh, *biases]

"""rnn-sparsity: the random graphs, their layers, their statistics, and what these say about accuracy.

Example::

    graph = random_graph("ba", 30, seed=1)
    print(layers_of(as_dag(graph)))                        # nodes by their longest path from a source
    print(graph_properties(graph)["closeness_var"])
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx
import numpy as np

from effdl.core.errors import ConfigurationError, check, check_choice, check_integer

Graph = nx.Graph | Sequence[Sequence[int]]
KINDS = ("ws", "ba")
_DIRECTED = "a graph without cycles: an undirected one, whose edges are then directed from low to high node"


def random_graph(kind: str, n: int, seed: int = 0, tries: int = 100) -> nx.Graph:
    """A Barabasi-Albert graph of m = n // 10, or a connected Watts-Strogatz graph of k = n // 5, p = 1.

    Args:
        kind: ``"ba"`` or ``"ws"``.
        n: nodes, at least 10.
        seed: of the graph.
        tries: Watts-Strogatz graphs drawn until one is connected (the thesis: 10; which one is found does not depend
            on it).

    Raises:
        ConfigurationError: another kind, fewer than 10 nodes (m = 0), no connected graph.
    """
    check_choice("kind", kind, KINDS)
    check_integer("n", n, 10, fix="Below 10 nodes m = n // 10 is 0.")
    if kind == "ba":
        return nx.barabasi_albert_graph(n, n // 10, seed=seed)
    try:
        return nx.connected_watts_strogatz_graph(n, n // 5, 1.0, tries=tries, seed=seed)
    except nx.NetworkXError as error:
        fix = "Take another seed or more nodes."
        raise ConfigurationError(f"n={n}: none of {tries} Watts-Strogatz graphs was connected. {fix}") from error


def as_dag(graph: Graph) -> nx.DiGraph:
    """The directed graph that wires a network: a ``DiGraph`` as it is, other edges from the lower to the higher node.

    Raises:
        ConfigurationError: self loops, cycles, several components, fewer than two nodes, nodes that are no integers.
    """
    if isinstance(graph, nx.Graph):
        nodes, edges = list(graph.nodes), list(graph.edges())
    else:
        edges = _pairs(graph)
        nodes = sorted({node for edge in edges for node in edge})
    whole = all(isinstance(node, (int, np.integer)) for node in nodes)
    fix = "networkx.convert_node_labels_to_integers(graph) makes them."
    check(whole, "graph", nodes[:5], "integer nodes", fix)
    if not (isinstance(graph, nx.Graph) and graph.is_directed()):
        edges = [(min(edge), max(edge)) for edge in edges]
    dag = nx.DiGraph()
    dag.add_nodes_from(sorted(nodes))
    dag.add_edges_from(edges)
    check(len(dag) >= 2, "graph", f"{len(dag)} nodes", "at least two nodes")
    loops = list(nx.selfloop_edges(dag))
    check(not loops, "graph", loops, "no self loops")
    check(nx.is_weakly_connected(dag), "graph", f"{nx.number_weakly_connected_components(dag)} components", "one")
    check(nx.is_directed_acyclic_graph(dag), "graph", "a graph with cycles", _DIRECTED)
    return dag


def _pairs(graph: Any) -> list[tuple[int, int]]:
    try:
        return [(u, v) for u, v in graph]
    except (TypeError, ValueError) as error:
        kind = type(graph).__name__
        raise ConfigurationError(f"graph={kind} is not valid: expected a networkx graph or pairs of nodes.") from error


def layer_index(dag: nx.DiGraph) -> dict[int, int]:
    """1 + the highest layer of a node's predecessors, 0 without any: the longest path from a source."""
    index: dict[int, int] = {}
    for node in nx.topological_sort(dag):
        index[node] = 1 + max((index[before] for before in dag.predecessors(node)), default=-1)
    return index


def layers_of(dag: nx.DiGraph) -> list[list[int]]:
    """Nodes by layer, ascending in each."""
    index = layer_index(dag)
    return [sorted(node for node in index if index[node] == layer) for layer in range(max(index.values()) + 1)]


def check_layers(dag: nx.DiGraph, layers: Sequence[Sequence[int]]) -> list[list[int]]:
    """``layers`` as lists, if they are the graph's own in another order within each.

    Raises:
        ConfigurationError: they are not.
    """
    given, own = [list(layer) for layer in layers], layers_of(dag)
    check([sorted(layer) for layer in given] == own, "layers", given, f"{own}, each in any order")
    return given


def skip_pairs(dag: nx.DiGraph, layers: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """``(target layer, source layer)``, ascending, of layers that are two or more apart and joined by an edge."""
    index = {node: i for i, layer in enumerate(layers) for node in layer}
    return sorted({(index[v], index[u]) for u, v in dag.edges if index[v] - index[u] > 1})


def graph_properties(graph: Graph) -> dict[str, float]:
    """Statistics of the undirected graph, and of its layers.

    ``layers``, ``nodes``, ``edges``, ``source_nodes`` (size of the first layer), ``sink_nodes`` (of the last),
    ``diameter``, ``density`` = m / (n (n - 1)), ``average_shortest_path_length``, and ``_mean``, ``_var``, ``_std``
    (with n - 1) of ``eccentricity``, ``degree`` and ``closeness`` centrality, ``nodes_betweenness`` and
    ``edge_betweenness``.

    Raises:
        ConfigurationError: as of :func:`as_dag`.
    """
    dag = as_dag(graph)
    layers, plain = layers_of(dag), dag.to_undirected()
    n, m = plain.number_of_nodes(), plain.number_of_edges()
    eccentricity = nx.eccentricity(plain)
    found: dict[str, float] = {
        "layers": len(layers),
        "nodes": n,
        "edges": m,
        "source_nodes": len(layers[0]),
        "sink_nodes": len(layers[-1]),
        "diameter": max(eccentricity.values()),
        "density": m / (n * (n - 1)),
        "average_shortest_path_length": nx.average_shortest_path_length(plain),
    }
    spread: dict[str, Mapping[Any, float]] = {
        "eccentricity": eccentricity,
        "degree": nx.degree_centrality(plain),
        "closeness": nx.closeness_centrality(plain),
        "nodes_betweenness": nx.betweenness_centrality(plain),
        "edge_betweenness": nx.edge_betweenness_centrality(plain),
    }
    for name, values in spread.items():
        found |= _moments(name, list(values.values()))
    return found


def _moments(name: str, values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        warnings.warn(f"{name}: the variance of a single value is undefined, reported as 0.", stacklevel=3)
    variance = statistics.variance(values) if len(values) > 1 else 0.0
    return {f"{name}_mean": statistics.fmean(values), f"{name}_var": variance, f"{name}_std": variance**0.5}

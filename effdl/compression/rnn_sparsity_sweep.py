"""rnn-sparsity: many random graphs trained alike, and what a graph's statistics say about its accuracy.

Example::

    from effdl.compression.rnn_sparsity_sweep import GraphSweep, correlations, write_table

    rows = GraphSweep(graphs=10, nodes=(20, 50), mode="GRU", epochs=15).run(ReberData(batch_size=128))
    write_table(rows, "graphs.csv")
    print(correlations(rows)["source_nodes"])
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch

from effdl.compression.rnn_sparsity import GATES
from effdl.compression.rnn_sparsity_graphs import KINDS, graph_properties, random_graph
from effdl.core.errors import check, check_choice, check_integer, check_number

#: Columns of the table that are no property of the graph.
OUTCOMES = ("kind", "mode", "seed", "loss_before", "loss", "accuracy", "seconds")


@dataclass(frozen=True)
class GraphSweep:
    """Random graphs of each kind, each trained once from its own seed, as rows of a table.

    Args:
        kinds: of ``"ws"`` and ``"ba"``.
        graphs: of each kind; 100 in the thesis.
        nodes: lowest and highest number of nodes, uniform; 10 to 50 in the thesis.
        mode: cell.
        epochs: of training; 15 in the thesis.
        lr: of Adam.
        seed: of the sizes, graphs and initial weights.
        pack: see ``SparseGraphRNNModule``.
        trainer: further arguments of every Trainer.

    Raises:
        ConfigurationError: an argument out of range.
    """

    kinds: Sequence[str] = KINDS
    graphs: int = 100
    nodes: tuple[int, int] = (10, 50)
    mode: str = "GRU"
    epochs: int = 15
    lr: float = 1e-3
    seed: int = 0
    pack: bool = True
    trainer: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for kind in self.kinds:
            check_choice("kinds", kind, KINDS)
        check_choice("mode", self.mode, GATES)
        check_integer("graphs", self.graphs, 1)
        check_integer("epochs", self.epochs, 1)
        check_integer("seed", self.seed, 0)
        check_number("lr", self.lr, 0, 1, closed="(]")
        low, high = self.nodes
        check(10 <= low <= high, "nodes", self.nodes, "(low, high) with 10 <= low <= high")

    def draw(self) -> Iterator[tuple[str, int, nx.Graph]]:
        """``(kind, seed, graph)``, the kinds in turns, so that a sweep cut short has some of each."""
        rng = np.random.default_rng([self.seed, 2407])
        for _ in range(self.graphs):
            for kind in self.kinds:
                seed, n = int(rng.integers(2**31)), int(rng.integers(self.nodes[0], self.nodes[1] + 1))
                yield kind, seed, random_graph(kind, n, seed, tries=10_000)

    def run(
        self, data: Any, on_row: Callable[[dict[str, Any]], None] | None = None, skip: Collection[int] = ()
    ) -> list[dict[str, Any]]:
        """Train and test every graph on a data module with batches of strings.

        Args:
            data: such as ``ReberData(batch_size=128)``; its test split is what accuracy is of.
            on_row: called with each row as soon as it is there.
            skip: seeds of graphs that were trained already, in a sweep that goes on.

        Returns:
            One row per graph trained: kind, mode, seed, the properties, loss on the test split before and after,
            accuracy in [0, 1], seconds.
        """
        rows = []
        for kind, seed, graph in self.draw():
            if seed in skip:
                continue
            began = time.perf_counter()
            outcome = self._train(graph, seed, data)
            row = {"kind": kind, "mode": self.mode, "seed": seed, **graph_properties(graph), **outcome}
            rows.append({**row, "seconds": time.perf_counter() - began})
            if on_row is not None:
                on_row(rows[-1])
        return rows

    def _train(self, graph: nx.Graph, seed: int, data: Any) -> dict[str, float]:
        from lightning.pytorch import Trainer

        from effdl.compression.rnn_sparsity_models import SparseGraphRNNModule

        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        options = {"enable_checkpointing": False, "gradient_clip_val": 5.0, "limit_val_batches": 0, **quiet}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            optimizer = partial(torch.optim.Adam, lr=self.lr)
            edges = [list(edge) for edge in graph.edges()]
            sizes = {"num_classes": data.num_classes, "vocab_size": data.vocab_size}
            module = SparseGraphRNNModule(edges, mode=self.mode, pack=self.pack, optimizer=optimizer, **sizes)
            trainer = Trainer(max_epochs=self.epochs, **{**options, **self.trainer})
            (before,) = trainer.test(module, data, verbose=False)
            trainer.fit(module, data)
            (after,) = trainer.test(module, data, verbose=False)
        return {"loss_before": before["test/loss"], "loss": after["test/loss"], "accuracy": after["test/accuracy"]}


def _features(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], np.ndarray, np.ndarray]:
    check(len(rows) >= 2, "rows", f"{len(rows)} rows", "at least two graphs")
    names = [name for name in rows[0] if name not in OUTCOMES]
    table = np.array([[float(row[name]) for name in names] for row in rows])
    return names, table, np.array([float(row["accuracy"]) for row in rows])


def correlations(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Pearson's r of each property with accuracy; NaN where one of them does not vary.

    Raises:
        ConfigurationError: fewer than two rows.
    """
    names, table, accuracy = _features(rows)
    x, y = table - table.mean(0), accuracy - accuracy.mean()
    scale = np.sqrt((x**2).sum(0) * (y**2).sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.where(scale > 0, (x * y[:, None]).sum(0) / scale, np.nan)
    return dict(zip(names, r.tolist()))


def predictability(rows: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, float]:
    """R^2 of three regressors of accuracy on the min-max scaled properties, on a held-out tenth of the graphs.

    Raises:
        ConfigurationError: fewer than twenty rows: a tenth must be two graphs at least.
    """
    from sklearn.ensemble import AdaBoostRegressor, RandomForestRegressor
    from sklearn.linear_model import BayesianRidge
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import MinMaxScaler

    check(len(rows) >= 20, "rows", f"{len(rows)} rows", "at least 20 graphs, of which a tenth is held out")
    _, table, accuracy = _features(rows)
    order = np.random.default_rng(seed).permutation(len(rows))
    test, train = np.split(order, [len(rows) // 10])
    models = {
        "bayesian_ridge": BayesianRidge(),
        "random_forest": RandomForestRegressor(random_state=seed),
        "ada_boost": AdaBoostRegressor(random_state=seed),
    }
    fitted = {name: make_pipeline(MinMaxScaler(), model).fit(table[train], accuracy[train])
              for name, model in models.items()}  # fmt: skip
    return {name: float(model.score(table[test], accuracy[test])) for name, model in fitted.items()}


def write_table(rows: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """The rows as CSV (``pandas.read_csv`` opens it)."""
    path = Path(path)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path

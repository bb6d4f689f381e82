"""rnn-sparsity, checks 8 and 9: a benchmark that trains graphs for half an hour and stores a table; no test.

``python -m tests.claims.rnn_sparsity_graphs docs/rnn-sparsity-graphs.csv [GRAPHS]`` trains GRAPHS (20) of each kind,
those that the file does not have yet, and tells what it says.
"""

from __future__ import annotations

import csv
import logging
import statistics
import sys
import warnings
from pathlib import Path

from effdl.compression.rnn_sparsity_sweep import GraphSweep, correlations, predictability, write_table
from effdl.data.reber import ReberData

SETTINGS = {"nodes": (10, 50), "mode": "GRU", "epochs": 10, "lr": 5e-3, "seed": 0, "trainer": {"accelerator": "cpu"}}


def make(path: Path, graphs: int) -> None:
    rows: list[dict] = _read(path) if path.exists() else []

    def keep(row: dict) -> None:
        rows.append(row)
        write_table(rows, path)
        told = f"{row['kind']} {row['nodes']:3d} nodes, {row['edges']:4d} edges: {100 * row['accuracy']:.1f} %"
        print(f"{told}, {row['seconds']:.0f} s", flush=True)

    data = ReberData(train=4000, val=0, test=1000, batch_size=128)
    GraphSweep(graphs=graphs, **SETTINGS).run(data, on_row=keep, skip={int(row["seed"]) for row in rows})


def _read(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def tell(path: Path) -> None:
    rows = _read(path)
    for low in (10, 20):
        for kind in ("ba", "ws"):
            chosen = [row for row in rows if row["kind"] == kind and int(row["nodes"]) >= low]
            got = [100 * float(row["accuracy"]) for row in chosen]
            spread = f"{statistics.mean(got):.1f} ± {statistics.stdev(got):.1f}, median {statistics.median(got):.1f}"
            print(f"{kind}, {len(got)} graphs of {low} to 50 nodes: {spread}")
    for name, r in sorted(correlations(rows).items(), key=lambda item: -item[1]):
        print(f"{name:30s} r = {r:+.2f}")
    print({name: round(score, 2) for name, score in predictability(rows).items()})
    print(f"{sum(float(row['seconds']) for row in rows) / 60:.0f} minutes")


if __name__ == "__main__":
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    target = Path(sys.argv[1])
    make(target, int(sys.argv[2]) if len(sys.argv) > 2 else 20)
    tell(target)

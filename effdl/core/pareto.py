"""Methods beside each other: means over seeds, who dominates whom, the table and the picture.

Example::

    found = judge({"dense": [run, run], "pruned": [run, run]}, Path("comparison"))
    found.rows[0]["dominated_by"]                     # [] for a row on the Pareto front
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from effdl.core.errors import check
from effdl.core.report import human

#: What is compared beside the metric, and whether more is better.
QUANTITIES = {"sparsity": True, "stored_bytes": False, "latency_ms": False}
_LATENCY_NOISE = 1.05  # closer than this, two latencies are called equal


@dataclass(frozen=True)
class Comparison:
    """What was found.

    ``rows``: one dict per method: ``name``; ``metric``, ``sparsity``, ``stored_bytes``, ``latency_ms``, ``seconds`` and
    ``parameters``, each ``{"mean", "std", "values"}``; ``dominated_by``: names; ``errors``: of the seeds that failed.
    """

    metric: str
    mode: str
    rows: list[dict[str, Any]]
    folder: Path

    def table(self) -> Table:
        """For printing."""
        table = Table(title=f"{len(self.rows)} methods; {self.metric} ({self.mode})", title_justify="left")
        for column in ("method", self.metric, "sparsity", "file, compressed", "latency", "seconds", "dominated by"):
            table.add_column(column, justify="left" if column in ("method", "dominated by") else "right")
        for row in self.rows:
            cells = [_cell(row, key) for key in ("metric", "sparsity", "stored_bytes", "latency_ms", "seconds")]
            table.add_row(row["name"], *cells, ", ".join(row["dominated_by"]) or _first_error(row))
        return table


def judge(results: dict[str, list[dict[str, Any]]], folder: Path, metric: str | None, mode: str | None) -> Comparison:
    """Rows from runs.

    Args:
        results: method to its runs, each with ``metrics`` and the measured quantities, or with an ``error``.
        folder: of the comparison.
        metric: logged in validation; ``None``: the first with "acc" in its name, else with "loss".
        mode: ``"max"``, ``"min"`` or ``None``: by the metric's name.
    """
    logged = [run["metrics"] for runs in results.values() for run in runs if "metrics" in run]
    metric = _metric(logged, metric) if logged else metric or "metric"
    mode = mode or ("min" if any(word in metric for word in ("loss", "error", "perplexity")) else "max")
    rows = [_row(name, runs, metric) for name, runs in results.items()]
    for row in rows:
        others = (other for other in rows if other is not row)
        row["dominated_by"] = [other["name"] for other in others if dominates(other, row, mode)]
    return Comparison(metric, mode, rows, folder)


def _metric(logged: list[dict[str, float]], wanted: str | None) -> str:
    names = list(dict.fromkeys(name for metrics in logged for name in metrics))
    if wanted is not None:
        check(wanted in names, "metric", wanted, f"one that validation logs: {names}")
        return wanted
    ranked = [name for word in ("acc", "loss") for name in names if word in name.lower()] or names
    check(bool(ranked), "metric", wanted, "a module whose validation logs something")
    return ranked[0]


def _row(name: str, runs: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    done = [run for run in runs if "metrics" in run]
    row: dict[str, Any] = {"name": name, "errors": {run["seed"]: run["error"] for run in runs if "error" in run}}
    if not done:
        return row
    row["metric"] = _spread([run["metrics"].get(metric, math.nan) for run in done])
    for key in ("parameters", "sparsity", "stored_bytes", "latency_ms", "latency_before_ms", "seconds"):
        row[key] = _spread([run[key] for run in done])
    return row


def _spread(values: list[float]) -> dict[str, Any]:
    return {"mean": statistics.fmean(values), "std": statistics.pstdev(values), "values": values}


def dominates(a: Mapping[str, Any], b: Mapping[str, Any], mode: str = "max") -> bool:
    """Whether row ``a`` is nowhere worse than ``b`` and somewhere better, by the means. A failed row takes no part."""
    if "metric" not in a or "metric" not in b:
        return False
    sign = 1 if mode == "max" else -1
    gains = [sign * (a["metric"]["mean"] - b["metric"]["mean"])]
    for key, more_is_better in QUANTITIES.items():
        x, y = a[key]["mean"], b[key]["mean"]
        if key == "latency_ms" and max(x, y) <= _LATENCY_NOISE * min(x, y):
            x = y
        gains.append(x - y if more_is_better else y - x)
    return all(gain >= 0 for gain in gains) and any(gain > 0 for gain in gains)


# ---- what a person looks at ----------------------------------------------------------------------------------------


def draw(found: Comparison, path: Path) -> Path:
    """The metric against sparsity, stored bytes and latency; bars of one standard deviation, hollow marks dominated."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    titles = {"sparsity": "share of zeros", "stored_bytes": "file, compressed [kB]", "latency_ms": "latency [ms]"}
    for axes, (key, title) in zip(panels, titles.items()):
        for index, row in enumerate(row for row in found.rows if "metric" in row):
            scale = 1e-3 if key == "stored_bytes" else 1.0
            x, y = row[key], row["metric"]
            axes.errorbar(
                x["mean"] * scale, y["mean"], xerr=x["std"] * scale, yerr=y["std"], color=f"C{index % 10}",
                marker="os^Dv"[index // 10 % 5], fillstyle="none" if row["dominated_by"] else "full",
                linestyle="none", capsize=2, label=row["name"],
            )  # fmt: skip
        axes.set_xlabel(title)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(found.metric)
    if any("metric" in row for row in found.rows):
        panels[-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)
    return path


def _cell(row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        return ""
    mean, std = row[key]["mean"], row[key]["std"]
    return f"{human(key, mean)} ± {std:.2g}" if key == "metric" else human(key, mean)


def _first_error(row: Mapping[str, Any]) -> str:
    return next(iter(row["errors"].values()), "")[:120]

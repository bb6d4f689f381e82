"""All compression methods on one trained network at equal budget: ``python -m benchmarks compression``.

CIFAR-10 (the JPEG images of ``EFFDL_DATA``), the trained ResNet-20, two epochs over 4,000 images for every method, and
``effdl.compare`` behind it: what is there already is not trained again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from benchmarks.cifar import Cifar, Classifier, resnet
from effdl.core.factorize import factorize
from effdl.core.masks import keep_count, top_k_mask
from effdl.core.pareto import Comparison
from effdl.core.quantized import quantize_
from effdl.core.quantizers import symmetric
from effdl.core.select import select_modules

EPOCHS, IMAGES = 2, 4000
FIRST = "conv1"  # of the network: left alone by every method, as the last layer is not


class AtTheEnd(Callback):
    """A change of the finished network that knows no method: the obvious baseline."""

    def __init__(self, change: Callable[[Any], None]) -> None:
        self.change = change

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.change(pl_module.model)


def _weights(model: Any) -> dict[str, Any]:
    return {f"{name}.weight": module for name, module in select_modules(model, None, FIRST).items()}


def one_shot_magnitude(model: Any, sparsity: float) -> None:
    """The smallest weights of each layer become zero; no training follows."""
    for layer in _weights(model).values():
        weight = layer.weight.data
        weight.mul_(top_k_mask(weight.abs(), keep_count(weight.numel(), sparsity)))


def one_shot_svd(model: Any, ranks: dict[str, int]) -> None:
    """Layers cut to given ranks; no training follows."""
    factorize(model, ranks, inplace=True)


def min_max_rounding(model: Any, bits: int) -> None:
    """Symmetric codes per output channel."""
    quantize_(model, {name: symmetric(layer.weight.detach(), bits) for name, layer in _weights(model).items()})


def pruning(sparsity: float) -> dict[str, Callable[[], Any]]:
    """At one sparsity of all weights but the first layer's."""
    from effdl.callbacks import PDPCallback, PruningCallback

    first = {"exclude": f"model.{FIRST}"}
    return {
        "one-shot magnitude": partial(AtTheEnd, partial(one_shot_magnitude, sparsity=sparsity)),
        "one-shot magnitude, then tuned": partial(PruningCallback, sparsity, start=0, stop=0, **first),
        "gradual-pruning": partial(PruningCallback, sparsity, start=0, stop=0.7, every=4, **first),
        "gradual-pruning, global": partial(
            PruningCallback, sparsity, start=0, stop=0.7, every=4, scope="global", **first
        ),
        "pdp": partial(
            PDPCallback, sparsity, temperature="auto", start=0, stop=0.7, every=4, targets="*", exclude="model.conv1"
        ),
    }


def quantisers(bits: int) -> dict[str, Callable[[], Any]]:
    """At one width of all weights but the first layer's."""
    from effdl.callbacks import QuantizedDistillationCallback

    first = {"exclude": f"model.{FIRST}"}
    return {
        "min-max rounding": partial(AtTheEnd, partial(min_max_rounding, bits=bits)),
        "quantized-distillation": lambda: QuantizedDistillationCallback(bits=bits, teacher=resnet(), **first),
    }


TABLES: dict[str, Callable[[], dict[str, Callable[[], Any]]]] = {
    "90 % sparse": partial(pruning, 0.90),
    "95 % sparse": partial(pruning, 0.95),
    "8 bits": partial(quantisers, 8),
    "4 bits": partial(quantisers, 4),
    "2 bits": partial(quantisers, 2),
}


def measure(
    folder: Path, seeds: int = 3, tables: list[str] | None = None, images: int = IMAGES
) -> dict[str, Comparison]:
    """Every table, or those named, into its own folder below ``folder``."""
    from effdl.comparison import compare

    unknown = set(tables or ()) - set(TABLES)
    if unknown:
        raise SystemExit(f"no table {sorted(unknown)}; there are {list(TABLES)}")
    data, found = Cifar(images), {}
    for name in tables or TABLES:
        found[name] = compare(
            Classifier, data, TABLES[name](), seeds=seeds, folder=folder / name.replace(" % ", "-percent-"),
            trainer={"max_epochs": EPOCHS, "accelerator": "cpu"},
        )  # fmt: skip
    return found


def lines(found: dict[str, Comparison]) -> list[list[str]]:
    """For printing: one row per method and table."""
    rows = [["table", "method", "accuracy", "sparsity", "parameters", "kB compressed", "latency / before", "seconds"]]
    for name, comparison in found.items():
        for row in comparison.rows:
            if "metric" not in row:
                rows.append([name, row["name"], next(iter(row["errors"].values()), "")[:60], *[""] * 5])
                continue
            metric, faster = row["metric"], row["latency_ms"]["mean"] / row["latency_before_ms"]["mean"]
            cells = [f"{100 * metric['mean']:.2f} ± {100 * metric['std']:.2f}", f"{row['sparsity']['mean']:.3f}"]
            cells += [f"{row['parameters']['mean']:,.0f}", f"{row['stored_bytes']['mean'] / 1e3:.1f}", f"{faster:.2f}"]
            rows.append([name, row["name"], *cells, f"{row['seconds']['mean']:.0f}"])
    return rows

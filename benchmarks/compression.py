"""All compression methods on one trained network at equal budget: ``python -m benchmarks compression``.

CIFAR-10 (the JPEG images of ``EFFDL_DATA``), the trained ResNet-20, 80 steps over 4,000 images for every method, and
``effdl.compare`` behind it: what is there already is not trained again. Methods of transformers and of recurrent
networks (dsnot, rnn-sparsity) and of several teachers (meal-v2) have no row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from benchmarks.cifar import Cifar, Classifier, resnet
from effdl.compression.trained_rank_pruning import final_ranks
from effdl.core.calibrate import recalibrate_batchnorm
from effdl.core.factorize import factorize, is_cheaper
from effdl.core.masks import keep_count, top_k_mask
from effdl.core.pareto import Comparison
from effdl.core.quantized import quantize_
from effdl.core.quantizers import symmetric
from effdl.core.report import count_parameters
from effdl.core.select import select_modules

EPOCHS, IMAGES, BATCH = 1, 4000, 50
FIRST = "conv1"  # of the network: left alone by every method, as the last layer is not
LAYERS = (torch.nn.Conv2d, torch.nn.Linear)


class AtTheEnd(Callback):
    """A change of the finished network that knows no method: the obvious baseline."""

    def __init__(self, change: Callable[[Any], None]) -> None:
        self.change = change

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self.change(pl_module.model)


class AtTheStart(AtTheEnd):
    """The same before training, which then mends what it can."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if not getattr(self, "done", False):
            self.change(pl_module.model)
        self.done = True

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        pass


class Extracted(Callback):
    """Maestro's network, cut to a share of the dense parameters by its own order of components."""

    def __init__(self, maestro: Any, budget: float, batches: Callable[[], Any]) -> None:
        self.maestro, self.budget, self.batches = maestro, budget, batches

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        from effdl.compression.maestro import extract

        ranks = {name.removeprefix("model."): rank for name, rank in self.maestro.ranks.items()}
        pl_module.model, _ = extract(pl_module.model, ranks, self.budget)
        recalibrate_batchnorm(pl_module.model, self.batches())


def _layers(model: Any) -> dict[str, Any]:
    """By their whole names: as a pattern ``conv1`` would fit one in every block."""
    return {name: layer for name, layer in select_modules(model, LAYERS).items() if name != FIRST}


def _weights(model: Any) -> dict[str, Any]:
    return {f"{name}.weight": layer for name, layer in _layers(model).items()}


def one_shot_magnitude(model: Any, sparsity: float) -> None:
    """The smallest weights of each layer become zero; no training follows."""
    for layer in _weights(model).values():
        weight = layer.weight.data
        weight.mul_(top_k_mask(weight.abs(), keep_count(weight.numel(), sparsity)))


def ranks_at(model: Any, energy: float) -> dict[str, int]:
    """Ranks that keep a share of each layer's squared singular values, of the layers that this makes smaller."""
    layers = _layers(model)
    ranks = final_ranks(layers, "channel", ("energy", energy))
    shapes = {name: layer.weight.shape for name, layer in layers.items()}
    return {name: rank for name, rank in ranks.items() if is_cheaper(shapes[name], rank, "channel")}


def energy_at(model: Any, budget: float) -> float:
    """The share of energy at which a network has ``budget`` of its parameters, by bisection."""
    dense = count_parameters(model)["parameters"]
    low, high = 0.05, 0.9999
    for _ in range(12):
        middle = (low + high) / 2
        small = count_parameters(factorize(model, ranks_at(model, middle)))["parameters"] <= budget * dense
        low, high = (middle, high) if small else (low, middle)
    return low


def one_shot_svd(model: Any, budget: float) -> None:
    """Layers cut at equal energy until ``budget`` of the parameters is left."""
    factorize(model, ranks_at(model, energy_at(model, budget)), inplace=True)


def min_max_rounding(model: Any, bits: int) -> None:
    """Symmetric codes per output channel."""
    quantize_(model, {name: symmetric(layer.weight.detach(), bits) for name, layer in _weights(model).items()})


def one_bit(model: Any) -> None:
    """Signs times their layer's mean magnitude."""
    for layer in _weights(model).values():
        weight = layer.weight.data
        weight.copy_(weight.sign() * weight.abs().mean())


def pruning(sparsity: float) -> dict[str, Callable[[], Any]]:
    """At one sparsity of all weights but the first layer's."""
    from effdl.callbacks import PDPCallback, PruningCallback, RelevancePruningCallback

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
        # channels inside of the blocks: those between them are tied by shortcuts that shift channels (F.pad)
        "relevance-pruning, whole channels": partial(
            RelevancePruningCallback, sparsity, step_sparsity=round(sparsity / 10, 3), every=4,
            targets="layer*.conv1",
        ),
    }  # fmt: skip


def low_rank(budget: float) -> dict[str, Callable[[], Any]]:
    """At one share of the dense parameters."""
    from effdl.callbacks import MaestroCallback, TrainedRankPruningCallback

    def trained(budget: float) -> list[Callback]:
        # the paper's period: three cuts, at the steps 0, 20 and 40, which together keep what the last one will
        energy = energy_at(resnet(), budget) ** (1 / 3)
        method = TrainedRankPruningCallback(
            keep_energy=energy, every=20, stop=0.7, decompose=False, exclude=f"model.{FIRST}"
        )
        return [method, AtTheEnd(partial(one_shot_svd, budget=budget))]

    def ordered(sampler: str, budget: float) -> list[Callback]:
        method = MaestroCallback(sampler=sampler, lasso_weight=1e-4, smallest=False, exclude=f"model.{FIRST}")
        return [method, Extracted(method, budget, lambda: list(Cifar(1600).train_dataloader()))]

    return {
        "one-shot SVD": partial(AtTheEnd, partial(one_shot_svd, budget=budget)),
        "one-shot SVD, then tuned": partial(AtTheStart, partial(one_shot_svd, budget=budget)),
        "trained-rank-pruning": partial(trained, budget),
        "maestro, per layer": partial(ordered, "per_layer", budget),
        "maestro, across layers": partial(ordered, "across_layers", budget),
    }


def quantisers(bits: int) -> dict[str, Callable[[], Any]]:
    """At one width of all weights but the first layer's; mixed precision chooses among this width and wider ones."""
    from effdl.callbacks import (
        DifferentiableQuantizationCallback,
        MixedPrecisionPTQCallback,
        NUPESCallback,
        QuantizedDistillationCallback,
    )

    first = {"exclude": f"model.{FIRST}"}

    def taught(bits: int) -> Callback:
        return QuantizedDistillationCallback(bits=bits, teacher=resnet(), **first)

    learned = {"learn_codes": True, "learn_exponent": True, "iterations": 200, **first}
    rows: dict[str, Callable[[], Any]] = {
        "min-max rounding": partial(AtTheEnd, partial(min_max_rounding, bits=bits)),
        "nupes, data-free": partial(NUPESCallback, bits=bits, **first),
        "nupes, learned": partial(NUPESCallback, bits=bits, **learned),
        "quantized-distillation": partial(taught, bits),
        "differentiable quantization": partial(DifferentiableQuantizationCallback, bits=bits, **first),
    }
    if bits < 8:
        wider = tuple(width for width in (8, 4, 2) if width >= bits)
        name = f"hessian-mixed-precision, {' '.join(map(str, wider))} bits"
        rows[name] = partial(
            MixedPrecisionPTQCallback, wider, probes=8, pairs="neighbours", calibration_batches=2, **first
        )
    return rows


def binary() -> dict[str, Callable[[], Any]]:
    """At one bit, with and without binary activations."""
    from effdl.callbacks import ReSTECallback

    layers = {"targets": torch.nn.Conv2d, "exclude": f"model.{FIRST}"}
    return {
        "signs of the finished weights": partial(AtTheEnd, one_bit),
        "reste, weights": partial(ReSTECallback, activations=False, **layers),
        "reste, weights and activations": partial(ReSTECallback, **layers),
    }


TABLES: dict[str, Callable[[], dict[str, Callable[[], Any]]]] = {
    "90 % sparse": partial(pruning, 0.90),
    "95 % sparse": partial(pruning, 0.95),
    "50 % of the parameters": partial(low_rank, 0.50),
    "30 % of the parameters": partial(low_rank, 0.30),
    "8 bits": partial(quantisers, 8),
    "4 bits": partial(quantisers, 4),
    "2 bits": partial(quantisers, 2),
    "1 bit": binary,
}


def measure(
    folder: Path, seeds: int = 3, tables: list[str] | None = None, images: int = IMAGES
) -> dict[str, Comparison]:
    """Every table, or those named; a run that ``folder`` holds is not made again."""
    from effdl.comparison import compare

    unknown = set(tables or ()) - set(TABLES)
    if unknown:
        raise SystemExit(f"no table {sorted(unknown)}; there are {list(TABLES)}")
    data, found = Cifar(images, BATCH), {}
    for name in tables or TABLES:
        found[name] = compare(
            Classifier, data, TABLES[name](), seeds=seeds, folder=folder,
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

"""The training step with a method over the bare step: ``python -m benchmarks overhead``.

timm's resnet18 on 32x32 images; PowerNorm and PolyCom on timm's vit_tiny (192 wide, 65 tokens of 4x4 pixels), where
they have layers to replace.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.race import Make, images, peak_bytes, periods, race, ratios


@dataclass(frozen=True)
class Row:
    """A method, how its run is made, and the ratio that it must not exceed (``None``: reported).

    Where ``least`` is given, the target is a margin on the ratio of that run, which has in it what the method cannot do
    without and nothing else; it takes part in the same race. A method that works only every ``period`` steps is
    measured by means over so many, and one whose cost falls while it trains after ``settle`` steps.
    """

    name: str
    make: Make
    bare: str
    target: float | None = None
    least: Make | None = None
    period: int = 1
    settle: int = 0


def classifier(model: str, cls: Any = None, **kwargs: Any) -> Any:
    """The stock classifier (or ``cls``) around a timm model with seeded weights."""
    from effdl.tasks.image import ImageClassifier

    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4} if model.startswith("vit") else {}
    optimizer = _sgd
    return (cls or ImageClassifier)(model=model, num_classes=10, model_kwargs=sizes, optimizer=optimizer, **kwargs)


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 1e-3, momentum=0.9)


def lightning_pruning(sparsity: float) -> Any:
    """Lightning's own pruning, its masks in place from the first step."""
    from lightning.pytorch.callbacks import ModelPruning

    class FromTheStart(ModelPruning):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.apply_pruning(sparsity)

    return FromTheStart("l1_unstructured", apply_pruning=False, use_lottery_ticket_hypothesis=False)


def teachers() -> list[Any]:
    """Two frozen resnet18."""
    from effdl.core.teacher import freeze

    return [freeze(classifier("resnet18").model) for _ in range(2)]


def meal() -> tuple[Any, list[Any]]:
    from effdl.compression.meal_v2 import MEALV2ImageClassifier

    return classifier("resnet18", MEALV2ImageClassifier, teachers=teachers(), discriminator_k=2), []


def with_forward_of_teachers() -> tuple[Any, list[Any]]:
    """The bare run, and each batch through the teachers: what they say is not used."""
    from effdl.tasks.image import ImageClassifier

    given = teachers()

    class Asking(ImageClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with torch.no_grad():
                for teacher in given:
                    teacher(batch["image"])
            return super().training_step(batch, batch_idx)

    return classifier("resnet18", Asking), []


def rows(names: list[str] | None = None) -> list[Row]:
    """All rows, or those named."""
    from effdl.callbacks import (
        MaestroCallback,
        PDPCallback,
        PolyComCallback,
        PowerNormCallback,
        PruningCallback,
        ReSTECallback,
        SAMCallback,
        SharpnessCallback,
        SmoothGradCAMCallback,
        TrainedRankPruningCallback,
    )
    from effdl.training.elr import ELRImageClassifier

    def with_callbacks(model: str, *make: Callable[[], Any]) -> Make:
        return lambda: (classifier(model), [one() for one in make])

    def elr() -> tuple[Any, list[Any]]:
        return classifier("resnet18", ELRImageClassifier, num_examples=4096), []

    resnet, vit, never = "resnet18", "vit_tiny_patch16_224", 1_000_000
    trp = with_callbacks(resnet, lambda: TrainedRankPruningCallback(decompose=False))  # cuts every 5 steps
    table = [
        Row("nothing (the noise)", with_callbacks(resnet), resnet),
        Row("pruning masks", with_callbacks(resnet, lambda: PruningCallback(0.9, start=0, stop=0)), resnet, 1.03),
        Row("PDP", with_callbacks(resnet, lambda: PDPCallback(0.9, start=0, stop=0)), resnet, 2.0),
        Row("Lightning ModelPruning", with_callbacks(resnet, lambda: lightning_pruning(0.9)), resnet),
        Row("SAM", with_callbacks(resnet, lambda: SAMCallback(rho=0.05)), resnet, 2.15),
        Row("ELR", elr, resnet, 1.03),
        Row("MEAL V2", meal, resnet, 0.05, least=with_forward_of_teachers),
        Row(
            "Smooth Grad-CAM++ (idle)", with_callbacks(resnet, lambda: SmoothGradCAMCallback(every=never)), resnet, 1.01
        ),
        Row("sharpness (idle)", with_callbacks(resnet, lambda: SharpnessCallback(every=never)), resnet, 1.01),
        Row("TRP, the first cuts of a random network", trp, resnet, period=5),
        Row("TRP (amortised at its default period)", trp, resnet, 1.10, period=5, settle=150),
        Row("Maestro", with_callbacks(resnet, MaestroCallback), resnet, 1.5),
        Row("ReSTE", with_callbacks(resnet, lambda: ReSTECallback(total_epochs=10)), resnet, 1.75),
        Row("PowerNorm v LayerNorm", with_callbacks(vit, lambda: PowerNormCallback(warmup_iters=0)), vit, 1.5),
        Row("PolyNorm v GELU", with_callbacks(vit, PolyComCallback), vit),
        Row("PolyReLU v GELU", with_callbacks(vit, lambda: PolyComCallback(kind="polyrelu")), vit),
    ]
    known = [row.name for row in table]
    unknown = set(names or ()) - set(known)
    if unknown:
        raise SystemExit(f"no row {sorted(unknown)}; there are {known}")
    return [row for row in table if not names or row.name in names]


def measure(pairs: int, batch: int, names: list[str] | None = None, memory: bool = True) -> list[dict[str, Any]]:
    """One dict per row: ratios, the target, whether it is met (by the median), peak memory with and without."""
    data, chosen = images(batch), rows(names)
    bares = {row.bare: (lambda model=row.bare: (classifier(model), [])) for row in chosen}
    peaks: dict[str, int | None] = {}
    if memory:  # before the first step here, see peak_bytes
        peaks = {row.name: peak_bytes(row.make, data) for row in chosen}
        peaks |= {model: peak_bytes(make, data) for model, make in bares.items()}
    results = []
    for row in chosen:
        makers = {"bare": bares[row.bare], "method": row.make} | ({"least": row.least} if row.least else {})
        rounds = math.ceil(pairs / row.period) * row.period
        times = periods(race(makers, data, rounds, row.settle), row.period)
        target = row.target
        if row.least:
            target = round(ratios(times, "least", "bare")["median"] + (row.target or 0), 3)
        result = {"name": row.name, "model": row.bare, **ratios(times, "method", "bare"), "target": target}
        result["met"] = None if target is None else result["median"] <= target
        result |= {"peak_bytes": peaks.get(row.name), "bare_peak_bytes": peaks.get(row.bare)}
        results.append(result)
    return results


def table(results: list[dict[str, Any]]) -> list[list[str]]:
    """For printing: a header and a row per result."""
    lines = [["method", "model", "median", "minimum", "cpu", "target", "step ms", "bare ms", "peak MB", "bare MB"]]
    for r in results:
        target = "" if r["target"] is None else f"<= {r['target']} {'ok' if r['met'] else 'MISSED'}"
        memory = ["" if r[key] is None else f"{r[key] / 1e6:.0f}" for key in ("peak_bytes", "bare_peak_bytes")]
        ratio = [f"{r[key]:.3f}" for key in ("median", "minimum", "cpu")]
        lines.append([r["name"], r["model"], *ratio, target, f"{r['step_ms']:.1f}", f"{r['bare_ms']:.1f}", *memory])
    return lines

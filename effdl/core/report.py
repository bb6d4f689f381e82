"""What a run tells: measurements of a model, ``report.json``, the final table and the curves over training.

A method takes part by duck typing; each of the three is optional, on its callback or LightningModule. ``report`` and
``figures`` are called on rank 0 alone once training is over: no collectives there.

``report() -> dict``
    What the method has to say, put into ``report.json`` under its slug. These keys are understood, all optional:

    - ``"before"`` and ``"after"``: one column each of the final table: ``{"name": "dense", "metrics": {"val/accuracy":
      0.97}, **measure(model, inputs)}``. What ``"after"`` lacks is filled in from the finished model.
    - ``"layers"``: ``{layer: {column: value}}``, printed as a table.
    - ``"curves"``: logged quantities to draw over training; by default the ``SLUG/...`` and the validation ones.
    - any other number or string is printed as it is.
``figures(folder: Path) -> None``
    Writes further images into the run's ``figures`` folder.
``matched(module: LightningModule) -> Iterable[str]``
    Names of the layers that the method acts on, for ``effdl run NAME --dry-run``; called once it is attached.

Example::

    from effdl.core.report import environment, measure, write_report

    numbers = measure(model, (images[:1],))     # parameters, nonzero, stored_bytes, latency_ms
    write_report(Path("report.json"), {"environment": environment(), "model": numbers})
"""

from __future__ import annotations

import csv
import gzip
import importlib.metadata
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from effdl.core.quantized import quantized_weights

PACKAGES = ("effdl", "torch", "torchvision", "lightning", "timm", "diffusers", "transformers", "datasets")
_TITLES = {
    "parameters": "parameters",
    "nonzero": "  of these not zero",
    "stored_bytes": "file size, compressed",
    "latency_ms": "latency, one example",
}


def count_parameters(model: nn.Module) -> dict[str, int]:
    """``parameters`` of the model (a shared tensor once, a quantised weight too) and how many are ``nonzero``."""
    tensors = [*model.parameters(), *(record.dequantize() for record in quantized_weights(model).values())]
    return {
        "parameters": sum(tensor.numel() for tensor in tensors),
        "nonzero": sum(int(torch.count_nonzero(tensor)) for tensor in tensors),
    }


def compressed_bytes(model: nn.Module, level: int = 6) -> int:
    """Bytes of the model's safetensors file under gzip: what zeros and repeated values save is seen, nothing else."""
    from safetensors.torch import save

    from effdl.core.export import plain_state

    return len(gzip.compress(save(plain_state(model)), compresslevel=level, mtime=0))


def first_example(inputs: Any) -> Any:
    """The first example of nested inputs: every tensor whose first dimension is the batch is cut to length 1."""
    size = next((leaf.shape[0] for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()), 1)
    return tree_map(lambda x: x[:1] if isinstance(x, Tensor) and x.dim() and x.shape[0] == size else x, inputs)


def latency_ms(
    model: nn.Module, args: tuple = (), kwargs: Mapping[str, Any] | None = None, seconds: float = 1.0
) -> float:
    """Median wall time [ms] of a forward pass in eval mode, over about ``seconds`` (5 to 100 passes after a warm-up).

    Training flags are put back; the inputs are taken as they are, on the model's device.
    """
    return latencies_ms([model], args, kwargs, seconds)[0]


def latencies_ms(
    models: list[nn.Module], args: tuple = (), kwargs: Mapping[str, Any] | None = None, seconds: float = 1.0
) -> list[float]:
    """:func:`latency_ms` of several models, their passes interleaved: a busy machine is busy for all of them."""
    kwargs = dict(kwargs or {})
    flags = [(module, module.training) for model in models for module in model.modules()]
    device = next((p.device for p in models[0].parameters()), torch.device("cpu"))
    times: list[list[float]] = [[] for _ in models]
    try:
        for model in models:
            model.eval()
        with torch.inference_mode():
            start = time.perf_counter()
            while len(times[0]) < 6 or (time.perf_counter() - start < seconds and len(times[0]) < 101):
                for model, own in zip(models, times):
                    begin = time.perf_counter()
                    model(*args, **kwargs)
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                    own.append(time.perf_counter() - begin)
    finally:
        for module, training in flags:
            module.training = training
    return [1000 * statistics.median(own[1:]) for own in times]


def measure(model: nn.Module, args: tuple | None = None, kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Parameters, non-zero ones, compressed bytes and, where example inputs are given, latency [ms] of one example."""
    numbers: dict[str, Any] = {**count_parameters(model), "stored_bytes": compressed_bytes(model)}
    if args is not None or kwargs:
        args, kwargs = first_example((args or (), dict(kwargs or {})))
        numbers["latency_ms"] = latency_ms(model, args, kwargs)
    return numbers


class ForwardProbe:
    """Remembers one example of what a network is called with next, inside somebody else's training.

    ``inputs`` is ``(args, kwargs)``, cut to one example and copied; ``None`` until a forward was seen. A forward that
    is being compiled is not looked at: that would break its graph.

    Example::

        probe = ForwardProbe(network)                        # before somebody else's forward
        numbers = measure(network, *(probe.inputs or ()))    # after it
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.inputs: tuple[tuple, dict[str, Any]] | None = None
        self._handle = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, _model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        # copies, which no graph and no later step can change
        cut = first_example((args, kwargs))
        self.inputs = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, cut)
        self.remove()

    def remove(self) -> None:
        """Stop listening; called again it does nothing."""
        self._handle.remove()


def environment() -> dict[str, Any]:
    """Versions, machine and devices, as plain values."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "versions": versions,
    }


def plain(value: Any) -> Any:
    """``value`` as JSON knows it: tensors and arrays become numbers or lists, what is not finite ``None``."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write strict JSON; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(plain(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def human(key: str, value: Any) -> str:
    """A value as a person reads it, with its unit."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if key.endswith("bytes"):
        return f"{value / 1e6:,.2f} MB" if value >= 1e6 else f"{value / 1e3:,.1f} kB"
    if key.endswith("_ms"):
        return f"{value:.2f} ms"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def comparison_table(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> Table:
    """Metrics and measurements, one column for each state of the model."""
    columns = [column for column in (before, after) if column]
    table = Table("", title_justify="left")
    for column in columns:
        table.add_column(str(column.get("name", "")), justify="right")
    # beside another column only what both have: a row is there to be compared
    for name in _in_order(columns[0].get("metrics") or after.get("metrics", {})):
        table.add_row(name, *[human(name, plain(column.get("metrics", {}).get(name))) for column in columns])
    for key, title in _TITLES.items():
        if any(key in column for column in columns):
            table.add_row(title, *[human(key, column.get(key)) for column in columns])
    return table


def _in_order(names: Iterable[str]) -> list[str]:
    """Validation before the rest, training last; of ``loss``, ``loss_step`` and ``loss_epoch`` one."""
    known = dict.fromkeys(names)
    kept = [n for n in known if not n.endswith("_step") and not (n.endswith("_epoch") and n[:-6] in known)]
    return sorted(kept, key=lambda name: (name.startswith("train"), not name.startswith(("val", "test"))))


def layer_table(layers: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per layer."""
    names = list(dict.fromkeys(name for row in layers.values() for name in row))
    table = Table()
    table.add_column("layer", overflow="fold")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for layer, row in layers.items():
        table.add_row(layer, *[human(name, plain(row.get(name))) for name in names])
    return table


def print_report(report: Mapping[str, Any], console: Console | None = None) -> None:
    """The final tables of a run: layers first, so that the summary is what remains on the screen."""
    parts: list[Any] = []
    before = None
    for slug, method in report.get("methods", {}).items():
        if method.get("layers"):
            parts += [f"[bold]{slug}[/bold]: layers", layer_table(method["layers"])]
        before = before or method.get("before")
        notes = {k: v for k, v in method.items() if isinstance(v, (int, float, str)) and not isinstance(v, bool)}
        parts += [f"{slug}: {key} = {human(key, value)}" for key, value in notes.items()]
    parts.append(comparison_table(before, report.get("result", {})))
    (console or Console()).print(Group(*parts))


def read_metrics(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Logged quantity to ``[(step, value), ...]`` from a CSVLogger's ``metrics.csv``."""
    curves: dict[str, list[tuple[float, float]]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if name not in ("step", "epoch") and value not in ("", None):
                    curves.setdefault(name, []).append((float(row["step"]), float(value)))
    return curves


def draw_curves(metrics: Path, target: Path, names: Iterable[str] | None = None, title: str = "") -> Path | None:
    """One panel per logged quantity over the optimizer steps; ``None`` where nothing of it was logged."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    curves = read_metrics(metrics)
    chosen = [name for name in (names if names is not None else curves) if name in curves][:6]
    if not chosen:
        return None
    figure = Figure(figsize=(7, 1 + 1.9 * len(chosen)), layout="constrained")
    for axes, name in zip(figure.subplots(len(chosen), sharex=True, squeeze=False)[:, 0], chosen):
        steps, values = zip(*curves[name])
        axes.plot(steps, values, marker="." if len(steps) < 60 else "", linewidth=1.5)
        axes.set_ylabel(name, fontsize=9)
        axes.grid(alpha=0.3)
    axes.set_xlabel("optimizer step")
    figure.suptitle(title)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    return target

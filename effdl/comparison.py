"""Which method suits this model? The same model, data, budget and seeds for each, and who is dominated by whom.

A comparison's folder holds ``compare.json``, ``pareto.png`` and one file per finished run under ``runs``: killed in the
middle and started again, it goes on with what is missing. A method that fails is a row with its error.

Example::

    import effdl

    found = effdl.compare(MyModule, MyData(), {"pdp": {"sparsity": 0.9}, "gradual-pruning": {"sparsity": 0.9}})
    print(found.rows[0]["dominated_by"])
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from effdl import catalog
from effdl.core.errors import ConfigurationError, check
from effdl.core.pareto import Comparison, draw, judge
from effdl.core.report import environment, write_report

BASELINE = "nothing"
Methods = Iterable[str] | Mapping[str, Any]


class Build(NamedTuple):
    """What one run needs."""

    trainer: Any
    module: Any
    data: Any


def compare(
    module_factory: Callable[[], Any],
    datamodule: Any,
    methods: Methods,
    *,
    seeds: int | Sequence[int] = 3,
    folder: str | Path = "comparison",
    trainer: Mapping[str, Any] | None = None,
    metric: str | None = None,
    mode: str | None = None,
    progress: bool = True,
) -> Comparison:
    """Train ``module_factory()`` once per method and seed, and without any method, and compare what comes out.

    Args:
        module_factory: makes the LightningModule, at its start (trained or not); called after ``seed_everything``.
        datamodule: a LightningDataModule, or a callable that makes one; it needs validation data.
        methods: names of methods; or ``{name: arguments}``; or ``{label: callable}``, which returns a callback, a list
            of callbacks or (a mixin mixed in, a method that is a module) the LightningModule to train.
        seeds: how many (0, 1, ...), or which.
        folder: of the results. Another module or other data want another folder: only methods, their arguments, the
            Trainer's and the seeds tell runs apart.
        trainer: arguments of the ``Trainer``; the same budget for all.
        metric: logged in validation; default: the first with "acc" in its name, else with "loss".
        mode: ``"max"`` or ``"min"``; default: by the metric's name.
        progress: a bar over methods and seeds.

    Raises:
        ConfigurationError: unknown methods or a folder of something else, before anything is trained.
    """
    chosen = {BASELINE: list, **_resolve(methods)}
    settings = dict(trainer or {})

    def build(name: str, seed: int) -> Build:
        import lightning.pytorch as lightning

        lightning.seed_everything(seed, verbose=False)
        made = chosen[name]()
        is_module = hasattr(made, "training_step")
        callbacks = [] if is_module else list(made) if isinstance(made, (list, tuple)) else [made]
        module = made if is_module else module_factory()
        data = datamodule() if callable(datamodule) else datamodule
        own = settings.get("callbacks") or []
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        quiet |= {"enable_model_summary": False, **settings}
        quiet["callbacks"] = [*(own if isinstance(own, (list, tuple)) else [own]), *callbacks]
        return Build(lightning.Trainer(**copy.copy(quiet)), module, data)

    identities = {name: [_stable(make), _stable(settings)] for name, make in chosen.items()}
    return run_all(identities, build, _seeds(seeds), Path(folder), metric, mode, progress)


def run_all(
    identities: Mapping[str, Any],
    build: Callable[[str, int], Build],
    seeds: Sequence[int],
    folder: Path,
    metric: str | None = None,
    mode: str | None = None,
    progress: bool = True,
) -> Comparison:
    """The missing runs, then the table: what :func:`compare` and ``effdl compare`` share.

    Args:
        identities: method to what its runs are remembered under.
        build: makes one run.
    """
    check(mode in (None, "max", "min"), "mode", mode, "'max', 'min' or None")
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in identities}
    with _bar(len(identities) * len(seeds), progress) as advance:
        for seed in seeds:  # seed by seed: an interrupted comparison has something of every method
            for name, identity in identities.items():
                advance(f"{name}, seed {seed}")
                results[name].append(_one(name, seed, identity, build, folder / "runs"))
                advance(None)
    found = judge(results, folder, metric, mode)
    document = {"metric": found.metric, "mode": found.mode, "seeds": list(seeds), "methods": found.rows}
    write_report(folder / "compare.json", {**document, "environment": environment()})
    draw(found, folder / "pareto.png")
    return found


def _one(name: str, seed: int, identity: Any, build: Callable, folder: Path) -> dict[str, Any]:
    """A run's numbers, from its file where it is there; an error is a result, but is tried again next time."""
    digest = hashlib.sha256(json.dumps([name, seed, identity], sort_keys=True, default=str).encode()).hexdigest()[:12]
    path = folder / f"{_safe(name)}-seed{seed}-{digest}.json"
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    try:
        result = _measured(build(name, seed))
    except Exception as error:  # not KeyboardInterrupt
        return {"seed": seed, "error": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    write_report(path, {"seed": seed, **result})
    return {"seed": seed, **result}


def _measured(run: Build) -> dict[str, Any]:
    """Train, validate the finished model by itself, count, weigh and time it beside what it was at the start."""
    import lightning.pytorch as lightning

    from effdl.core.export import product
    from effdl.core.report import ForwardProbe, compressed_bytes, count_parameters, latencies_ms

    before = copy.deepcopy(product(run.module))
    dense = count_parameters(before)["parameters"]
    start = time.perf_counter()
    run.trainer.fit(run.module, datamodule=run.data)
    seconds = time.perf_counter() - start
    network = product(run.module)
    probe = ForwardProbe(network)
    judge = lightning.Trainer(
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        accelerator=run.trainer.accelerator, devices=1,
    )  # fmt: skip
    try:
        logged = judge.validate(run.module, datamodule=run.data, verbose=False)
    finally:
        probe.remove()
    device = judge.strategy.root_device
    counts = count_parameters(network)
    args, kwargs = probe.inputs or ((), {})
    old, new = latencies_ms([before.to(device), network.to(device)], args, kwargs) if probe.inputs else (0.0, 0.0)
    return {
        "metrics": {key: float(value) for part in logged for key, value in part.items()},
        **counts,
        "sparsity": 1 - counts["nonzero"] / max(dense, 1),
        "stored_bytes": compressed_bytes(network),
        "latency_ms": new,
        "latency_before_ms": old,
        "seconds": seconds,
    }


class _bar:
    """A progress bar whose ``advance(text)`` names what runs now, ``advance(None)`` counts it."""

    def __init__(self, total: int, wanted: bool) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, disable=not wanted, console=Console(stderr=True))
        self.task = self.progress.add_task("", total=total)

    def __enter__(self) -> Callable[[str | None], None]:
        self.progress.start()
        return self._advance

    def _advance(self, text: str | None) -> None:
        if text is None:
            self.progress.advance(self.task)
        else:
            self.progress.update(self.task, description=text)

    def __exit__(self, *exception: Any) -> None:
        self.progress.stop()


# ---- which methods -------------------------------------------------------------------------------------------------


def _resolve(methods: Methods) -> dict[str, Callable[[], Any]]:
    """Label to a callable that makes the method; every name is looked up now, and made once to see its arguments."""
    given = dict(methods) if isinstance(methods, Mapping) else {name: {} for name in methods}
    check(bool(given), "methods", methods, "at least one method")
    made = {name: _maker(name, value) for name, value in given.items()}
    check(BASELINE not in made, "methods", BASELINE, "other labels: this one is the run without any method")
    return made


def _maker(name: str, value: Any) -> Callable[[], Any]:
    if callable(value):
        return value
    arguments = dict(value or {})
    entry = catalog.find(name)
    if entry.kind != "callback":
        raise ConfigurationError(
            f"{name} is a {entry.kind}: give {{{name!r}: callable}} that makes the LightningModule."
        )
    catalog.create(name, **arguments)  # a wrong argument is told before anything is trained
    return _Created(name, arguments)


@dataclass(frozen=True)
class _Created:
    name: str
    arguments: dict[str, Any]

    def __call__(self) -> Any:
        return catalog.create(self.name, **self.arguments)


def _stable(value: Any) -> str:
    """A name for a callable or arguments that is the same in the next process."""
    if isinstance(value, _Created):
        return repr((value.name, sorted(value.arguments.items(), key=str)))
    if isinstance(value, Mapping):
        return repr(sorted((key, _stable(item)) for key, item in value.items()))
    if isinstance(value, functools.partial):
        return repr((_stable(value.func), [_stable(item) for item in value.args], _stable(value.keywords)))
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text


def _seeds(seeds: int | Sequence[int]) -> list[int]:
    chosen = list(range(seeds)) if isinstance(seeds, int) and not isinstance(seeds, bool) else list(seeds)
    good = bool(chosen) and all(isinstance(seed, int) and seed >= 0 for seed in chosen)
    check(good, "seeds", seeds, "a positive number, or a list of integers >= 0")
    return chosen


def _safe(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)

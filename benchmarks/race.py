"""Several trainings in one process, one step each in turn: what makes the machine slow now makes all of them slow.

Each run is a real ``Trainer.fit`` in a thread of its own, of which exactly one is awake. A step lasts from one
``on_train_batch_start`` to the next: loading, forward, backward, optimizer and every callback are inside.

Example::

    times = race({"bare": make_bare_fit, "method": make_method_fit}, rounds=20)
    print(ratios(times, "method", "bare"))          # {"median": 1.02, "minimum": 1.01, ...}
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor

WARM_UP = 3

#: Wall time, and processor time of the whole process, which other programs on a busy machine do not lengthen.
Seconds = tuple[float, float]
#: Makes (module, callbacks) of one run.
Make = Callable[[], tuple[Any, list[Any]]]


class _Stepper(lightning.Callback):
    """Stops its run before every step until it is told to go on."""

    def __init__(self) -> None:
        self.go, self.arrived = threading.Semaphore(0), threading.Semaphore(0)

    def on_train_batch_start(self, *args: Any) -> None:
        self.arrived.release()
        self.go.acquire()


class _Run(threading.Thread):
    def __init__(self, make: Make, batches: list[Any], steps: int) -> None:
        super().__init__(daemon=True)
        self.make, self.batches, self.steps = make, batches, steps
        self.stepper, self.error = _Stepper(), None

    def run(self) -> None:
        try:
            fit(*self.make(), self.batches, self.steps, self.stepper)
        except BaseException as error:  # the main thread raises it
            self.error = error
        finally:
            self.stepper.arrived.release()

    def step(self) -> Seconds:
        """The next step."""
        seconds = clocked(self._to_the_next_step)
        if self.error is not None:
            raise self.error
        return seconds

    def _to_the_next_step(self) -> None:
        self.stepper.go.release()
        self.stepper.arrived.acquire()


def clocked(work: Callable[[], Any]) -> Seconds:
    """How long ``work`` takes, by the wall clock and in processor time."""
    begin = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begin[0], time.process_time() - begin[1]


def fit(module: Any, callbacks: list[Any], batches: list[Any], steps: int, stepper: Any = None) -> None:
    """So many training steps on the CPU, without logger, checkpoints and validation."""
    trainer = lightning.Trainer(
        max_steps=steps, callbacks=[*([stepper] if stepper else []), *callbacks], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))


def race(makers: dict[str, Make], batch: Any, rounds: int, settle: int = 0) -> dict[str, list[Seconds]]:
    """Seconds per step of each run; round ``i`` of one is the neighbour in time of round ``i`` of the others.

    Each has ``settle`` steps behind it by then.
    """
    counted = rounds + WARM_UP
    runs = {name: _Run(make, [batch] * (settle + counted), settle + counted) for name, make in makers.items()}
    for run in runs.values():
        run.start()
        run.stepper.arrived.acquire()
        if run.error is not None:
            raise run.error
        for _ in range(settle):
            run.step()
    times: dict[str, list[Seconds]] = {name: [] for name in runs}
    names = list(runs)
    for index in range(counted):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(runs[name].step())
    return {name: values[WARM_UP:] for name, values in times.items()}


def in_turns(runs: dict[str, Callable[[], Any]], pairs: int) -> dict[str, list[Seconds]]:
    """Seconds of each of some functions, called in turns."""
    times: dict[str, list[Seconds]] = {name: [] for name in runs}
    for index in range(pairs):
        for name in list(runs)[:: 1 if index % 2 else -1]:
            times[name].append(clocked(runs[name]))
    return times


def periods(times: dict[str, list[Seconds]], length: int) -> dict[str, list[Seconds]]:
    """Means over ``length`` steps on end, for what happens in one of so many."""

    def mean(block: list[Seconds]) -> Seconds:
        wall, processor = (sum(values) / length for values in zip(*block))
        return wall, processor

    blocks = {name: [v[i : i + length] for i in range(0, len(v), length)] for name, v in times.items()}
    return {name: [mean(block) for block in parts] for name, parts in blocks.items()}


def ratios(times: dict[str, list[Seconds]], method: str, bare: str) -> dict[str, Any]:
    """Median and minimum over the pairs of (method's step / bare step), by wall time; ``cpu``: the median of the
    ratios of processor time; and the median steps in ms."""
    pairs = list(zip(times[method], times[bare]))
    wall = [a[0] / b[0] for a, b in pairs]
    return {
        "median": statistics.median(wall),
        "minimum": min(wall),
        "cpu": statistics.median(a[1] / b[1] for a, b in pairs if b[1] > 0),
        "pairs": len(pairs),
        "step_ms": 1000 * statistics.median(a[0] for a, _ in pairs),
        "bare_ms": 1000 * statistics.median(b[0] for _, b in pairs),
    }


def peak_bytes(make: Make, batch: Any, steps: int = 4) -> int | None:
    """Peak resident memory of a few steps above what the process held before, in a child process; Linux only.

    Best called before any tensor was computed with here, so that the child starts small.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        return None
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_measure_peak, args=(theirs, make, batch, steps), daemon=True)
    child.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(300) else None
    except EOFError:
        return None
    finally:
        child.kill()
        child.join()


def _measure_peak(pipe: Any, make: Make, batch: Any, steps: int) -> None:
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    with contextlib.suppress(OSError, AttributeError):  # glibc: give freed blocks of 1 MB back, M_MMAP_THRESHOLD = -3
        ctypes.CDLL(None).mallopt(-3, 1 << 20)
    before = _status("VmRSS")
    fit(*make(), [batch] * steps, steps)
    after = _status("VmHWM")
    pipe.send(None if before is None or after is None else after - before)


def _status(key: str) -> int | None:
    """A line of ``/proc/self/status`` in bytes."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next((1024 * int(line.split()[1]) for line in file if line.startswith(key)), None)
    except OSError:
        return None


def images(count: int, size: int = 32, classes: int = 10) -> dict[str, Tensor]:
    """A batch as ``ImageClassifier`` and ELR take it."""
    g = torch.Generator().manual_seed(0)
    return {
        "image": torch.randn(count, 3, size, size, generator=g),
        "label": torch.randint(0, classes, (count,), generator=g),
        "index": torch.arange(count),
    }

"""Pairs for reflow and distillation as a LightningDataModule: made once by the teacher, then read from disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from effdl.core.distributed import rank, world_size
from effdl.core.errors import check, check_choice, check_integer, check_number
from effdl.data.loading import EpochSampler, ResumableLoader, as_it_is
from effdl.diffusion._denoiser import TimeConvention
from effdl.diffusion._pair_table import PairTable, Solve
from effdl.diffusion._source import FlowSource, fingerprint

PROMPTS = "prompts.json"


class _Rows(torch.utils.data.Dataset):
    """Some rows of a table, with the prompts of their numbers."""

    def __init__(self, table: PairTable, rows: range, prompts: list[str] | None) -> None:
        self.table, self.rows, self.prompts = table, rows, prompts

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, positions: Sequence[int]) -> dict[str, Any]:
        batch: dict[str, Any] = self.table[[self.rows[i] for i in positions]]
        if self.prompts is not None:
            batch["prompt"] = [self.prompts[i] for i in batch["condition"].tolist()]
        return batch


class ReflowPairs(L.LightningDataModule):
    """Pairs for reflow and distillation: made by the teacher before training, then read from a memory-mapped table.

    Generation runs in ``setup`` on the trainer's device, each process making its own blocks; a run that is stopped
    goes on where it was. ``path`` must be seen by all nodes. Batches: ``x0``, ``x1`` float32 ``[B, ...]``,
    ``condition`` int64 ``[B]``, ``index`` int64 ``[B]`` and, with prompts, ``prompt`` (list of B strings).

    Args:
        path: folder of the table.
        teacher: v_k: the folder of the model that the stage starts from, a pipeline, or any
            ``network(x, label, condition)``; ``None`` reads a finished table.
        conditions: prompts (a list, or a text file with one per line), the number of classes, or ``None`` for an
            unconditional teacher. Row i gets condition ``i mod`` their number. No images are needed.
        count: number of pairs; the paper's CIFAR-10 needs 1e6 or more.
        steps: of the teacher's solver: DPM-Solver for a diffusion model, Euler for a flow.
        guidance: alpha of the teacher; ``None``: the paper's, 1 for a teacher that reads no text, 1.5 for a flow of
            :class:`ReflowModule` (which is guided already: above 2 it over-saturates), 6 for Stable Diffusion.
        shape: of one x0, for a teacher whose network has no ``sample_size``.
        convention: how the teacher counts time, see :class:`ReflowModule`.
        dtype: of x1 on disk.
        block: pairs that are solved together.
        batch_size: pairs per training batch and process.
        val: share of the rows, the last ones, held out for validation.
        seed: of noise and order.

    Raises:
        ConfigurationError: an argument out of range; a table of another teacher, guidance, seed ... in ``path``.

    Example::

        data = ReflowPairs("pairs", teacher="runs/instaflow/version_0/model", conditions="prompts.txt", count=100_000)
        Trainer(max_steps=70_000).fit(ReflowModule("runs/instaflow/version_0/model", stage="reflow"), data)
    """

    def __init__(
        self,
        path: str | Path,
        teacher: torch.nn.Module | str | None = None,
        conditions: str | int | list[str] | None = None,
        count: int = 10_000,
        steps: int = 25,
        guidance: float | None = None,
        shape: list[int] | None = None,
        convention: str | TimeConvention | None = None,
        dtype: str = "float16",
        block: int = 64,
        batch_size: int = 64,
        val: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("count", count), ("steps", steps), ("block", block), ("batch_size", batch_size)):
            check_integer(name, value, 1)
        check_integer("seed", seed, 0)
        check_number("val", val, 0, 1, closed="[)")
        check_choice("dtype", dtype, ("float16", "float32"))
        if guidance is not None:
            check_number("guidance", guidance, 0, float("inf"), closed="[)")
        check(teacher is not None or (Path(path) / "pairs.json").is_file(), "teacher", None,
              f"a teacher: there is no table in {str(path)!r}")  # fmt: skip
        self.path, self.teacher, self.count, self.steps = Path(path), teacher, count, steps
        self.guidance, self.shape, self.convention, self.dtype = guidance, shape, convention, dtype
        self.block, self.batch_size, self.val, self.seed = block, batch_size, val, seed
        self.prompts, self.classes = _read_conditions(conditions)
        self.table: PairTable | None = None

    def setup(self, stage: str | None = None) -> None:
        if self.table is not None:
            return
        if self.teacher is not None:
            self._generate()
        self.table = PairTable(self.path)
        self.guidance = self.table.about.get("guidance")
        if self.prompts is None and (self.path / PROMPTS).is_file():
            self.prompts = json.loads((self.path / PROMPTS).read_text(encoding="utf-8"))
        check(self.table.finished, "path", str(self.path), "a finished table", "Give teacher= to finish it.")

    def train_dataloader(self) -> ResumableLoader:
        return self._loader(range(len(self.table) - self._held_out()), shuffle=True)

    def val_dataloader(self) -> ResumableLoader | list:
        rows = range(len(self.table) - self._held_out(), len(self.table))
        return self._loader(rows, shuffle=False) if len(rows) else []

    def predict_dataloader(self) -> ResumableLoader | list:
        return self.val_dataloader()

    def _held_out(self) -> int:
        return round(self.val * len(self.table))

    def _loader(self, rows: range, shuffle: bool) -> ResumableLoader:
        dataset = _Rows(self.table, rows, self.prompts)
        shard = (self.trainer.distributed_sampler_kwargs if self.trainer else None) or {}
        sampler = EpochSampler(dataset, shuffle, self.seed, **shard)
        # equal batches on all ranks; the rest of an epoch is left out of it (another rest in each epoch)
        drop = shuffle and len(rows) >= self.batch_size * world_size()
        return ResumableLoader(
            dataset, batch_size=self.batch_size, sampler=sampler, collate_fn=as_it_is, drop_last=drop
        )

    def _generate(self) -> None:
        source = FlowSource(self.teacher, self.convention)
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        if self.guidance is None:
            text = 1.5 if source.record else 6.0
            self.guidance = text if self.prompts is not None else 1.0
        shape = self.shape or source.shape
        check(shape is not None, "shape", None, "the shape of one x0: this teacher's network has no sample_size")
        text = json.dumps(self.prompts)
        about = {
            "teacher": fingerprint(source.network), "convention": source.convention.as_list(), "steps": self.steps,
            "guidance": self.guidance, "classes": self.classes, "prompts": hashlib.sha256(text.encode()).hexdigest(),
        }  # fmt: skip
        kinds = len(self.prompts) if self.prompts is not None else max(self.classes, 1)
        settings = {"shape": shape, "about": about, "seed": self.seed, "dtype": self.dtype, "block": self.block}
        if rank() == 0 or (self.path / "pairs.json").is_file():  # every process compares what is there: none waits
            PairTable.create(self.path, np.arange(self.count) % kinds, **settings)
        if rank() == 0 and self.prompts is not None:
            (self.path / PROMPTS).write_text(text, encoding="utf-8")
        _barrier()
        network = source.network
        if isinstance(network, torch.nn.Module):
            where, training = next(network.parameters(), torch.empty(0)).device, network.training
            network.eval().to(device)
        PairTable(self.path, writable=True).fill(self._solve(source), rank(), world_size(), device)
        if isinstance(network, torch.nn.Module):
            network.train(training).to(where)
        source.to("cpu")
        _barrier()

    def _solve(self, source: FlowSource) -> Solve:
        def solve(x0: Tensor, number: Tensor) -> Tensor:
            condition: Any = number if self.classes else None
            if self.prompts is not None:
                condition = [self.prompts[i] for i in number.tolist()]
            return source.solve(x0, condition, self.steps, self.guidance)

        return solve


def _read_conditions(conditions: Any) -> tuple[list[str] | None, int]:
    """Prompts or ``None``, and the number of classes or 0."""
    valid = conditions is None or isinstance(conditions, (str, int, list, tuple)) and not isinstance(conditions, bool)
    check(valid, "conditions", conditions, "prompts, a text file, a number of classes or None")
    if isinstance(conditions, str):
        check(Path(conditions).is_file(), "conditions", conditions, "a text file with one prompt per line")
        conditions = [line for line in Path(conditions).read_text(encoding="utf-8").splitlines() if line.strip()]
    if isinstance(conditions, int):
        check_integer("conditions", conditions, 1)
        return None, conditions
    if conditions is not None:
        texts = all(isinstance(text, str) for text in conditions)
        check(len(conditions) > 0 and texts, "conditions", conditions, "at least one prompt")
    return None if conditions is None else list(conditions), 0


def _barrier() -> None:
    if world_size() > 1:
        torch.distributed.barrier()

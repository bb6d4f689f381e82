"""The pair table of instaflow: noise, condition and the image that the teacher makes of them, on disk.

Reflow and distillation learn from triplets ``(x0, c, x1 = ODE[v_k](x0 | c))``. They are made once and kept as four
``.npy`` files that are mapped into memory, never read whole:

- ``x0.npy`` float32: stored in full precision, for half of it would move the very point that the student starts from;
- ``x1.npy`` float16 or float32; ``condition.npy`` int64: a class label or the number of a prompt;
- ``done.npy`` bool, one per block of rows; ``pairs.json``: what the table was made with.

The noise of row i is a function of (seed, i), the blocks are fixed, and block b belongs to rank ``b mod world``: a
run that was stopped goes on where it was and the table comes out the same, whatever the number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effdl.core.errors import check, check_choice, check_integer

Solve = Callable[[Tensor, Tensor], Tensor]
ARRAYS = ("x0", "x1", "condition")


def row_noise(seed: int, row: int, shape: Sequence[int]) -> np.ndarray:
    """N(0, I) of the given shape in float32, from (seed, row) alone."""
    return np.random.default_rng([seed, row]).standard_normal(tuple(shape), dtype=np.float32)


class PairTable:
    """A memory-mapped table of (x0, condition, x1).

    Args:
        path: its folder.
        writable: map it for writing.

    Raises:
        ConfigurationError: no table there, or arrays of different lengths.

    Example::

        table = PairTable.create("pairs", labels, shape=(3, 32, 32), about={"guidance": 1.0})
        table.fill(lambda x0, label: euler(guided_velocity(net, label, None, 1.0), x0, 25))
        batch = table[[0, 1, 2]]    # {"x0": [3, 3, 32, 32], "x1": ..., "condition": [3], "index": [3]}
    """

    def __init__(self, path: str | Path, writable: bool = False) -> None:
        self.path = Path(path)
        check((self.path / "pairs.json").is_file(), "path", str(path), "a folder with a pair table")
        self.about: dict[str, Any] = json.loads((self.path / "pairs.json").read_text())
        mode = "r+" if writable else "r"
        names = (*ARRAYS, "done")
        self.x0, self.x1, self.condition, self.done = (
            np.load(self.path / f"{name}.npy", mmap_mode=mode, allow_pickle=False) for name in names
        )
        lengths = {name: len(getattr(self, name)) for name in ARRAYS}
        check(len(set(lengths.values())) == 1, "path", str(path), "x0, x1 and condition of equal length",
              f"They have {lengths}: the table is damaged, make it again.")  # fmt: skip

    @classmethod
    def create(
        cls,
        path: str | Path,
        conditions: Sequence[int] | np.ndarray,
        shape: Sequence[int],
        about: dict[str, Any] | None = None,
        seed: int = 0,
        dtype: str = "float16",
        block: int = 64,
    ) -> PairTable:
        """An empty table, or the one that is there if it was made with the same settings (finished or not).

        Args:
            path: the folder.
            conditions: class label or prompt number of each row ``[n]``.
            shape: of one x0.
            about: whatever the pairs depend on (teacher's fingerprint, guidance, steps, prompts); JSON values.
            seed: of the noise.
            dtype: of x1, float16 or float32.
            block: rows that are solved together.

        Raises:
            ConfigurationError: a table made with other settings lies there.
        """
        check_choice("dtype", dtype, ("float16", "float32"))
        check_integer("block", block, 1)
        check_integer("seed", seed, 0)
        conditions, path = np.asarray(conditions, dtype=np.int64), Path(path)
        check(conditions.ndim == 1 and len(conditions) > 0, "conditions", conditions.shape, "a shape (n,), n >= 1")
        settings = {"count": len(conditions), "shape": list(shape), "seed": seed, "dtype": dtype, "block": block}
        settings = json.loads(json.dumps(settings | (about or {})))  # as it will be read back
        if (path / "pairs.json").is_file():
            table = cls(path, writable=True)
            table.check_settings(settings)
            return table
        path.mkdir(parents=True, exist_ok=True)
        n, kinds = len(conditions), {"x0": np.float32, "x1": np.dtype(dtype)}
        for name, kind in kinds.items():
            np.lib.format.open_memmap(path / f"{name}.npy", "w+", kind, (n, *shape)).flush()
        np.save(path / "condition.npy", conditions)
        np.save(path / "done.npy", np.zeros(-(-n // block), dtype=bool))
        (path / "pairs.json").write_text(json.dumps(settings, indent=1))  # last: a table without it was never begun
        return cls(path, writable=True)

    def check_settings(self, settings: dict[str, Any]) -> None:
        """Raise unless the table was made with ``settings`` (guidance, teacher, steps, seed, ...)."""
        for name, value in settings.items():
            there = self.about.get(name)
            check(there == value, name, value, f"{there!r}, with which {self.path} was made",
                  "Other settings make another flow: choose a new path, or delete that folder.")  # fmt: skip

    def __len__(self) -> int:
        return len(self.condition)

    @property
    def finished(self) -> bool:
        """Whether all rows are there."""
        return bool(self.done.all())

    @torch.no_grad()
    def fill(self, solve: Solve, rank: int = 0, world: int = 1, device: torch.device | str = "cpu") -> None:
        """Solve the teacher's ODE for the blocks of this process that are not done yet.

        Args:
            solve: ``x1 = solve(x0, condition)``, x0 ``[b, ...]`` float32, condition ``[b]`` int64.
            rank, world: this process and their number.
            device: where ``solve`` works.

        Raises:
            ConfigurationError: the end points are not shaped like the noise, or not finite in the table's dtype.
        """
        size = self.about["block"]
        for b in range(rank, len(self.done), world):
            if self.done[b]:
                continue
            rows = slice(b * size, min((b + 1) * size, len(self)))
            x0 = np.stack([row_noise(self.about["seed"], i, self.about["shape"]) for i in range(rows.start, rows.stop)])
            condition = torch.from_numpy(np.array(self.condition[rows])).to(device)
            x1 = solve(torch.from_numpy(x0).to(device), condition)
            check(x1.shape == x0.shape, "teacher", tuple(x1.shape), f"a teacher that returns x0's shape {x0.shape}")
            x1 = x1.float().cpu().numpy().astype(self.x1.dtype)
            check(bool(np.isfinite(x1).all()), "dtype", self.about["dtype"], "a dtype in which x1 is finite")
            self.x0[rows], self.x1[rows] = x0, x1
            self.x0.flush()
            self.x1.flush()
            self.done[b] = True  # only now: a block cut short is made again
            self.done.flush()

    def __getitem__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The rows as one batch: x0 and x1 float32, condition and index int64."""
        rows = np.asarray(rows)
        return {
            "x0": torch.from_numpy(self.x0[rows]),
            "x1": torch.from_numpy(self.x1[rows].astype(np.float32)),
            "condition": torch.from_numpy(self.condition[rows]),
            "index": torch.from_numpy(rows.astype(np.int64)),
        }

    __getitems__ = __getitem__  # DataLoader: a whole batch at once

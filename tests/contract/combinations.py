"""C7's page: which callbacks combine, found by training with each ordered pair.

``python -m tests.contract.combinations docs/combinations.md`` writes the page; a test checks that it is current.
"""

from __future__ import annotations

import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

from effdl.core.errors import ConfigurationError
from tests.contract.cases import CASES, QUIET
from tests.contract.foreign import ForeignClassifier, pictures

EMA = "EMAWeightAveraging"
NAMES = sorted(name for name, case in CASES.items() if case.entry.kind == "callback")
HEAD = """# What combines with what

Each pair was trained on a foreign LightningModule (a tiny vision transformer): the row's callback listed first, the
column's second. ✓ runs and ends in finite weights; a number is a refusal before training, whose sentence stands below.
Every callback also runs with gradient clipping, accumulation, `lr_find`, bf16 and fp16 mixed precision and two-process
DDP (the contract's rows C2, C3 and C7). Written by `python -m tests.contract.combinations docs/combinations.md`.

"""


def make(name: str) -> Any:
    return EMAWeightAveraging(decay=0.5) if name == EMA else CASES[name].callback()


@cache
def try_pair(first: str, second: str) -> str:
    """An empty string when it runs, else the sentence of the refusal."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    network = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    module = ForeignClassifier(model=network)
    trainer = Trainer(max_epochs=1, limit_train_batches=3, limit_val_batches=1, callbacks=[make(first), make(second)],
                      **QUIET)  # fmt: skip
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, pictures(), pictures())
    except ConfigurationError as refusal:
        return " ".join(str(refusal).split())
    assert all(torch.isfinite(p).all() for p in module.parameters()), (first, second)
    return ""


def page() -> str:
    """The markdown page."""
    columns = [*NAMES, EMA]
    refusals: list[str] = []
    lines = ["| first ↓, second → | " + " | ".join(f"`{c}`" for c in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for first in columns:
        cells = []
        for second in columns:
            if first == second:
                cells.append("—")
                continue
            refusal = try_pair(first, second)
            if refusal and refusal not in refusals:
                refusals.append(refusal)
            cells.append(str(refusals.index(refusal) + 1) if refusal else "✓")
        lines.append(f"| `{first}` | " + " | ".join(cells) + " |")
    notes = [f"{i}. {refusal}" for i, refusal in enumerate(refusals, 1)]
    return HEAD + "\n".join([*lines, "", *notes]) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")

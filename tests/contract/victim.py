"""A training run to be killed: ``python -m tests.contract.victim FOLDER [CKPT]`` saves every second step, slowly."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from effdl.callbacks import PruningCallback, RNGStateCallback, SAMCallback
from tests.contract.cases import QUIET
from tests.contract.foreign import ForeignClassifier, pictures


class Slow(Callback):
    """Says where it is, and leaves time for the signal to land in the middle of a step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        print(trainer.global_step, flush=True)
        time.sleep(float(self.seconds))

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


def run(folder: str, ckpt_path: str | None = None, seconds: float = 0.0, epochs: int = 2) -> ForeignClassifier:
    torch.manual_seed(0)
    module = ForeignClassifier()
    callbacks = [
        PruningCallback(sparsity=0.8, start=2, stop=12, every=2), SAMCallback(rho=0.05), RNGStateCallback(),
        ModelCheckpoint(folder, filename="last", every_n_train_steps=2, save_top_k=-1, enable_version_counter=False),
        Slow(seconds),
    ]  # fmt: skip
    trainer = Trainer(callbacks=callbacks, max_epochs=epochs, **{**QUIET, "enable_checkpointing": True})
    trainer.fit(module, pictures(), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return module


if __name__ == "__main__":
    trained = run(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None, seconds=0.15)
    torch.save(trained.state_dict(), Path(sys.argv[1]) / "finished.pt")

"""Ways in which a run ends too early."""

from __future__ import annotations

from lightning.pytorch.callbacks import Callback

from tests.contract.cases import Case


class StopError(RuntimeError):
    pass


class RaiseAt(Callback):
    """Ends the run by an error when the n-th training batch starts, counted over epochs."""

    def __init__(self, batches: int, error: type[BaseException] = StopError) -> None:
        self.left, self.error = batches, error

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.left == 0:
            raise self.error("stopped on purpose")
        self.left -= 1


def case_steps(case: Case, batches: int) -> int:
    """``global_step`` after so many batches: under manual optimisation each optimizer counts."""
    module = case.module()
    optimizers = module.configure_optimizers() if case.example.manual else None
    return batches * (len(optimizers) if isinstance(optimizers, (list, tuple)) else 1)

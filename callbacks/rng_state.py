"""Resume exactly: the global random streams travel in the checkpoint."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback

from effdl.core.contract import ContractExample
from effdl.core.distributed import rank, world_size
from effdl.core.random import rng_state, set_rng_state


class RNGStateCallback(Callback):
    """Saves and restores torch's (CPU, CUDA), NumPy's and Python's global random state, per rank.

    Lightning saves none of it, so a resumed run shuffles and drops out differently from the uninterrupted one. The
    state is put back in ``on_fit_start``: before the DataLoader draws its seed, after which it would be too late; and,
    for a checkpoint from the middle of an epoch, once more before the first batch, whose loader has drawn again.

    Example::

        from effdl.callbacks import RNGStateCallback

        trainer = Trainer(callbacks=[RNGStateCallback(), ModelCheckpoint(save_last=True)])
        trainer.fit(module, data, ckpt_path="last.ckpt", weights_only=True)
    """

    paper = None

    def __init__(self) -> None:
        self._loaded: list[dict[str, Any]] | None = None

    @property
    def state_key(self) -> str:
        return "rng-state"

    def state_dict(self) -> dict[str, Any]:
        return {"ranks": _gather(rng_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict["ranks"]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self._loaded is not None and len(self._loaded) == world_size():
            set_rng_state(self._loaded[rank()])
        else:
            self._loaded = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._loaded is not None:
            if batch_idx > 0:
                set_rng_state(self._loaded[rank()])
            self._loaded = None


    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite."""
        return ContractExample()


def _gather(state: dict[str, Any]) -> list[dict[str, Any]]:
    if world_size() == 1:
        return [state]
    import torch.distributed as dist

    states: list[Any] = [None] * world_size()
    dist.all_gather_object(states, state)
    return states

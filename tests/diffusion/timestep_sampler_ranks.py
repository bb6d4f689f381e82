"""What the two processes of ``test_timestep_sampler_bins.py`` run; apart, so that they start without the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from effdl.callbacks import TimestepSamplerCallback
from effdl.core.random import generator
from effdl.data.loading import ResumableLoader
from effdl.diffusion.rectified_flow_transformer import RectifiedFlowModule
from effdl.tasks.diffusion import DiffusionModule
from tests.joined import joined_ddp
from tests.support import BARE as QUIET

BATCH, BATCHES, BINS = 12, 4, 4


class Plane(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(3, 2)

    def forward(self, x, label, condition=None):
        return self.net(torch.cat([x, label[:, None].to(x) / 1000], 1))


class Points(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.x = torch.randn(BATCH * BATCHES, 2, generator=generator(3))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"image": self.x[i]}


class Recording:
    """What the last epoch's steps were: time and loss of each example, as the network and the loss saw them."""

    offset = 0.0

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.seen, self.lost = [], []

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.seen, self.lost = [], []

    def training_step(self, batch, batch_idx):
        hook = self.model.register_forward_pre_hook(lambda m, args: self.seen.append(args[1].clone()))
        try:
            return super().training_step(batch, batch_idx)
        finally:
            hook.remove()

    def mean_loss(self, losses):
        if self.training:
            self.lost.append(losses.detach().flatten(1).mean(1))
        return super().mean_loss(losses)

    @property
    def recorded(self) -> tuple[torch.Tensor, torch.Tensor]:
        return (torch.cat(self.seen) + self.offset) / 1000, torch.cat(self.lost)


class Flow(Recording, RectifiedFlowModule):
    """Draws the times of all processes at once."""


class Denoiser(Recording, DiffusionModule):
    """Every process draws its own; a label is a thousandth of the axis, half a one from its beginning."""

    offset = 0.5


class SaveAt(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def logged(trainer: Trainer) -> dict[str, float]:
    prefix = "rectified-flow-transformer/"
    found = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): value for name, value in found.items()}


def fit_points(make: type, extra: list[Callback] = (), epochs: int = 2, callback: Any = None, **kwargs: Any) -> Any:
    module, batch = make(Plane(), seed=1), kwargs.pop("batch", BATCH)
    callback = callback or TimestepSamplerCallback("logit_normal(0, 1)", shift=2.0, bins=BINS)
    trainer = Trainer(max_epochs=epochs, callbacks=[callback, *extra], **QUIET, **kwargs.pop("trainer", {}))
    trainer.fit(module, ResumableLoader(Points(), batch_size=batch, shuffle=True, seed=3), **kwargs)
    return trainer, module, callback


def run(rank: int, folder: str) -> None:
    def distributed() -> dict[str, Any]:
        strategy = joined_ddp(rank)
        return {"strategy": strategy, "devices": 2}

    for make in (Flow, Denoiser):
        path = Path(folder) / f"{make.__name__}.ckpt"
        # the whole run, saved in the middle of its second epoch; then the rest of it again
        trainer, module, callback = fit_points(make, [SaveAt(6, path)], batch=BATCH // 2, trainer=distributed())
        state = callback.state_dict()
        resumed = fit_points(make, batch=BATCH // 2, trainer=distributed(), ckpt_path=path, weights_only=True)
        result = {
            "logged": logged(trainer), "again": logged(resumed[0]), "recorded": module.recorded, "sums": state["sums"],
        }  # fmt: skip
        torch.save(result, f"{folder}/{make.__name__}-{rank}.pt")

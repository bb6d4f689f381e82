"""powernorm, claim 10: a two-layer GPT-2 of width 64 on tiny Shakespeare, byte by byte."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from effdl.architectures.powernorm import PowerNorm
from effdl.architectures.powernorm_models import select_norms
from effdl.callbacks import PowerNormCallback
from effdl.core.surgery import replace_modules
from effdl.data.text import TextData
from effdl.tasks.tiny import tiny_gpt2
from tests.support import real_data

pytestmark = pytest.mark.slow
SEEDS = (0, 1, 2)
STEPS = 800


class TokenBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the tokens of [B, T, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).view(x.shape)


class Reader(LightningModule):
    """Next-byte prediction with AdamW 1e-3; ``scales`` multiply the embedding, one of them drawn per batch."""

    def __init__(self, seed: int, scales: tuple[float, ...] = ()) -> None:
        super().__init__()
        self.model, self.scales = tiny_gpt2(256, 64, seed=seed).train(), scales
        self.draws = torch.Generator().manual_seed(seed)
        self.finite = torch.tensor(True)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        embedded = self.model.transformer.wte(batch["input_ids"])
        if self.scales:
            embedded = embedded * self.scales[torch.randint(len(self.scales), (), generator=self.draws)]
        loss = self.model(inputs_embeds=embedded, labels=batch["labels"]).loss
        self.finite &= loss.detach().isfinite()
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.model(**batch).loss, batch_size=len(batch["input_ids"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def fit(module: Reader, seed: int, callbacks: tuple = (), steps: int = STEPS) -> float:
    data = TextData(str(real_data("tinyshakespeare.parquet")), block_size=64, batch_size=8, val=0.025, seed=seed)
    quiet = {
        "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
        "num_sanity_val_steps": 0, "accelerator": "cpu",
    }  # fmt: skip
    trainer = Trainer(max_steps=steps, val_check_interval=steps, callbacks=list(callbacks), **quiet)
    trainer.fit(module, data)
    assert all(m.iters == steps for m in module.modules() if isinstance(m, PowerNorm))
    return float(trainer.callback_metrics["val/loss"])


def batch_norm(module: Reader) -> Reader:
    replace_modules(module, select_norms(module), lambda name, old: TokenBatchNorm(64))
    return module


def power_norm(**options) -> PowerNormCallback:
    return PowerNormCallback(warmup_iters=200, group_num=4, **options)


def test_claim_10_below_batch_norm_and_with_layer_norm():
    rows: dict[str, list[float]] = {"LayerNorm": [], "BatchNorm": [], "PN-V": [], "PowerNorm": []}
    begin = time.perf_counter()
    for seed in SEEDS:
        rows["LayerNorm"].append(fit(Reader(seed), seed))
        rows["BatchNorm"].append(fit(batch_norm(Reader(seed)), seed))
        rows["PN-V"].append(fit(Reader(seed), seed, (power_norm(mode="vanilla"),)))
        rows["PowerNorm"].append(fit(Reader(seed), seed, (power_norm(),)))
    for name, values in rows.items():
        spread = statistics.stdev(values)
        print(f"{name} | {statistics.mean(values):.3f} ± {spread:.3f} | {[round(v, 3) for v in values]}")
    print(f"{time.perf_counter() - begin:.0f} s")
    mean = {name: statistics.mean(values) for name, values in rows.items()}
    assert mean["PowerNorm"] < mean["BatchNorm"]
    assert mean["PowerNorm"] < mean["LayerNorm"] + 0.03


@pytest.mark.parametrize("group_num", [4, None])
def test_claim_10_finite_while_the_input_scale_jumps(group_num):
    module = Reader(0, scales=(0.1, 1.0, 10.0))
    loss = fit(module, 0, (PowerNormCallback(warmup_iters=200, group_num=group_num),))
    print(f"input scale jumping, group_num={group_num}: validation loss {loss:.3f}")
    assert module.finite
    assert all(value.isfinite().all() for value in module.state_dict().values())
    # without group scaling it stays finite, as claimed, but statistics that lag one batch behind learn badly
    assert group_num is None or loss < 3.0

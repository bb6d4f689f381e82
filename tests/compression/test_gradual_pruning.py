"""gradual-pruning: the schedule, official numbers, masks that hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from effdl.callbacks import PruningCallback
from effdl.compression.gradual_pruning import SparsitySchedule, magnitude_masks
from effdl.core.masks import MaskStore, keep_count, top_k_mask
from effdl.core.select import select_weights
from tests.compression.gradual_pruning_parts import Net, data, fit, zeros
from tests.support import golden

GOLDEN = golden("gradual-pruning")


@pytest.mark.parametrize("case", GOLDEN["schedules"], ids=lambda c: f"n{c['n_prune']}-p{c['power']}")
def test_must_01_schedule_golden(case):
    ramp = SparsitySchedule(
        case["initial_sparsity"], case["final_sparsity"], case["begin_step"], case["n_prune"], case["frequency"],
        case["power"],
    )  # fmt: skip
    assert np.allclose([ramp.sparsity(t) for t in case["steps"]], case["sparsity"], atol=1e-7, rtol=0)
    assert [ramp.is_update(t) for t in case["steps"]] == [bool(u) for u in case["updates_mask"]]
    assert ramp.sparsity(ramp.begin) == (case["initial_sparsity"] if case["n_prune"] else case["final_sparsity"])
    assert ramp.sparsity(ramp.end) == case["final_sparsity"]


def test_must_01_schedule_reference_unit_test():
    case = GOLDEN["reference_schedule"]
    n = case["end_step"] - case["begin_step"]
    ramp = SparsitySchedule(case["initial_sparsity"], case["final_sparsity"], case["begin_step"], n, 1, case["power"])
    values = [ramp.sparsity(t) for t in case["steps"]]
    assert np.allclose(values, case["sparsity"], atol=1e-7, rtol=0)
    assert np.allclose(case["sparsity"], [0.2, 0.4928, 0.725, 0.8], atol=1e-4)


def test_one_shot_is_no_division_by_zero():
    ramp = SparsitySchedule(0.0, 0.9, begin=5, updates=0, frequency=10)
    assert (ramp.sparsity(4), ramp.sparsity(5), ramp.end, ramp.is_update(5)) == (0.0, 0.9, 5, True)


class Scripted(LightningModule):
    """Its gradient at step t is the t-th of a list: loss = <weight, grad_t>."""

    def __init__(self, weight, grads, lr, momentum):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1) if weight.dim() == 4 else nn.Linear(1, 1, bias=False)
        self.layer.weight = nn.Parameter(weight.clone())
        self.layer.bias = None
        self.grads, self.rates = grads, (lr, momentum)

    def training_step(self, batch, batch_idx):
        return (self.layer.weight * self.grads[batch_idx]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rates[0], momentum=self.rates[1])


@pytest.mark.parametrize("name", ["trajectory_linear", "trajectory_conv"])
def test_must_02_golden_trajectory(name):
    case = GOLDEN[name]
    as_tensor = lambda v: torch.tensor(v, dtype=torch.float64).reshape(case["shape"])  # noqa: E731
    grads = [as_tensor(g) for g in case["grads"]]
    module = Scripted(as_tensor(case["initial_weight"]), grads, case["lr"], case["momentum"])
    stop = case["begin_step"] + case["n_prune"] * case["frequency"]
    pruning = PruningCallback(
        case["final_sparsity"], case["initial_sparsity"], case["begin_step"], stop, case["frequency"]
    )
    seen = {}
    update = pruning._update

    def spy(trainer):
        update(trainer)
        mask = pruning.store.masks["layer.weight"].flatten().tolist()
        seen[pruning.step] = (mask, module.layer.weight.detach().clone())

    pruning._update = spy
    trainer = Trainer(
        max_epochs=1, callbacks=[pruning], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, precision="64-true",
    )  # fmt: skip
    trainer.fit(module, DataLoader([torch.zeros(1)] * len(case["grads"]), batch_size=None))
    assert list(seen) == [u["step"] for u in case["updates"]]
    for golden_update in case["updates"]:
        mask, weight = seen[golden_update["step"]]
        assert mask == golden_update["mask"]
        assert sum(mask) == golden_update["kept"]
        assert torch.allclose(weight, as_tensor(golden_update["weight_after_mask"]), atol=1e-6, rtol=0)
    assert torch.allclose(module.layer.weight, as_tensor(case["final_weight"]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("numel", [1, 2, 7, 100, 4097])
def test_must_03_kept_count_is_exact(numel):
    g = torch.Generator().manual_seed(numel)
    for sparsity in np.linspace(0, 0.99, 34):
        keep = max(1, int(np.rint(numel * (1 - sparsity))))
        assert keep_count(numel, float(sparsity)) == keep
        assert int(top_k_mask(torch.rand(numel, generator=g), keep).sum()) == keep
        tied = top_k_mask(torch.ones(numel), keep)
        assert tied.nonzero().flatten().tolist() == list(range(keep))


OPTIMIZERS = {
    "sgd-momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.02),
    "adamw": lambda p: torch.optim.AdamW(p, 0.02, weight_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_must_04_masked_weights_stay_zero_between_updates(name):
    counts = []

    class Watch(PruningCallback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            counts.append((self.step, sum(zeros(pl_module).values())))

    fit(Net(OPTIMIZERS[name]), [Watch(0.8, start=2, stop=14, every=4)])
    updates = {2, 6, 10, 14}
    changes = {step for (_, before), (step, after) in zip(counts, counts[1:]) if before != after}
    assert changes == updates - {2}  # s_i = 0: the first update prunes nothing
    assert counts[-1][1] == 12 * 32 + 32 * 3 - keep_count(12 * 32, 0.8) - keep_count(32 * 3, 0.8)


def test_must_04_without_masked_gradients_moments_and_projection_it_fails():
    module = Net(OPTIMIZERS["adamw"])
    optimizer = module.configure_optimizers()
    store = MaskStore(select_weights(module))
    for step, (x, y) in enumerate(data(6)):
        optimizer.zero_grad()
        module.training_step((x, y), step).backward()
        optimizer.step()
        if step == 2:  # after three steps there is momentum: mask once, as a naive pruner does
            for weight_name, mask in magnitude_masks(list(store.weights.values()), 0.8).items():
                store.set(weight_name, mask)
            store.apply_()
            once = float(store.sparsity())
    assert float(store.sparsity()) < once - 0.5


def test_must_05_accumulation_does_not_shift_updates():
    seen = []
    for accumulate, epochs in ((1, 2), (4, 8)):  # sixteen optimizer steps each
        steps = []

        class Watch(PruningCallback):
            def _update(self, trainer, steps=steps):
                steps.append(self.step)
                super()._update(trainer)

        fit(Net(), [Watch(0.8, start=2, stop=14, every=4)], epochs=epochs, accumulate_grad_batches=accumulate)
        seen.append(steps)
    assert seen == [[2, 6, 10, 14]] * 2


@pytest.mark.parametrize("retain", [False, True])
def test_must_06_resume_in_mid_ramp_is_bit_identical(tmp_path, retain):
    make = lambda: PruningCallback(0.8, start=0, stop=20, every=2, retain=retain)  # noqa: E731
    whole = Net()
    fit(whole, [make()], epochs=3)
    save = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    fit(Net(), [make(), save], epochs=1)  # 8 of 20 steps: 40 % of the ramp
    resumed = Net()
    fit(resumed, [make()], epochs=3, ckpt_path=tmp_path / "last.ckpt")
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters()):
        assert torch.equal(a, b), name
    assert sum(zeros(resumed).values()) > 300

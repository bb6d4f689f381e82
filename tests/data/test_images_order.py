"""effdl.data.images and loading: the order, alone and on several processes, and the exact resume."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from effdl.data.images import ImageData
from effdl.data.loading import EpochSampler, ResumableLoader, as_it_is
from tests.data.images_parts import batches


def test_order_is_a_function_of_seed_and_epoch_alone():
    loader = ImageData(batch_size=100).train_dataloader()
    first = batches(loader)
    torch.manual_seed(7)
    np.random.seed(7)
    assert batches(loader) == first
    loader.sampler.set_epoch(1)
    assert batches(loader) != first
    loader.sampler.set_epoch(0)
    assert batches(loader) == first


def test_iterating_leaves_the_global_random_streams_alone():
    loader = ImageData(batch_size=100, augment=True).train_dataloader()
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    batches(loader)
    assert torch.equal(before, torch.get_rng_state())
    assert (numpys == np.random.get_state()[1]).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_where_its_state_was_taken(workers):
    def make():
        data = TensorDataset(torch.arange(23))
        loader = ResumableLoader(data, batch_size=4, shuffle=True, seed=3, num_workers=workers)
        loader.sampler.set_epoch(5)
        return loader

    whole = [b[0].tolist() for b in make()]
    first, second = make(), make()
    iterator = iter(first)
    head = [next(iterator)[0].tolist() for _ in range(2)]
    second.load_state_dict(first.state_dict())
    assert head + [b[0].tolist() for b in second] == whole
    assert [b[0].tolist() for b in second] == whole  # the next epoch is a whole one
    assert len(second) == 6


class Recorder(L.LightningModule):
    """A foreign module that remembers what it was shown."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * 12 * 12, 5)
        self.seen: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["index"].tolist())
        return nn.functional.cross_entropy(self.layer(batch["image"].flatten(1)), batch["label"])

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


def fit(npz, folder, resume: str | None = None, **kwargs) -> Recorder:
    L.seed_everything(0, verbose=False)
    saving = L.pytorch.callbacks.ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, enable_version_counter=False
    )
    trainer = L.Trainer(
        max_steps=15, default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=None if resume else [saving], enable_checkpointing=not resume, **kwargs,
    )  # fmt: skip
    module = Recorder()
    trainer.fit(module, ImageData(npz, batch_size=8, augment=True), ckpt_path=resume, weights_only=resume and True)
    return module


@pytest.mark.parametrize("limit", [None, 4])
def test_a_run_resumed_anywhere_is_the_uninterrupted_run(npz, tmp_path, limit):
    kwargs = {"limit_train_batches": limit} if limit else {}
    whole = fit(npz, tmp_path, **kwargs)
    for stop in (3, 7, 8, 9):  # epochs are 7 (or 4) batches long
        resumed = fit(npz, tmp_path, resume=str(tmp_path / f"step={stop}.ckpt"), **kwargs)
        assert resumed.seen == whole.seen[stop:], stop
        for a, b in zip(whole.parameters(), resumed.parameters()):
            assert torch.equal(a, b), stop


def test_trainer_test_and_predict_see_every_test_example_in_order(npz, tmp_path):
    class Shown(Recorder):
        def test_step(self, batch, batch_idx):
            self.seen.append(batch["index"].tolist())

        def predict_step(self, batch, batch_idx):
            return batch["index"]

    module = Shown()
    trainer = L.Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False)
    trainer.test(module, ImageData(npz, batch_size=8), verbose=False)
    assert sum(module.seen, []) == list(range(20))
    assert torch.cat(trainer.predict(module, ImageData(npz, batch_size=8))).tolist() == list(range(20))


@pytest.mark.parametrize("resumed", [False, True])
def test_processes_share_the_batches_of_a_single_one(npz, resumed):
    dataset = ImageData(npz).train_dataset

    def loader(batch_size, replicas, rank):
        sampler = EpochSampler(dataset, shuffle=True, num_replicas=replicas, rank=rank)
        sampler.set_epoch(2)
        loader = ResumableLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=as_it_is)
        if resumed:
            loader.load_state_dict({"epoch": 2, "batches": 3})
        return loader

    whole = batches(loader(8, 1, 0))
    ours = [a + b for a, b in zip(batches(loader(4, 2, 0)), batches(loader(4, 2, 1)))]
    assert [sorted(b) for b in ours] == [sorted(b) for b in whole]
    assert len(loader(4, 2, 0)) == len(loader(4, 2, 1)) == 7


def test_an_uneven_share_is_filled_from_the_start():
    shares = [list(EpochSampler(range(7), num_replicas=3, rank=r)) for r in range(3)]
    assert shares == [[0, 3, 6], [1, 4, 0], [2, 5, 1]]


def test_lightning_does_not_replace_the_sampler(npz):
    from torch.utils.data.distributed import DistributedSampler

    assert isinstance(ImageData(npz).train_dataloader().sampler, DistributedSampler)


def test_seeds_and_epochs_do_not_share_orders():
    orders = {(s, e): None for s in range(3) for e in range(3)}
    for s, e in orders:
        sampler = EpochSampler(range(50), shuffle=True, seed=s)
        sampler.set_epoch(e)
        orders[s, e] = tuple(sampler)
    assert len(set(orders.values())) == 9

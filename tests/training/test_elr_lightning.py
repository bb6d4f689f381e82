"""elr on a Trainer: the mixin on a foreign module: what it adds, what it leaves alone, its table and its report."""

from __future__ import annotations

import csv

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Subset

from effdl import ELRLossMixin
from effdl.core.errors import ConfigurationError
from effdl.data.indexed import IndexedDataset
from effdl.training.elr import elr_loss
from tests.support import run_ranks
from tests.training.elr_parts import (
    CLASSES,
    Foreign,
    Mine,
    N,
    examples,
    fit,
    loader,
    same,
    without_batchnorm,
    without_dropout,
)


def test_must_05_lam_zero_is_plain_training_bit_for_bit():
    plain, ours, on = Foreign(), Mine(lam=0.0), Mine(lam=3.0)
    for module in (plain, ours, on):
        fit(module)
    same(plain, ours)  # weights, and BatchNorm statistics; Dropout took the same numbers of the global stream
    assert not torch.equal(plain.net[0].weight, on.net[0].weight)


def test_must_06_resume_is_exact(tmp_path):
    no_dropout = lambda: without_dropout(Mine())  # noqa: E731
    whole, first, second = no_dropout(), no_dropout(), no_dropout()
    fit(whole, epochs=2)
    fit(first, epochs=1, callbacks=[ModelCheckpoint(tmp_path, save_last=True)])
    fit(second, epochs=2, ckpt_path=tmp_path / "last.ckpt")
    same(whole, second, atol=1e-6)
    assert torch.equal(whole.elr.targets, second.elr.targets)
    assert torch.equal(whole.elr.labels, second.elr.labels)
    assert not torch.equal(first.elr.targets, second.elr.targets)


def test_the_step_is_the_function():
    module = without_dropout(Mine(beta=0.9, lam=7.0))
    reference = without_dropout(Foreign())
    fit(module, epochs=3)
    targets, optimizer = torch.zeros(N, CLASSES), reference.configure_optimizers()
    data = loader()
    for epoch in range(3):
        data.batch_sampler.sampler.set_epoch(epoch)
        for x, y, index in data:
            loss = elr_loss(reference(x), y, index, targets, beta=0.9, lam=7.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    same(reference, module, atol=1e-6)
    assert torch.allclose(module.elr.targets, targets, atol=1e-6)


def test_the_module_keeps_its_own_loss_and_output():
    class Smoothed(Foreign):
        def training_step(self, batch):  # no batch_idx, a dict, sometimes nothing
            self.seen = getattr(self, "seen", 0) + 1
            if self.seen == 3:
                return None
            loss = nn.functional.cross_entropy(self(batch["x"]), batch["label"], label_smoothing=0.1)
            return {"loss": loss, "mine": self.seen}

    class Both(ELRLossMixin, Smoothed):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            assert not outputs or set(outputs) == {"loss", "mine"}

    rows = [{"x": x, "label": y, "number": i} for i, (x, y) in enumerate(examples())]
    module = Both(index_key="number", num_examples=N, width=8)
    trainer = fit(module, DataLoader(rows, batch_size=4), epochs=1)
    seen = module.elr.targets.sum(dim=1) > 0
    assert seen.tolist() == [i // 4 != 2 for i in range(N)]  # the skipped batch has taught nothing
    assert {"elr/regularizer", "elr/suspects"} <= set(trainer.callback_metrics)
    assert trainer.callback_metrics["elr/regularizer"] < 0


def test_checkpoints_are_plain_and_the_table_lies_beside(tmp_path):
    module = Mine()
    fit(module, callbacks=[ModelCheckpoint(tmp_path, save_last=True, save_weights_only=True)])
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    Foreign().load_state_dict(saved["state_dict"], strict=True)
    assert torch.equal(saved["effdl"]["elr"]["targets"], module.elr.targets)
    assert not any("elr" in name for name, _ in [*module.named_buffers(), *module.named_parameters()])
    loaded = Mine.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    assert torch.equal(loaded.label_report().target, module.label_report().target)


def test_a_second_pass_over_a_batch_reads_the_table_only():
    from effdl.callbacks import SAMCallback

    visits = []

    class Watch(Mine):
        def _elr_first_pass(self, *args):
            visits.append(super()._elr_first_pass(*args))
            return visits[-1]

    fit(Watch(), epochs=2, callbacks=[SAMCallback(rho=0.05)])
    assert visits == [True, False] * 12
    visits.clear()
    fit(Watch(), epochs=1, callbacks=[SAMCallback(rho=0.05)], accumulate_grad_batches=2)
    assert sum(visits) == 6
    assert len(visits) == 12


def test_validation_and_weight_averaging_leave_the_table_alone():
    plain, averaged = Mine(), Mine()
    fit(plain)
    fit(averaged, callbacks=[EMAWeightAveraging(decay=0.5)], val=loader())
    assert torch.equal(plain.elr.targets, averaged.elr.targets)


def test_a_table_of_half_the_size():
    half, full = Mine(targets_dtype="float16", targets_device="cpu"), Mine()
    fit(half)
    fit(full)
    assert half.elr.targets.dtype == torch.float16
    assert torch.allclose(half.elr.targets.float(), full.elr.targets, atol=0.02)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision_keeps_the_regulariser_in_float32(precision):
    class Sure(Mine):
        def forward(self, x):
            return 60 * super().forward(x)

    module = Sure()
    trainer = fit(module, precision=precision)
    assert module.elr.targets.dtype == torch.float32
    assert trainer.callback_metrics["elr/regularizer"].isfinite()
    assert all(p.isfinite().all() for p in module.parameters())


def test_label_report_finds_the_wrong_labels(tmp_path):
    clean, noisy = examples(96, noise=False), examples(96)
    module = Mine()
    fit(module, loader(IndexedDataset(noisy), batch_size=8), epochs=12)
    report = module.label_report(tmp_path / "labels.csv")
    wrong = clean.tensors[1] != noisy.tensors[1]
    assert torch.equal(report.label, noisy.tensors[1])
    assert (report.suspect & wrong).sum() / wrong.sum() > 0.6
    with open(tmp_path / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["suspect"]) for row in rows] == report.suspect.int().tolist()
    assert [int(row["index"]) for row in rows] == list(range(96))
    assert module.report()["suspects"] == int(report.suspect.sum())
    assert module.label_report(labels=clean.tensors[1]).label.equal(clean.tensors[1])


def test_a_subset_is_numbered_as_its_parent():
    subset = Subset(examples(40), list(range(30, 40)))
    for data in (IndexedDataset(subset), Subset(IndexedDataset(examples(40)), subset.indices)):
        module = Mine()
        fit(module, DataLoader(data, batch_size=5))
        assert module.elr.targets.shape == (40, CLASSES)
        assert (module.elr.targets.sum(dim=1) > 0).nonzero().flatten().tolist() == subset.indices


def test_what_cannot_work_is_refused():
    with pytest.raises(TypeError, match="IndexedDataset"):
        fit(Mine(), DataLoader(examples(), batch_size=4))
    with pytest.raises(ConfigurationError, match="num_examples=10.*>= 24"):
        fit(Mine(num_examples=10))
    with pytest.raises(ConfigurationError, match="num_examples=None"):  # a list of batches has no length in examples
        fit(Mine(), DataLoader(list(loader()), batch_size=None))
    with pytest.raises(IndexError, match="index 24 "):
        fit(Mine(num_examples=24), DataLoader([(torch.zeros(2, 6), torch.tensor([0, 1]), torch.tensor([3, 24]))],
                                              batch_size=None))  # fmt: skip
    with pytest.raises(ConfigurationError, match="comes? first"):
        type("Wrong", (Foreign, ELRLossMixin), {})
    with pytest.raises(ConfigurationError, match="network='nett'.*'net'"):
        fit(Mine(network="nett"))
    manual = Mine()
    manual.automatic_optimization = False
    with pytest.raises(ConfigurationError, match="automatic"):
        fit(manual)


def test_a_table_of_another_data_set_is_refused(tmp_path):
    fit(Mine(), epochs=1, callbacks=[ModelCheckpoint(tmp_path, save_last=True)])
    with pytest.raises(ConfigurationError, match="24 rows"):
        fit(Mine(), loader(IndexedDataset(examples(32))), ckpt_path=tmp_path / "last.ckpt")


def test_collapse_warns():
    class Worse(ELRLossMixin, Foreign):
        def forward(self, x):
            return super().forward(x) * 0 + torch.tensor([40.0, 0, 0])

    data = sorted(examples(), key=lambda example: int(example[1]))  # the labels get worse for class 0
    rows = [(x, y, i) for i, (x, y) in enumerate(data)]
    with pytest.warns(UserWarning, match="ELR collapses"):
        fit(Worse(beta=0.0, lam=20.0, num_examples=N), DataLoader(rows, batch_size=2), epochs=1)


@pytest.mark.ddp
def test_two_ranks_share_one_table_and_do_what_one_process_does(tmp_path):
    run_ranks("tests.training.elr_ranks", tmp_path)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for key in ("targets", "labels"):
        assert torch.equal(ranks[0][key], ranks[1][key])
    single = without_batchnorm(Mine())
    fit(single, loader(batch_size=8), epochs=2)
    assert torch.allclose(single.elr.targets, ranks[0]["targets"], atol=1e-6)
    assert torch.equal(single.elr.labels, ranks[0]["labels"])
    assert torch.allclose(single.net[0].weight, ranks[0]["weight"], atol=1e-6)
    # 23 examples on two ranks: the sampler pads with an example that another rank also has
    assert torch.equal(ranks[0]["padded"], ranks[1]["padded"])
    assert (ranks[0]["padded"].sum(dim=1) > 0).all()

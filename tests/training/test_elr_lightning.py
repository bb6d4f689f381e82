"""elr on a Trainer: the mixin on a foreign module, and ELR+."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from effdl import ELRImageClassifier, ELRLossMixin, ELRPlusModule
from effdl.core.errors import ConfigurationError
from effdl.data.indexed import IndexedDataset
from effdl.data.loading import ResumableLoader
from effdl.training.elr import TargetTable, elr_loss
from tests.support import ROOT

N, CLASSES = 24, 3


class Foreign(LightningModule):
    """Has never heard of effdl: BatchNorm, Dropout, a loss of its own."""

    def __init__(self, width: int = 16, smoothing: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, CLASSES)
        )
        self.smoothing = smoothing

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1], label_smoothing=self.smoothing)

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class Mine(ELRLossMixin, Foreign):
    """A foreign class with the mixin in."""


def examples(n=N, noise=True):
    g = torch.Generator().manual_seed(1)
    y = torch.randint(0, CLASSES, (n,), generator=g)
    x = torch.randn(n, 6, generator=g) + nn.functional.one_hot(y, 6) * 2.0
    return TensorDataset(x, (y + (torch.rand(n, generator=g) < 0.3)) % CLASSES if noise else y)


def loader(dataset=None, batch_size=4):
    return ResumableLoader(dataset or IndexedDataset(examples()), batch_size=batch_size, shuffle=True, seed=3)


def fit(module, data=None, epochs=2, callbacks=(), ckpt_path=None, val=None, **kwargs):
    torch.manual_seed(5)
    trainer = Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks), callbacks=list(callbacks),
        **kwargs,
    )  # fmt: skip
    trainer.fit(module, data or loader(), val, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


def same(a, b, atol=0.0):
    for (name, p), q in zip(a.state_dict().items(), b.state_dict().values()):
        assert torch.allclose(p.float(), q.float(), atol=atol, rtol=0), name


def test_must_05_lam_zero_is_plain_training_bit_for_bit():
    plain, ours, on = Foreign(), Mine(lam=0.0), Mine(lam=3.0)
    for module in (plain, ours, on):
        fit(module)
    same(plain, ours)  # weights, and BatchNorm statistics; Dropout took the same numbers of the global stream
    assert not torch.equal(plain.net[0].weight, on.net[0].weight)


def test_must_06_resume_is_exact(tmp_path):
    no_dropout = lambda: _without_dropout(Mine())  # noqa: E731
    whole, first, second = no_dropout(), no_dropout(), no_dropout()
    fit(whole, epochs=2)
    fit(first, epochs=1, callbacks=[ModelCheckpoint(tmp_path, save_last=True)])
    fit(second, epochs=2, ckpt_path=tmp_path / "last.ckpt")
    same(whole, second, atol=1e-6)
    assert torch.equal(whole.elr.targets, second.elr.targets)
    assert torch.equal(whole.elr.labels, second.elr.labels)
    assert not torch.equal(first.elr.targets, second.elr.targets)


def _without_dropout(module):
    module.net[3] = nn.Identity()
    return module


def test_the_step_is_the_function():
    module = _without_dropout(Mine(beta=0.9, lam=7.0))
    reference = _without_dropout(Foreign())
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


def network():
    layers = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(6, CLASSES))


def pictures(n=N):
    g = torch.Generator().manual_seed(2)
    y = torch.randint(0, CLASSES, (n,), generator=g)
    return TensorDataset(torch.randn(n, 3, 8, 8, generator=g) + y.view(-1, 1, 1, 1), y)


def plus(cls=ELRPlusModule, **kwargs):
    torch.manual_seed(0)
    optimizer = kwargs.pop("optimizer", lambda p: torch.optim.SGD(p, 0.05, momentum=0.9))
    settings = {"num_classes": CLASSES, "ema_step": 4, "optimizer": optimizer}
    return cls(network(), network(), **(settings | kwargs))


def picture_loader():
    return loader(IndexedDataset(pictures()), batch_size=6)


class ConstantTeacher(ELRPlusModule):
    """B' is frozen: it says the same of every image."""

    constant = torch.tensor([0.1, 0.7, 0.2])

    def _average_teachers(self):
        super()._average_teachers()
        self._freeze()

    @torch.no_grad()
    def _freeze(self):
        self.teachers.b[-1].weight.zero_()
        self.teachers.b[-1].bias.copy_(self.constant.log())

    def on_train_start(self):
        super().on_train_start()
        self._freeze()


@pytest.mark.parametrize("teacher_bn", ["batch", "copy"])
def test_must_10_each_table_is_fed_by_the_other_students_teacher(teacher_bn):
    frozen, free = plus(ConstantTeacher, lam=0.0, teacher_bn=teacher_bn), plus(lam=0.0, teacher_bn=teacher_bn)
    for module in (frozen, free):
        fit(module, picture_loader(), epochs=6)
    constant = (1 - 0.7**6) * ConstantTeacher.constant
    assert (frozen.tables[0].targets - constant).abs().max() < 1e-6
    assert (free.tables[0].targets - constant).abs().max() > 0.05
    # T_B is fed by A'. Without the regulariser nothing else links the two students: not a bit of it changes.
    assert torch.equal(frozen.tables[1].targets, free.tables[1].targets)
    assert (frozen.tables[1].targets - constant).abs().max() > 0.05


def test_the_teachers_are_weight_averages_of_parameters_only():
    module = plus(ema_alpha=0.9, ema_step=2, teacher_bn="copy")
    before = [p.clone() for p in module.teachers.parameters()]
    fit(module, picture_loader(), max_steps=2, epochs=1)  # both optimizers count: one batch
    for old, teacher, student in zip(before, module.teachers.parameters(), module.students.parameters()):
        assert torch.allclose(teacher, 0.9 * old + 0.1 * student, atol=1e-6)  # gamma(1) = 0.9 ramp(2, 2) = 0.9
        assert not teacher.requires_grad
    for ours, theirs in zip(module.teachers.buffers(), module.students.buffers()):
        assert torch.equal(ours, theirs)
    assert module.steps == 1
    assert not module.teachers.training
    module = plus(ema_alpha=0.9, teacher_bn="batch")
    fit(module, picture_loader(), epochs=1)
    pairs = zip(module.teachers.buffers(), module.students.buffers())
    assert any(not torch.equal(ours, theirs) for ours, theirs in pairs)  # by its own batches


def test_elr_plus_predicts_with_the_mean_of_the_logits():
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for predict_with, pair in (("students", "students"), ("ema", "teachers")):
        module = plus(predict_with=predict_with)
        fit(module, picture_loader(), epochs=1)
        module.eval()
        a, b = getattr(module, pair).a, getattr(module, pair).b
        assert torch.equal(module(x), 0.5 * (a(x) + b(x)))
        assert module.model is getattr(module, pair)
        assert not torch.equal(a(x), b(x))


def test_elr_plus_resumes_exactly(tmp_path):
    whole, first, second = plus(), plus(), plus()
    fit(whole, picture_loader(), epochs=3)
    fit(first, picture_loader(), epochs=1, callbacks=[ModelCheckpoint(tmp_path, save_last=True)])
    fit(second, picture_loader(), epochs=3, ckpt_path=tmp_path / "last.ckpt")
    same(whole, second)
    for a, b in zip(whole.tables, second.tables):
        assert torch.equal(a.targets, b.targets)
    assert whole.steps == second.steps == 12


def test_elr_plus_steps_both_schedules():
    module = plus(scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5))
    trainer = fit(module, picture_loader(), epochs=2)
    assert [o.param_groups[0]["lr"] for o in trainer.optimizers] == [0.0125, 0.0125]
    module = plus(scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step))
    trainer = fit(module, picture_loader(), epochs=1)
    assert [o.param_groups[0]["lr"] for o in trainer.optimizers] == [0.05 * 0.5**4] * 2


def test_elr_plus_leaves_the_global_stream_alone_and_mixes_by_seed():
    a, b, c = plus(), plus(), plus(seed=1)
    for module in (a, b, c):
        fit(module, picture_loader(), epochs=1)
        torch.rand(7)
    same(a, b)
    assert not torch.equal(a.students.a[0].weight, c.students.a[0].weight)


def test_elr_plus_from_a_timm_name_has_two_different_students():
    torch.manual_seed(0)
    module = ELRPlusModule("test_resnet", num_classes=4, refine_labels=True)
    a, b = module.students.a, module.students.b
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert a.get_classifier().out_features == 4
    assert isinstance(ELRImageClassifier("test_resnet", num_classes=4).elr, TargetTable)


def test_elr_plus_reports():
    module = plus()
    fit(module, picture_loader(), epochs=2)
    mean = (module.tables[0].targets + module.tables[1].targets) / 2
    assert torch.equal(module.label_report().target, mean.argmax(dim=1))
    assert module.report()["labels"] == N
    with pytest.raises(TypeError, match="IndexedDataset"):
        fit(plus(), DataLoader(pictures(), batch_size=6))
    with pytest.raises(ConfigurationError, match="second"):
        ELRPlusModule(network(), num_classes=3)


@pytest.mark.ddp
def test_two_ranks_share_one_table_and_do_what_one_process_does(tmp_path):
    command = [sys.executable, "-m", "tests.training.elr_ddp_worker", str(tmp_path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for key in ("targets", "labels"):
        assert torch.equal(ranks[0][key], ranks[1][key])
    single = _without_batchnorm(Mine())
    fit(single, loader(batch_size=8), epochs=2)
    assert torch.allclose(single.elr.targets, ranks[0]["targets"], atol=1e-6)
    assert torch.equal(single.elr.labels, ranks[0]["labels"])
    assert torch.allclose(single.net[0].weight, ranks[0]["weight"], atol=1e-6)
    # 23 examples on two ranks: the sampler pads with an example that another rank also has
    assert torch.equal(ranks[0]["padded"], ranks[1]["padded"])
    assert (ranks[0]["padded"].sum(dim=1) > 0).all()


def _without_batchnorm(module):
    module.net[1], module.net[3] = nn.Identity(), nn.Identity()
    return module

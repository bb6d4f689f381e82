"""elr: ELR+ on a Trainer: two students, the teachers that are their averages, each feeding the other's table."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from effdl import ELRImageClassifier, ELRPlusModule
from effdl.core.errors import ConfigurationError
from effdl.data.indexed import IndexedDataset
from effdl.training.elr import TargetTable
from tests.training.elr_parts import CLASSES, N, fit, loader, same


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

"""Frozen networks: outside the tree, shared by copies, moved when asked."""

from __future__ import annotations

import copy

import torch
from lightning.pytorch import LightningModule
from torch import nn

from effdl.core.teacher import Frozen, freeze


class Student(LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.teacher = nn.Linear(2, 2), Frozen(nn.Sequential(nn.Linear(2, 2), nn.Dropout()))


def test_freeze_is_in_place():
    net = nn.Linear(2, 2)
    assert freeze(net) is net
    assert not net.training
    assert not net.weight.requires_grad


def test_the_student_neither_trains_nor_saves_nor_casts_nor_copies_it():
    student = Student()
    student.train().double()
    student.requires_grad_(True)
    teacher = student.teacher.module
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert teacher[0].weight.dtype == torch.float32
    assert sorted(student.state_dict()) == sorted(dict(student.named_parameters())) == ["net.bias", "net.weight"]
    assert copy.deepcopy(student).teacher is student.teacher


def test_it_moves_to_the_device_asked_for_also_out_of_inference_mode():
    frozen = Frozen(nn.Sequential(nn.Linear(2, 2)))
    assert frozen.on(torch.ones(1)) is frozen.on("cpu") is frozen.module
    with torch.inference_mode():  # the sanity check comes before the first training step
        moved = frozen.on("meta")
    assert moved[0].weight.is_meta
    assert not moved[0].weight.is_inference()
    only_buffers = Frozen(nn.BatchNorm1d(2, affine=False))
    assert only_buffers.on(torch.device("meta")).running_mean.is_meta
    assert Frozen(nn.Identity()).on("meta")(torch.ones(1)) == 1

"""A second pass leaves no trace."""

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryPrecision, BinaryRecall

from effdl.core.replay import unrecorded


class Module(LightningModule):
    """Every kind of state that a forward may write."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.register_buffer("rebound", torch.zeros(2))
        self.scores = BinaryAUROC()
        self.grouped = MetricCollection([BinaryPrecision(), BinaryRecall(), BinaryAccuracy()])
        self.logged = []

    def log(self, name, value, **kwargs):
        self.logged.append(name)

    def forward(self, x):
        y = (x[:, 0] > 0).int()
        out = self.norm(x)
        self.rebound = self.rebound + 1
        self.scores(out[:, 0].detach().sigmoid(), y)
        self.grouped.update(x[:, 0].sigmoid() * 0.6, y)
        self.log_dict({"a": out.mean(), "b": 1.0})
        return out.square().sum() + self.norm.weight.sum()


def numbers(module):
    kept = [v.clone() for v in module.state_dict().values()]
    kept += [module.scores.compute(), *module.grouped.compute().values(), torch.tensor(module.scores._update_count)]
    return [*kept, torch.tensor(len(module.scores.preds))]


def test_values_return_and_gradients_stay():
    g = torch.Generator().manual_seed(0)
    x, other = torch.randn(8, 1, generator=g), torch.randn(8, 1, generator=g)
    once, twice = Module(), Module()
    once(x)
    twice(x)
    objects = [id(b) for b in twice.buffers()]
    with unrecorded(twice):
        twice(other).backward()
    assert objects == [id(b) for b in twice.buffers()]
    assert twice.logged == ["a", "b"]
    assert twice.norm.weight.grad is not None
    assert all(torch.equal(a, b) for a, b in zip(numbers(once), numbers(twice)))
    once(other)  # and both go on alike
    twice(other)
    assert all(torch.equal(a, b) for a, b in zip(numbers(once), numbers(twice)))
    assert twice.logged == once.logged


def test_also_after_an_error():
    module = Module()
    module(torch.ones(4, 1))
    before = [v.clone() for v in module.state_dict().values()]
    with pytest.raises(RuntimeError, match="inside"), unrecorded(module):
        module(torch.zeros(4, 1)) and (_ for _ in ()).throw(RuntimeError("inside"))
    assert all(torch.equal(a, b) for a, b in zip(before, module.state_dict().values()))
    assert "log" not in module.__dict__

"""reste: the ReLU in front of a binary layer, found and moved."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from effdl.compression._reste_bits import fold_thresholds
from effdl.compression._reste_relu import (
    ReLUBatchNorm2d,
    relus_before,
    reorder_relus,
    restore_relus,
)
from effdl.compression.reste import binarize, binary_layers, candidates
from effdl.core.errors import ConfigurationError
from tests.compression.test_reste import draw, network


class Inputs:
    """The smallest and largest input of each binary layer."""

    def __init__(self, model: nn.Module) -> None:
        self.seen = {}
        for name, layer in binary_layers(model).items():
            layer.register_forward_pre_hook(lambda m, x, name=name: self.look(name, x[0].detach()))

    def look(self, name: str, x: torch.Tensor) -> None:
        self.seen[name] = float(x.min()), float(x.max())

    def dead(self) -> list[str]:
        return [name for name, (low, high) in self.seen.items() if low >= 0 or high < 0]


def sequential(*norms: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(nn.Conv2d(1, 8, 3), *norms, nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.ReLU(), *head)


class Residual(nn.Module):
    """As torchvision writes it: one ReLU module for both places."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(1, 4, 3)
        self.a, self.b, self.c = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(3))
        self.na, self.nb, self.nc = (nn.BatchNorm2d(4) for _ in range(3))
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.relu, self.last = nn.ReLU(inplace=True), nn.ReLU()

    def forward(self, x):
        x = self.stem(x)
        y = self.relu(self.na(self.a(x)))
        y = self.relu(self.nb(self.b(y)) + self.downsample(x))
        return self.last(self.nc(self.c(y)) + y)


# ---- what it becomes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norms", [(), (nn.BatchNorm2d(8),), (nn.BatchNorm2d(8), nn.Identity(), nn.Dropout(0.1))])
def test_conv_relu_conv_sees_both_signs(norms):
    model, x = sequential(*copy.deepcopy(norms)), draw(16, 1, 10, 10)
    layer = str(len(norms) + 3)
    dead = Inputs(binarize(copy_of := copy.deepcopy(model), [layer]))
    copy_of(x)
    assert dead.dead() == [layer]
    keys, order = list(model.state_dict()), [id(p) for p in model.parameters()]
    looks = Inputs(binarize(model, [layer], reorder_relu=True))
    model(x)
    assert looks.dead() == []
    assert list(relus_before(model, [layer])) == []
    assert (list(model.state_dict()), [id(p) for p in model.parameters()]) == (keys, order)
    assert type(model[len(norms) + 1]) is nn.Identity
    assert type(model[len(norms) + 4]) is nn.ReLU  # it feeds the head


def test_the_batch_norm_comes_last():
    model = network(relu_first=True).eval()
    model[1].running_mean, model[1].bias.data = draw(8), draw(8, seed=1)
    conv, norm, x = model[0], copy.deepcopy(model[1]), draw(4, 1, 6, 6)
    moved = reorder_relus(model, ["3"])
    assert torch.equal(model[:3](x), norm(conv(x).relu()))
    assert moved.norms == {"1": ReLUBatchNorm2d}
    assert reorder_relus(model, ["3"]) == ([], {})  # once is enough
    restore_relus(model, moved)
    assert torch.equal(model[:3](x), norm(conv(x)).relu())
    assert [type(part) for part in model[1:3]] == [nn.BatchNorm2d, nn.ReLU]


def test_a_residual_block_becomes_the_papers():
    """x + BN(ReLU(BinConv(x))): also with one ReLU module in two places, and a BatchNorm on the shortcut."""
    model = Residual().eval()
    for i, norm in enumerate((model.na, model.nb, model.nc, model.downsample[1])):
        norm.running_mean, norm.bias.data = draw(4, seed=i), draw(4, seed=9 + i)
    x = draw(2, 1, 8, 8)
    reorder_relus(model, ["a", "b", "c"])
    norms = [copy.deepcopy(getattr(model, name)) for name in ("na", "nb")]
    for norm in norms:
        norm.__class__ = nn.BatchNorm2d
    x0 = model.stem(x)
    y = norms[0](model.a(x0).relu())
    y = norms[1](model.b(y).relu()) + model.downsample(x0)
    assert torch.allclose(model(x), (model.nc(model.c(y)) + y).relu(), atol=1e-6)
    assert type(model.nc) is nn.BatchNorm2d  # behind it comes nothing binary


@pytest.mark.parametrize("name", ["resnet18", "resnet10t", "resnet26"])
def test_timm_resnets_see_both_signs(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4)
    names = list(candidates(model))
    fed = {layer for _, layer in relus_before(model, names)}
    assert len(fed) >= len(names) - 1
    binarize(model, reorder_relu=True)
    looks = Inputs(model)
    model(draw(4, 3, 64, 64))
    assert set(looks.seen) == set(names)
    assert looks.dead() == []
    assert list(relus_before(model, names)) == []
    assert list(model.state_dict()) == list(timm.create_model(name, num_classes=4).state_dict())


def test_torchvision_resnet():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(num_classes=4)
    binarize(model, reorder_relu=True)
    looks = Inputs(model)
    model(draw(4, 3, 64, 64))
    assert looks.dead() == []


def test_thresholds_behind_a_relu():
    norm = nn.BatchNorm2d(6).eval()
    norm.weight.data = torch.tensor([1.0, -2.0, 0.5, -0.1, 1.0, -1.0])
    norm.running_mean, norm.bias.data = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 0.0]), torch.zeros(6)
    norm.__class__ = ReLUBatchNorm2d
    x = torch.cat([draw(2, 6, 5, 5), torch.zeros(1, 6, 5, 5)])
    value, rising = (t.view(1, -1, 1, 1) for t in fold_thresholds(norm))
    assert torch.equal(rising * (x - value) >= 0, norm(x) >= 0)


# ---- what is refused ------------------------------------------------------------------------------------------------


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.n = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.b(F.relu(self.n(self.a(x))))


class Shared(nn.Module):
    """Another layer takes what comes out of the BatchNorm, or of the ReLU."""

    def __init__(self, norm: bool):
        super().__init__()
        self.a, self.b, self.c, self.relu = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU()
        self.n = nn.BatchNorm2d(4) if norm else nn.Identity()

    def forward(self, x):
        x = self.n(self.a(x))
        y = self.relu(x)
        return self.b(y) + self.c(y if isinstance(self.n, nn.Identity) else x)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.relu = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1), nn.ReLU()

    def forward(self, x):
        x = self.a(x)
        return self.b(self.relu(x * x.mean((2, 3), keepdim=True)))


@pytest.mark.parametrize("make", [Functional, lambda: Shared(True), lambda: Shared(False), Gated])
def test_other_layouts_are_refused_and_left_alone(make):
    model = make()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ConfigurationError, match=r"reorder_relu: no known layout\. b takes the output of .*BatchNorm"):
        binarize(model, ["b"], reorder_relu=True)
    assert [type(m) for m in model.modules()] == kinds
    with pytest.raises(ConfigurationError, match="reorder_relu"):
        binarize(network(), activations=False, reorder_relu=True)


def test_without_a_trace_the_order_in_a_sequential_counts():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = sequential(nn.Sequential(nn.BatchNorm2d(8)))

        def forward(self, x):
            return self.body(x) if x.sum() > 0 else self.body(-x)

    model = Untraceable()
    assert list(relus_before(model, ["body.4"])) == [("body.2", "body.4")]
    assert reorder_relus(model, ["body.4"]).norms == {"body.1.0": ReLUBatchNorm2d}
    assert list(relus_before(model, ["body.4"])) == []

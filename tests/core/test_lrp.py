"""The relevance engine on networks with skips, BatchNorm, functional operations, layers used twice; against zennit."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effdl.core import _lrp_recorder
from effdl.core.errors import ConfigurationError
from effdl.core.lrp import (
    AlphaBeta,
    Composite,
    Epsilon,
    LRPRuleNotFound,
    ZBox,
    pass_through,
    register_rule,
    relevance,
)


class Block(nn.Module):
    """BatchNorm, a skip, one ReLU used twice and in place, functional pooling."""

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 6, 3, padding=1), norm(6)
        self.b, self.nb = nn.Conv2d(6, 6, 3, padding=1), norm(6)
        self.relu, self.head = nn.ReLU(inplace=True), nn.Linear(6 * 4, 4)

    def forward(self, x):
        x = self.relu(self.na(self.a(x)))
        x += self.nb(self.b(x))
        x = F.avg_pool2d(input=F.max_pool2d(self.relu(x), 2), kernel_size=2)
        return self.head(F.dropout(x, 0.5, self.training).reshape(x.size(0), -1))


def settled(net):
    """BatchNorms with statistics of their own, no biases elsewhere."""
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1)
            layer.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(layer.weight, -1, 1.5)
            nn.init.normal_(layer.bias, 0, 0.1)
    return net.eval()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return settled(Block())


X = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3, 0])


def test_the_composite_equals_zennit(net):
    pytest.importorskip("zennit")
    from zennit.attribution import Gradient
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.composites import LayerMapComposite
    from zennit.rules import Epsilon as TheirEpsilon
    from zennit.rules import Pass, ZPlus
    from zennit.types import Activation, AvgPool, Convolution, Linear

    vgg = settled(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 5, 3), nn.ReLU(),
            nn.AvgPool2d(2), nn.Flatten(), nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 4),
        )
    )  # fmt: skip
    rules = [
        (Activation, Pass()), (Convolution, ZPlus(1e-9, zero_params="bias")), (Linear, TheirEpsilon(1e-6)),
        (AvgPool, TheirEpsilon(1e-9)),
    ]  # fmt: skip
    theirs = LayerMapComposite(rules, canonizers=[SequentialMergeBatchNorm()])
    start = F.one_hot(Y, 4).float()
    with Gradient(model=copy.deepcopy(vgg), composite=theirs) as attributor:
        _, want = attributor(X, start)
    got = relevance(vgg, X, start, rule=Composite(linear=Epsilon(1e-6)))
    assert torch.allclose(got.inputs, want, rtol=1e-4, atol=1e-6)


def test_two_uses_of_a_layer_add_up_and_everything_is_put_back(net):
    twice = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU())
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.ReLU(), twice, twice, nn.Linear(4, 3, bias=False))
    found = relevance(model, X.flatten(1)[:, :6].abs(), torch.tensor([0] * 5), rule="zplus")
    assert set(found.layers) == {"0", "2.0", "4"}
    alive = found.layers["0"].sum(1) > 0
    assert torch.allclose(found.layers["2.0"].sum(1)[alive], torch.tensor(2.0), atol=1e-5)
    assert "forward" not in model[0].__dict__
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_logits_are_the_networks_and_selected_layers_are_recorded(net):
    found = relevance(net, X, Y, layers=["b"])
    assert torch.allclose(found.logits, net(X), atol=1e-5)
    assert list(found.layers) == ["b"]
    assert found.layers["b"].shape == (5, 6, 8, 8)
    with pytest.raises(ConfigurationError, match="Did you mean"):
        relevance(net, X, Y, layers=["heed"])
    with pytest.raises(ConfigurationError, match="zplus"):
        relevance(net, X, Y, rule="z-plus")


def test_a_batchnorm_before_a_convolution_is_folded_into_it_with_a_tensor_bias():
    torch.manual_seed(0)
    net = settled(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten()))
    scale = net[0].weight * (net[0].running_var + net[0].eps).rsqrt()
    shift = net[0].bias - net[0].running_mean * scale
    merged = lambda x: F.conv2d(x, net[1].weight * scale.view(1, -1, 1, 1), None, padding=1)  # noqa: E731
    constant = F.conv2d(shift.view(1, -1, 1, 1).expand(1, 3, 8, 8), net[1].weight, net[1].bias, padding=1)
    assert torch.allclose(net[:2](X), merged(X) + constant, atol=1e-5)  # not a bias per channel: the borders differ
    start = torch.randn(5, 4 * 64).abs()
    x = X.clone().requires_grad_()
    z = merged(x)
    s = start.view(5, 4, 8, 8) / (z + constant)
    want = x * torch.autograd.grad(z, x, s.detach())[0]
    assert torch.allclose(relevance(net, X, start, rule="epsilon").inputs, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rule", [AlphaBeta(2.0, 1.0), ZBox(-4.0, 4.0), AlphaBeta(), Epsilon()])
def test_rules_conserve_relevance_without_bias_also_for_negative_inputs(rule):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.Flatten()).double()
    start = torch.rand(5, 4 * 36, dtype=torch.float64)
    back = relevance(net, X.double(), start, rule=Composite(conv=rule)).inputs
    assert torch.allclose(back.flatten(1).sum(1), start.sum(1), rtol=1e-5)


def test_single_layers_and_the_first_one_can_have_their_own_rule(net):
    plain = relevance(net, X, Y).inputs
    boxed = relevance(net, X, Y, rule=Composite(first=ZBox(-3.0, 3.0))).inputs
    by_name = relevance(net, X, Y, rule=Composite(layers=(("a", ZBox(-3.0, 3.0)),))).inputs
    assert torch.equal(boxed, by_name)
    assert not torch.allclose(boxed, plain)


class Gelu(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3))

    def forward(self, x):
        return self.body(x)


def test_an_unknown_operation_is_named_and_can_be_given_a_rule(monkeypatch):
    monkeypatch.setattr(_lrp_recorder, "REGISTERED", registered := dict(_lrp_recorder.REGISTERED))
    monkeypatch.setattr("effdl.core.lrp.REGISTERED", registered)
    net, x = Gelu(), X.flatten(1)[:, :6]
    with pytest.raises(LRPRuleNotFound, match=r"'body\.1' \(GELU\).*register_rule"):
        relevance(net, x, Y % 3)
    attention = nn.TransformerEncoderLayer(6, 2, dropout=0.0)
    with pytest.raises(LRPRuleNotFound, match="self_attn|norm"):
        relevance(nn.Sequential(attention, nn.Linear(6, 3)), x, Y % 3)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    register_rule(nn.GELU, pass_through)
    found = relevance(net, x, Y % 3)
    assert set(found.layers) == {"body.0", "body.2"}
    assert "forward" not in net.body[1].__dict__
    with pytest.raises(ConfigurationError, match="layer_type"):
        register_rule("GELU", pass_through)


def test_a_relevance_that_is_not_finite_names_its_layer(net):
    with torch.no_grad():
        net.b.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="'b'|'head'"):
        relevance(net, X, Y)


@pytest.mark.parametrize("bad", [{"alpha": 2.0, "beta": 0.5}, {"alpha": 0.5, "beta": -0.5}, {"eps": 0.0}])
def test_rules_refuse_bad_numbers(bad):
    with pytest.raises(ConfigurationError):
        AlphaBeta(**bad)
    with pytest.raises(ConfigurationError, match="high"):
        ZBox(1.0, 0.0)
    with pytest.raises(ConfigurationError, match="eps"):
        Epsilon(0.0)


def test_compiled_networks_and_half_precision_weights(net):
    want = relevance(net, X, Y).inputs
    assert torch.equal(relevance(torch.compile(net, backend="eager"), X, Y).inputs, want)
    half = copy.deepcopy(net).bfloat16()
    found = relevance(half, X.bfloat16(), Y)
    assert found.inputs.dtype == torch.float32
    assert torch.allclose(found.inputs.sum(), want.sum(), rtol=0.2)

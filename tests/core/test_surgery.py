"""Replacing layers, the class swap, captures and folding: what the user set stays."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from effdl.core.calibrate import calibration_batches
from effdl.core.capture import capture, undisturbed
from effdl.core.errors import ConfigurationError
from effdl.core.reweight import raw, reweight
from effdl.core.select import select_modules
from effdl.core.surgery import count_parameters, replace_modules, when_built
from effdl.core.teacher import Frozen


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(inplace=True), nn.Linear(8, 2))


def test_replacement_keeps_device_dtype_flags_hooks_and_ties():
    net = model().to(torch.float64)
    net.append(net[1])  # tied
    net[1].eval()
    net[1].weight.requires_grad_(False)
    calls = []
    net[1].register_forward_hook(lambda *a: calls.append(1))
    report = replace_modules(net, {"1": net[1]}, lambda name, old: nn.RMSNorm(8))
    assert type(net[1]) is nn.RMSNorm
    assert net[4] is net[1]
    assert net[1].weight.dtype == torch.float64
    assert not net[1].weight.requires_grad
    assert not net[1].training
    net[1](torch.ones(1, 8, dtype=torch.float64))
    assert calls == [1]
    assert report.delta == -8
    assert count_parameters(net) == report.parameters_after


def test_an_error_while_building_leaves_the_model_as_it_was():
    net = model()
    layers = list(net)

    def make(name, old):
        if name == "3":
            raise ValueError("no")
        return nn.Identity()

    with pytest.raises(ValueError, match="no"):
        replace_modules(net, select_modules(net, default=(nn.Linear,)), make)
    assert list(net) == layers


@pytest.mark.parametrize("where", ["setup", "configure_model"])
def test_when_built_waits_for_layers_and_complains_only_then(where):
    class Late(LightningModule):
        def __init__(self):
            super().__init__()

        def build(self, *args):
            self.net = nn.Linear(2, 2)

    setattr(Late, where, lambda self, *args, **kwargs: self.build())
    for target, fails in (("net", False), ("nest", True)):
        module, found = Late(), []
        handles = when_built(module, lambda m=module, f=found, t=target: f.extend(select_modules(m, t)))
        assert not found
        if fails:
            with pytest.raises(ConfigurationError, match="nest"):  # noqa: PT012
                module.setup("fit")
                module.configure_model()
        else:
            module.setup("fit")
            module.configure_model()
            assert found == ["net"]
        for handle in handles:
            handle.remove()
        assert not any(hasattr(v, "_effdl_chain") for v in module.__dict__.values())


def test_when_built_acts_at_once_or_raises_at_once():
    module = LightningModule()
    with pytest.raises(ConfigurationError):
        when_built(module, lambda: select_modules(module, "net"))
    module.net = nn.Linear(2, 2)
    found = []
    assert when_built(module, lambda: found.append(1)) == []
    assert found == [1]


def test_class_swap_keeps_parameters_and_is_undone():
    net = model()
    weight, order = net[0].weight, [n for n, _ in net.named_parameters()]
    half = reweight(net[0], "weight", lambda w: w * 0.5)
    plus = reweight(net[0], "weight", lambda w: w + 1)
    assert torch.equal(net[0].weight, weight * 0.5 + 1)
    assert raw(net[0], "weight") is weight
    assert [n for n, _ in net.named_parameters()] == order
    assert isinstance(net[0], nn.Linear)
    net[0](torch.ones(1, 4)).sum().backward()
    assert torch.allclose(weight.grad, torch.full_like(weight, 0.5))
    twin = copy.deepcopy(net)
    x = torch.randn(3, 4)
    assert torch.equal(twin(x), net(x))
    exported = torch.export.export(net.eval(), (x,)).module()(x)
    assert torch.allclose(exported, net(x))
    half.remove()
    assert torch.equal(net[0].weight, weight + 1)
    plus.remove()
    plus.remove()
    assert type(net[0]) is nn.Linear
    assert net[0].weight is weight
    with pytest.raises(ConfigurationError, match="no parameter 'wight'"):
        reweight(net[0], "wight", lambda w: w)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_class_swap_reaches_recurrent_layers(kind):
    torch.manual_seed(0)
    rnn, x = kind(4, 4), torch.randn(3, 1, 4)
    before = rnn(x)[0]
    handle = reweight(rnn, "weight_hh_l0", lambda w: w * 0)
    cut = rnn(x)[0]
    assert not torch.allclose(cut[1:], before[1:])
    assert torch.allclose(cut[:1], before[:1])  # the first step has no past
    handle.remove()
    assert torch.equal(rnn(x)[0], before)
    assert rnn._flat_weights[1] is rnn.weight_hh_l0


def test_capture_records_before_an_in_place_operation_and_keeps_the_graph():
    net, x = model(), torch.randn(5, 4)
    with capture(net, ["1"], clone=True) as seen:
        out = net(x)
    assert (seen["1"] < 0).any()  # the in-place ReLU behind it did not reach the record
    assert torch.autograd.grad(out.sum(), seen["1"])[0].shape == (5, 8)
    assert not net[1]._forward_hooks
    with pytest.raises(ConfigurationError, match="no such layer"):
        capture(net, ["9"]).__enter__()


def test_undisturbed_restores_everything_even_after_an_error():
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    net[2].eval()
    net[2].weight.requires_grad_(False)
    net[2].bias.grad = torch.ones(2)
    before = copy.deepcopy(net.state_dict())
    with torch.inference_mode(), pytest.raises(RuntimeError), undisturbed(net, training=True):  # noqa: PT012
        assert not torch.is_inference_mode_enabled()
        net(torch.randn(8, 4)).sum().backward()
        raise RuntimeError
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))
    assert [m.training for m in net] == [True, True, False]
    assert not net[2].weight.requires_grad
    assert torch.equal(net[2].bias.grad, torch.ones(2))


def test_undisturbed_restores_a_buffer_that_validation_made():
    net = nn.Linear(2, 2)
    with torch.inference_mode():
        net.register_buffer("seen", torch.ones(2))
        with undisturbed(net), torch.inference_mode():
            net.seen.add_(1)
    assert torch.equal(net.seen, torch.ones(2))


def test_a_frozen_teacher_is_outside_the_tree_and_never_copied():
    class Student(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.teacher = nn.Linear(2, 2), Frozen(model())

    student = Student()
    assert sorted(student.state_dict()) == ["net.bias", "net.weight"]
    assert copy.deepcopy(student).teacher.module is student.teacher.module
    assert not student.teacher.module.training
    assert not any(p.requires_grad for p in student.teacher.module.parameters())
    assert student.teacher.on(torch.ones(1)) is student.teacher.module


def test_calibration_batches_do_not_advance_the_streams():
    class Trainer:
        train_dataloader = torch.utils.data.DataLoader(torch.arange(10.0).view(10, 1), batch_size=4, shuffle=True)
        val_dataloaders = None

    module = LightningModule()
    state = torch.get_rng_state()
    batches = calibration_batches(Trainer, module, 2)
    assert torch.equal(torch.cat(batches).flatten(), torch.arange(8.0))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ConfigurationError, match="no validation data"):
        calibration_batches(Trainer, module, 2, train=False)
    with pytest.raises(ConfigurationError, match="calibration_batches=0"):
        calibration_batches(Trainer, module, 0)

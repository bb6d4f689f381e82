"""smooth-gradcampp: the explanation in float64 of a network in any precision (``double=True``)."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import weight_norm

from effdl.attribution._double import check_double, double_copy
from effdl.attribution.smooth_gradcampp import SmoothGradCAMpp
from effdl.callbacks import SmoothGradCAMCallback
from effdl.core.errors import ConfigurationError
from effdl.core.reweight import reweight
from tests.attribution.smooth_gradcampp_parts import images, small_cnn
from tests.attribution.test_smooth_gradcampp_callback import Module, loader, trainer_with

FIELDS = ("cam", "activation", "raw", "weights", "alpha", "first", "second", "third")


def explain(net, x, **options):
    return SmoothGradCAMpp(net, "2", n_samples=3, **options).explain(x, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_the_explanation_of_the_float64_network(dtype):
    net, x = small_cnn().to(dtype), images().to(dtype)
    want = explain(copy.deepcopy(net).double(), x.double())
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.inference_mode(autocast):
            got = explain(net, x, double=True)
        for field in FIELDS:
            assert torch.equal(getattr(got.layers["2"], field), getattr(want.layers["2"], field)), field
        for field in ("scores", "probabilities"):
            assert getattr(got, field).dtype == torch.float64
            assert torch.equal(getattr(got, field), getattr(want, field)), field
    assert SmoothGradCAMpp(net, "2", double=True)(x)["2"].dtype == torch.float64


def test_seeds_mean_the_same_noise_in_every_precision():
    net, x = small_cnn(), images()
    single, double = (explain(net, x, double=double).layers["2"] for double in (False, True))
    torch.testing.assert_close(single.first.double(), double.first, rtol=1e-4, atol=1e-8)
    cam = SmoothGradCAMpp(net, "2", n_samples=3, double=True)
    first, second = cam(x)["2"], cam(x)["2"]
    assert not torch.equal(first, second)  # each call draws on
    cam = SmoothGradCAMpp(net, double=True)
    cam(x)
    assert cam.layers == ["6"]  # found once


def test_the_model_is_not_touched():
    net, x = small_cnn(), images()
    net.train()
    net[1].eval()
    net[0].weight.requires_grad_(False)
    net[4].weight.grad = torch.ones_like(net[4].weight)
    tensors = [*net.parameters(), *net.buffers()]
    before = [(id(t), t.data_ptr(), t._version, t.dtype, t.requires_grad, t.clone()) for t in tensors]
    flags, keys = [m.training for m in net.modules()], [sorted(vars(m)) for m in net.modules()]
    torch.manual_seed(5)
    stream = torch.get_rng_state()
    explain(net, x, double=True)
    with pytest.raises(ConfigurationError, match="class_idx"):
        SmoothGradCAMpp(net, double=True).explain(x, 99)
    with pytest.raises(ConfigurationError, match="x="):
        SmoothGradCAMpp(net, double=True).explain(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    for t, (*known, value) in zip([*net.parameters(), *net.buffers()], before, strict=True):
        assert known == [id(t), t.data_ptr(), t._version, t.dtype, t.requires_grad]
        assert torch.equal(t, value)
    assert torch.equal(stream, torch.get_rng_state())
    assert flags == [m.training for m in net.modules()]
    assert keys == [sorted(vars(m)) for m in net.modules()]
    assert [p.grad is not None for p in net.parameters()] == [p is net[4].weight for p in net.parameters()]
    assert not any(m._forward_hooks for m in net.modules())


def test_the_copy_holds_the_weights_once_and_tied():
    net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "lstm": nn.LSTM(4, 4)})
    net["b"].weight, net["again"] = net["a"].weight, net["a"]
    net.register_buffer("steps", torch.tensor(3))
    net.scale = torch.tensor(0.1)  # a plain attribute
    net["a"].weight.grad = torch.ones(4, 4)
    with torch.inference_mode():
        net.register_buffer("made_in_validation", torch.ones(2))
        net.register_buffer("counted_in_validation", torch.ones(2, dtype=torch.int64))
        twin = double_copy(net, torch.device("cpu"))
    assert twin["b"].weight is twin["a"].weight
    assert twin["again"] is twin["a"]
    assert {p.dtype for p in twin.parameters()} == {torch.float64}
    assert not any(p.requires_grad or p.grad is not None for p in twin.parameters())
    assert twin.scale.dtype == torch.float64
    assert twin.steps.dtype == torch.int64
    assert not any(b.is_inference() for b in twin.buffers() if b.is_floating_point())
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(twin["lstm"](x)[0].float(), net["lstm"](x.float())[0])
    already = double_copy(net.double(), torch.device("cpu"))
    assert already["a"].weight.data_ptr() != net["a"].weight.data_ptr()


def test_hooks_reweighting_weight_norm_and_compilation_come_along():
    class Owner:
        def __init__(self):
            self.calls, self.lock = [], threading.Lock()  # cannot be copied, as a Trainer cannot

        def hook(self, _module, _args, output):
            self.calls.append(output.dtype)
            return 2 * output

    owner, x = Owner(), images()
    net = small_cnn().eval()
    net[0].register_forward_hook(owner.hook)
    handle = reweight(net[4], "weight", lambda w: w * (w.abs() > 0.05))
    net[10] = weight_norm(net[10])
    net(x)  # weight_norm leaves a tensor with a history behind
    single, double = (explain(net, x, double=double).layers["2"] for double in (False, True))
    assert set(owner.calls) == {torch.float32, torch.float64}
    torch.testing.assert_close(single.cam.double(), double.cam, rtol=0, atol=1e-4)
    for compiled in (torch.compile(net, backend="eager"), nn.Sequential(torch.compile(net, backend="eager"))):
        compiled(x)
        layer = "0._orig_mod.2" if isinstance(compiled, nn.Sequential) else "2"
        (got,) = SmoothGradCAMpp(compiled, layer, n_samples=3, double=True).explain(x, 2).layers.values()
        assert torch.equal(got.cam, double.cam)
    handle.remove()
    torch.compiler.reset()


def test_what_cannot_be_done_is_said():
    with pytest.raises(ConfigurationError, match="double=True.*'mps'.*CPU"):
        check_double(torch.device("mps"))
    net = small_cnn()
    net.lock = threading.Lock()
    with pytest.raises(ConfigurationError, match="double=True: Sequential cannot be deep-copied.*state_dict"):
        SmoothGradCAMpp(net, double=True)(images())
    with pytest.raises(ConfigurationError, match="double='yes'"):
        SmoothGradCAMpp(net, double="yes")


class Forward(Module):
    """Asks its trainer, and casts to its own dtype."""

    def forward(self, x):
        assert self.trainer is not None
        return self.net(x.to(self.dtype))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_callback_explains_in_float64_and_leaves_the_run_alone(precision):
    def run(*callbacks):
        torch.manual_seed(3)
        module = Forward()
        trainer_with(*callbacks, epochs=2, precision=precision).fit(module, loader(), loader(2))
        return module.state_dict(), torch.get_rng_state()

    bare, stream = run()
    cam = SmoothGradCAMCallback(targets="net.2", n_samples=2, double=True)
    with_cam, stream_with_cam = run(cam)
    assert all(torch.equal(bare[key], with_cam[key]) for key in bare)
    assert torch.equal(stream, stream_with_cam)
    assert cam.maps["net.2"].dtype == torch.float64
    assert cam.maps["net.2"].isfinite().all()
    assert cam.report()["double"] is True
    assert len(cam.figure().axes) == 2 * 8 + 1


def test_the_callback_refuses_a_device_without_float64_before_the_run(monkeypatch):
    trainer = trainer_with(SmoothGradCAMCallback(double=True))
    monkeypatch.setattr(type(trainer.strategy), "root_device", torch.device("mps"))
    with pytest.raises(ConfigurationError, match="double=True.*'mps'"):
        trainer.callbacks[0].setup(trainer, Module(), "fit")

"""smooth-gradcampp: the attributor: noise, chunks, traces, precision, bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from effdl.attribution.smooth_gradcampp import SmoothGradCAMpp
from effdl.core.errors import ConfigurationError
from tests.attribution.smooth_gradcampp_parts import CASES, _explain, images, load, small_cnn


def test_noise_follows_smoothgrads_rule():
    net, x = small_cnn().eval(), images() * torch.tensor([1.0, 7.0])[:, None, None, None]
    seen = []
    net.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    SmoothGradCAMpp(net, "6", n_samples=64, sigma=0.2)(x)
    noise = seen[-1].unflatten(0, (-1, 2)) - x
    ratio = noise.std((0, 2, 3, 4)) / (x.flatten(1).amax(1) - x.flatten(1).amin(1))
    torch.testing.assert_close(ratio, torch.full((2,), 0.2), rtol=0.03, atol=0)
    seen.clear()
    SmoothGradCAMpp(net, "6", n_samples=64, sigma=0.2, sigma_mode="absolute")(x)
    noise = seen[-1].unflatten(0, (-1, 2)) - x
    torch.testing.assert_close(noise.std((0, 2, 3, 4)), torch.full((2,), 0.2), rtol=0.03, atol=0)


def test_chunks_do_not_change_the_result_and_seeds_do():
    net, x = small_cnn(), images()
    maps = {size: SmoothGradCAMpp(net, "2", internal_batch_size=size)(x)["2"] for size in (1, 6, 1000)}
    torch.testing.assert_close(maps[1], maps[6])
    torch.testing.assert_close(maps[1], maps[1000])
    assert not torch.allclose(maps[1], SmoothGradCAMpp(net, "2", seed=1)(x)["2"])


def test_each_sample_is_explained_as_if_alone():
    net, x = small_cnn(), images(3)
    noise = 0.1 * torch.randn(4, *x.shape)
    cam = SmoothGradCAMpp(net, ["2", "6"])
    together = cam(x, [0, 3, 1], noise=noise)
    for i, c in enumerate((0, 3, 1)):
        alone = cam(x[i : i + 1], c, noise=noise[:, i : i + 1])
        for name in ("2", "6"):
            torch.testing.assert_close(together[name][i], alone[name][0], atol=1e-5, rtol=1e-4)


def test_the_predicted_class_is_that_of_the_clean_input():
    net, x = small_cnn().eval(), images(4)
    explanation = SmoothGradCAMpp(net, "6", sigma=50.0, n_samples=2).explain(x)
    logits = net(x)
    assert torch.equal(explanation.classes, logits.argmax(1))
    torch.testing.assert_close(explanation.scores, logits.amax(1))


def test_nothing_is_left_behind():
    net, x = small_cnn(), images()
    net.train()
    net[1].eval()
    net[0].weight.requires_grad_(False)
    net[4].weight.grad = torch.ones_like(net[4].weight)
    before, flags = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    torch.manual_seed(5)
    stream = torch.get_rng_state()
    SmoothGradCAMpp(net)(x)
    with pytest.raises(ConfigurationError, match="class_idx"):
        SmoothGradCAMpp(net)(x, 99)
    assert torch.equal(stream, torch.get_rng_state())
    assert flags == [m.training for m in net.modules()]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert [p.grad is not None for p in net.parameters()] == [p is net[4].weight for p in net.parameters()]
    assert torch.equal(net[4].weight.grad, torch.ones_like(net[4].weight))
    assert not net[0].weight.requires_grad
    assert not x.requires_grad
    assert not any(m._forward_hooks for m in net.modules())


def test_inference_mode_frozen_parameters_and_inplace_relu_change_nothing():
    x, noise = images(), 0.1 * torch.randn(3, 2, 3, 16, 16)
    want = SmoothGradCAMpp(small_cnn(), ["1", "6"])(x, 2, noise=noise)
    net = small_cnn(inplace=True).requires_grad_(False)  # the ReLU overwrites the target's output
    with torch.inference_mode():
        classes = torch.full((2,), 2) + 0  # an inference tensor, like a label in Lightning's validation
        got = SmoothGradCAMpp(net, ["1", "6"])(x.clone(), classes, noise=noise.clone())
    for name in want:
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_a_compiled_model_runs_its_hooks(how):
    x, net = images(), small_cnn().eval()
    want = SmoothGradCAMpp(net, "6")(x, 2)["6"]
    compiled = torch.compile(net, backend="eager") if how == "wrapped" else net
    if how == "in place":
        net.compile(backend="eager")
    before = compiled(x)
    torch.testing.assert_close(SmoothGradCAMpp(compiled, "6")(x, 2)["6"], want)
    torch.testing.assert_close(SmoothGradCAMpp(compiled)(x, 2)["6"], want)
    assert torch.equal(compiled(x), before)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_powers_are_taken_in_float32(dtype):
    net, x = small_cnn().eval(), images()
    noise = 0.1 * torch.randn(8, *x.shape)
    want = _explain(net, x, 2, noise, target="6")
    got = _explain(copy.deepcopy(net).to(dtype), x.to(dtype), 2, noise, target="6")
    assert got.third.dtype == torch.float32
    assert (got.cam - want.cam).abs().max() < 0.05
    with torch.autocast("cpu", dtype):
        autocast = _explain(net, x, 2, noise, target="6")
    assert autocast.third.dtype == torch.float32
    assert (autocast.cam - want.cam).abs().max() < 0.05


def test_neuron_regions():
    net, x, noise, c, want = load(CASES[1])
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[1:3, 2:6] = True
    by_mask, by_box = _explain(net, x, c, noise, neurons=mask), _explain(net, x, c, noise, neurons=(1, 2, 3, 6))
    assert torch.equal(by_mask.raw, by_box.raw)
    assert not by_mask.raw[..., ~mask].any()
    torch.testing.assert_close(by_mask.alpha, want["alpha"] * mask, atol=1e-6, rtol=0)
    whole = _explain(net, x, c, noise, neurons=(0, 0, 5, 7))
    torch.testing.assert_close(whole.raw, want["cam_raw"], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_samples": 0}, "n_samples=0"),
        ({"n_samples": 2.5}, "n_samples=2.5"),
        ({"sigma": -0.1}, "sigma=-0.1"),
        ({"sigma": float("nan")}, "sigma=nan"),
        ({"sigma": float("inf")}, "sigma=inf"),
        ({"sigma_mode": "rang"}, "'range'"),
        ({"mode": "map"}, "'maps'"),
        ({"alpha_numerator": 2}, "alpha_numerator=2"),
        ({"denominator": "sum"}, "denominator='sum'"),
        ({"targets": "7x"}, "targets='7x'"),
        ({"targets": "Relu"}, "ReLU"),
        ({"targets": "10"}, "reshape_transform"),
        ({"exclude": "nothing.*", "targets": "6"}, "exclude"),
        ({"channels": [16], "targets": "6"}, "channels=16"),
        ({"channels": [], "targets": "6"}, "channels"),
        ({"neurons": (0, 0, 9, 3), "targets": "6"}, "neurons"),
        ({"neurons": torch.ones(3, 3, dtype=torch.bool), "targets": "6"}, "neurons"),
        ({"reshape_transform": "vitt"}, "'vit'"),
        ({"target_fn": "logits"}, "target_fn"),
        ({"internal_batch_size": 0}, "internal_batch_size"),
        ({"seed": -1}, "seed"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ConfigurationError, match=message):
        SmoothGradCAMpp(small_cnn(), **options)(images())


@pytest.mark.parametrize("class_idx", [5, -1, [0, 1, 2], [0, 5], 1.5])
def test_bad_classes_are_named(class_idx):
    with pytest.raises(ConfigurationError, match="class_idx"):
        SmoothGradCAMpp(small_cnn())(images(), class_idx)


def test_bad_inputs_are_named():
    cam = SmoothGradCAMpp(small_cnn())
    with pytest.raises(ConfigurationError, match="x="):
        cam(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ConfigurationError, match="noise"):
        cam(images(), noise=torch.zeros(2, 3, 16, 16))


def test_unconnected_layers_are_named():
    class TwoBranches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.ignored, self.idle = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            self.ignored(x)
            return self.used(x).mean((2, 3))

    assert set(SmoothGradCAMpp(TwoBranches())(images())) == {"used"}
    with pytest.raises(ConfigurationError, match="targets='ignored'.*score depends"):
        SmoothGradCAMpp(TwoBranches(), "ignored")(images())
    with pytest.raises(ConfigurationError, match="targets='idle'.*runs in the forward"):
        SmoothGradCAMpp(TwoBranches(), "idle")(images())


def test_no_noise_with_many_copies_warns():
    with pytest.warns(UserWarning, match="n_samples=1"):
        SmoothGradCAMpp(small_cnn(), sigma=0.0, n_samples=4)

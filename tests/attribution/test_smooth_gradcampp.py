"""smooth-gradcampp: identities, the golden numbers, and other people's models."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from effdl.attribution.smooth_gradcampp import (
    SmoothGradCAMpp,
    channel_weights,
    channels_last_to_map,
    combine,
    normalize_map,
    pixel_weights,
    tokens_to_map,
)
from effdl.core.errors import ConfigurationError
from tests.support import golden

CASES = golden("smooth-gradcampp")["cases"]


class GoldenNet(nn.Module):
    """conv1 - relu [target] - conv2 - relu - GAP - fc, with the golden weights."""

    def __init__(self, inputs: dict, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv1, self.relu, self.conv2 = nn.Conv2d(1, 1, 3), nn.ReLU(), nn.Conv2d(1, 1, 3)
        self.fc, self.scale = nn.Linear(1, 1), 1.0
        for layer, name in ((self.conv1, "conv1"), (self.conv2, "conv2"), (self.fc, "fc")):
            for part, suffix in (("weight", "w"), ("bias", "b")):
                value = torch.tensor(inputs[f"{name}_{suffix}"], dtype=dtype)
                setattr(layer, part, nn.Parameter(value))
        self.conv1.padding = self.conv2.padding = (1, 1)
        self.conv1._reversed_padding_repeated_twice = self.conv2._reversed_padding_repeated_twice = [1, 1, 1, 1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.conv2(self.relu(self.conv1(x))).relu()
        return self.scale * self.fc(hidden.mean((2, 3)))


def load(case: dict, dtype: torch.dtype = torch.float64):
    """Net, x, noise, class and the golden outputs as tensors."""
    inputs = case["inputs"]
    x, noise = (torch.tensor(inputs[key], dtype=dtype) for key in ("x", "noise"))
    outputs = {key: torch.tensor(value, dtype=torch.float64) for key, value in case["outputs"].items()}
    return GoldenNet(inputs, dtype).eval(), x, noise, inputs["class_idx"], outputs


def small_cnn(seed: int = 0, inplace: bool = False) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace), nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip


def images(count: int = 2, size: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


both_cases = pytest.mark.parametrize("case", CASES, ids=["6x6", "5x7"])


@both_cases
def test_must_01_one_clean_copy_is_gradcampp(case):
    net, x, _, c, want = load(case)
    got = SmoothGradCAMpp(net, "relu", n_samples=1, sigma=0.0).explain(x, c).layers["relu"]
    torch.testing.assert_close(got.weights, want["gradcampp_w"], atol=1e-6, rtol=0)
    torch.testing.assert_close(got.raw.relu(), want["gradcampp_cam_raw"], atol=1e-6, rtol=0)
    torch.testing.assert_close(got.cam, want["gradcampp_cam"], atol=1e-6, rtol=0)
    torch.testing.assert_close(got.activation, want["A"], atol=1e-6, rtol=0)
    torch.testing.assert_close(got.first, want["grad_clean"], atol=1e-6, rtol=0)


def test_must_01_differs_from_the_peer_that_forgets_to_divide():
    net, x, _, c, want = load(CASES[0])
    got = SmoothGradCAMpp(net, "relu", n_samples=1, sigma=0.0).explain(x, c).layers["relu"]
    assert (got.cam - want["torchcam_v040_undivided_cam"]).abs().max() > 0.05


FIELDS = {
    "D1": "first",
    "D2": "second",
    "D3": "third",
    "alpha": "alpha",
    "w": "weights",
    "cam_raw": "raw",
    "cam": "cam",
}


@both_cases
def test_must_02_golden_parity(case):
    net, x, noise, c, want = load(case)
    explanation = SmoothGradCAMpp(net, "relu").explain(x, c, noise=noise)
    for key, field in FIELDS.items():
        torch.testing.assert_close(getattr(explanation.layers["relu"], field), want[key], atol=1e-6, rtol=0, msg=key)
    torch.testing.assert_close(explanation.scores, want["logits"][:, c], atol=1e-6, rtol=0)


@both_cases
def test_must_02_golden_parity_float32(case):
    net, x, noise, c, want = load(case, torch.float32)
    got = SmoothGradCAMpp(net, "relu").explain(x, c, noise=noise).layers["relu"]
    for key, field in FIELDS.items():
        value = getattr(got, field)
        assert value.dtype == torch.float32
        # alpha = D2 / (2 D2 + sum(A) D3) has condition number ~ alpha, and the 6x6 case holds a near-pole, alpha = 41.
        size = want[key].abs().max() * max(1.0, float(want[key].abs().max()) if key == "alpha" else 1.0)
        assert (value.double() - want[key]).abs().max() <= 1e-5 * size, key


@both_cases
def test_must_02_golden_variants(case):
    net, x, noise, c, want = load(case)
    explain = functools.partial(_explain, net, x, c, noise)
    literal = explain(alpha_numerator="first")
    torch.testing.assert_close(literal.weights, want["w_paper_literal_numerator_D1"], atol=1e-6, rtol=0)
    torch.testing.assert_close(literal.raw, want["cam_raw_paper_literal"], atol=1e-6, rtol=0)
    mean = explain(mode="maps")
    torch.testing.assert_close(mean.cam, want["mean_of_normalised_per_sample_maps"], atol=1e-6, rtol=0)
    one = explain(channels=[1])
    torch.testing.assert_close(one.cam, want["neuron_subset_cam_k1"], atol=1e-6, rtol=0)


def _explain(net, x, c, noise=None, target="relu", **options):
    return SmoothGradCAMpp(net, target, **options).explain(x, c, noise=noise).layers[target]


@pytest.mark.parametrize("sigma", [0.15, 5.0])
def test_must_03_constant_gradient_has_a_closed_form_whatever_the_noise(sigma):
    torch.manual_seed(0)
    conv, fc = nn.Conv2d(2, 6, 3, padding=1), nn.Linear(6, 4)
    net = nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), fc).double()
    x = torch.randn(3, 2, 7, 9, dtype=torch.float64)
    got = _explain(net, x, 2, target="1", n_samples=5, sigma=sigma, sigma_mode="absolute")
    A = conv(x).relu()
    g = fc.weight[2] / 63
    closed = g.relu() * 63 / (2 + g * A.sum((2, 3)))
    torch.testing.assert_close(got.weights, closed, atol=1e-6, rtol=0)
    plain = _explain(net, x, 2, target="1", n_samples=1, sigma=0.0)
    torch.testing.assert_close(got.cam, plain.cam, atol=1e-6, rtol=0)
    elementwise = _explain(net, x, 2, target="1", n_samples=5, sigma=sigma, denominator="elementwise")
    torch.testing.assert_close(elementwise.weights, closed, atol=1e-6, rtol=0)  # equal only since G is constant


@both_cases
def test_must_04_scaled_logits_scale_the_derivatives_by_powers(case):
    net, x, noise, c, _ = load(case)
    one = _explain(net, x, c, noise)
    net.scale = 10.0
    ten = _explain(net, x, c, noise)
    for power, field in ((1, "first"), (2, "second"), (3, "third")):
        torch.testing.assert_close(getattr(ten, field), 10.0**power * getattr(one, field))
    below = 2 * 100 * one.second + one.activation.sum((2, 3), keepdim=True) * 1000 * one.third
    alpha = torch.where(below == 0, 0.0, 100 * one.second / torch.where(below == 0, 1.0, below))
    torch.testing.assert_close(ten.alpha, alpha)
    assert not torch.allclose(ten.alpha, one.alpha)  # the D3 term is there


@both_cases
def test_must_05_more_copies_average_the_noise_away(case):
    net, x, _, c, _ = load(case)

    def spread(n: int) -> float:
        runs = [_explain(net, x, c, n_samples=n, sigma=0.15, seed=seed).weights for seed in range(20)]
        return float(torch.stack(runs).var(0).sum())

    assert spread(64) <= spread(4) / 8


@both_cases
def test_must_06_the_clean_activation_is_weighed(case):
    net, x, _, c, _ = load(case)
    got = _explain(net, x, c, n_samples=3, sigma=10.0)
    clean = net.relu(net.conv1(x))
    torch.testing.assert_close(got.raw, (got.weights[..., None, None] * clean).sum(1), atol=0, rtol=0)


@both_cases
def test_must_07_single_channels_add_up_to_the_map(case):
    net, x, noise, c, _ = load(case)
    parts = sum(_explain(net, x, c, noise, channels=[k]).raw for k in range(3))
    torch.testing.assert_close(parts, _explain(net, x, c, noise).raw, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", ["derivatives", "maps"])
@pytest.mark.parametrize("numerator", ["second", "first"])
@pytest.mark.parametrize("denominator", ["map", "elementwise"])
def test_must_10_a_dead_relu_gives_zeros_not_nan(mode, numerator, denominator):
    net = small_cnn()
    nn.init.constant_(net[4].bias, -1e4)  # behind BN's running statistics: all negative
    cam = SmoothGradCAMpp(net, n_samples=3, mode=mode, alpha_numerator=numerator, denominator=denominator)
    for target in (None, "2", "6"):
        cam.layers = None if target is None else [target]
        (maps,) = cam(images(), 1).values()
        assert maps.shape == (2, 16, 16)
        assert torch.equal(maps, torch.zeros_like(maps))


# The functions alone


def test_functions_compose_to_the_class():
    net, x, noise, c, want = load(CASES[1])
    A, D1, D2, D3 = (want[key] for key in ("A", "D1", "D2", "D3"))
    alpha = pixel_weights(A, D1, D2, D3)
    raw = combine(channel_weights(alpha, D1), A)
    torch.testing.assert_close(normalize_map(raw), _explain(net, x, c, noise).cam, atol=1e-6, rtol=0)


def test_tiny_gradients_are_not_taken_for_dead():
    torch.manual_seed(0)
    A, G = torch.rand(1, 4, 5, 5), torch.randn(1, 4, 5, 5)
    full, tiny = (pixel_weights(A / s, s * G, (s * G) ** 2, (s * G) ** 3) for s in (1.0, 1e-9))
    torch.testing.assert_close(full, tiny * 1.0, rtol=1e-4, atol=0)


def test_pytorch_grad_cam_agrees_on_gradcampp():
    peer = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    net, x = small_cnn().eval(), images()
    net[-1].weight.data *= 1e4  # they add 1e-7 to the denominator, which drowns the G^2 of modest logits
    with peer.GradCAMPlusPlus(net, [net[2]]) as method:
        theirs = torch.from_numpy(method(x, [ClassifierOutputTarget(3)] * 2))
    ours = SmoothGradCAMpp(net, "2", n_samples=1, sigma=0.0)(x, 3)["2"]  # of the input's size: no upsampling to compare
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


# The attributor


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
        got = SmoothGradCAMpp(net, ["1", "6"])(x.clone(), 2, noise=noise.clone())
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


def test_volumes_sequences_and_target_fn():
    net = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    (maps,) = SmoothGradCAMpp(net, n_samples=2)(torch.randn(2, 1, 4, 5, 6)).values()
    assert maps.shape == (2, 4, 5, 6)
    net = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3))
    (maps,) = SmoothGradCAMpp(net, n_samples=2)(torch.randn(2, 1, 9)).values()
    assert maps.shape == (2, 9)
    where = torch.zeros(2, 8, 8)
    where[:, 2:5, 3:6] = 1  # a mask per sample, closed over
    segmenter = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    cam = SmoothGradCAMpp(segmenter, "1", target_fn=lambda out: (out[:, 1] * where).sum((1, 2)))
    explanation = cam.explain(images(2, 8))
    assert explanation.classes is None
    assert explanation.layers["1"].cam.shape == (2, 8, 8)


@pytest.mark.parametrize(
    ("name", "size", "layer"),
    [
        ("resnet18", 64, "layer4"),
        ("convnext_atto", 64, "stages"),
        ("efficientnet_b0", 64, "bn2"),
    ],
)
def test_timm_cnns_find_their_last_map(name, size, layer):
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7)
    cam = SmoothGradCAMpp(model, n_samples=2)
    maps = cam(images(2, size))
    assert set(maps) == {layer}
    assert maps[layer].shape == (2, size, size)
    assert maps[layer].isfinite().all()
    assert 0 <= maps[layer].min() <= maps[layer].max() <= 1


@pytest.mark.parametrize(
    ("name", "reshape", "layer", "shape"),
    [
        ("vit_tiny_patch16_224", "vit", "blocks.11.norm1", (192, 4, 4)),
        ("deit_tiny_distilled_patch16_224", "vit", "blocks.11.norm1", (192, 4, 4)),
        ("swin_tiny_patch4_window7_224", "swin", "norm", (768, 2, 2)),
    ],
)
def test_timm_transformers(name, reshape, layer, shape):
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, img_size=64)
    got = SmoothGradCAMpp(model, n_samples=2, reshape_transform=reshape).explain(images(2, 64)).layers
    assert set(got) == {layer}
    assert got[layer].activation.shape[1:] == shape
    assert got[layer].first.any()
    if reshape == "vit":
        with pytest.raises(ConfigurationError, match="reshape_transform"):
            SmoothGradCAMpp(model, layer)(images(1, 64))


def test_transformers_vit_and_swin():
    from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vit = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=5, **small))
    (layer,) = SmoothGradCAMpp(vit, n_samples=2, reshape_transform="vit").explain(images(2, 32)).layers.values()
    assert layer.cam.shape == (2, 4, 4)
    assert layer.first.any()
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    swin = SwinForImageClassification(config)
    (layer,) = SmoothGradCAMpp(swin, n_samples=2, reshape_transform="swin").explain(images(2, 32)).layers.values()
    assert layer.cam.shape == (2, 4, 4)
    assert layer.first.any()


def test_reshape_transforms_keep_the_grid():
    maps = torch.randn(2, 5, 3, 4)
    tokens = maps.flatten(2).transpose(1, 2)
    assert torch.equal(tokens_to_map(torch.cat([torch.zeros(2, 3, 5), tokens], 1), grid=(3, 4)), maps)
    assert torch.equal(channels_last_to_map(maps.permute(0, 2, 3, 1)), maps)
    square = torch.randn(1, 5, 4, 4)
    assert torch.equal(tokens_to_map(square.flatten(2).transpose(1, 2)), square)


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

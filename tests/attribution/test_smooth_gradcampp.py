"""smooth-gradcampp: identities, the golden numbers, and other people's models."""

from __future__ import annotations

import copy
import functools
import json

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import nn
from torch.utils.data import DataLoader

from effdl.attribution._figures import caption, displayable, overlay_figure, pixels, png
from effdl.attribution.smooth_gradcampp import (
    SmoothGradCAMpp,
    channel_weights,
    channels_last_to_map,
    combine,
    normalize_map,
    pixel_weights,
    tokens_to_map,
)
from effdl.callbacks import SmoothGradCAMCallback
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


# The callback


class Module(LightningModule):
    """A foreign module with BatchNorm and Dropout, without a forward of its own."""

    def __init__(self, network=None):
        super().__init__()
        self.net = small_cnn() if network is None else network

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def loader(batches=6, size=4, shuffle=False):
    g = torch.Generator().manual_seed(2)
    rows = [(torch.randn(3, 16, 16, generator=g), int(i) % 5) for i in range(batches * size)]
    return DataLoader(rows, batch_size=size, shuffle=shuffle)


def trainer_with(*callbacks, epochs=1, **options):
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(max_epochs=epochs, callbacks=list(callbacks), **{**quiet, "enable_checkpointing": saves, **options})


class GradWatch(Callback):
    """What ``.grad`` and the training flags are before and after the callbacks between its two copies."""

    def __init__(self, seen):
        self.seen = seen

    def on_validation_batch_end(self, trainer, pl_module, *args):
        grads = [None if p.grad is None else p.grad.clone() for p in pl_module.parameters()]
        self.seen.append((grads, [m.training for m in pl_module.modules()]))


def test_must_09_a_run_with_the_callback_is_bit_identical():
    def run(*callbacks):
        torch.manual_seed(3)
        module = Module()
        # validation in the middle of an accumulation, so that there are gradients to be left alone
        options = {"val_check_interval": 3, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
        trainer_with(*callbacks, epochs=2, **options).fit(module, loader(shuffle=True), loader(2))
        return module.state_dict(), torch.get_rng_state()

    bare, stream = run()
    before, after = [], []
    cam = SmoothGradCAMCallback(n_samples=3, every=1, num_images=6)
    with_cam, stream_with_cam = run(GradWatch(before), cam, GradWatch(after))
    assert len(cam.rows) == 6
    assert all(torch.equal(bare[key], with_cam[key]) for key in bare)
    assert torch.equal(stream, stream_with_cam)
    assert any(grad is not None and grad.any() for grads, _ in before for grad in grads)
    for (grads, flags), (grads_after, flags_after) in zip(before, after, strict=True):
        assert flags == flags_after
        for a, b in zip(grads, grads_after):
            assert (a is None and b is None) or torch.equal(a, b)


def test_must_09_training_flags_come_back_when_the_attributor_raises():
    flags = []

    class Flags(SmoothGradCAMCallback):
        def _explain(self, pl_module, x, labels):
            pl_module.net[1].train()
            flags.append([m.training for m in pl_module.modules()])
            try:
                return super()._explain(pl_module, x, labels)
            finally:
                flags.append([m.training for m in pl_module.modules()])
                flags.append([p.grad for p in pl_module.parameters()])

    with pytest.raises(ConfigurationError, match="class_idx=7"):
        trainer_with(Flags(class_idx=7)).validate(Module(), loader(1), verbose=False)
    assert flags[0] == flags[1]
    assert flags[0].count(True) == 1
    assert set(flags[2]) == {None}


class Takes(Logger):
    """A logger that takes images the way W&B's does, or (``tensorboard=True``) TensorBoard's experiment."""

    name, version = "takes", 0

    def __init__(self, tensorboard=False):
        self.images, self.experiment = [], self
        log = self._add_image if tensorboard else self._log_image
        setattr(self, "add_image" if tensorboard else "log_image", log)

    def _log_image(self, key, images, step=None):
        self.images.append((key, images[0].shape, images[0].dtype, step))

    def _add_image(self, tag, image, global_step, dataformats="CHW"):
        assert dataformats == "CHW"
        self._log_image(tag, [image.permute(1, 2, 0).numpy()], global_step)

    def log_metrics(self, metrics, step=None):
        pass

    log_hyperparams = log_metrics


def test_pictures_and_reports_go_to_loggers_and_run_folder(tmp_path):
    takers = [Takes(), Takes(tensorboard=True)]
    cam = SmoothGradCAMCallback(n_samples=2, num_images=2)
    trainer = trainer_with(cam, epochs=2, logger=[CSVLogger(tmp_path), *takers], num_sanity_val_steps=1)
    trainer.fit(Module(), loader(), loader(2))
    folder = tmp_path / "lightning_logs" / "version_0" / "figures"
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"smooth-gradcampp-step={n}.{end}" for n in (12, 6) for end in ("json", "png")]
    report = json.loads((folder / "smooth-gradcampp-step=12.json").read_text())
    assert report["explained_layers"] == ["6"]
    assert {"n_samples": 2, "sigma": 0.15, "seed": 0, "step": 12}.items() <= report.items()
    assert [sorted(row) for row in report["images"]] == [["class", "label", "predicted", "probability", "score"]] * 2
    for taker in takers:
        assert [(key, step) for key, _, _, step in taker.images] == [("smooth-gradcampp/overlay", n) for n in (6, 12)]
        assert taker.images[0][1][2] == 3
    assert cam.figures(tmp_path / "drawn")[0].stat().st_size > 10_000


@pytest.mark.parametrize("options", [{"logger": False}, {"fast_dev_run": 2}, {"write": False}])
def test_nothing_is_written_where_nothing_should_be(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cam = SmoothGradCAMCallback(n_samples=2, num_images=1, write=options.pop("write", True))
    options = {"logger": CSVLogger(tmp_path), **options}
    trainer_with(cam, default_root_dir=tmp_path, **options).fit(Module(), loader(), loader(2))
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".png", ".json")]
    assert len(cam.figure().axes) == 2 + 1


@pytest.mark.parametrize(("every", "steps"), [("1ep", [6, 12, 18]), ("2ep", [12]), (4, [6, 12, 18]), (0.4, [12])])
def test_every_counts_between_analyses(every, steps):
    seen = []

    class Watch(SmoothGradCAMCallback):
        def _finish(self, trainer, pl_module):
            super()._finish(trainer, pl_module)
            seen.append(self.step)

        on_validation_epoch_end = _finish

    cam = Watch(n_samples=1, every=every, num_images=1)
    trainer_with(cam, epochs=3).fit(Module(), loader(), loader(1))
    assert sorted(set(seen) - {0}) == steps
    cam.step = 10**6  # a second, shorter fit starts over
    trainer_with(cam).fit(Module(), loader(), loader(1))
    assert cam.step == 6


def test_the_noise_goes_on_where_it_was_after_a_resume(tmp_path):
    make = lambda: SmoothGradCAMCallback(targets="2", n_samples=3, every="1ep")  # noqa: E731
    whole, first, second = make(), make(), make()
    trainer_with(whole, epochs=2).fit(Module(), loader(), loader(2))
    save = ModelCheckpoint(tmp_path, save_last=True)
    trainer_with(first, save).fit(Module(), loader(), loader(2))
    trainer = trainer_with(second, epochs=2)
    trainer.fit(Module(), loader(), loader(2), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][first.state_key]
    assert sorted(state) == ["generator", "interval", "step"]
    assert torch.equal(whole.generator.get_state(), second.generator.get_state())
    assert second.interval == 6
    assert second.step == 12


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_stages_alone_and_the_class_to_explain(stage):
    module = Module()
    said = [module.eval().net(x).argmax(1).tolist() for x, _ in loader(2)][0]
    for class_idx, want in ((None, said), (3, [3] * 4), ("label", [0, 1, 2, 3])):
        cam = SmoothGradCAMCallback(n_samples=1, class_idx=class_idx, num_images=4)
        getattr(trainer_with(cam), stage)(module, loader(2))
        assert [row["class"] for row in cam.rows] == want
        assert [row["label"] for row in cam.rows] == [0, 1, 2, 3]
        assert cam.maps["6"].shape == (4, 16, 16)


def test_images_are_collected_over_batches_and_the_averaged_weights_explained():
    results = []
    for order in (0, 1):
        torch.manual_seed(0)
        cam, ema = SmoothGradCAMCallback(targets="2", n_samples=2, num_images=6), EMAWeightAveraging(decay=0.5)
        trainer_with(*([cam, ema] if order else [ema, cam])).fit(Module(), loader(), loader(3))
        results.append(cam)
    assert len(results[0].images) == 6
    (first, _), (second, _), *_ = loader(3)
    assert torch.equal(results[0].images, torch.cat([first, second[:2]]))
    assert torch.equal(results[0].maps["2"], results[1].maps["2"])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precisions_and_compiled_modules(precision):
    cam = SmoothGradCAMCallback(n_samples=2)
    module = torch.compile(Module(), backend="eager") if precision == "bf16-mixed" else Module()
    trainer_with(cam, precision=precision).fit(module, loader(), loader(1))
    (heat,) = cam.maps.values()
    assert heat.dtype == torch.float32
    assert heat.isfinite().all()
    torch.compiler.reset()


def test_transformers_several_networks_and_target_fn():
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=16, patch_size=4, depth=2)
    cam = SmoothGradCAMCallback(n_samples=2, reshape_transform="vit")
    trainer_with(cam).validate(Module(vit), loader(1), verbose=False)
    assert set(cam.maps) == {"blocks.1.norm1"}

    module = Module()
    module.teacher = nn.Linear(2, 2)
    with pytest.raises(ConfigurationError, match="network=None.*2 submodules"):
        trainer_with(SmoothGradCAMCallback()).validate(module, loader(1), verbose=False)
    cam = SmoothGradCAMCallback(n_samples=2, network="net", target_fn=lambda logits: logits.logsumexp(1))
    trainer_with(cam).validate(module, loader(1), verbose=False)
    assert [sorted(row) for row in cam.rows] == [["label", "score"]] * 4
    assert caption(cam.rows[0]).startswith("score")


def test_layers_built_late_and_layers_that_are_not_there():
    class Late(Module):
        def __init__(self):
            super().__init__(nn.Identity())
            self.net = None

        def configure_model(self):
            self.net = small_cnn() if self.net is None else self.net

    cam = SmoothGradCAMCallback(targets="2", n_samples=2)
    trainer_with(cam).fit(Late(), loader(), loader(1))
    assert set(cam.maps) == {"2"}
    for options in ({"targets": "11"}, {"exclude": "layer9"}, {"network": "nett"}):
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            trainer_with(SmoothGradCAMCallback(**options)).fit(Module(), loader(), loader(1))
    with pytest.warns(UserWarning, match="explains validation images"):
        trainer_with(SmoothGradCAMCallback()).fit(Module(), loader())
    with pytest.raises(ConfigurationError, match="figure"):
        SmoothGradCAMCallback().figure()


# Figures


def test_captions():
    row = {"label": 1, "class": 1, "score": 4.2, "probability": 0.968, "predicted": 1}
    assert caption(row) == "1  97 %"
    assert caption({**row, "class": 0}, ["cat", "dog"]) == "cat  97 %, true dog"
    assert caption({"score": 4.2345}) == "score 4.23"


def test_overlay_figures_draw_what_they_are_given():
    x = torch.rand(10, 2, 9, 7)  # not RGB: shown in grey; more than one block of columns
    figure = overlay_figure(x, {"layer": torch.rand(10, 9, 7)}, ["caption"] * 10, wrong=[True])
    assert len(figure.axes) == 2 * 2 * 8 + 1
    assert figure.axes[0].title.get_color() == "firebrick"
    picture = pixels(png(figure, dpi=50))
    assert picture.dtype == torch.uint8
    assert picture.float().std() > 20
    assert displayable(torch.full((3, 4, 4), 2.0)).max() == 0  # constant, and no division by zero
    assert displayable(x[0]).shape == (9, 7, 3)

"""smooth-gradcampp: official numbers, closed forms, the functions alone, figures."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from effdl.attribution._figures import caption, displayable, overlay_figure, pixels, png
from effdl.attribution.smooth_gradcampp import SmoothGradCAMpp, channel_weights, combine, normalize_map, pixel_weights
from tests.attribution.smooth_gradcampp_parts import CASES, _explain, both_cases, images, load, small_cnn


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
    net, x, noise, c, want = load(case, torch.float32)  # network and inputs are rounded to float32
    got = SmoothGradCAMpp(net, "relu", double=True).explain(x, c, noise=noise).layers["relu"]
    for key, field in FIELDS.items():
        value = getattr(got, field)
        assert value.dtype == torch.float64
        # Each entry to 1e-5 of itself. One of D2, D3 (1e-8, 1e-12: a 4e-7th of the largest, and less) is further off in
        # any precision: the network with rounded weights has another gradient there. The floor is for this one alone.
        floor = 1e-11 * float(want[key].abs().max()) if key in ("D2", "D3") else 0.0
        torch.testing.assert_close(value, want[key], rtol=1e-5, atol=floor, msg=key)


@both_cases
def test_must_02_without_double_alpha_is_as_inexact_as_its_pole_is_near(case):
    net, x, noise, c, want = load(case, torch.float32)
    got = SmoothGradCAMpp(net, "relu").explain(x, c, noise=noise).layers["relu"]
    for key, field in FIELDS.items():
        value = getattr(got, field)
        assert value.dtype == torch.float32
        # alpha = D2 / (2 D2 + sum(A) D3) has condition number ~ alpha, and the 6x6 case holds a near-pole, alpha = 41:
        # it is 1.9e-5 off, more than check 2 allows.
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

"""quantized-distillation: the quantisers and the points (checks 1, 2 and 5, without a Trainer)."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effdl.compression.quantized_distillation import (
    assign_points,
    check_points,
    distillation_loss,
    fake_quantize,
    huffman_bits,
    initial_points,
    layout_of,
    level_frequencies,
    nearest_points,
    points_record,
    quantize_to_points,
    scale_down,
    uniform,
)
from effdl.core.deploy import UnsupportedBackendError, deploy
from effdl.core.errors import ConfigurationError
from effdl.core.quantized import quantize_
from effdl.core.quantizers import grouped
from tests.support import golden

GOLDEN = golden("quantized-distillation")
LAYOUT = layout_of(GOLDEN["bucket_size"])
WEIGHT = torch.tensor(GOLDEN["weight"])


def tensor(name):
    return torch.tensor(GOLDEN[name])


def close(name, value, tolerance=1e-5):
    error = float((value.detach() - tensor(name)).abs().max())
    print(f"{name}: largest error {error:.1e}")
    assert error <= tolerance, name


def test_must_01_golden_parity_of_the_uniform_quantiser():
    buckets = scale_down(WEIGHT, LAYOUT)
    close("alpha", buckets.alpha)
    close("beta", buckets.beta)
    close("scaled", buckets.scaled)
    record = uniform(WEIGHT, GOLDEN["bits"], LAYOUT)
    close("uniform_bucketed", record.dequantize())
    close("uniform_unbucketed", uniform(WEIGHT, GOLDEN["bits"], layout_of(None)).dequantize())
    weight = WEIGHT.clone().requires_grad_()
    fake_quantize(weight, GOLDEN["bits"], LAYOUT, "exact_scale").backward(tensor("upstream_grad"))
    close("gradient_through_scale", weight.grad, 1e-4)
    assert huffman_bits(level_frequencies([record])) == pytest.approx(GOLDEN["huffman_mean_bits_uniform"], abs=1e-5)


def test_must_01_golden_parity_of_learned_points():
    close("init_points_quantiles", initial_points(WEIGHT, GOLDEN["levels"], LAYOUT))
    points = tensor("points").requires_grad_()
    seen = quantize_to_points(WEIGHT, points, LAYOUT)
    close("nonuniform_quantized", seen)
    seen.backward(tensor("upstream_grad"))
    close("points_grad", points.grad, 1e-4)
    record = points_record(WEIGHT, points.detach(), LAYOUT)
    assert torch.equal(record.codes.long() + 4, tensor("nonuniform_indices"))
    assert torch.equal(record.dequantize(), seen)
    case = GOLDEN["assign_points"]
    assert assign_points(case["grad_norms"], case["initial_points"]) == case["assigned"]


def test_must_01_golden_parity_of_the_loss():
    case = GOLDEN["distill"]
    student, teacher = torch.tensor(case["student_logits"]), torch.tensor(case["teacher_logits"])
    task = F.cross_entropy(student, torch.tensor(case["labels"]))
    for reduction, name in (("batchmean", "loss_batchmean"), ("element_mean", "loss_official_elementmean")):
        loss = distillation_loss(student, teacher, task, case["T"], case["teacher_weight"], reduction)
        assert float(loss) == pytest.approx(case[name], abs=1e-5)


def test_must_01_padding_never_leaks():
    values = torch.randn(270, generator=torch.Generator().manual_seed(0))
    rows = grouped(values, LAYOUT)
    assert rows.shape == (5, 64)
    # whatever order the last bucket's values come in, each is quantised as before; v^ without padding has 270 entries
    order = torch.randperm(14, generator=torch.Generator().manual_seed(1)) + 256
    mixed = torch.cat([values[:256], values[order]])
    for quantise in (
        lambda v: uniform(v, 3, LAYOUT).dequantize(),
        lambda v: points_record(v, torch.linspace(0, 1, 5), LAYOUT).dequantize(),
    ):
        assert torch.equal(quantise(mixed)[256:], quantise(values)[order])
    assert torch.equal(initial_points(mixed, 7, LAYOUT), initial_points(values, 7, LAYOUT))
    assert sum(level_frequencies([uniform(values, 3, LAYOUT)])) == 270


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("bucket", [16, 256, None, "row"])
def test_must_02_levels_ends_idempotence_and_error(bits, bucket):
    weight, layout = torch.randn(10, 37, generator=torch.Generator().manual_seed(bits)), layout_of(bucket)
    seen = fake_quantize(weight, bits, layout)
    assert torch.equal(seen, uniform(weight, bits, layout).dequantize())
    for before, after in zip(grouped(weight, layout), grouped(seen, layout)):
        alpha = before.max() - before.min()
        assert after.unique().numel() <= 2**bits
        assert torch.stack([after.min() - before.min(), after.max() - before.max()]).abs().max() < 2e-6 * alpha
        assert (after - before).abs().max() <= alpha / (2 * (2**bits - 1)) + 1e-6
    assert (fake_quantize(seen, bits, layout) - seen).abs().max() < 1e-6


def test_constant_buckets_and_symmetric_levels():
    flat = torch.full((4, 8), 0.3)
    assert (uniform(flat, 2, "bucket:8").dequantize() - 0.3).abs().max() < 1e-6
    weight = torch.tensor([[0.0, -2.0, 0.9, 2.0], [0.0, 0.0, 0.0, 0.0]])
    record = uniform(weight, 2, "row", symmetric=True)
    assert record.offset is None
    assert record.dequantize().tolist() == [[0, -2, 0, 2], [0, 0, 0, 0]]
    assert torch.equal(fake_quantize(weight, 2, "row", symmetric=True), record.dequantize())


def test_gradients_of_the_three_styles():
    weight = torch.tensor([[-1.5, -0.2, 0.4, 1.2]])
    upstream = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    for style, want in (("ste", [1.0, 2, 3, 4]), ("truncated", [0.0, 2, 3, 0])):
        leaf = weight.clone().requires_grad_()
        fake_quantize(leaf, 4, "tensor", style).backward(upstream)
        assert leaf.grad.tolist() == [want]
    clamped = fake_quantize(weight, 4, "tensor", "truncated")
    assert (float(clamped.min()), float(clamped.max())) == pytest.approx((-1, 1))


def test_stochastic_rounding_keeps_the_mean():
    weight = torch.linspace(0, 1, 11).repeat(4000, 1)
    record = uniform(weight, 2, "tensor", generator=torch.Generator().manual_seed(0))
    assert (record.dequantize().mean(0) - weight[0]).abs().max() < 0.01


def test_must_05_points_gradient_is_that_of_finite_differences():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 40, generator=g, dtype=torch.float64)
    x, y = torch.randn(16, 40, generator=g, dtype=torch.float64), torch.randint(0, 6, (16,), generator=g)
    points = initial_points(weight, 4, "bucket:64").requires_grad_()
    loss = lambda p: F.cross_entropy(F.linear(x, quantize_to_points(weight, p, "bucket:64")), y)  # noqa: E731
    loss(points).backward()
    members = nearest_points(scale_down(weight, "bucket:64").scaled, points.detach())
    for j in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[j] = 1e-6
        up, down = points.detach() + step, points.detach() - step
        for moved in (up, down):
            assert torch.equal(nearest_points(scale_down(weight, "bucket:64").scaled, moved), members)
        slope = (loss(up) - loss(down)) / 2e-6
        assert float(points.grad[j]) == pytest.approx(float(slope), rel=1e-3, abs=1e-9)


def test_a_value_in_the_middle_takes_the_upper_point():
    assert nearest_points(torch.tensor([0.25, 0.75, 0.1]), torch.tensor([0.0, 0.5, 1.0])).tolist() == [1, 2, 0]
    collapsed = torch.tensor([0.0, 0.5, 0.5, 1.0], requires_grad=True)
    quantize_to_points(torch.randn(3, 5), collapsed, "tensor").sum().backward()
    assert torch.isfinite(collapsed.grad).all()


def test_points_that_are_no_power_of_two_pack_into_whole_bits():
    record = points_record(WEIGHT, torch.linspace(0, 1, 5), LAYOUT)
    assert record.bits == 3
    assert record.codebook.shape == (8,)
    assert record.payload_bytes == math.ceil(270 * 3 / 8) + 5 * 8 + 8 * 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniform(WEIGHT, 0), "bits=0"),
        (lambda: uniform(WEIGHT, 2.0), "bits=2.0"),
        (lambda: uniform(WEIGHT, 1, symmetric=True), "bits=1"),
        (lambda: uniform(WEIGHT * math.nan, 4), "NaN"),
        (lambda: layout_of(1), "bucket_size=1"),
        (lambda: layout_of("column"), "bucket_size='column'"),
        (lambda: check_points(torch.tensor([0.0, 1.0, 0.5])), "points=.*ascending"),
        (lambda: points_record(WEIGHT, torch.zeros(2, 2)), "1-D"),
        (lambda: points_record(WEIGHT * math.inf, torch.linspace(0, 1, 4)), "infinite"),
        (lambda: initial_points(WEIGHT, 1), "points=1"),
        (lambda: initial_points(WEIGHT, 4, init="random"), "init='random'"),
        (lambda: assign_points([1.0, 2.0], 3), "points=3"),
        (lambda: assign_points([0.0, 0.0], 8), "gradient_norms"),
        (lambda: huffman_bits([0, 0]), "frequencies"),
    ],
)
def test_what_cannot_work_is_refused(call, message):
    with pytest.raises(ConfigurationError, match=message):
        call()


def test_assigned_points_keep_their_sum():
    for norms in ([1.0, 1.0, 1.0], [1e-6, 5.0, 0.1, 0.1], [1000.0, 1.0, 1.0]):
        for points in (4, 5, 8, 256):
            shares = assign_points(norms, points)
            assert sum(shares) == points * len(norms)
            assert 2 <= min(shares) <= max(shares) <= 256


@pytest.mark.parametrize(
    ("bucket", "bits", "symmetric", "points", "backend", "fits"),
    [
        (32, 4, False, False, "torch-int4", True),
        (256, 4, False, False, "torch-int4", False),  # a bucket holds four rows of 64
        (32, 4, False, True, "torch-int4", False),
        ("row", 8, True, False, "torch-int8", True),
        ("row", 8, False, False, "torch-int8", False),
        (256, 2, False, True, "lut", True),
    ],
)
def test_which_backend_runs_which_layout(bucket, bits, symmetric, points, backend, fits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
    for name in ("0.weight", "2.weight"):
        weight, layout = model.get_parameter(name), layout_of(bucket)
        if points:
            quantize_(model, {name: points_record(weight, initial_points(weight, 2**bits, layout), layout)})
        else:
            quantize_(model, {name: uniform(weight, bits, layout, symmetric)})
    x = torch.randn(4, 64)
    if not fits:
        with pytest.raises(UnsupportedBackendError):
            deploy(model, backend)
        return
    tolerance = {"lut": 1e-6, "torch-int8": 0.05, "torch-int4": 0.05}[backend]
    assert (deploy(model, backend)(x) - model(x)).abs().max() < tolerance

"""pdp: its checks 1-5, 7-9 and what the mathematics promises."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effdl.compression.pdp import (
    Groups,
    PrunedWeight,
    Ramp,
    hard_mask,
    last_kept,
    layer_sparsities,
    soft_mask,
    soft_masked,
)
from effdl.core.errors import ConfigurationError
from effdl.core.reweight import reweight
from tests.support import golden

GOLDEN = golden("pdp")


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def name_of(case):
    return f"{case['layer_type']}-{'channel' if case['structured'] else 'unstructured'}"


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=name_of)
def test_must_01_golden_parity(case):
    granularity = "channel" if case["structured"] else "unstructured"
    groups, weight = Groups.parse(granularity), double(case["weight"]).requires_grad_()
    form = (case["r"], case["temperature"], granularity)
    count = weight.shape[0] if case["structured"] else weight.numel()
    threshold = groups.threshold(weight, torch.tensor(last_kept(count, case["r"])))
    mask, seen = soft_mask(weight, *form), soft_masked(weight, *form)
    (grad,) = torch.autograd.grad(seen, weight, double(case["upstream_grad"]))
    (composed,) = torch.autograd.grad(mask * weight, weight, double(case["upstream_grad"]))
    assert torch.allclose(composed, grad, rtol=1e-9, atol=1e-12)  # the fused form is the plain one
    want = {"mask": mask, "output": seen, "grad_weight_t_detached": grad, "threshold": threshold}
    errors = {key: float((value.detach() - double(case[key])).abs().max()) for key, value in want.items()}
    print(name_of(case), {key: f"{error:.1e}" for key, error in errors.items()})
    assert max(errors.values()) < 1e-6
    hard = hard_mask(weight, case["r"], granularity)
    assert torch.equal(hard.double(), double(case["hard_mask"]).expand(weight.shape))
    if case["epoch"] is not None:  # epsilon 0.015: 3 steps of 200, an "epoch" of 3 steps
        assert Ramp(0, 200, 3).share(3 * case["epoch"]) * case["target_sparsity"] == pytest.approx(case["r"], abs=1e-12)


def test_must_01_the_gradient_stays_out_of_the_threshold():
    """Peers differentiate through t: their numbers differ at the two weights (groups) beside it, and only there."""
    for case in GOLDEN["cases"]:
        through, ours = double(case["grad_weight_through_t"]), double(case["grad_weight_t_detached"])
        differs = ((through - ours).abs() > 1e-6).reshape(through.shape[0], -1)
        assert int(differs.any(1).sum() if case["structured"] else differs.sum()) == 2


@pytest.mark.parametrize("numel", [2, 3, 10, 1000, 40_001])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 0.999, 1.0])
def test_must_02_counts_and_shape_of_the_mask(numel, sparsity):
    w = torch.randn(numel, dtype=torch.float64, generator=torch.Generator().manual_seed(numel))
    lim = min(max(int((1 - sparsity) * numel) - 1, 0), numel - 2)
    mask, hard = soft_mask(w, sparsity, 1e-3), hard_mask(w, sparsity)
    assert int((mask > 0.5).sum()) == int(hard.sum()) == lim + 1
    assert torch.equal(mask >= 0.5, hard)
    assert (mask.sort().values == mask[w.abs().argsort()]).all()  # monotone in |w|
    assert torch.equal(soft_mask(-w, sparsity, 1e-3), mask)  # and even
    kept, pruned = w[hard].abs().min(), w[~hard].abs().max()
    t = Groups.parse("unstructured").threshold(w, torch.tensor(lim))
    assert t == (kept + pruned) / 2


@pytest.mark.parametrize("tau", [1e-5, 1e-4, 0.3])
def test_must_02_the_mask_is_a_half_at_the_threshold(tau):
    # two entries of each sign at the threshold itself: kept and pruned neighbour are equal to it
    w = torch.tensor([0.9, 0.31, -0.31, 0.1, -0.02])
    assert soft_mask(w, 0.6, tau)[1:3].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("granularity", ["unstructured", "channel", "2:4"])
def test_must_03_gradcheck_with_the_threshold_frozen(granularity):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(6, 8, dtype=torch.float64, generator=g)
    groups, tau = Groups.parse(granularity), 2.0 if granularity == "channel" else 0.3
    index = torch.tensor(last_kept(6 if granularity == "channel" else 48, 0.5))
    t = groups.threshold(w, index)

    class Frozen(Groups):
        def threshold(self, weight, index):
            return t

    frozen = Frozen(groups.unit)
    inputs = (w.requires_grad_(),)
    assert torch.autograd.gradcheck(lambda x: frozen.soft(x, index, tau)[0], inputs)
    assert torch.autograd.gradgradcheck(lambda x: frozen.soft(x, index, tau)[0], inputs)


def test_must_03_a_weight_near_the_threshold_is_pushed_off_it():
    tau, target = 0.05, 2.0
    others = torch.tensor([1.5, -1.2, 0.1, 0.05], dtype=torch.float64)
    w = torch.tensor(0.6, dtype=torch.float64)
    t = w  # of a single weight that stands exactly at it

    def loss(value):
        mask = torch.sigmoid((value**2 - t**2) / tau)
        return 0.5 * (mask * value - target) ** 2

    step = 1e-6
    finite = (loss(w + step) - loss(w - step)) / (2 * step)
    upstream = 0.5 * w - target
    straight_through = upstream * 0.5  # a hard or detached mask lets only m = 1/2 through
    assert float(finite / straight_through) == pytest.approx(float(0.5 + 2 * w**2 / tau / 4) / 0.5, rel=1e-6)
    row = torch.cat([others[:2], w[None], -w[None], others[2:]]).requires_grad_()
    (grad,) = torch.autograd.grad(0.5 * (soft_masked(row, 0.5, tau)[2] - target) ** 2, row)
    assert float(grad[2]) == pytest.approx(float(finite), rel=1e-6)


def test_must_04_regrowth():
    """y = 2 x1 for a hundred steps, then y = 2 x2: the soft mask lets w2 take over, a hard projection cannot."""
    x = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))

    def run(soft: bool) -> torch.Tensor:
        layer = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[0.8, 0.3]]))
        state = PrunedWeight(Groups.parse("unstructured"), 2, sparsity=0.5, temperature=0.5)
        state.set_share(1.0, layer.weight.device)
        handle = reweight(layer, "weight", state.seen) if soft else None
        parameter = layer._parameters["weight"]
        optimizer = torch.optim.SGD([parameter], 0.05)
        for step in range(600):
            y = 2 * x[:, 0 if step < 100 else 1]
            optimizer.zero_grad()
            (layer(x).squeeze(1) - y).square().mean().backward()
            optimizer.step()
            if not soft and step == 50:
                alive = hard_mask(parameter.detach(), 0.5)
            if not soft and step >= 50:
                parameter.data.mul_(alive)
        if handle is not None:
            handle.remove()
            parameter.data.mul_(state.hard(parameter.data))
        return parameter.detach().flatten()

    soft, projected = run(True), run(False)
    assert soft[0] == 0
    assert soft[1] == pytest.approx(2, abs=0.1)
    assert projected[1] == 0


def test_must_05_layer_budgets():
    case = GOLDEN["layer_budgets"]
    magnitudes = [double(w).abs() for w in case["weights"]]
    threshold, shares = layer_sparsities(magnitudes, case["target_sparsity"])
    assert threshold == pytest.approx(case["global_threshold"], abs=1e-6)
    assert shares == pytest.approx(case["layer_sparsity"], abs=1e-6)
    below = sum(int((m < threshold).sum()) for m in magnitudes)
    assert sum(share * m.numel() for share, m in zip(shares, magnitudes)) == pytest.approx(below)
    assert layer_sparsities(magnitudes, 0.0)[1] == [0.0, 0.0, 0.0]


def test_ramp_is_the_papers():
    ramp = Ramp(start=16, stop=83, every=1)  # its epochs: s = 16, epsilon = 1/67
    assert [ramp.share(e) for e in (0, 15, 16, 82, 83, 99)] == [0, 0, pytest.approx(1 / 67), 1, 1, 1]
    assert Ramp(5, 5, 10).share(5) == 1
    with pytest.raises(ConfigurationError, match="stop="):
        Ramp(5, 4, 1)


@pytest.mark.parametrize("granularity", ["unstructured", "channel", "1:4"])
def test_half_types_compute_in_float32_and_other_transforms_differentiate(granularity):
    w = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    mask = soft_mask(w.bfloat16(), 0.75, 1e-2, granularity)
    assert mask.dtype == torch.float32
    assert torch.equal(mask, soft_mask(w.bfloat16().float(), 0.75, 1e-2, granularity))
    assert soft_masked(w.bfloat16(), 0.75, 1e-2, granularity).dtype == torch.bfloat16
    want = torch.autograd.grad(soft_masked(w.requires_grad_(), 0.75, 1e-2, granularity).sum(), w)[0]
    assert torch.allclose(torch.func.grad(lambda v: soft_masked(v, 0.75, 1e-2, granularity).sum())(w.detach()), want)


def test_n_m_keeps_n_of_m_input_weights_and_blends_in():
    for transposed in (False, True):
        w = torch.randn(8, 8, 3, generator=torch.Generator().manual_seed(0))
        groups = Groups.parse("1:4", transposed)
        state = PrunedWeight(groups, w.numel(), sparsity=0.75, temperature=1e-2)
        state.set_share(0.25, w.device)
        rows = state.hard(w).movedim(groups.inputs, -1).reshape(-1, 4)
        assert (rows.sum(1) == 1).all()
        mask = groups.soft(w, state.index, 1e-2)[1]
        assert torch.equal(mask > 0.5, state.hard(w))
        assert torch.allclose(state.seen(w), (1 - 0.25 * (1 - mask)) * w)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda w: soft_mask(w, 0.5, 0.0), "temperature"),
        (lambda w: soft_mask(w, 1.5, 1e-4), "sparsity"),
        (lambda w: soft_mask(w, 0.5, 1e-4, "4x1"), "granularity"),
        (lambda w: hard_mask(w[:1, :1], 0.5), "weight"),
        (lambda w: layer_sparsities([w], 1.0), "sparsity"),
    ],
)
def test_bad_arguments(call, name):
    with pytest.raises(ConfigurationError, match=f"{name}="):
        call(torch.randn(4, 4))

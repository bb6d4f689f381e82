"""elr: identities, closed forms and the official numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from effdl.core.errors import ConfigurationError
from effdl.training.elr import (
    clamped_softmax,
    elr_loss,
    elr_regularizer,
    label_report,
    normalised,
    update_targets,
)
from effdl.training.elr_plus import (
    elr_plus_loss,
    ema_decay,
    mix_pairs,
    mixed_targets,
    mixup_weight,
    sigmoid_rampup,
)
from tests.support import golden

GOLDEN = golden("elr")


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("case", GOLDEN["elr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_must_01_golden_parity_elr(case, dtype):
    targets = torch.zeros(case["num_examples"], case["num_classes"], dtype=dtype)
    for step in case["steps"]:
        logits, index = tensor(step["logits"]).requires_grad_(), torch.tensor(step["index"])
        loss = elr_loss(logits, torch.tensor(step["labels"]), index, targets, case["beta"], case["lam"], case["clamp"])
        loss.backward()
        assert abs(loss.item() - step["loss"]) < 1e-5
        assert (logits.grad - tensor(step["grad_logits"])).abs().max() < 1e-5
        assert (targets[index] - tensor(step["targets_after"])).abs().max() < 1e-5
    assert (targets - tensor(case["final_targets"])).abs().max() < 1e-5


@pytest.mark.parametrize("case", GOLDEN["elr_plus"])
def test_must_02_golden_parity_elr_plus(case):
    targets = torch.zeros(case["num_examples"], case["num_classes"], dtype=torch.float64)
    for step in case["steps"]:
        ramp = sigmoid_rampup(step["global_step"], case["coef_step"])
        assert abs(ramp - step["ramp"]) < 1e-6
        logits, labels = tensor(step["student_logits_on_mixed"]).requires_grad_(), torch.tensor(step["labels"])
        mix = torch.tensor(step["mix_perm"]), step["mix_l"]
        q = mixed_targets(targets, torch.tensor(step["index"]), tensor(step["teacher_logits"]), *mix, beta=case["beta"])
        loss = elr_plus_loss(logits, labels, q, *mix, lam=case["lam"], ramp=ramp)
        loss.backward()
        assert (q - tensor(step["q"])).abs().max() < 1e-5
        assert abs(loss.item() - step["loss"]) < 1e-5
        assert (logits.grad - tensor(step["grad_logits"])).abs().max() < 1e-5
    assert (targets - tensor(case["final_hist"])).abs().max() < 1e-5


def test_must_02_golden_ramp():
    for row in GOLDEN["ramp"]:
        assert abs(sigmoid_rampup(row["step"], row["length"]) - row["value"]) < 1e-6


@pytest.mark.parametrize("a", [0.1, 0.3, 0.5, 0.8, 0.95])
def test_must_03_closed_form_of_two_classes(a):
    logits = tensor([[math.log(a / (1 - a)), 0.0]]).requires_grad_()
    targets = torch.zeros(1, 2, dtype=torch.float64)
    lam = 3.0
    with_regularizer = elr_loss(logits, torch.tensor([0]), torch.tensor([0]), targets, beta=0.0, lam=lam)
    regularizer = with_regularizer - F.cross_entropy(logits, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(regularizer, logits)
    assert (targets - tensor([[a, 1 - a]])).abs().max() < 1e-12
    assert abs(regularizer.item() - lam * math.log(2 * a * (1 - a))) < 1e-12
    assert abs(gradient[0, 0].item() - lam * (1 - 2 * a) / 2) < 1e-12


def test_gradient_of_the_regulariser_is_the_formula_of_lemma_2():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 5, generator=generator, dtype=torch.float64).requires_grad_()
    rows = 0.7 * torch.rand(6, 5, generator=generator, dtype=torch.float64).softmax(dim=1)
    (gradient,) = torch.autograd.grad(elr_regularizer(clamped_softmax(logits), rows), logits)
    p = logits.detach().softmax(dim=1)
    inner = ((rows[:, None, :] - rows[:, :, None]) * p[:, None, :]).sum(dim=2)
    expected = p / (1 - (rows * p).sum(dim=1, keepdim=True)) * inner / len(p)
    assert (gradient - expected).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_must_04_table_rows(dtype):
    beta, visits = 0.7, 7
    p = torch.tensor([[0.2, 0.5, 0.3], [0.9, 0.05, 0.05]], dtype=dtype)
    targets = torch.zeros(5, 3, dtype=dtype)
    for _ in range(visits):
        rows = update_targets(targets, torch.tensor([4, 1]), p, beta)
    assert torch.equal(rows, targets[[4, 1]])
    assert (targets[[4, 1]] - (1 - beta**visits) * p).abs().max() < 1e-6
    assert torch.equal(targets[[0, 2, 3]], torch.zeros(3, 3, dtype=dtype))


def test_an_index_twice_in_a_batch_takes_the_last_prediction():
    index = torch.tensor([2, 0, 2, 1, 2, 0])
    p = torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
    expected = targets.clone()
    for i in range(6):  # every occurrence starts from the row before the batch
        expected[index[i]] = 0.7 * targets[index[i]] + (1 - 0.7) * p[i]
    rows = update_targets(targets, index, p, 0.7)
    assert torch.allclose(targets, expected)
    assert torch.equal(rows, targets[index])


def test_a_saturated_prediction_is_finite_in_every_precision():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for table in (torch.float16, torch.float32):
            logits = torch.tensor([[60.0] + [0.0] * 9], dtype=dtype, requires_grad=True)
            targets = torch.zeros(1, 10, dtype=table)
            for _ in range(60):
                loss = elr_loss(logits, torch.tensor([0]), torch.tensor([0]), targets, beta=0.5)
            loss.backward()
            assert loss.isfinite()
            assert logits.grad.isfinite().all()
            assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_targets_carry_no_gradient_and_predictions_do():
    logits = torch.randn(3, 4, requires_grad=True)
    targets = torch.zeros(3, 4)
    elr_loss(logits, torch.tensor([0, 1, 2]), torch.arange(3), targets).backward()
    assert not targets.requires_grad
    assert logits.grad.abs().sum() > 0


def test_lam_zero_is_cross_entropy_bit_for_bit():
    logits = torch.randn(8, 5, requires_grad=True)
    labels = torch.randint(5, (8,))
    (plain,) = torch.autograd.grad(F.cross_entropy(logits, labels), logits)
    loss = elr_loss(logits, labels, torch.arange(8), torch.zeros(8, 5), lam=0.0)
    (ours,) = torch.autograd.grad(loss, logits)
    assert torch.equal(loss, F.cross_entropy(logits, labels))
    assert torch.equal(ours, plain)


def test_label_report():
    targets = torch.tensor([[0.0, 0.6, 0.2], [0.9, 0.0, 0.0], [0.0, 0.0, 0.0]])
    report = label_report(targets, torch.tensor([2, 0, 1]))
    assert report.target[:2].tolist() == [1, 0]
    assert report.suspect.tolist() == [True, False, False]  # an example never seen is not a suspect
    assert torch.allclose(report.confidence, torch.tensor([0.75, 1.0, 0.0]))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"beta": 1.0}, "beta"),
        ({"beta": -0.1}, "beta"),
        ({"lam": -1.0}, "lam"),
        ({"clamp": 0.0}, "clamp"),
        ({"clamp": 0.5}, "clamp"),
        ({"logits": torch.zeros(2, 1)}, "logits"),
        ({"logits": torch.zeros(2, 3, 4)}, "logits"),
        ({"labels": torch.zeros(3, dtype=torch.long)}, "labels"),
        ({"targets": torch.zeros(4, 5)}, "targets"),
    ],
)
def test_bad_arguments(change, name):
    good = {
        "logits": torch.zeros(2, 3),
        "labels": torch.zeros(2, dtype=torch.long),
        "index": torch.arange(2),
        "targets": torch.zeros(4, 3),
    }
    with pytest.raises(ConfigurationError, match=name):
        elr_loss(**(good | change))


@pytest.mark.parametrize("index", [4, 9, -1])
def test_index_outside_the_table_is_named(index):
    with pytest.raises(IndexError, match=f"index {index} "):
        elr_loss(torch.zeros(1, 3), torch.tensor([0]), torch.tensor([index]), torch.zeros(4, 3))


def test_ema_decay():
    assert ema_decay(0, 0.997, ramp=0) == 0.997
    assert ema_decay(39_999) == 0.997
    assert abs(ema_decay(19_999) - 0.997 * math.exp(-5 / 4)) < 1e-12
    assert [ema_decay(t, 0.9999, ramp=None) for t in (0, 1, 3)] == [0.0, 0.5, 0.75]
    assert ema_decay(10**6, 0.9999, ramp=None) == 0.9999


def test_mixup_weight_is_the_larger_half_of_a_beta():
    generator = np.random.default_rng(0)
    before = torch.get_rng_state()
    for alpha in (0.4, 1.0, 1.5):
        draws = tensor([mixup_weight(alpha, generator) for _ in range(2000)])
        assert draws.min() >= 0.5
        assert draws.max() <= 1
        # E[(l - 1/2)^2] = var Beta(a, a) = 1 / (4 (2 a + 1)); folding l at 1/2 leaves it alone.
        assert abs((draws - 0.5).square().mean() - 1 / (4 * (2 * alpha + 1))) < 0.01
    assert mixup_weight(0.0, generator) == 1.0
    assert torch.equal(torch.get_rng_state(), before)


def test_without_mixing_elr_plus_is_elr_fed_by_a_teacher():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(4, 3, generator=generator), torch.tensor([0, 2, 1, 0])
    permutation = torch.tensor([1, 0, 3, 2])
    a, b = torch.zeros(4, 3), torch.zeros(4, 3)
    q = mixed_targets(a, torch.arange(4), logits, permutation, 1.0, beta=0.7)
    ours = elr_plus_loss(logits, labels, q, permutation, 1.0)
    assert torch.allclose(ours, elr_loss(logits, labels, torch.arange(4), b))
    assert torch.allclose(a, b)


def test_refined_labels():
    logits = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels, permutation = torch.tensor([0, 1]), torch.tensor([1, 0])
    q = torch.tensor([[0.2, 0.6, 0.1], [0.0, 0.0, 0.5]])
    loss = elr_plus_loss(logits, labels, q, permutation, 0.75, lam=0.0, refine_labels=True)
    y = torch.tensor([[0.75 * 0.2, 0.25 * 0.6, 0.0]])
    expected = -(y / y.sum() * logits[:1].log_softmax(dim=1)).sum() / 2  # the second row rules its labels out
    assert torch.allclose(loss, expected)
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_mix_pairs():
    x = torch.arange(6.0).reshape(3, 2)
    permutation = torch.tensor([2, 0, 1])
    assert torch.allclose(mix_pairs(x, permutation, 0.75), 0.75 * x + 0.25 * x[permutation])
    assert torch.equal(mix_pairs(x, permutation, 1.0), x)


def test_normalised_rows_sum_to_one():
    p = normalised(clamped_softmax(torch.tensor([[50.0, 0.0, 0.0]], requires_grad=True)))
    assert not p.requires_grad
    assert torch.allclose(p.sum(dim=1), torch.ones(1))

"""meal-v2: identities, closed forms and the official numbers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from effdl.compression._meal_teachers import Teachers
from effdl.compression.meal_v2 import (
    MEALDiscriminator,
    Renormalize,
    cutmix_images,
    discriminator_loss,
    looks_untrained,
    meal_loss,
    reverse_gradient,
)
from effdl.core.distill import mean_probabilities
from effdl.core.errors import ConfigurationError
from tests.support import golden

GOLDEN = golden("meal-v2")
TOLERANCE = 1e-6


def tensor(name: str) -> torch.Tensor:
    return torch.tensor(GOLDEN[name])


def official() -> tuple[MEALDiscriminator, torch.Tensor, list[torch.Tensor]]:
    """The golden discriminator, student logits that want a gradient, and the teachers' logits."""
    d = MEALDiscriminator(GOLDEN["num_classes"], k=2, last_relu=True)
    with torch.no_grad():
        for i in range(3):
            weight = torch.tensor(GOLDEN["discriminator"][f"conv{i + 1}.weight"])
            d.weights[i].copy_(weight.squeeze(-1).squeeze(-1))
            d.biases[i].copy_(torch.tensor(GOLDEN["discriminator"][f"conv{i + 1}.bias"]))
    return d, tensor("student_logits").requires_grad_(), list(tensor("teacher_logits"))


def error(ours: torch.Tensor, name: str) -> float:
    worst = float((ours.detach() - tensor(name)).abs().max())
    print(f"{name}: {worst:.1e}")
    return worst


def test_must_01_golden_parity():
    d, z, teachers = official()
    terms = meal_loss(z, teachers, d, "cooperative")
    mean = torch.stack(teachers).mean(0)
    assert error(mean_probabilities(teachers), "soft_labels_mean_of_softmax") < TOLERANCE
    assert error(mean, "mean_teacher_logits") < TOLERANCE
    assert error(d(torch.cat([z, mean])), "discriminator_logits_on_concat") < TOLERANCE
    for ours, name in zip(
        (terms.similarity, terms.kl, terms.discriminator, terms.total),
        ("soft_ce_loss", "kl_loss", "d_loss", "total_loss"),
    ):
        assert error(ours, name) < TOLERANCE


def test_must_01_golden_gradients_and_their_reversal():
    d, z, teachers = official()
    (similarity,) = torch.autograd.grad(meal_loss(z, teachers).total, z)
    assert error(similarity, "grad_student_soft_ce") < TOLERANCE
    mean = torch.stack(teachers).mean(0)
    own = list(d.parameters())  # three weights, then three biases
    want = [torch.tensor(GOLDEN["grad_discriminator"][f"conv{i}.{k}"]) for k in ("weight", "bias") for i in (1, 2, 3)]
    for adversarial, sign in (("cooperative", 1), ("reversal", -1)):
        student, *ours = torch.autograd.grad(discriminator_loss(d, z, mean, adversarial), [z, *own])
        assert error(sign * student, "grad_student_d_loss_cooperative") < TOLERANCE
        for a, b in zip(ours, want):
            assert (a - b.reshape(a.shape)).abs().max() < TOLERANCE
    assert tensor("grad_student_d_loss_cooperative").abs().max() > 1e-4  # it is a gradient that could be wrong


def test_must_02_the_gradient_is_softmax_minus_q():
    g = torch.Generator().manual_seed(0)
    z = (2 * torch.randn(5, 7, generator=g, dtype=torch.float64)).requires_grad_()
    teachers = [3 * torch.randn(5, 7, generator=g, dtype=torch.float64) for _ in range(3)]
    q = mean_probabilities(teachers)
    (gradient,) = torch.autograd.grad(meal_loss(z, teachers).total, z)
    assert (gradient - (z.softmax(1) - q) / 5).abs().max() < 1e-15
    perfect = q.log().requires_grad_()
    terms = meal_loss(perfect, teachers)
    (gradient,) = torch.autograd.grad(terms.total, perfect)
    assert abs(float(terms.kl)) < 1e-15
    assert gradient.abs().max() < 1e-16
    assert abs(float(meal_loss(teachers[0].clone(), teachers[:1]).kl)) < 1e-15


def test_must_03_probabilities_are_averaged_not_logits():
    q = mean_probabilities(list(tensor("teacher_logits")))
    assert (q.sum(1) - 1).abs().max() < 1e-6
    assert (q - tensor("teacher_logits").mean(0).softmax(1)).abs().max() > 1e-2


def test_weights_of_the_teachers():
    d, z, teachers = official()
    first = meal_loss(z, teachers, d, "cooperative", teacher_weights=[1.0, 0.0])
    alone = meal_loss(z, teachers[:1], d, "cooperative")
    assert torch.allclose(torch.stack([*first[:4], first[4]]), torch.stack([*alone[:4], alone[4]]))
    half = meal_loss(z, teachers, d, "cooperative", d_weight=0.5)
    assert torch.allclose(half.total, half.similarity + 0.5 * half.discriminator)
    none = meal_loss(z, teachers, d, None)
    assert none.discriminator is None
    assert torch.equal(none.total, none.similarity)


def test_reversed_gradient_is_exact():
    x = torch.randn(9, requires_grad=True)
    y = reverse_gradient(x)
    assert torch.equal(y, x)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], -torch.ones(9))


def test_reversal_learns_to_tell_apart_while_the_student_hides():
    """D falls, and moving the student along its own gradient makes D's loss rise."""
    torch.manual_seed(0)
    d, z, m = MEALDiscriminator(6, k=1), torch.randn(64, 6), torch.randn(64, 6) + 1.0
    optimizer = torch.optim.Adam(d.parameters(), 0.01)
    before = float(discriminator_loss(d, z, m).detach())
    for _ in range(50):
        optimizer.zero_grad()
        discriminator_loss(d, z, m).backward()
        optimizer.step()
    z.requires_grad_()
    loss = discriminator_loss(d, z, m)
    loss.backward()
    assert loss < before
    with torch.no_grad():
        assert discriminator_loss(d, z - 5.0 * z.grad, m) > loss


@pytest.mark.parametrize(("classes", "k", "widths"), [(1000, 8, [1000, 125, 15, 2]), (16, 2, [16, 8, 4, 2])])
def test_widths(classes, k, widths):
    d = MEALDiscriminator(classes, k)
    assert [w.shape[1] for w in d.weights] + [2] == widths
    assert not any(isinstance(m, (nn.Linear, nn.ReLU)) for m in d.modules())
    assert (d(torch.randn(64, classes)) < 0).any()
    assert (MEALDiscriminator(classes, k, last_relu=True)(torch.randn(64, classes)) >= 0).all()


def test_few_classes_are_clamped_with_a_warning():
    with pytest.warns(UserWarning, match="hidden widths below 2.*discriminator_k=2 avoids it"):
        d = MEALDiscriminator(10, 8)
    assert [w.shape[0] for w in d.weights] == [2, 2, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_loss_is_float32_also_under_autocast(dtype):
    z = torch.tensor([[60.0, 0, 0, -60]] * 2, dtype=dtype, requires_grad=True)
    d = MEALDiscriminator(4, 1).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        terms = meal_loss(z, [z.detach().flip(1), z.detach()], d)
    terms.total.backward()
    assert {t.dtype for t in terms} == {torch.float32}
    assert z.grad.isfinite().all()
    assert d.weights[0].grad.dtype == dtype


def test_shapes_are_checked():
    with pytest.raises(ConfigurationError, match=r"teacher.*\(2, 5\).*\(2, 4\)"):
        meal_loss(torch.zeros(2, 4), [torch.zeros(2, 5)])
    with pytest.raises(ConfigurationError, match="made for 5 classes.*have 4"):
        meal_loss(torch.zeros(2, 4), [torch.zeros(2, 4)], MEALDiscriminator(5, 1))


def test_must_09_cutmix_moves_boxes():
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 2, 16, 16)
    areas = []
    for seed in range(400):
        mixed = cutmix_images(images, 1.0, np.random.default_rng(seed))
        changed = (mixed != images)[:, 0]
        box = changed.any(0)  # where some image came from another: a rectangle
        rows, columns = box.any(1), box.any(0)
        assert torch.equal(box, rows[:, None] & columns[None])
        for i in range(4):
            assert mixed[i].unique().numel() <= 2
        areas.append(float(box.float().mean()))
    assert torch.equal(images, torch.arange(4.0).view(4, 1, 1, 1).expand(4, 2, 16, 16))
    # E(area) = 1/2 for Beta(1, 1) before boxes are cut at the border (and some permutations move nothing)
    assert 0.2 < np.mean(areas) < 0.5
    same = [cutmix_images(images, 1.0, np.random.default_rng(3)) for _ in range(2)]
    assert torch.equal(*same)


def test_renormalise():
    pixels = torch.rand(2, 3, 8, 8)
    column = lambda v: torch.tensor(v).view(-1, 1, 1)  # noqa: E731
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    want = (pixels - column(mean)) / column(std)
    assert torch.allclose(Renormalize(0.5, 0.25, mean, std)((pixels - 0.5) / 0.25), want, atol=1e-5)
    assert torch.allclose(Renormalize(0.5, 0.5, 0.5, 0.5)(pixels), pixels)
    assert Renormalize(0.5, 0.5, 0.5, 0.5, size=12)(pixels.bfloat16()).shape == (2, 3, 12, 12)
    for bad in ({"std": 0.0}, {"to_std": -1.0}, {"size": 0}):
        with pytest.raises(ConfigurationError, match="std|size"):
            Renormalize(**({"mean": 0.5, "std": 0.5, "to_mean": 0.5, "to_std": 0.5} | bad))


def test_teachers_refuse_the_student_and_stay_one_when_copied():
    student = nn.Linear(3, 2)
    with pytest.raises(ConfigurationError, match=r"teachers\[1\].*shares no parameter"):
        Teachers([nn.Linear(3, 2), student], student)
    teachers = Teachers([nn.Linear(3, 2), nn.Linear(3, 2)], student)
    assert copy.deepcopy(teachers) is teachers


def test_untrained_students_are_told_from_trained_ones():
    def network():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    fresh, zeros, trained = network(), network(), network()
    nn.init.zeros_(zeros[4].weight)  # as residual networks begin
    optimizer = torch.optim.SGD(trained.parameters(), 0.1)
    trained(torch.randn(2, 3, 5, 5)).square().mean().backward()
    optimizer.step()
    assert [looks_untrained(n) for n in (fresh, zeros, trained)] == [True, True, False]
    assert not looks_untrained(nn.Linear(2, 2))

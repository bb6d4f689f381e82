"""meal-v2: what the teachers see, what is refused, what is reported."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
from torch import nn

from effdl import ImageClassifier, MEALV2ImageClassifier, MEALV2Mixin
from effdl.compression.meal_v2 import Renormalize
from effdl.core.errors import ConfigurationError
from effdl.core.export import save_timm
from tests.compression.meal_v2_parts import CLASSES, Foreign, Mine, N, fit, loader, network, sgd, stock, teachers

pytestmark = pytest.mark.filterwarnings("ignore:.*untrained", "ignore:.*hidden widths below 2")


# ---- the teachers' view ---------------------------------------------------------------------------------------------


def test_a_named_teacher_sees_images_normalised_as_it_was_trained(tmp_path):
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=CLASSES)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    save_timm(net, tmp_path, {"mean": mean, "std": std})
    net.eval()
    x = torch.rand(4, 3, 32, 32)
    batch = ((x - 0.5) / 0.5, torch.arange(4))
    theirs = (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)

    class Data:
        mean, std = 0.5, [0.5, 0.5, 0.5]

    view = Renormalize(0.5, 0.5, mean, std)
    cases = [
        (str(tmp_path), None, Data(), theirs),
        (str(tmp_path), None, None, batch[0]),  # nobody says what the images are
        (net, None, Data(), batch[0]),  # a network that is handed over may have been trained on anything
        (net, view, None, theirs),
        (net, [view], Data(), theirs),
        (str(tmp_path), [None], Data(), batch[0]),
    ]
    for teacher, transform, data, want in cases:
        module = stock(teachers=teacher, teacher_transform=transform)
        module.meal_teachers.prepare(torch.device("cpu"), data)
        (logits,) = module.meal_teachers.logits(batch[0])
        assert torch.allclose(logits, net(want), atol=1e-4), (teacher, transform)
    save_timm(net, tmp_path / "other", {"mean": 0.5, "std": 0.5})
    two = stock(teachers=[str(tmp_path), str(tmp_path / "other")]).meal_teachers
    with pytest.warns(UserWarning, match="different normalisations"):
        two.prepare(torch.device("cpu"), None)


# ---- what cannot work -----------------------------------------------------------------------------------------------


class Broken(nn.Module):
    """A teacher whose answers are NaN from some batch on."""

    def __init__(self, after):
        super().__init__()
        self.net, self.left = network(11), after

    def forward(self, x):
        self.left -= 1
        return self.net(x) * (float("nan") if self.left < 0 else 1.0)


def test_what_cannot_work_is_refused():
    with pytest.raises(ConfigurationError, match=r"teachers\[1\]: NaN"):
        fit(stock(teachers=[network(), Broken(0)]), max_steps=1)
    with pytest.raises(ConfigurationError, match=r"teachers\[0\]: NaN"):  # found after the epoch: no wait in a step
        fit(stock(teachers=Broken(2)), epochs=1)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(192, 7))
    with pytest.raises(ConfigurationError, match=r"teacher.*\(6, 7\).*\(6, 4\)"):
        fit(stock(teachers=wide))
    module = stock()
    module.meal_teachers.networks[1][5].train()
    with pytest.raises(ConfigurationError, match=r"teachers\[1\] is in training mode"):
        fit(module)
    module = stock()
    module.meal_teachers.networks[0].requires_grad_(True)
    with pytest.raises(ConfigurationError, match=r"teachers\[0\].*requires_grad"):
        fit(module)
    many = torch.ones(N, CLASSES)
    with pytest.raises(ConfigurationError, match="multi-label"):
        fit(Mine(teachers=teachers()), loader(many))
    manual = stock()
    manual.automatic_optimization = False
    with pytest.raises(ConfigurationError, match="automatic"):
        fit(manual)
    with pytest.raises(ConfigurationError, match="must come first"):
        type("Wrong", (Foreign, MEALV2Mixin), {})
    headless = nn.Sequential(nn.Conv2d(3, CLASSES, 8), nn.Flatten())
    with pytest.raises(ConfigurationError, match="num_classes"):
        stock(teachers=headless, model=copy.deepcopy(headless))

    class Deaf(ImageClassifier):
        def training_step(self, batch, batch_idx):
            return self(batch[0]).sum()

    with pytest.raises(ConfigurationError, match="does not ask compute_loss"):
        fit(type("Both", (MEALV2Mixin, Deaf), {})(teachers=teachers(), model=network(), num_classes=CLASSES))


def test_a_teacher_switched_on_in_mid_run_is_noticed():
    class Meddler(MEALV2ImageClassifier):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.meal_teachers.networks[0].train()

    with pytest.raises(ConfigurationError, match=r"teachers\[0\] is in training mode"):
        fit(Meddler(teachers=teachers(), model=network(), num_classes=CLASSES))


@pytest.mark.filterwarnings("default:.*untrained")
def test_an_untrained_student_warns_and_a_trained_one_does_not():
    with pytest.warns(UserWarning, match="student looks untrained"):
        fit(stock(), epochs=1)
    plain = ImageClassifier(network(), CLASSES, optimizer=sgd)
    fit(plain, epochs=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*untrained")
        fit(stock(model=plain.model), epochs=1)


def test_a_student_that_outruns_its_discriminator_is_told():
    with pytest.warns(UserWarning, match="outrun the discriminator"):
        fit(stock(d_weight=100.0, d_lr=1e-6), epochs=6)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*outrun")
        fit(stock(), epochs=1)
        fit(stock(adversarial=None), epochs=1)


def test_report_compares_before_and_after():
    module = stock()
    trainer = fit(module, val=loader(), num_sanity_val_steps=-1)
    told = module.report()
    assert told["teachers"] == 2
    assert told["teacher_parameters"] == sum(p.numel() for t in module.meal_teachers.networks for p in t.parameters())
    before, after = told["before"], told["after"]
    assert before["parameters"] == sum(p.numel() for p in module.model.parameters())
    assert {"val/accuracy", "val/loss"} <= set(before["metrics"])
    assert before["metrics"]["val/loss"] != float(trainer.callback_metrics["val/loss"])
    assert before["latency_ms"] == after["latency_ms"] > 0
    assert {"meal-v2/kl", "meal-v2/agreement", "meal-v2/discriminator"} <= set(trainer.callback_metrics)
    assert "before" not in stock().report()

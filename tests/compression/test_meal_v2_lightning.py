"""meal-v2 on a Trainer: the stock classifier, a foreign module, checkpoints, precision."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from effdl import ImageClassifier, MEALV2ImageClassifier, MEALV2Mixin
from effdl.core.distill import mean_probabilities
from effdl.core.errors import ConfigurationError
from effdl.core.export import plain_state, save_safetensors
from tests.compression.meal_v2_parts import CLASSES, Foreign, Mine, N, fit, loader, network, same, sgd, stock, teachers

pytestmark = pytest.mark.filterwarnings("ignore:.*untrained", "ignore:.*hidden widths below 2")


# ---- what is trained ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [stock, lambda **kw: Mine(teachers=teachers(), discriminator_k=1, **kw)])
def test_must_04_labels_are_not_used(make):
    modules = []
    for labels in (None, torch.zeros(N, dtype=torch.long), torch.arange(N) % CLASSES):
        modules.append(make())
        fit(modules[-1], loader(labels))
    same(modules[0], modules[1])
    same(modules[0], modules[2])
    other = make()
    other.meal_teachers.holders.reverse()  # the order of two teachers does not count, another teacher does
    other.meal_teachers.holders[0] = other.meal_teachers.holders[1]
    fit(other)
    assert not torch.equal(next(other.parameters()), next(modules[0].parameters()))


def test_must_05_teachers_stay_as_they_are_and_out_of_everything(tmp_path):
    given = teachers()
    before = [copy.deepcopy(t.state_dict()) for t in given]
    module = stock(teachers=given)
    seen = []
    for teacher in given:
        teacher.register_forward_hook(lambda m, x, y: seen.append(m.training or torch.is_grad_enabled()))
    trainer = fit(module, callbacks=[ModelCheckpoint(tmp_path, save_last=True)], val=loader())
    assert len(seen) == 2 * 2 * 4  # once per teacher and training batch, never in validation
    assert not any(seen)
    for teacher, state in zip(given, before):
        for name, value in teacher.state_dict().items():
            assert torch.equal(value, state[name]), name
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in module.parameters()}
    assert not trained & {id(p) for t in given for p in t.parameters()}
    own = set(ImageClassifier(network(), CLASSES).state_dict())
    assert set(module.state_dict()) - own == {f"meal_discriminator.{k}" for k in module.meal_discriminator.state_dict()}
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == own
    assert set(saved["effdl"]["meal-v2"]["state_dict"]) == set(module.state_dict()) - own


def test_must_05_the_file_opens_in_timm_and_is_no_larger_for_its_teachers(tmp_path):
    torch.manual_seed(0)
    big = timm.create_model("test_resnet", num_classes=3)
    student = timm.create_model("test_vit", num_classes=3, img_size=32)
    data = DataLoader(TensorDataset(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])), batch_size=4)
    module = MEALV2ImageClassifier(teachers=[big], model=student, num_classes=3, optimizer=sgd)
    fit(module, data, epochs=1, callbacks=[ModelCheckpoint(tmp_path, save_last=True, save_weights_only=True)])
    fresh = timm.create_model("test_vit", num_classes=3, img_size=32)
    fresh.load_state_dict(load_file(save_safetensors(module.model, tmp_path / "student.safetensors")), strict=True)
    assert not any("meal" in key for key in plain_state(module.model))
    extra = sum(p.numel() for p in module.meal_discriminator.parameters())
    want = 4 * (sum(p.numel() for p in student.parameters()) + extra)
    assert want < (tmp_path / "last.ckpt").stat().st_size < want + 60_000 < want + 4 * 372_979


def test_must_06_the_discriminators_rate_keeps_its_ratio_and_nothing_decays():
    rates = []

    class Watch(MEALV2ImageClassifier):
        def on_train_epoch_start(self):
            rates.append([group["lr"] for group in self.optimizers().param_groups])

    module = Watch(
        teachers=teachers(), model=network(), num_classes=CLASSES, d_lr=1e-4, optimizer=sgd,
        scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.1),
    )  # fmt: skip
    trainer = fit(module, epochs=3)
    assert torch.allclose(torch.tensor(rates), torch.tensor([[0.05, 1e-4], [5e-3, 1e-5], [5e-4, 1e-6]]))
    assert [group["weight_decay"] for group in trainer.optimizers[0].param_groups] == [0, 0]
    groups = module.meal_param_groups(0.3)
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.3, 0.0), (1e-4, 0.0)]
    assert [g["lr"] for g in stock().meal_param_groups(0.3)] == [0.3, 0.3]
    assert [g["lr"] for g in sgd(stock().meal_param_groups()).param_groups] == [0.05, 0.05]
    none = stock(adversarial=None)
    assert none.meal_discriminator is None
    assert len(none.meal_param_groups()) == 1
    assert not any("meal" in key for key in none.state_dict())


@pytest.mark.parametrize(
    ("optimizer", "scheduler", "message"),
    [
        (lambda p: torch.optim.SGD(p, 0.1, weight_decay=1e-4), None, "weight_decay > 5e-5"),
        (sgd, lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 99), "scheduler sets the discriminator's"),
    ],
)
def test_must_06_what_breaks_it_warns(optimizer, scheduler, message):
    with pytest.warns(UserWarning, match=message):
        fit(stock(d_lr=1e-4, optimizer=optimizer, scheduler=scheduler), max_steps=1)


def test_must_06_a_foreign_optimizer_warns():
    class Own(MEALV2Mixin, Foreign):
        pass

    class Without(MEALV2Mixin, Foreign):
        def configure_optimizers(self):
            return torch.optim.SGD(self.net.parameters(), 0.1)

    for cls, message in ((Own, "student's learning rate instead of d_lr"), (Without, "in no optimizer")):
        with pytest.warns(UserWarning, match=message):
            fit(cls(teachers=teachers(), discriminator_k=1, d_lr=1e-4), max_steps=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*discriminator.*")
        fit(stock(), max_steps=1)
        fit(Mine(teachers=teachers(), discriminator_k=1), max_steps=1)
        fit(Own(teachers=teachers(), discriminator_k=1), max_steps=1)  # the student's rate is the default


@pytest.mark.parametrize("as_dict", [False, True])
def test_must_09_targets_are_the_teachers_answers_to_the_mixed_batch(as_dict):
    seen = []

    class Watch(MEALV2ImageClassifier):
        def meal_loss(self, outputs, batch):
            x, y = (batch["image"], batch["label"]) if as_dict else batch
            q = mean_probabilities(self.meal_teachers.logits(x))
            z = outputs.detach()
            loss = super().meal_loss(outputs, batch)
            assert torch.allclose(loss.detach(), -(q * z.log_softmax(1)).sum(1).mean(), atol=1e-6)
            seen.append((x, y))
            return loss

        def validation_step(self, batch, batch_idx):
            assert torch.equal(batch["image"] if as_dict else batch[0], x)  # only training images are mixed

    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 3, 8, 8, generator=g), torch.arange(8) % CLASSES
    data = DataLoader([{"image": x, "label": y} if as_dict else (x, y)] * 3, batch_size=None)
    module = Watch(teachers=teachers(), model=network(), num_classes=CLASSES, adversarial=None, cutmix=1.0)
    fit(module, data, epochs=1, val=data)
    mixed = [xs for xs, _ in seen]
    assert len(mixed) == 3
    assert all(torch.equal(ys, y) for _, ys in seen)
    assert not any(torch.equal(a, x) for a in mixed)
    assert not torch.equal(mixed[0], mixed[1])
    for pixel in mixed[0].permute(0, 2, 3, 1).reshape(-1, 3)[::7]:  # every pixel is one of the batch's
        assert (x.permute(0, 2, 3, 1).reshape(-1, 3) == pixel).all(1).any()


def test_a_second_pass_over_a_batch_sees_the_same_mix():
    from effdl.callbacks import SAMCallback

    seen = []

    class Watch(MEALV2ImageClassifier):
        def meal_loss(self, outputs, batch):
            seen.append(batch[0])
            return super().meal_loss(outputs, batch)

    module = Watch(teachers=teachers(), model=network(), num_classes=CLASSES, cutmix=1.0, optimizer=sgd)
    fit(module, epochs=2, callbacks=[SAMCallback(rho=0.05)])
    assert len(seen) == 16
    assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2]))
    assert len({float(x.sum()) for x in seen}) == 8


def test_cutmix_needs_images():
    with pytest.raises(ConfigurationError, match="cutmix=1.0"):
        fit(Mine(teachers=teachers(), cutmix=1.0), DataLoader([(torch.zeros(2, 5), torch.zeros(2))], batch_size=None))


# ---- resume, precision, text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [stock, lambda **kw: Mine(teachers=teachers(), **kw)])
def test_resume_is_exact_with_both_groups_and_cutmix(make, tmp_path):
    def quiet():
        module = make(cutmix=1.0)
        [m.eval() or setattr(m, "p", 0.0) for m in module.modules() if isinstance(m, nn.Dropout)]
        return module

    whole, first, second = quiet(), quiet(), quiet()
    want = fit(whole, epochs=2)
    fit(first, epochs=1, callbacks=[ModelCheckpoint(tmp_path, save_last=True)])
    got = fit(second, epochs=2, ckpt_path=tmp_path / "last.ckpt")
    same(whole, second)
    for a, b in zip(want.optimizers[0].param_groups, got.optimizers[0].param_groups, strict=True):
        for p, q in zip(a["params"], b["params"], strict=True):
            assert torch.equal(
                want.optimizers[0].state[p]["momentum_buffer"], got.optimizers[0].state[q]["momentum_buffer"]
            )
    assert not torch.equal(next(first.parameters()), next(second.parameters()))


def test_an_ordinary_checkpoint_is_a_start(tmp_path):
    plain = ImageClassifier(network(3), CLASSES, optimizer=sgd)
    fit(plain, epochs=1, callbacks=[ModelCheckpoint(tmp_path, save_last=True, save_weights_only=True)])
    module = MEALV2ImageClassifier.load_from_checkpoint(
        tmp_path / "last.ckpt", weights_only=True, teachers=teachers(), model=network(), num_classes=CLASSES
    )
    assert torch.equal(module.model[0].weight, plain.model[0].weight)
    trainer = fit(module, epochs=1, callbacks=[ModelCheckpoint(tmp_path, filename="meal", save_weights_only=True)])
    again = MEALV2ImageClassifier.load_from_checkpoint(
        tmp_path / "meal.ckpt", weights_only=True, teachers=teachers(), model=network(), num_classes=CLASSES
    )
    same(again.cpu(), module)
    trainer.test(module, loader(), ckpt_path=str(tmp_path / "meal.ckpt"), weights_only=True, verbose=False)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision(precision):
    module = stock()
    trainer = fit(module, precision=precision)
    assert all(p.isfinite().all() for p in module.parameters())
    assert trainer.callback_metrics["meal-v2/kl"].dtype == torch.float32
    assert trainer.callback_metrics["meal-v2/kl"] > 0


def test_text_classifiers_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=3
    )
    sharp = copy.deepcopy(config)
    sharp.initializer_range = 1.0

    class Text(LightningModule):
        def __init__(self):
            super().__init__()
            self.model = transformers.BertForSequenceClassification(config)

        def forward(self, **batch):
            return self.model(**batch)

        def training_step(self, batch, batch_idx):
            return self(**batch).loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.meal_param_groups(0.1))

    torch.manual_seed(0)
    batch = {"input_ids": torch.randint(0, 20, (4, 5)), "attention_mask": torch.ones(4, 5).long()}
    data = DataLoader([{**batch, "labels": torch.tensor([0, 1, 2, 0])}] * 8, batch_size=None)
    module = type("Mine", (MEALV2Mixin, Text), {})(teachers=[transformers.BertForSequenceClassification(sharp)])
    assert module.meal_discriminator.num_classes == 3
    trainer = fit(module, data, epochs=1)
    first = float(trainer.callback_metrics["meal-v2/kl"])
    assert float(fit(module, data, epochs=4).callback_metrics["meal-v2/kl"]) < first

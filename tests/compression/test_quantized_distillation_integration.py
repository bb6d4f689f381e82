"""quantized-distillation inside other people's runs: resume, other layers, other callbacks, what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from effdl.callbacks import DifferentiableQuantizationCallback, PruningCallback, QuantizedDistillationCallback
from effdl.core.errors import ConfigurationError
from effdl.core.export import save_model
from effdl.core.quantized import load_quantized, quantized_weights
from tests.compression.test_quantized_distillation_callbacks import (
    CALLBACKS,
    Losses,
    Net,
    data,
    fit,
    rows,
    teacher,
    trained,
)
from tests.compression.tied_sequence import Sequence
from tests.support import QUIET


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_checkpoint_is_plain_resumes_and_tests_as_its_artifact(name, tmp_path):
    save = lambda: ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)  # noqa: E731
    whole, half = Net(), Net()
    fit(whole, [CALLBACKS[name]()], epochs=3)
    fit(half, [CALLBACKS[name](), save()], epochs=2)
    resumed = Net()
    trainer = fit(resumed, [CALLBACKS[name](), save()], epochs=3, ckpt_path=tmp_path / "last.ckpt")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    Net().load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"], strict=True)
    # the same Trainer on the quantised module, and another one on a fresh module
    again = trainer.test(resumed, data(2), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True, verbose=False)
    fresh = Net()
    other = Trainer(callbacks=[CALLBACKS[name]()], **QUIET)
    assert again == other.test(fresh, data(2), ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[key]), key
    fit(fresh, [CALLBACKS[name]()], epochs=1)  # codes train again from what they decode to
    with pytest.raises(ConfigurationError, match="other arguments"):
        fit(Net(), [QuantizedDistillationCallback(5, teacher())], epochs=3, ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize("kind", ["masters", "points"])
def test_recurrent_attention_and_tied_weights(kind, tmp_path):
    module = Net(Sequence(bias=False))
    arguments = {"bits": 4, "bucket_size": 64}
    if kind == "masters":
        callback = QuantizedDistillationCallback(**arguments, teacher=Sequence(bias=False), quantize_bias=True)
    else:
        callback = DifferentiableQuantizationCallback(**arguments)
    fit(module, [callback, ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)], epochs=1)
    names = list(quantized_weights(module.model))
    assert len([n for n in names if "bias" not in n]) == 7  # tied weight once; in_proj, out_proj; four recurrent ones
    assert len(names) == (13 if kind == "masters" else 7)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(state["model.head.weight"], state["model.embedding.weight"])
    reopened = Sequence(bias=False)
    reopened.load_state_dict({k.removeprefix("model."): v for k, v in state.items()})
    x = rows(1)[0][0]
    assert torch.allclose(reopened.eval()(x), module.model.eval()(x), atol=1e-6)
    save_model(module, tmp_path / "artifact")
    assert torch.equal(load_quantized(Sequence(bias=False), tmp_path / "artifact").eval()(x), module.model(x))


def test_truncated_masters_stay_inside_and_still_move():
    module = Net(optimizer=lambda p: torch.optim.SGD(p, 5.0))
    look = Losses()
    fit(module, [QuantizedDistillationCallback(4, teacher(), gradient="truncated"), look], epochs=1)
    weights = look.weights[-1]["model.3.weight"]
    assert float(weights.abs().max()) <= 1
    assert float((weights.abs() == 1).float().mean()) < 1


def test_symmetric_levels_hold_masked_weights_at_zero():
    pruning = PruningCallback(0.6, start=0, stop=8, every=2)
    quantise = QuantizedDistillationCallback(8, teacher(), bucket_size="row", symmetric=True)
    module = Net()
    fit(module, [pruning, quantise])
    assert pruning.report()["sparsity"] == pytest.approx(0.6, abs=0.02)
    assert float((module.model[0].weight == 0).float().mean()) >= 0.58
    with pytest.raises(ConfigurationError, match="PruningCallback holds weights at zero.*symmetric=True"):
        fit(Net(), [PruningCallback(0.6), QuantizedDistillationCallback(4, teacher())])


def test_points_by_gradient_first_and_last_and_the_report():
    module = Net(trained(), lambda p: torch.optim.Adam(p, 1e-3))
    callback = DifferentiableQuantizationCallback(3, assign="gradient", calibration_batches=2)
    fit(module, [callback], epochs=1)
    layers = callback.report()["layers"]
    shares = callback._shares
    assert sum(shares.values()) == 3 * 8
    assert min(shares.values()) >= 4
    assert {n: row["bits"] for n, row in layers.items()} == {
        n.removeprefix("model."): (s - 1).bit_length() for n, s in shares.items()
    }
    assert callback.report()["before"]["name"] == "full precision"
    assert callback.report()["before"]["metrics"]["val/accuracy"] > 0.5
    inner = QuantizedDistillationCallback(teacher=teacher(), quantize_first_last=False)
    fit(Net(), [inner], epochs=1)
    assert inner.matched(None) == ["model.3.weight"]


def test_points_that_jump_are_warned_of():
    module = Net(trained(), lambda p: torch.optim.Adam(p, 0.5))
    with pytest.warns(UserWarning, match="passed a neighbour.*lower the learning rate"):
        fit(module, [DifferentiableQuantizationCallback(2, None)], epochs=1)


def test_points_without_a_weight_are_warned_of():
    with pytest.warns(UserWarning, match="no weight at them"):
        fit(Net(trained()), [DifferentiableQuantizationCallback(8, None, init="uniform", targets="model.5")], epochs=1)


class Reader(LightningModule):
    """A language model: logits (B, T, V)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Embedding(7, 16), nn.Linear(16, 7))

    def training_step(self, batch, batch_idx):
        return {"loss": F.cross_entropy(self.model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_language_models_name_the_network_of_their_logits():
    tokens = torch.arange(24).view(4, 6) % 7
    loader = DataLoader([{"input_ids": tokens, "labels": tokens}] * 4, batch_size=None)

    class Teacher(nn.Module):
        def forward(self, input_ids):
            return F.one_hot(input_ids, 7).float()

    options = {"max_epochs": 1, "enable_checkpointing": False, **QUIET}
    callback = QuantizedDistillationCallback(4, Teacher(), network="model")
    Trainer(callbacks=[callback], **options).fit(module := Reader(), loader)
    assert sorted(quantized_weights(module.model)) == ["0.weight", "1.weight"]
    assert callback.report()["after"]["metrics"] == {}
    with pytest.raises(ConfigurationError, match="network="):
        Trainer(callbacks=[QuantizedDistillationCallback(4, Teacher())], **options).fit(Reader(), loader)


def test_averaged_weights_are_quantised_too(tmp_path):
    for kind in ("distilled", "points"):
        module, save = Net(), ModelCheckpoint(tmp_path / kind, save_last=True, save_on_train_epoch_end=True)
        fit(module, [CALLBACKS[kind](), EMAWeightAveraging(decay=0.9), save])
        checkpoint = torch.load(tmp_path / kind / "last.ckpt", weights_only=True)
        for name, record in quantized_weights(module).items():
            assert torch.equal(checkpoint["state_dict"][name], record.dequantize())
            assert not torch.equal(checkpoint["current_model_state"][name], record.dequantize())
    with pytest.raises(ConfigurationError, match="listed after"):
        fit(Net(), [EMAWeightAveraging(decay=0.9), CALLBACKS["points"]()])


def test_two_callbacks_on_one_weight_and_other_misfits_are_refused():
    plain = {"teacher_weight": 0.0}
    cases = {
        "another callback quantises": [
            QuantizedDistillationCallback(4, **plain),
            QuantizedDistillationCallback(2, **plain),
        ],
        "teacher: its logits": [QuantizedDistillationCallback(4, nn.Sequential(nn.Linear(12, 5)))],
        "shares no parameter": None,
    }
    for message, callbacks in cases.items():
        module = Net()
        callbacks = callbacks or [QuantizedDistillationCallback(4, module.model)]
        with pytest.raises(ConfigurationError, match=message):
            fit(module, callbacks, epochs=1)
        assert not any(hasattr(type(m), "_effdl_swapped") for m in module.modules())
    broken = Net()
    broken.model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(ConfigurationError, match=r"model\.0\.weight has NaN"):
        fit(broken, [QuantizedDistillationCallback(4, **plain)], epochs=1)
    with pytest.raises(ConfigurationError, match="float32"):
        fit(Net().to(torch.bfloat16), [QuantizedDistillationCallback(4, **plain)], epochs=1, precision="bf16-true")
    mixed = [QuantizedDistillationCallback(b, **plain, targets=t) for b, t in ((2, "model.0"), (8, "model.3"))]
    module = Net()
    fit(module, mixed, epochs=1)
    assert {n: r.bits for n, r in quantized_weights(module).items()} == {"model.0.weight": 2, "model.3.weight": 8}


def test_a_compiled_network_trains_through_its_quantised_weights():
    module = Net()
    module.model = torch.compile(module.model, backend="eager")
    fit(module, [QuantizedDistillationCallback(4, teacher())], epochs=1)
    plain = Net()
    fit(plain, [QuantizedDistillationCallback(4, teacher())], epochs=1)
    for name, record in quantized_weights(plain.model).items():
        assert torch.allclose(
            quantized_weights(module.model._orig_mod)[name].dequantize(), record.dequantize(), atol=1e-5
        )
    x = rows(1)[0][0]
    assert torch.allclose(module.model.eval()(x), plain.model.eval()(x), atol=1e-4)

"""nupes: checks 8 and 9 on a Trainer, learning in every kind of layer, and what users of the callback rely on."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from effdl.callbacks import NUPESCallback, PruningCallback
from effdl.compression._nupes_learning import Learning, learn_layer
from effdl.compression._nupes_network import learn_network
from effdl.compression.nupes import (
    largest,
    power_codes,
    power_quantize,
    power_records,
)
from effdl.core.errors import ConfigurationError
from effdl.core.quantized import quantized_weights
from effdl.core.select import select_weights
from tests.compression import nupes_ranks
from tests.compression.small_network import Net, data, gaussian, trainer
from tests.support import check_quantized_artifact


def test_must_08_and_09_learned_artifact(tmp_path):
    callback, module = (
        NUPESCallback(2, granularity="tensor", learn_codes=True, learn_exponent=True, iterations=60),
        Net(),
    )
    floats = {}

    class Keep(PruningCallback):  # sees the weights before they become codes
        def on_train_end(self, trainer, pl_module):
            super().on_train_end(trainer, pl_module)
            floats.update({n: p.detach().clone() for n, p in pl_module.model.named_parameters() if p.dim() > 1})

    trainer(callback, Keep(0.3, start=0, stop=2, every=1)).fit(module, data(), data(2))
    records = quantized_weights(module.model)
    assert set(records) == set(floats)
    check_quantized_artifact(module.model, lambda: Net().model, (next(iter(data()))[0],), tmp_path)
    moved = {}
    for name, record in records.items():
        w, a = floats[name], float(record.exponent) if record.exponent is not None else 1.0
        ratio = w.abs() / largest(w, "tensor")
        moved[name] = float(((record.codes - w.sign() * ratio**a).abs() > 1).float().mean())
        assert (record.codes[w == 0] == 0).all()  # what was pruned stays zero
        assert record.codes.unique().numel() <= 3
    assert max(moved.values()) > 0.005  # further than any rounding up or down
    told = callback.report()
    assert told["quantised_bytes"] <= (2 / 32 + 0.03) * told["full_precision_bytes"]
    assert told["before"]["metrics"]["val/accuracy"] - 0.2 <= told["after"]["metrics"]["val/accuracy"]
    assert told["layers"]["0.weight"].keys() >= {"exponent", "error", "uniform_error", "moved", "bits_per_weight"}


def test_two_of_them_under_validate_alone_and_again_without_effect():
    callback, module = NUPESCallback(4, first_last_bits=8, exclude="3"), Net()
    run = trainer(callback, NUPESCallback(3, targets="3"))
    run.validate(module, data(2), verbose=False)
    records = quantized_weights(module.model)
    assert {n: r.bits for n, r in records.items()} == {"0.weight": 8, "3.weight": 3, "6.weight": 4, "8.weight": 8}
    run.validate(module, data(2), verbose=False)
    assert quantized_weights(module.model).keys() == records.keys()
    assert callback.report()["layers"]["6.weight"]["error"] <= callback.report()["layers"]["6.weight"]["uniform_error"]


def test_a_checkpoint_is_of_the_float_network_and_gives_the_same_codes_again(tmp_path):
    save = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    module = Net()
    trainer(NUPESCallback(3), save, enable_checkpointing=True).fit(module, data())
    codes = {name: record.codes for name, record in quantized_weights(module.model).items()}
    again = NUPESCallback(3)
    trainer(again).validate(module, data(1), ckpt_path=tmp_path / "last.ckpt", weights_only=True, verbose=False)
    assert all(torch.equal(record.codes, codes[n]) for n, record in quantized_weights(module.model).items())
    assert again.report()["artifact_bytes"] > 0
    trainer(NUPESCallback(3)).fit(module, data())  # goes on from what the codes decode to
    assert quantized_weights(module.model).keys() == codes.keys()


def test_learned_exponent_alone_is_no_worse_on_the_layer():
    x, w = gaussian(300, 20), gaussian(8, 20, seed=3)
    run = nn.functional.linear
    record = power_quantize(w, 3, 1.2)
    error = lambda r: float((run(x, r.dequantize()) - run(x, w)).square().mean())  # noqa: E731
    learned = learn_layer(
        w, record, lambda w, x: run(x, w), x, run(x, w), Learning(codes=False, exponent=True, iterations=300)
    )
    assert error(learned) < error(record)
    assert torch.equal(learned.codes, power_codes(w, 3, float(learned.exponent)))


def test_half_precision_rows_of_zeros_and_tied_weights():
    weight = gaussian(4, 9).bfloat16()
    weight[2] = 0
    record = power_quantize(weight, 3, 0.6)
    assert record.scale[2] == 1
    assert not record.codes[2].any()
    model = nn.ModuleDict({"embed": nn.Embedding(12, 8), "head": nn.Linear(8, 12, bias=False)}).bfloat16()
    model.head.weight = model.embed.weight

    class Tied(Net):
        def validation_step(self, batch, batch_idx):
            hidden = self.model.embed(batch[1])
            assert self.model.head(hidden).dtype == torch.bfloat16

    module = Tied(model)
    trainer(NUPESCallback(4), precision="bf16-true").validate(module, data(1), verbose=False)
    assert set(quantized_weights(model)) == {"embed.weight"}
    assert torch.equal(model.head.weight, model.embed.weight)


def test_processes_take_what_the_first_one_learned_and_pool_their_inputs(tmp_path):
    torch.multiprocessing.spawn(nupes_ranks.run, (str(tmp_path),), nprocs=2)
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    first, second = (each["learned"] for each in saved)
    alone, other = nupes_ranks.learned(0), nupes_ranks.learned(1)
    same = lambda a, b: all(torch.equal(x, y) for name in a for x, y in zip(a[name], b[name]))  # noqa: E731
    assert same(first, second)
    assert same(first, alone)
    assert not same(alone, other)
    pooled = nupes_ranks.ranges([0, 1])
    assert all(same(each["ranges"], pooled) for each in saved)
    assert not same(nupes_ranks.ranges([0]), pooled)


@pytest.mark.parametrize("kind", ["conv1d of transformers", "transposed", "shared layer", "tokens"])
def test_layers_of_every_kind_are_learned(kind):
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    make = {
        "conv1d of transformers": (lambda: Conv1D(6, 12), gaussian(64, 12)),
        "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), gaussian(16, 4, 5, 5)),
        "shared layer": (lambda: nn.Linear(12, 12), gaussian(64, 12)),
        "tokens": (lambda: nn.Linear(12, 6), gaussian(16, 7, 12)),
    }
    layer, x = make[kind][0](), make[kind][1] + 2  # correlated: else rounding to nearest is hard to beat
    model = nn.Sequential(layer, nn.ReLU(), layer) if kind == "shared layer" else nn.Sequential(layer)
    nn.init.normal_(layer.weight)
    before = layer.weight.detach().clone()
    records = power_records({"0.weight": before}, 2)
    learned = learn_network(model, records, [x, x + 0.1], Learning(iterations=50))
    assert torch.equal(layer.weight, before)

    @torch.no_grad()
    def error(found):
        quantised = torch.func.functional_call(layer, {"weight": found["0.weight"].dequantize()}, (x,))
        return float((quantised - layer(x)).square().mean())

    assert error(learned) < 0.8 * error(records)


def test_nan_weights_are_named_and_nothing_has_changed():
    module = Net()
    module.model[6].weight.data[0, 0] = float("inf")
    before = {name: p.clone() for name, p in module.named_parameters()}
    with pytest.raises(ConfigurationError, match=r"6\.weight"):
        trainer(NUPESCallback(4)).validate(module, data(1), verbose=False)
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert len(select_weights(module)) == 4

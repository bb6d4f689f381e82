"""dsnot on a Trainer: check 10, when it acts, what it reports, and what padding and failures do."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch.utils.data import DataLoader

from effdl.callbacks import DSnoTCallback
from effdl.compression.dsnot import Settings, sparsify
from effdl.core.export import product
from effdl.core.masks import unpack
from effdl.tasks.language import LanguageModel
from effdl.tasks.tiny import tiny_gpt2, tiny_llama
from tests.support import quiet_trainer


def loader(count=6):
    g = torch.Generator().manual_seed(0)
    blocks = [torch.randint(0, 32, (4, 16), generator=g) for _ in range(count)]
    return DataLoader([{"input_ids": b, "labels": b} for b in blocks], batch_size=None)


def module(network=tiny_llama):
    optimizer = lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1)  # noqa: E731
    return LanguageModel(network(32, 16), optimizer=optimizer)


def trainer(callbacks, epochs=2, **kwargs):
    return quiet_trainer(*callbacks, max_epochs=epochs, num_sanity_val_steps=0, **kwargs)


def zeros(lm, callback):
    return {n: (lm.get_parameter(n) == 0).float().mean().item() for n in callback.store.weights}


@pytest.mark.parametrize("init", ["wanda", "sparsegpt"])
def test_must_10_fine_tuning_keeps_the_zeros(init, tmp_path):
    dsnot = DSnoTCallback(0.5, init=init, when="start", calibration_batches=2)
    lm, save = module(), ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    trainer([dsnot, save]).fit(lm, loader())
    assert len(dsnot.result.masks) == 14
    for name, keep in dsnot.result.masks.items():
        weight, start = lm.get_parameter(name), module().get_parameter(name)
        assert torch.equal(weight == 0, ~keep), name
        assert not torch.equal(weight, start * keep)  # it did train
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    stored = checkpoint["callbacks"][dsnot.state_key]["masks"]
    assert all(torch.equal(unpack(stored[n]), keep) for n, keep in dsnot.result.masks.items())
    again, resumed = DSnoTCallback(0.5, init=init, when="start", calibration_batches=2), module()
    trainer([again], epochs=3).fit(resumed, loader(), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert all(torch.equal(resumed.get_parameter(n) == 0, ~keep) for n, keep in dsnot.result.masks.items())
    assert again.report()["layers"].keys() == dsnot.report()["layers"].keys()


@pytest.mark.parametrize("average", [None, "before", "after"])
def test_at_the_end_the_network_that_is_left_is_sparse_and_scored(average, tmp_path):
    dsnot, lm = DSnoTCallback(nm=(2, 4), calibration_batches=2), module(tiny_gpt2)
    own = {"before": [EMAWeightAveraging(decay=0.5), dsnot], "after": [dsnot, EMAWeightAveraging(decay=0.5)]}
    save = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    run = trainer([*own.get(average, [dsnot]), save], epochs=1)
    run.fit(lm, loader(), loader(2))
    assert set(zeros(lm, dsnot).values()) == {0.5}
    weight = lm.model.transformer.h[0].mlp.c_fc.weight  # (in, out)
    assert weight.eq(0).view(16, 4, -1).sum(1).eq(2).all()
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]  # written before: dense
    assert not any((state[n] == 0).any() for n in dsnot.store.weights)
    assert type(product(lm)).__name__ == "GPT2LMHeadModel"
    report = dsnot.report()
    dense = report["before"]["metrics"]["val/loss"]
    final = float(run.callback_metrics["val/loss"])
    trainer([], epochs=1).validate(lm, loader(2), verbose=False)
    assert final == (pytest.approx(float(lm.trainer.callback_metrics["val/loss"])) if average is None else dense)
    assert (final == dense) == (average is not None)
    assert report["sparsity"] == pytest.approx(0.5)
    assert report["before"]["nonzero"] > report["before"]["parameters"] * 0.9
    row = report["layers"]["model.transformer.h.1.mlp.c_proj.weight"]
    assert {"eps_before", "eps_after", "mse_before", "mse_after", "swaps", "seconds"} <= row.keys()
    assert report["seconds_per_million"] > 0


def test_alone_under_validate_and_once():
    dsnot, lm = DSnoTCallback(0.6, calibration_batches=2), module()
    run = trainer([dsnot])
    run.validate(lm, loader(2), verbose=False)
    scored = float(run.callback_metrics["val/loss"])
    masks = dict(dsnot.result.masks)
    # floor(0.6 C_in) of every row
    assert all(value == pytest.approx(0.6, abs=1 / 64) for value in zeros(lm, dsnot).values())
    run.validate(lm, loader(2), verbose=False)
    assert float(run.callback_metrics["val/loss"]) == scored
    assert all(torch.equal(dsnot.result.masks[n], mask) for n, mask in masks.items())
    rows = dsnot.report()["layers"].values()
    assert all(row["eps_after"] <= row["eps_before"] for row in rows)
    assert sum(row["swaps"] for row in rows) > 0
    lm.zero_grad()
    product(lm)(torch.zeros(1, 4, dtype=torch.long)).logits.sum().backward()  # no inference tensors left


def test_a_failure_puts_the_dense_weights_back():
    lm = module()
    lm.model.model.layers[1].post_attention_layernorm.weight.data[3] = torch.nan
    before = {k: v.clone() for k, v in lm.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"model.layers.1.mlp.gate_proj .* sequence 0"):
        trainer([DSnoTCallback(0.5)]).validate(lm, loader(2), verbose=False)
    assert all(torch.equal(v.nan_to_num(), before[k].nan_to_num()) for k, v in lm.state_dict().items())
    assert not any(m._forward_pre_hooks for m in lm.modules())


def test_padding_changes_nothing():
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 32, (1, n), generator=g) for n in (9, 12, 5, 12)]
    wide = torch.cat([torch.nn.functional.pad(row, (0, 12 - row.shape[1])) for row in ids])
    mask = torch.tensor([[1] * row.shape[1] + [0] * (12 - row.shape[1]) for row in ids])
    plain = sparsify(tiny_llama(32, 16), [{"input_ids": row} for row in ids], Settings(0.5, init="sparsegpt"))
    padded = sparsify(
        tiny_llama(32, 16), [{"input_ids": wide, "attention_mask": mask}], Settings(0.5, init="sparsegpt")
    )
    for name, keep in plain.masks.items():
        assert (keep != padded.masks[name]).float().mean() < 0.002, name  # rounding may swap two near ones


def test_bfloat16_weights_and_one_block_at_a_time():
    plain = sparsify(tiny_llama(32, 16), list(loader(2)), Settings(0.5))
    moved = sparsify(tiny_llama(32, 16), list(loader(2)), Settings(0.5), device="cpu", store="cpu")
    assert all(torch.equal(moved.masks[n], keep) for n, keep in plain.masks.items())
    lm = module().to(torch.bfloat16)
    dsnot = DSnoTCallback(0.5, calibration_batches=2)
    trainer([dsnot], precision="bf16-true").validate(lm, loader(2), verbose=False)
    assert set(zeros(lm, dsnot).values()) == {0.5}
    assert next(lm.parameters()).dtype == torch.bfloat16

"""pdp: the callback in a run: masks, resuming, averages, accumulation."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn

from effdl.callbacks import PDPCallback
from effdl.compression.pdp import hard_mask, last_kept, soft_masked
from effdl.core.errors import ConfigurationError
from tests.compression.pdp_parts import GRANULARITIES, SIZES, Net, data, fit, pdp, zeros


@pytest.mark.parametrize("freeze", [None, 18])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_must_07_the_finished_weights_are_the_last_hard_ones(granularity, freeze):
    module, callback = Net(), pdp(granularity=granularity, scope="local", freeze=freeze)
    keys = list(module.state_dict())
    fit(module, callback, val=data(1))
    assert list(module.state_dict()) == keys
    assert type(module.model[0]) is nn.Linear
    with torch.no_grad():
        assert torch.equal(module.eval().model(next(iter(data(1)))[0]), module.outputs[-1])
    sparsity = 0.5 if granularity == "2:4" else 0.8
    for name, count in zeros(module).items():
        rows = module.get_parameter(name).shape[0] if granularity == "channel" else SIZES[name]
        kept = SIZES[name] // 2 if granularity == "2:4" else last_kept(rows, sparsity) + 1
        assert count == SIZES[name] - kept * SIZES[name] // (SIZES[name] if granularity == "2:4" else rows)
        assert abs(count / SIZES[name] - sparsity) <= 1 / rows
    assert callback.report()["layers"]["model.0.weight"]["sparsity"] == zeros(module)["model.0.weight"] / 384


def test_must_08_two_of_four_are_zero_in_every_group():
    fit(module := Net(), pdp(granularity="2:4"))
    for layer in (module.model[0], module.model[2]):
        assert (layer.weight.view(-1, 4) == 0).sum(1).eq(2).all()


def test_must_09_no_parameter_is_added():
    plain, module = Net(), Net(look=lambda self: [(n, p.shape, id(p)) for n, p in self.named_parameters()])
    fit(module, callback := pdp())
    want = [(n, p.shape, id(p)) for n, p in module.named_parameters()]
    assert all(seen == want for seen in module.seen)
    assert [w[:2] for w in want] == [(n, p.shape) for n, p in plain.named_parameters()]
    (group,) = callback_optimizer(module).param_groups
    assert len(group["params"]) == len(list(plain.parameters()))
    assert callback.matched(module) == list(SIZES)


def callback_optimizer(module):
    return module.trainer.optimizers[0]


def test_the_threshold_follows_the_weights_at_every_forward():
    def look(self):
        raw = {name: dict(self.named_parameters())[name].detach().clone() for name in SIZES}
        return {name: (raw[name], self.get_submodule(name[:-7]).weight.detach().clone()) for name in SIZES}

    fit(module := Net(look=look), callback := pdp(), max_epochs=3)
    shares = [0.0] * 4 + [1 / 3] * 4 + [2 / 3] * 4 + [1.0] * 12
    for share, seen in zip(shares, module.seen, strict=True):
        for name, (raw, weight) in seen.items():
            layer = callback.layers[name]
            want = soft_masked(raw, share * layer.sparsity, layer.temperature) if share else raw
            assert torch.equal(weight, want)
    # the global budget was fixed once, from the weights at the start
    at_start = torch.cat([module.seen[4][name][0].abs().flatten() for name in SIZES])
    threshold = at_start.sort(descending=True).values[int(0.2 * at_start.numel())]
    for name, (raw, _) in module.seen[4].items():
        assert callback.layers[name].sparsity == float((raw.abs() < threshold).sum()) / raw.numel()
    assert sum(zeros(module).values()) == pytest.approx(0.8 * at_start.numel(), abs=2)


def test_validation_sees_hard_masks_unless_told_otherwise():
    def look(self):
        return float((self.model[0].weight == 0).float().mean())

    class Watch(Net):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.shares = [*getattr(self, "shares", []), look(self)]

    for eval_hard in (True, False):
        fit(module := Watch(look=look), pdp(eval_hard=eval_hard, scope="local"), val=data(1))
        assert max(module.seen) == 0
        assert module.shares == (pytest.approx([0.8 / 3, 0.8, 0.8], abs=0.01) if eval_hard else [0, 0, 0])


def test_frozen_masks_stay_and_pruned_weights_get_no_gradient():
    def look(self):
        return self.model[0].weight.detach().clone()

    fit(module := Net(look=look, optimizer=lambda p: torch.optim.AdamW(p, 0.02)), pdp(freeze=17))
    patterns = [weight == 0 for weight in module.seen]
    assert not any(p.any() for p in patterns[:17])
    assert all(torch.equal(p, patterns[17]) for p in patterns[17:])
    assert torch.equal(module.model[0].weight == 0, patterns[17])
    assert not torch.equal(module.seen[17], module.seen[-1])


@pytest.mark.parametrize("freeze", [None, 8])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_resume_is_bit_identical(tmp_path, granularity, freeze):
    make = lambda: pdp(granularity=granularity, freeze=freeze)  # noqa: E731
    fit(whole := Net(), make())
    save = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    fit(first := Net(), make(), save, max_epochs=1)
    fit(resumed := Net(), make(), ckpt_path=tmp_path / "last.ckpt")
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters()):
        assert torch.equal(a, b), name
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {name: int((state[name] == 0).sum()) for name in SIZES} == zeros(first)
    with pytest.raises(ConfigurationError, match="other arguments of PDPCallback"):
        fit(Net(), pdp(sparsity=None if ":" in granularity else 0.5, scope="local", granularity=granularity),
            ckpt_path=tmp_path / "last.ckpt")  # fmt: skip


@pytest.mark.parametrize("order", [0, 1])
def test_weight_averaging_ends_and_is_saved_sparse(tmp_path, order):
    save = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    callbacks = [pdp(scope="local"), EMAWeightAveraging(decay=0.9)]
    fit(module := Net(), *(callbacks if order else callbacks[::-1]), save, val=data(1))
    want = {name: count - last_kept(count, 0.8) - 1 for name, count in SIZES.items()}
    assert zeros(module) == want
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for key in ("state_dict", "current_model_state"):
        assert {name: int((checkpoint[key][name] == 0).sum()) for name in SIZES} == want
    # each state is binarised by its own threshold
    kept = next(value for key, value in checkpoint["effdl"].items() if key.startswith("pdp-"))
    for key, raw in kept.items():
        for name in SIZES:
            assert torch.equal(checkpoint[key][name], raw[name] * hard_mask(raw[name], 0.8))


def test_accumulation_counts_optimizer_steps():
    for accumulate, epochs in ((1, 3), (4, 12)):
        shares = []

        class Watch(PDPCallback):
            def _rise(self, share, shares=shares):
                shares.append((self.step, share))
                super()._rise(share)

        fit(Net(), Watch(0.8, "auto", 4, 16, 4, targets="*"), max_epochs=epochs, accumulate_grad_batches=accumulate)
        assert shares == [(4, 1 / 3), (8, 2 / 3), (12, 1.0), (16, 1.0), (20, 1.0)]


def test_validating_and_saving_leave_no_trace_in_training(tmp_path):
    fit(plain := Net(), pdp())
    save = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    fit(watched := Net(), pdp(), save, val=data(1), val_check_interval=2)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters()))

"""hessian-mixed-precision: checks 5, 8 and 9 on a Trainer."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from effdl.callbacks import MixedPrecisionPTQCallback, NUPESCallback
from effdl.compression.hessian_mixed_precision import apply_bit_map
from effdl.core.errors import ConfigurationError
from effdl.core.export import save_model
from effdl.core.quantized import load_quantized, payload, quantized_weights
from tests.compression import small_network
from tests.support import check_quantized_artifact


def Net():
    return small_network.Net(extra=[nn.Dropout(0.2)])


def data(batches=6, seed=1):
    return small_network.data(batches, seed=seed, distance=0.4)


def trainer(*callbacks, **kwargs):
    return small_network.trainer(*callbacks, **{"max_epochs": 3, **kwargs})


@torch.no_grad()
def accuracy(network, loader):
    network.eval()
    hits = [(network(x).argmax(-1) == y).float().mean() for x, y in loader]
    return float(torch.stack(hits).mean())


def agreement(network, batches):
    """A metric that every change of the weights lowers: one minus the distance from the float outputs."""
    outputs = torch.cat([network(x) for x, _ in batches])
    if not hasattr(agreement, "float"):
        agreement.float = outputs.clone()
    return max(0.0, 1 - float((outputs - agreement.float).abs().max()))


def test_must_05_and_09_the_artifact_reaches_the_target_and_is_as_small_as_told(tmp_path):
    mixed, module, val = MixedPrecisionPTQCallback((8, 4, 2), 0.97, probes=4, loss="kl"), Net(), data(4, seed=2)
    trainer(mixed).fit(module, data(), val)
    told = mixed.report()
    records = quantized_weights(module.model)
    assert {f"model.{name}": record.bits for name, record in records.items()} == mixed.bit_map
    assert len(set(mixed.bit_map.values())) > 1, mixed.bit_map  # truly mixed
    save_model(module, tmp_path / "saved")
    reopened = load_quantized(Net().model, tmp_path / "saved")
    assert accuracy(reopened, val) >= told["search"]["target"] == pytest.approx(0.97 * told["search"]["baseline"])
    assert told["after"]["metrics"]["val/accuracy"] == pytest.approx(accuracy(reopened, val))
    weights = {"0.weight": 54, "3.weight": 162, "6.weight": 2304, "9.weight": 72}
    tables = sum(4 * record.scale.numel() for record in records.values())
    packed = sum(-(-n * records[name].bits // 8) for name, n in weights.items())
    rest = sum(t.nbytes for name, t in Net().model.state_dict().items() if name not in weights)
    assert told["quantised_bytes"] == packed + tables == payload(module.model)["bytes"]
    header = 8 + int.from_bytes((tmp_path / "saved" / "model.safetensors").read_bytes()[:8], "little")
    assert told["artifact_bytes"] == header + packed + tables + rest
    macs = {"0.weight": 36 * 54, "3.weight": 16 * 162, "6.weight": 2304, "9.weight": 72}
    assert told["bit_operations"] == sum(16 * macs[name] * record.bits for name, record in records.items())
    assert told["layers"]["0.weight"].keys() >= {"bits", "mean_trace", "trace_error", "bits_per_weight"}
    check_quantized_artifact(module.model, lambda: Net().model, (next(iter(data()))[0],), tmp_path)
    again = apply_bit_map(Net(), mixed.bit_map)
    assert {name: r.bits for name, r in quantized_weights(again).items()} == mixed.bit_map
    trainer(mixed).fit(module, data(), val)  # goes on from what the codes decode to
    assert mixed.bit_map.keys() == {f"model.{name}" for name in weights}


@pytest.mark.parametrize(("ratio", "mostly"), [(1.0, 16), (0.5, 4)])
def test_must_05_a_fragile_network_keeps_16_bits_and_a_low_target_gives_4(ratio, mostly):
    module = Net()
    for parameter in module.parameters():
        parameter.data = parameter.data.half().float()  # so that 16 bits lose nothing
    agreement.__dict__.clear()
    mixed = MixedPrecisionPTQCallback(target_ratio=ratio, metric=agreement, probes=4)
    trainer(mixed).validate(module, data(3), verbose=False)
    assert sum(bits == mostly for bits in mixed.bit_map.values()) >= 3, mixed.bit_map


OPTIONS = {
    "measured": {"diagonal": "measured", "pairs": "neighbours"},
    "hvp": {"pairs": "hvp", "diagonal": "measured", "loss": "kl"},
    "row sum": {"order": "row_sum"},
    "hessian": {"order": "hessian", "validation_batches": 1},
    "qe, greedy": {"order": "qe", "method": "greedy"},
    "random": {"order": "random", "granularity": "group:8", "verify": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_must_08_nothing_has_changed_after_a_search(options, monkeypatch):
    module, seen = Net(), {}
    module.model[0].weight.requires_grad_(False)
    module.model[6].weight.grad = torch.ones_like(module.model[6].weight)
    records = MixedPrecisionPTQCallback._records

    def state():
        tensors = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        flags = [p.requires_grad for p in module.parameters()], [m.training for m in module.modules()]
        grads = [None if p.grad is None else p.grad.sum().item() for p in module.parameters()]
        streams = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
        return tensors, (flags, grads, streams, torch.is_grad_enabled(), torch.is_inference_mode_enabled())

    def watched(self, *args):
        before = state()
        found = records(self, *args)
        after = state()
        assert all(torch.equal(before[0][name], tensor) for name, tensor in after[0].items())
        assert before[1] == after[1]
        seen["searched"] = True
        return found

    monkeypatch.setattr(MixedPrecisionPTQCallback, "_records", watched)
    mixed = MixedPrecisionPTQCallback(target_ratio=0.9, probes=3, calibration_batches=3, **options)
    trainer(mixed).validate(module, data(3), verbose=False)
    assert seen
    told = mixed.report()["search"]
    assert [entry["bits"] for entry in told["evaluations"]][0] == 16
    assert all(len(order) <= 4 for order in told["orders"].values())


def test_must_08_an_error_leaves_the_network_as_it_was():
    module, broken = Net(), MixedPrecisionPTQCallback(metric=lambda network, batches: float("nan"), probes=1)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ConfigurationError, match="metric=nan"):
        trainer(broken).validate(module, data(2), verbose=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert not quantized_weights(module)
    with pytest.raises(ConfigurationError, match="two layers"):
        trainer(MixedPrecisionPTQCallback(targets="model.0")).validate(module, data(2), verbose=False)
    with pytest.raises(ConfigurationError, match="mode='min'"):
        MixedPrecisionPTQCallback(mode="min")
    trainer(NUPESCallback(4)).validate(module, data(2), verbose=False)
    with pytest.raises(ConfigurationError, match="another callback"):
        trainer(NUPESCallback(4), MixedPrecisionPTQCallback()).validate(Net(), data(2), verbose=False)


class Absolute(torch.autograd.Function):
    """Its gradient is computed outside torch: there is no second one."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.abs()

    @staticmethod
    def backward(ctx, grad):
        return torch.from_numpy(grad.numpy() * ctx.saved_tensors[0].sign().detach().numpy())


class Custom(nn.Module):
    def forward(self, x):
        return Absolute.apply(x)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_other_precisions_and_networks_without_second_derivatives(precision):
    module = Net()
    module.model[2] = Custom()
    with pytest.raises(ConfigurationError, match="diagonal='measured'"):
        trainer(MixedPrecisionPTQCallback(probes=1)).validate(module, data(2), verbose=False)
    mixed = MixedPrecisionPTQCallback(target_ratio=0.8, diagonal="measured")
    run = trainer(mixed, precision=precision)
    run.validate(module, data(2), verbose=False)
    assert float(run.callback_metrics["val/accuracy"]) >= 0.8 * mixed.found.baseline - 0.05
    dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert module.model[6].weight.dtype == dtype

"""hessian-mixed-precision with activations: units of a weight and what enters its layer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effdl.callbacks import MixedPrecisionPTQCallback
from effdl.callbacks._precision_inputs import UnitInputs
from effdl.compression._precision_cost import bit_operations
from effdl.compression._precision_inputs import InputHessian, UnitLayer
from effdl.compression.hessian_mixed_precision import apply_bit_map, quantise
from effdl.core.deploy import UnsupportedBackendError, deploy
from effdl.core.errors import ConfigurationError
from effdl.core.input_quantizers import QuantizedInput
from effdl.core.quantized import load_quantized, quantized_inputs, quantized_weights
from effdl.core.random import generator
from effdl.core.static_int8 import StaticInt8Layer
from tests.compression.small_network import Net, data, gaussian, trainer
from tests.products import operands
from tests.support import check_quantized_artifact


def callback(*args, **kwargs):
    return MixedPrecisionPTQCallback(*args, **{"activations": True, "probes": 3, "loss": "kl", **kwargs})


@torch.no_grad()
def accuracy(network, loader):
    network.eval()
    return float(torch.stack([(network(x).argmax(-1) == y).float().mean() for x, y in loader]).mean())


@pytest.mark.parametrize("options", [{}, {"pairs": "hvp", "activation_range": "max"}], ids=["all pairs", "hvp"])
def test_the_artifact_computes_with_its_inputs_and_reaches_the_target(tmp_path, options):
    mixed, module, val = callback((8, 4, 2), 0.97, **options), Net(), data(4, seed=2, distance=0.4)
    trainer(mixed, max_epochs=3).fit(module, data(distance=0.4), val)
    told, images = mixed.report(), next(iter(val))[0]
    inputs = quantized_inputs(module.model)
    assert {f"model.{name}.weight": r.bits for name, r in inputs.items()} == {
        name: bits for name, bits in mixed.bit_map.items() if bits != 16
    }
    assert len(set(mixed.bit_map.values())) > 1, mixed.bit_map  # truly mixed
    entering = dict(zip(["0", "3", "6", "8"], operands(module.model, images), strict=True))
    for name, record in inputs.items():
        assert entering[name].unique().numel() <= 2**record.bits, name
    check_quantized_artifact(module.model, lambda: Net().model, (images,), tmp_path)
    reopened = load_quantized(Net().model, tmp_path / "artifact")
    assert accuracy(reopened, val) >= told["search"]["target"] == pytest.approx(0.97 * told["search"]["baseline"])
    assert told["after"]["metrics"]["val/accuracy"] == pytest.approx(accuracy(reopened, val))
    assert told["inputs"].keys() == {f"model.{name}" for name in inputs}
    assert told["inputs"]["model.6"]["low"] == 0 < told["inputs"]["model.6"]["high"]
    macs = {"model.0.weight": 36 * 54, "model.3.weight": 16 * 162, "model.6.weight": 2304, "model.8.weight": 72}
    assert told["bit_operations"] == sum(macs[name] * bits**2 for name, bits in mixed.bit_map.items())
    assert len(told["search"]["input_traces"]) == 4
    again = apply_bit_map(Net(), mixed.bit_map, inputs=mixed.inputs)
    assert {n: r.bits for n, r in quantized_inputs(again.model).items()} == {n: r.bits for n, r in inputs.items()}


def test_8_and_4_bit_units_run_on_integer_kernels():
    mixed, module = callback((8, 4), 0.5), Net()
    trainer(mixed).validate(module, data(3), verbose=False)
    assert set(mixed.bit_map.values()) <= {8, 4}
    x = next(iter(data(1, 40, seed=7)))[0]
    fast = deploy(module.model, "torch-int8")
    assert sum(isinstance(layer, StaticInt8Layer) for layer in fast.modules()) == 4
    module.model.eval()
    with torch.no_grad():
        assert (fast(x) - module.model(x)).norm() < 0.02 * module.model(x).norm()  # ties fall to either side
    with pytest.raises(UnsupportedBackendError, match="fixed input range"):
        deploy(module.model, "torchao", exclude=["0", "3"])


def agreement(float_outputs):
    return lambda network, batches: max(
        0.0, 1 - float((torch.cat([network(x) for x, _ in batches]) - float_outputs).norm() / float_outputs.norm())
    )


def test_the_search_finds_fewer_low_bits_than_with_weights_alone():
    module, val = Net(), data(3)
    with torch.no_grad():
        outputs = torch.cat([module.model.eval()(x) for x, _ in val])
    found = {}
    for activations in (False, True):
        mixed = callback((8, 4), 0.85, metric=agreement(outputs), activations=activations)
        trainer(mixed).validate(copy.deepcopy(module), val, verbose=False)
        found[activations] = mixed
        assert mixed.found.log[-1]["metric"] >= mixed.found.target or mixed.found.bits.count(4) == 0
    assert sum(found[True].bit_map.values()) > sum(found[False].bit_map.values())
    orders = [found[activations].report()["search"]["interactions"]["8"]["values"] for activations in (False, True)]
    assert orders[0] != orders[1]  # activations take part in what is measured


def linear_case():
    """Two linear layers in float64 and a smooth loss: shifts of inputs can be written down."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = gaussian(5, 4).double()
    return network, x, lambda _batch: network(x).square().sum(-1).mean()


def test_traces_of_inputs_are_those_of_the_full_hessian():
    network, x, loss = linear_case()
    layers = [UnitLayer(0, network[0]), UnitLayer(1, network[2])]
    estimates = InputHessian(loss, [network[0].weight, network[2].weight], layers, [None]).traces(2000, generator(0))
    of_first = lambda e: network(x + e).square().sum(-1).mean()  # noqa: E731
    hidden = network[:2](x).detach()
    of_second = lambda e: network[2](hidden + e).square().sum(-1).mean()  # noqa: E731
    for k, (function, like) in enumerate([(of_first, x), (of_second, hidden)]):
        full = torch.autograd.functional.hessian(function, torch.zeros_like(like))
        trace = float(full.reshape(like.numel(), like.numel()).trace())
        spread = float(estimates[:, k].std() / 2000**0.5)
        assert abs(float(estimates[:, k].mean()) - trace) <= 3 * spread + 1e-9
        assert trace > 0


def test_interactions_with_inputs_are_the_quadratic_form_of_both():
    network, x, loss = linear_case()
    weights = [network[0].weight, network[2].weight]
    deltas = [quantise(w.detach(), 3).dequantize().double() - w.detach() for w in weights]
    records = [QuantizedInput.of_range(-3, 3, 4), QuantizedInput.of_range(-1, 1, 3)]
    places = [UnitLayer(0, network[0]), UnitLayer(1, network[2])]
    diagonal, omega = InputHessian(loss, weights, places, [None]).interactions(deltas, records, [0, 1])
    hidden = network[:2](x).detach()
    moves = [(deltas[0], records[0].apply(x, -1) - x), (deltas[1], records[1].apply(hidden, -1) - hidden)]

    def at(scales):
        """The loss along both units' directions."""
        (dw0, dx0), (dw1, dx1) = moves
        w0, w1 = weights[0].detach() + scales[0] * dw0, weights[1].detach() + scales[1] * dw1
        inner = F.linear(x + scales[0] * dx0, w0, network[0].bias).tanh()
        return F.linear(inner + scales[1] * dx1, w1, network[2].bias).square().sum(-1).mean()

    full = torch.autograd.functional.hessian(at, torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(2 * diagonal, full.diagonal(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(omega[0, 1], full[0, 1], rtol=1e-8, atol=1e-10)


def test_ranges_are_fixed_and_those_of_least_error_are_no_worse_than_the_largest():
    network, images = Net().model.eval(), next(iter(data(1, 40)))[0]
    made = {
        clip: UnitInputs(network, [network[6].weight, network[0].weight], "model.", clip, lambda: network(images))
        for clip in ("max", "mse")
    }
    assert made["max"].names == ["model.6", "model.0"]
    for width in (8, 4, 2):
        pairs = list(zip(made["mse"].ranges(width), made["max"].ranges(width)))
        assert all(best[1] <= widest[1] for best, widest in pairs)
        assert float(pairs[1][1][0].high) == pytest.approx(float(images.abs().max()), rel=1e-5)  # signed: -high too
        assert float(pairs[1][1][0].low) <= -float(images.abs().max()) < 0 == float(pairs[0][1][0].low)
        plain = (pairs[1][0][0].apply(images) - images).square().mean()
        assert pairs[1][0][1] == pytest.approx(float(plain), rel=0.01)
    assert float(made["mse"].ranges(2)[0][0].high) < 0.9 * float(made["max"].ranges(2)[0][0].high)
    assert made["max"].widths([8, 16]) == [8, 16]
    assert made["max"].records([8, 16]).keys() == {"model.6"}
    assert bit_operations([10, 10], [8, 4], [8, 16]) == 640 + 640


@pytest.mark.parametrize("order", ["hessian", "qe", "row_sum", "random"])
def test_every_order_takes_activations_and_leaves_the_network_alone(order):
    module, mixed = Net(), callback(target_ratio=1.0, order=order, calibration_batches=2, probes=2)
    before = copy.deepcopy(module.state_dict())
    mixed.metric = lambda network, batches: float("nan")
    with pytest.raises(ConfigurationError, match="metric=nan"):
        trainer(mixed).validate(module, data(2), verbose=False)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in module.modules())
    mixed.metric, mixed.target_ratio = None, 0.9
    trainer(mixed).validate(module, data(2), verbose=False)
    assert len(quantized_weights(module)) == 4


def test_bad_activations_are_named():
    module = Net()
    module.model.add_module("spare", nn.Identity())
    module.model.spare.layer = nn.Linear(4, 4)
    with pytest.raises(ConfigurationError, match="never calls model.spare.layer"):
        trainer(callback()).validate(module, data(1), verbose=False)
    assert not quantized_weights(module)
    for bad in ({"activations": "all"}, {"activation_range": "percentile"}):
        with pytest.raises(ConfigurationError, match=next(iter(bad))):
            MixedPrecisionPTQCallback(**bad)

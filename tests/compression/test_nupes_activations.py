"""nupes with activations: inputs in power codes, from calibration to the artifact."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from effdl.callbacks import NUPESCallback
from effdl.compression._nupes_inputs import input_error, power_input, top_input_code, uniform_input
from effdl.compression._nupes_learning import Learning
from effdl.compression._nupes_network import learn_network
from effdl.compression.nupes import integer_dot, power_codes, power_decode, power_records
from effdl.core.deploy import UnsupportedBackendError, deploy
from effdl.core.errors import ConfigurationError
from effdl.core.export import export_onnx, onnx_outputs, save_model
from effdl.core.input_quantizers import QuantizedInput, taking
from effdl.core.input_ranges import InputHistogram, input_histograms, layers_reading
from effdl.core.quantized import load_quantized, quantized_inputs, quantized_weights
from tests.compression.small_network import Net, data, gaussian, trainer
from tests.products import operands
from tests.support import check_quantized_artifact

IMAGES = next(iter(data(1, 40, seed=5)))[0]


def histogram(x: torch.Tensor) -> InputHistogram:
    layer = nn.Linear(x.shape[-1], 1)
    return input_histograms({"0": layer}, lambda: [layer(part) for part in x.split(7)])["0"]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_inputs_have_the_codes_of_the_weights_operator(bits, signed):
    x = gaussian(50, 8) if signed else gaussian(50, 8).relu()
    for a in (0.4, 0.5, 1.2):
        record = QuantizedInput.of_power(2.0, a, bits, signed)
        seen = record.apply(x, -1)
        assert 2 < seen.unique().numel() <= 2**bits
        assert torch.equal(record.apply(seen, -1), seen)
        assert record.apply(torch.zeros(1), -1) == 0
        assert float(record.apply(torch.tensor([1e9]), -1)) == float(record.high) == 2.0
        if signed:
            codes = power_codes(x.clamp(-2, 2), bits, a, "tensor", torch.tensor([2.0]))
            torch.testing.assert_close(seen, power_decode(codes, torch.tensor([2.0]), bits, a, "tensor"))
            assert torch.equal(record.encode(x, -1).int() - 2 ** (bits - 1), codes.int())
        else:
            n = 2**bits - 1
            expected = (n * (x.clamp(max=2) / 2) ** a).round()
            assert torch.equal(record.encode(x, -1).float(), expected)
            torch.testing.assert_close(seen, 2 * (expected / n) ** (1 / a))


def test_the_exponent_is_the_best_of_a_plain_search_and_never_worse_than_uniform():
    for x in (gaussian(60, 50), gaussian(60, 50).relu(), gaussian(60, 50).square()):
        seen = histogram(x)
        assert (seen.low, seen.high) == (float(x.min()), float(x.max()))
        for bits in (4, 8):
            record = power_input(seen, bits)
            plain = {a / 20: QuantizedInput.of_power(float(x.abs().max()), a / 20, bits, bool((x < 0).any()))
                     for a in range(3, 25)}  # fmt: skip
            error = lambda r, x=x: float((r.apply(x, -1) - x).norm() / x.norm())  # noqa: E731
            assert error(record) <= 1.01 * min(map(error, plain.values()))
            assert input_error(seen, record) == pytest.approx(error(record), rel=0.01)
            assert error(record) <= error(uniform_input(seen, record)) * 1.001
    assert power_input(histogram(gaussian(60, 50).square()), 4).exponent < 0.9  # a long tail
    assert top_input_code(histogram(gaussian(9, 9).relu()), 4) == 15


def test_a_percentile_clips_and_exponent_1_is_uniform():
    x = torch.cat([gaussian(400, 10).flatten(), torch.tensor([50.0])])[:, None]
    clipped, whole = power_input(histogram(x), 4, 1.0, 99.9), power_input(histogram(x), 4, 1.0)
    assert clipped.exponent is None
    assert 2 < float(clipped.high) < 5 < 49 < float(whole.high) < 51
    assert 1 - float((x.abs() <= clipped.high).float().mean()) == pytest.approx(0.001, abs=0.0005)
    with pytest.raises(ConfigurationError, match="percentile"):
        power_input(histogram(x), 4, percentile=20)


def test_equal_exponents_of_one_half_decode_in_integers():
    x, w = gaussian(5, 12).relu(), gaussian(5, 12, seed=1)
    record = QuantizedInput.of_power(float(x.max()), 0.5, 4, signed=False)
    weights = power_records({"w": w}, 4, 0.5, "tensor")["w"]
    whole = integer_dot(record.encode(x, -1), weights.codes, 2)
    expected = (record.apply(x, -1).double() * weights.dequantize().double()).sum(-1)
    scale = float(record.scale) * float(weights.scale) / (15 * 7) ** 2
    torch.testing.assert_close(whole.double() * scale, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("exponent", "learn"), [("layer", False), ("network", True), (0.5, False), (1, False)])
def test_the_finished_network_computes_with_quantised_inputs_and_reopens(tmp_path, exponent, learn):
    callback = NUPESCallback((4, 3), exponent, learn_codes=learn, iterations=30, first_last_bits=8)
    module = Net()
    trainer(callback).fit(module, data(), data(2))
    inputs = quantized_inputs(module.model)
    assert {name: record.bits for name, record in inputs.items()} == {"0": 8, "3": 3, "6": 3, "8": 8}
    assert [r.bits for r in quantized_weights(module.model).values()] == [8, 4, 4, 8]
    entering = operands(module.model, IMAGES)
    assert [x.unique().numel() <= 2**r.bits for x, r in zip(entering, inputs.values(), strict=True)] == [True] * 4
    assert entering[2].min() == 0  # behind a ReLU: all codes on one side
    assert inputs["6"].zero_point == 0 < inputs["0"].zero_point
    powers = {name: None if record.exponent is None else float(record.exponent) for name, record in inputs.items()}
    if exponent == "layer":
        assert len(set(powers.values())) > 2
    elif exponent == 1:
        assert set(powers.values()) == {None}
        module.model.eval()
        far = (deploy(module.model, "torch-int8")(IMAGES) - module.model(IMAGES)).norm() / module.model(IMAGES).norm()
        assert far < 0.02  # integer kernels; a value on a tie may fall to either side
    else:
        wanted = {float(r.exponent) for r in quantized_weights(module.model).values()}
        assert set(powers.values()) == wanted
        with pytest.raises(UnsupportedBackendError, match="power exponent"):
            deploy(module.model, "torch-int8")
    if exponent == 0.5:
        (onnx,) = onnx_outputs(export_onnx(module.model.cpu().eval(), (IMAGES,), tmp_path / "model.onnx"), (IMAGES,))
        torch.testing.assert_close(onnx, module.model(IMAGES), rtol=0, atol=1e-4)
    if exponent == "layer":  # opens a process of its own
        check_quantized_artifact(module.model, lambda: Net().model, (IMAGES,), tmp_path)
    save_model(module, tmp_path / "saved")
    again = load_quantized(Net().model, tmp_path / "saved").eval()
    assert torch.equal(again(IMAGES), module.model.cpu().eval()(IMAGES))
    told = callback.report()
    rows = told["inputs"]
    assert rows.keys() == {f"model.{name}" for name in inputs}
    assert all(row["error"] <= row["uniform_error"] * 1.001 for row in rows.values()) or exponent != "layer"
    assert told["before"]["metrics"]["val/accuracy"] - 0.25 <= told["after"]["metrics"]["val/accuracy"]
    trainer(NUPESCallback(4)).fit(module, data())  # goes on from what the codes decode to, with float inputs
    assert not quantized_inputs(module.model)


def test_layers_are_learned_on_their_quantised_inputs():
    model = Net().model.eval()
    batches = [x for x, _ in data(2)]
    records = power_records({n: p.detach() for n, p in model.named_parameters() if p.dim() > 1}, 3, 1.0)
    layers = layers_reading(model, [p for p in model.parameters() if p.dim() > 1])
    assert list(layers) == ["0", "3", "6", "8"]
    seen = input_histograms(layers, lambda: [model(x) for x in batches])
    taken = {layers[name]: power_input(found, 2) for name, found in seen.items()}

    @torch.no_grad()
    def error(found):
        """Of the first layer on its coarse inputs, where nothing comes before it."""
        x = torch.cat(batches)
        with taking(taken):
            worn = torch.func.functional_call(model[0], {"weight": found["0.weight"].dequantize()}, (x,))
        return float((worn - model[0](x)).square().mean())

    how = Learning(iterations=60)
    with_inputs, without = (learn_network(model, records, batches, how, taken=each) for each in (taken, None))
    assert error(with_inputs) < error(without)
    assert not any(layer._forward_pre_hooks for layer in layers.values())


def test_tied_weights_and_embeddings_and_a_layer_that_is_never_called():
    model = nn.ModuleDict({"embed": nn.Embedding(12, 8), "head": nn.Linear(8, 12, bias=False)})
    model.head.weight = model.embed.weight
    model.forward = lambda tokens: model.head(model.embed(tokens))

    class Tied(Net):
        def validation_step(self, batch, batch_idx):
            self.model(batch["inputs"])

    tokens = DataLoader([{"inputs": torch.arange(12)}], batch_size=None)
    module = Tied(model)
    trainer(NUPESCallback((4, 4))).validate(module, tokens, verbose=False)
    assert set(quantized_inputs(model)) == {"head"}  # one weight: the layer that multiplies by it takes codes
    unused = Net()
    unused.model.add_module("spare", nn.Identity())
    unused.model.spare.layer = nn.Linear(4, 4)
    with pytest.raises(ConfigurationError, match="never calls model.spare.layer"):
        trainer(NUPESCallback((4, 4))).validate(unused, data(1), verbose=False)
    assert not quantized_weights(unused)
    trainer(NUPESCallback((4, 4), exclude="model.spare*")).validate(unused, data(1), verbose=False)


def test_bad_activations_are_named_and_nothing_has_changed():
    module = Net()
    module.model[1].running_var.fill_(float("nan"))
    with pytest.raises(ConfigurationError, match=r"model\.3"):
        trainer(NUPESCallback((4, 8))).validate(module, data(1), verbose=False)
    assert not quantized_weights(module)
    for bits in ((4, 9), (4, 1), (4, 4, 4), ()):
        with pytest.raises(ConfigurationError, match="bits"):
            NUPESCallback(bits)
    with pytest.raises(ConfigurationError, match="activation_percentile"):
        NUPESCallback((4, 4), activation_percentile=101)

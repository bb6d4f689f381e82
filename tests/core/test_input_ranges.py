"""core/input_ranges: what enters layers, and the ranges that follow; records with an exponent in a file."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from effdl.core.errors import ConfigurationError
from effdl.core.export import save_model
from effdl.core.input_quantizers import QuantizedInput
from effdl.core.input_ranges import input_histograms, layers_reading
from effdl.core.quantized import load_quantized, quantize_, quantized_inputs
from effdl.core.quantizers import symmetric


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_a_histogram_tells_what_the_tensors_themselves_do():
    x = torch.cat([draw(400, 6), torch.full((1, 6), -7.0)])
    layer = nn.Linear(6, 2)
    whole, parts = (
        input_histograms({"a": layer}, lambda size=size: [layer(part) for part in x.split(size)])["a"]
        for size in (500, 7)
    )
    assert torch.equal(whole.counts, parts.counts)
    assert (whole.low, whole.high) == (-7.0, float(x.max()))
    assert whole.counts.sum() == x.numel()
    assert whole.mean_square() == pytest.approx(float(x.square().mean()), rel=1e-4)
    assert whole.largest() == 7.0
    assert whole.largest(99.0) == pytest.approx(float(x.abs().flatten().quantile(0.99)), rel=0.02)
    for bits in (3, 8):
        (best, error), (widest, more) = whole.uniform(bits, "mse"), whole.uniform(bits, "max")
        assert error <= more
        assert error == pytest.approx(float((best.apply(x, -1) - x).square().mean()), rel=0.01)
        assert float(widest.high) == pytest.approx(7.0)
    assert not layer._forward_pre_hooks


def test_layers_that_share_a_weight_and_constant_or_bad_inputs():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    network = nn.Sequential(first, second, nn.Linear(4, 4))
    assert list(layers_reading(network, [first.weight])) == ["0", "1"]
    constant = input_histograms({"0": first}, lambda: first(torch.full((3, 4), 2.0)))["0"]
    assert float(constant.uniform(4)[0].apply(torch.tensor([2.0]), -1)) == pytest.approx(2.0)
    with pytest.raises(ConfigurationError, match="never calls 1"):
        input_histograms({"0": first, "1": second}, lambda: first(draw(3, 4)))
    with pytest.raises(ConfigurationError, match="NaN or infinite"):
        input_histograms({"0": first}, lambda: first(torch.tensor([[1.0, float("nan"), 0, 0]])))


def test_records_with_an_exponent_in_a_file(tmp_path):
    def fresh() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    model = fresh()
    power = [QuantizedInput.of_power(2.0, a, 4, signed) for a, signed in ((0.5, True), (0.7, False))]
    joined = QuantizedInput.joined(power[:1] * 2, (1, 3))
    weights = {name: symmetric(p.detach(), 8) for name, p in model.named_parameters() if p.dim() > 1}
    quantize_(model, weights, {"0": joined, "1": power[1]})
    save_model(model, tmp_path)
    again, x = load_quantized(fresh(), tmp_path), draw(9, 4)
    assert torch.equal(again(x), model(x))
    assert torch.equal(joined.apply(x, -1), power[0].apply(x, -1))
    assert [float(part.exponent) for part in quantized_inputs(again)["0"].parts()] == [0.5, 0.5]
    told = json.loads((tmp_path / "quantization.json").read_text())
    assert told["inputs"]["1"]["power"] is True
    quantize_(model := fresh(), {"1.weight": weights["1.weight"]}, {"1": QuantizedInput.of_range(0, 1)})
    save_model(model, tmp_path)
    plain = json.loads((tmp_path / "quantization.json").read_text())
    plain["inputs"]["1"]["power"] = True
    (tmp_path / "quantization.json").write_text(json.dumps(plain))
    with pytest.raises(ConfigurationError, match="input_exponent"):
        load_quantized(fresh(), tmp_path)
    for bad in ({"exponent": torch.zeros(1)}, {"exponent": torch.ones(2)}, {"zero_point": torch.tensor([3])}):
        good = {"scale": torch.ones(1), "zero_point": torch.zeros(1), "bits": 4, "exponent": torch.ones(1)}
        with pytest.raises(ConfigurationError):
            QuantizedInput(**{**good, **bad})

"""ptq4dm: ranges against the official quantiser, states against the sampler, learnt rounding."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from diffusers import UNet2DModel

from effdl.core.input_ranges import candidate_errors, rounded
from effdl.core.quantized import quantize_
from effdl.core.random import generator
from effdl.core.solvers import sample_loop
from effdl.diffusion._ptq4dm_ranges import RangeSearch
from effdl.diffusion._ptq4dm_rounding import penalty, rounded_by, rounding_start, soft_rounding
from effdl.diffusion._ptq4dm_samples import walk
from effdl.diffusion.ptq4dm import (
    calibrate,
    moving_range,
    search_range,
    time_steps,
    weight_record,
)
from effdl.tasks.tiny import tiny_unet
from tests.diffusion.ptq4dm_parts import SCHEDULERS, gaussian, small
from tests.support import golden

GOLDEN = golden("ptq4dm")


def settled(x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Entries that are not on a rounding tie: 1e-6 away from it; float32 knows a quotient of 127 to 8e-6."""
    margin = 1e-6 if x.dtype == torch.float64 else 8e-6
    return ((x.double() / delta.double()).frac().abs() - 0.5).abs() > margin


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['name']}-{c['bits']}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_must_01_golden_ranges(case, dtype):
    x = torch.tensor(case["x"], dtype=dtype)
    found = search_range(x, case["bits"], GOLDEN["p"], GOLDEN["candidates"], bool(case["channel_wise"]))
    want = {key: torch.tensor(value, dtype=dtype) for key, value in case["fixed_z"].items()}
    delta = found.delta.view(-1, *[1] * (x.dim() - 1)) if case["channel_wise"] else found.delta
    seen, sure = rounded(x, delta, found.zero_point, case["bits"]), settled(x, delta)
    assert found.zero_point == int(want["zero_point"])
    torch.testing.assert_close(found.delta, want["delta"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(seen[sure], want["dequantized"][sure], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.error.to(dtype), want["error_p2.4"], rtol=1e-4, atol=0)
    if not case["z_tie_affected"]:
        torch.testing.assert_close(found.delta, torch.tensor(case["delta"], dtype=dtype), rtol=1e-5, atol=1e-7)
        official = torch.tensor(case["dequantized"], dtype=dtype)
        torch.testing.assert_close(seen[sure], official[sure], rtol=1e-5, atol=1e-6)
    worst = float(((seen - want["dequantized"])[sure]).abs().max() / want["dequantized"].abs().max())
    print(f"golden {case['name']}-{case['bits']}-{dtype}: relative {worst:.1e}")
    if case["name"] == "nonneg":
        assert found.zero_point == 0
        signed = search_range(torch.cat([x, -x]), case["bits"])
        assert found.delta < 0.6 * signed.delta  # twice the resolution


def test_must_01_golden_time_steps_and_the_moving_average():
    told = GOLDEN["ndtc"]
    assert time_steps(torch.tensor(told["normal_draws"]), told["T"], told["mu"], told["sigma"]).tolist() == told["t"]
    x = torch.tensor(GOLDEN["cases"][0]["x"])
    for count, want in enumerate(GOLDEN["ema_over_batches"]["sequence"], 1):
        low, high = moving_range([x * i for i in range(1, count + 1)])
        assert float(high) == pytest.approx(want["running_max"], rel=1e-5)
        assert float(high - low) / 255 == pytest.approx(want["delta"], rel=1e-5)


def test_must_01_golden_adaround():
    for case in (c for c in GOLDEN["cases"] if c["name"] == "weight" and c["bits"] == GOLDEN["adaround"]["bits"]):
        told = {key: torch.tensor(value) for key, value in GOLDEN["adaround"].items()}
        x, delta = torch.tensor(case["x"]), torch.tensor(case["delta"]).view(-1, 1, 1, 1)
        v = rounding_start(x, delta)
        torch.testing.assert_close(v, told["alpha_init"], rtol=0, atol=1e-3)
        h = soft_rounding(told["alpha_init"])
        torch.testing.assert_close(h, told["soft_targets"], rtol=0, atol=1e-4)
        bits = case["bits"]
        torch.testing.assert_close(delta * rounded_by(x, delta, h, bits), told["soft_dequantized"], rtol=0, atol=1e-5)
        sure = (told["soft_targets"] - 0.5).abs() > 1e-4
        hard = delta * rounded_by(x, delta, (v >= 0).float(), bits)
        torch.testing.assert_close(hard[sure], told["hard_dequantized"][sure], rtol=1e-5, atol=1e-6)
        assert float(penalty(torch.tensor([0.0, 1.0]), 1.0)) == 0
        assert float(penalty(torch.tensor([0.5]), 1.0)) == 1
        assert float(penalty(torch.tensor([0.5]), 0.1)) == 0


def test_adaround_learns_blocks_and_keeps_the_scales():
    unet = tiny_unet(8, 1, add_attention=False, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
                     block_out_channels=(16,))  # fmt: skip
    fp = copy.deepcopy(unet)
    how = small(bits=(3, 8), num_samples=16)
    near = calibrate(unet, SCHEDULERS["ddim"](), how)
    learned = calibrate(unet, SCHEDULERS["ddim"](), dataclasses.replace(how, adaround=True, iterations=150))
    assert all(torch.equal(a, b) for a, b in zip(unet.state_dict().values(), fp.state_dict().values()))
    assert all(parameter.grad is None for parameter in unet.parameters())
    moved = 0
    for name, record in learned.weights.items():
        assert torch.equal(record.scale, near.weights[name].scale)
        steps = unet.get_submodule(name).weight / record.scale.view(-1, *[1] * (record.codes.dim() - 1))
        inside = steps.abs() < 2 ** (record.bits - 1) - 1
        assert ((record.codes - steps).abs()[inside] <= 1 + 1e-5).all()  # one of the two neighbours
        moved += int((record.codes != near.weights[name].codes).sum())
    assert moved > 0
    errors = []
    x, t, _ = next(near.samples.batches(16))
    for found in (near, learned):
        net = copy.deepcopy(fp)
        quantize_(net, {f"{n}.weight": r for n, r in found.weights.items()}, found.inputs)
        with torch.no_grad():
            errors.append(float((net(x, t).sample - fp(x, t).sample).square().mean()))
    print("block rounding, output error:", errors)
    assert errors[1] < errors[0]


class Recorder:
    """A network that says its time, and remembers its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t):
        self.calls.append((x.clone(), t.clone()))
        return t.view(-1, 1).expand_as(x).float() / 1000 + 0.1 * x


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_must_02_each_pair_is_a_call_of_the_sampler(kind):
    noise, steps = gaussian(12, 3), 7
    chosen = torch.arange(12) % steps
    states, times = walk(Recorder(), noise, chosen, SCHEDULERS[kind](), steps, generator(3))
    sampler, asked = SCHEDULERS[kind](), Recorder()
    sample_loop(asked, noise, sampler, steps, generator(3))
    assert len(asked.calls) == steps == len(sampler.timesteps)
    for i, t in enumerate(chosen.tolist()):
        x, time = asked.calls[steps - 1 - t]
        assert torch.equal(states[i], x[i])
        assert times[i] == time[i] == sampler.timesteps[steps - 1 - t]


def test_must_02_a_step_that_adds_one_counts_the_steps():
    class AddOne:
        timesteps, num_inference_steps, config = torch.arange(9, -1, -1) * 100, 10, {}

        def set_timesteps(self, steps, device=None):
            pass

        def step(self, output, t, x):
            return type("Step", (), {"prev_sample": x + 1})

    chosen = torch.arange(10)
    states, times = walk(lambda x, t: x, torch.zeros(10, 1), chosen, AddOne(), pairing="matched")
    assert states.flatten().tolist() == list(range(9, -1, -1))  # steps done before the call at t
    assert times.tolist() == list(range(0, 1000, 100))
    # the released script: after step k from the noisy end, under the time of step k from the image's end
    states, times = walk(lambda x, t: x, torch.zeros(10, 1), chosen, AddOne(), pairing="official")
    assert states.flatten().tolist() == list(range(1, 11))
    assert times.tolist() == list(range(0, 1000, 100))


def test_must_03_steps_are_normal_clamped():
    steps = 250
    t = time_steps(gaussian(20_000), steps)
    normal = torch.distributions.Normal(0.4 * steps, 0.4 * steps)
    inside = torch.arange(steps).double()
    expected = normal.cdf(inside + 1)  # int() truncates: t = k holds [k, k + 1), and everything below 1 is 0
    expected[-1] = 1
    empirical = torch.tensor([(t <= k).double().mean() for k in range(steps)])
    assert (empirical - expected).abs().max() < 0.02
    assert float((t == 0).double().mean()) == pytest.approx(float(normal.cdf(torch.tensor(1.0))), abs=0.01)
    weights = torch.diff(expected, prepend=torch.zeros(1))
    mean = float((weights * inside).sum())
    std = math.sqrt(float((weights * (inside - mean) ** 2).sum()))
    assert float(t.double().mean()) == pytest.approx(mean, abs=2)
    assert float(t.double().std()) == pytest.approx(std, abs=2)
    assert int(t.min()) == 0
    assert int(t.max()) == steps - 1


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["heavy-tailed", "normal", "positive", "negative"])
def test_must_04_no_candidate_is_better(bits, kind):
    x = gaussian(4000).double()
    x = {"heavy-tailed": x**3, "normal": x, "positive": x.abs(), "negative": -x.abs()}[kind]
    found = search_range(x, bits)
    largest = x.abs().max()
    errors = candidate_errors(x[None], largest[None], found.side, bits, 2.4, 100)[:, 0] / x.numel()
    assert (found.error <= errors).all()
    low, high = float(x.min()), float(x.max())
    delta = (max(high, 0) - min(low, 0)) / (2**bits - 1)
    zero = round(-min(low, 0) / delta)
    if found.side != "signed":  # of a signed tensor the asymmetric range is another family
        assert found.error <= (rounded(x, torch.tensor(delta), zero, bits) - x).abs().pow(2.4).mean() * (1 + 1e-9)
    assert found.error <= errors[-1]
    if kind == "heavy-tailed" and bits == 4:
        assert found.theta < largest


@pytest.mark.parametrize("kind", ["signed", "heavy-tailed", "positive", "constant", "zero"])
@pytest.mark.parametrize("bits", [4, 8])
def test_must_04_pooled_over_batches_is_the_search_of_all_of_them(kind, bits):
    parts = [gaussian(60, 50, seed=i) * (1 + i) for i in range(4)]
    change = {"signed": lambda x: x, "heavy-tailed": lambda x: x**5, "positive": torch.abs,
              "constant": lambda x: x * 0 - 3, "zero": lambda x: x * 0}[kind]  # fmt: skip
    parts = [change(part) for part in parts]
    whole = search_range(torch.cat(parts), bits)
    for order in (parts, parts[::-1]):
        search = RangeSearch(bits, 2.4, 100)
        for step in (search.see, search.tally, search.score):
            for part in order:
                step(part)
            if step == search.tally:
                search.shorten()
        assert float(search.record().scale) == pytest.approx(float(whole.delta), rel=1e-6)
        assert int(search.record().zero_point) == whole.zero_point
        assert len(search.among) < 25 or kind == "zero"
    if kind == "signed":
        assert float(moving_range(parts)[1]) != pytest.approx(float(moving_range(parts[::-1])[1]), rel=1e-3)


def test_weights_are_symmetric_codes_also_without_negative_values():
    record = weight_record(gaussian(6, 5).abs(), 8)
    assert record.offset is None
    assert int(record.codes.min()) >= 0
    assert isinstance(tiny_unet(8), UNet2DModel)
    torch.testing.assert_close(record.dequantize(), gaussian(6, 5).abs(), atol=float(record.scale.max()), rtol=0)

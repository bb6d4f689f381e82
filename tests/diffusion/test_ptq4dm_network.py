"""ptq4dm: a whole network in integers, its artifact, its kernels; sources of states; refusals."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

from effdl.core.deploy import deploy
from effdl.core.errors import ConfigurationError
from effdl.core.export import save_model
from effdl.core.quantized import is_quantized, quantized_inputs, quantized_weights
from effdl.core.random import rng_state
from effdl.core.solvers import denoising_path, sample_loop
from effdl.diffusion._ptq4dm_ranges import skip_channels
from effdl.diffusion._ptq4dm_samples import call, draw
from effdl.diffusion.ptq4dm import (
    Settings,
    calibrate,
    quantize_unet,
)
from effdl.tasks.tiny import tiny_condition_unet, tiny_unet
from tests.diffusion.ptq4dm_parts import SCHEDULERS, gaussian, small
from tests.support import check_quantized_artifact, in_fresh_process


def test_must_05_layers_are_integer_and_the_edges_eight_bits():
    unet = tiny_unet(8, 1)
    found = quantize_unet(unet, SCHEDULERS["ddim"](), small(bits=(4, 5)))
    records, names = quantized_weights(unet), list(found.weights)
    assert names[0] == "conv_in"
    assert names[-1] == "conv_out"
    assert {n: r.bits for n, r in records.items()} == {
        f"{n}.weight": 8 if n in ("conv_in", "conv_out") else 4 for n in names
    }
    assert {n: r.bits for n, r in found.inputs.items()} == {n: 8 if n in ("conv_in", "conv_out") else 5 for n in names}
    seen = {}
    for name in names:
        layer = unet.get_submodule(name)
        base = type(layer)._effdl_base
        original = base.forward

        def spy(self, x, *args, _name=name, _original=original):
            seen[_name] = x.unique().numel()
            return _original(self, x, *args)

        type(layer)._effdl_base = type("Spied", (base,), {"forward": spy})
    with torch.no_grad():
        out = unet(gaussian(16, 1, 8, 8), torch.arange(16) * 60).sample
    assert seen.keys() == set(names)
    assert all(count <= 2 ** found.inputs[name].bits for name, count in seen.items())
    for record in records.values():
        assert max(row.unique().numel() for row in record.dequantize().flatten(1)) <= 2**record.bits
    assert out.unique().numel() > 900  # the output is not quantised


@pytest.fixture(scope="module")
def quantised():
    """One small U-Net of DDPM, before and after."""
    unet = tiny_unet(16, 1, block_out_channels=(32, 64))
    fp = copy.deepcopy(unet)
    found = quantize_unet(unet, SCHEDULERS["ddim"](), small(candidates=100))
    return fp, unet.eval(), found


class Wrapped(nn.Module):
    """The network as the shared check calls it: tensors in, a tensor out."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x, t):
        return self.unet(x, t, return_dict=False)[0]


def test_must_06_the_program_opens_without_effdl(tmp_path):
    plain = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (16,)}
    make = lambda: Wrapped(tiny_unet(8, 1, add_attention=False, **plain))  # noqa: E731
    net = make()
    quantize_unet(net.unet, SCHEDULERS["ddim"](), small())
    check_quantized_artifact(net, make, (gaussian(4, 1, 8, 8), torch.tensor([5, 100, 400, 900])), tmp_path)


def test_must_06_the_artifact_is_int8_and_reopens_in_a_fresh_process(quantised, tmp_path):
    fp, unet, found = quantised
    x, t = gaussian(4, 1, 16, 16), torch.tensor([5, 100, 400, 900])
    assert save_model(fp, tmp_path / "fp") == "pretrained"
    assert save_model(unet, tmp_path / "codes") == "quantized"
    whole = (tmp_path / "fp" / "diffusion_pytorch_model.safetensors").stat().st_size
    ratio = (tmp_path / "codes" / "model.safetensors").stat().st_size / whole
    print(f"file / fp32 file = {ratio:.3f}")
    assert ratio <= 0.27
    torch.save({"x": x, "t": t, "want": unet(x, t).sample.detach()}, tmp_path / "case.pt")
    code = (
        "import sys, torch\nfrom diffusers import UNet2DModel\nfrom effdl.core.quantized import load_quantized\n"
        "folder, case = sys.argv[1], torch.load(sys.argv[2], weights_only=True)\n"
        "unet = load_quantized(UNet2DModel.from_config(UNet2DModel.load_config(folder)), folder).eval()\n"
        "with torch.no_grad():\n    got = unet(case['x'], case['t']).sample\n"
        "torch.testing.assert_close(got, case['want'], rtol=0, atol=1e-5)\n"
    )
    in_fresh_process(code, tmp_path / "codes", tmp_path / "case.pt")
    assert json.loads((tmp_path / "codes" / "config.json").read_text())["_class_name"] == "UNet2DModel"


@pytest.mark.parametrize("kind", ["ddim", "dpm-solver"])
def test_must_06_integer_kernels_agree_also_along_a_sampler(quantised, kind):
    _, unet, _ = quantised
    fast = deploy(unet, "torch-int8")
    assert not any(is_quantized(layer) for layer in fast.modules())
    x, t = gaussian(4, 1, 16, 16), torch.tensor([5, 100, 400, 900])
    with torch.no_grad(), torch.profiler.profile() as profile:
        got = fast(x, t).sample
    events = {event.key for event in profile.key_averages()}
    assert {"onednn::qconv2d_pointwise", "quantized::linear_with_input_q_dq_qweight_dq_output_fp32"} <= events
    assert "aten::mkldnn_convolution" not in events
    with torch.no_grad():
        want = unet(x, t).sample
    assert (got - want).norm() <= 0.02 * want.norm()
    ends = [
        sample_loop(lambda x, t, net=net: net(x, t).sample, gaussian(2, 1, 16, 16), SCHEDULERS[kind](), 5)
        for net in (unet, fast)
    ]
    assert (ends[0] - ends[1]).norm() <= 0.02 * ends[0].norm()


def test_must_08_nothing_but_the_product_changes():
    unet, scheduler = tiny_unet(8, 1).train(), SCHEDULERS["ddpm"]()
    before, stream, config = copy.deepcopy(unet.state_dict()), rng_state(), dict(scheduler.__dict__)
    found = calibrate(unet, scheduler, small())
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert unet.training
    assert scheduler.__dict__.keys() == config.keys()
    assert scheduler.num_inference_steps is None
    assert torch.equal(torch.get_rng_state(), stream["torch"])
    again = calibrate(unet, scheduler, small())
    assert all(torch.equal(record.scale, again.inputs[name].scale) for name, record in found.inputs.items())
    assert all(torch.equal(record.codes, again.weights[name].codes) for name, record in found.weights.items())


def test_text_and_guidance_record_both_halves():
    unet = tiny_condition_unet(8)
    text, empty = gaussian(3, 4, 32), torch.zeros(1, 4, 32)
    how = small(guidance=3.0, num_samples=10, batch_size=5)
    seen = []
    unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    given = {"encoder_hidden_states": text}, {"encoder_hidden_states": empty}
    samples = draw(unet, SCHEDULERS["dpm-solver"](), how, *given)
    assert len(samples) == 20
    assert torch.equal(samples.states[:10], samples.states[10:])
    assert torch.equal(samples.times[:10], samples.times[10:])
    assert torch.equal(samples.condition["encoder_hidden_states"][:10], text[torch.arange(10) % 3])
    assert not samples.condition["encoder_hidden_states"][10:].any()
    found = quantize_unet(unet, SCHEDULERS["dpm-solver"](), how, *given)
    assert "mid_block.attentions.0.transformer_blocks.0.attn2.to_k" in found.inputs
    first = {"encoder_hidden_states": text[:2]}
    out = call(deploy(unet, "torch-int8"), gaussian(2, 4, 8, 8), torch.tensor([10, 500]), first)
    assert torch.isfinite(out).all()


def test_halves_of_a_skip_have_ranges_of_their_own(quantised):
    fp, _, found = quantised
    cuts = skip_channels(fp, {n: fp.get_submodule(n) for n in found.weights}, found.samples)
    assert {name.rpartition(".")[2] for name in cuts} == {"conv1", "conv_shortcut"}
    assert all(name.startswith("up_blocks") for name in cuts)
    unet = tiny_unet(8, 1)
    split = quantize_unet(unet, SCHEDULERS["ddim"](), small(split_shortcut=True))
    assert split.inputs["up_blocks.0.resnets.0.conv_shortcut"].channels == (32, 32)
    assert split.inputs["up_blocks.0.resnets.1.conv_shortcut"].channels == (32, 16)
    x, t = gaussian(2, 1, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        got, want = deploy(unet, "torch-int8")(x, t).sample, unet(x, t).sample
    assert (got - want).norm() <= 0.02 * want.norm()


def test_sequential_measures_behind_quantised_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 3))

        def forward(self, x, t):
            return self.body(x + t.view(-1, 1) / 1000)

    net, scheduler, data = Net(), SCHEDULERS["ddim"](), torch.zeros(1, 3)
    parallel = calibrate(net, scheduler, small(bits=(8, 3)), images=data)
    behind = calibrate(net, scheduler, small(bits=(8, 3), sequential=True), images=data)
    assert torch.equal(parallel.inputs["body.0"].scale, behind.inputs["body.0"].scale)
    assert not torch.equal(parallel.inputs["body.4"].scale, behind.inputs["body.4"].scale)


def test_other_sources_of_states():
    net, images = tiny_unet(8, 1), gaussian(5, 1, 8, 8)
    for calibration, check in {
        "noise": lambda s: abs(float(s.states.std()) - 1) < 0.05,
        "raw": lambda s: torch.equal(s.states[:5], images),
        "forward": lambda s: 0.5 < float(s.states.std()) < 1.5,
        "uniform": lambda s: set(s.steps.tolist()) == set(range(6)),
        3: lambda s: s.steps.unique().tolist() == [3] and s.times.unique().numel() == 1,
    }.items():
        samples = draw(net, SCHEDULERS["ddim"](), small(calibration=calibration, num_samples=48), images=images)
        assert len(samples) == 48
        assert sum(samples.histogram(6)) == 48
        assert check(samples), calibration
    path = list(denoising_path(lambda x, t: x, gaussian(1, 2), SCHEDULERS["ddim"](), 6))
    assert sorted({int(t) for t in draw(net, SCHEDULERS["ddim"](), small(calibration="uniform")).times}) <= sorted(
        {int(visit.t) for visit in path}
    )


def test_refusals():
    unet, ddim = tiny_unet(8, 1), SCHEDULERS["ddim"]()
    for settings, argument in [
        ({"mu": 1.2}, "mu"), ({"sigma": 0}, "sigma"), ({"bits": 8}, "bits"), ({"bits": (1, 8)}, "bits"),
        ({"num_samples": 4, "batch_size": 8}, "num_samples"), ({"calibration": "skewd"}, "skewed"), ({"p": 0}, "p="),
    ]:  # fmt: skip
        with pytest.raises(ConfigurationError, match=argument):
            Settings(**settings)
    with pytest.warns(UserWarning, match="above 0.5"):
        Settings(mu=0.7)
    state = copy.deepcopy(unet.state_dict())
    broken = copy.deepcopy(unet)
    broken.mid_block.resnets[0].conv1.bias.data.fill_(float("nan"))
    for act, message in [
        (lambda: quantize_unet(unet, None, small()), "scheduler"),
        (lambda: quantize_unet(unet, ddim, small(steps=None)), "steps"),
        (lambda: quantize_unet(unet, DDIMScheduler(prediction_type="epsilonn"), small()), "prediction_type"),
        (lambda: quantize_unet(unet, ddim, small(guidance=2.0)), "guidance"),
        (lambda: quantize_unet(unet, ddim, small(calibration=6)), "below 6"),
        (lambda: quantize_unet(unet, ddim, small(calibration="raw")), "images"),
        (lambda: quantize_unet(broken, ddim, small(calibration="noise")), "mid_block.*time step"),
        (lambda: quantize_unet(nn.Sequential(nn.ReLU()), ddim, small()), "no layer"),
        (lambda: quantize_unet(unet, ddim, small(), targets="conv_inn"), "conv_in"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            act()
    assert all(torch.equal(value, state[name]) for name, value in unet.state_dict().items())
    assert not quantized_inputs(unet)

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend, self.out = nn.MultiheadAttention(4, 1, batch_first=True), nn.Linear(4, 4)

        def forward(self, x, t):
            return self.out(self.attend(x, x, x, need_weights=False)[0])

    with pytest.raises(ConfigurationError, match=r"attend\.out_proj"):
        quantize_unet(Attending(), ddim, small(), images=torch.zeros(1, 3, 4))

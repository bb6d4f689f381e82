"""ptq4dm's claims: states of the sampling path give better ranges than others; 8 bits sample as well as floats.

``EFFDL_DATA=... pytest -m slow -s tests/claims/test_ptq4dm.py``
"""

from __future__ import annotations

import copy
import math
import statistics
import time

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import nn

from effdl.core.deploy import deploy
from effdl.core.export import plain_state
from effdl.core.quantized import quantize_
from effdl.core.random import generator
from effdl.core.report import latencies_ms
from effdl.core.solvers import denoising_path, sample_loop
from effdl.diffusion.ptq4dm import Settings, calibrate, quantize_unet
from effdl.tasks.tiny import tiny_unet
from tests.support import load_npz

pytestmark = pytest.mark.slow
SEEDS = range(3)
STEPS = 50
SOURCES = {"skewed": "skewed", "uniform": "uniform", "t = 0": 0, "t = T - 1": STEPS - 1, "noise": "noise"}


def with_codes(network, found):
    made = copy.deepcopy(network)
    quantize_(made, {f"{name}.weight": record for name, record in found.weights.items()}, found.inputs)
    return made.eval()


# ---- eight Gaussians in the plane --------------------------------------------------------------------------------


class Plane(nn.Module):
    """Four hidden layers of 96 on the point and sixteen sines of the time."""

    def __init__(self):
        super().__init__()
        sizes = (18, 96, 96, 96, 96)
        layers = [part for i, o in zip(sizes, sizes[1:]) for part in (nn.Linear(i, o), nn.SiLU())]
        self.net = nn.Sequential(*layers, nn.Linear(96, 2))

    def forward(self, x, t):
        angle = t.float()[:, None] / STEPS * 2 ** torch.arange(8) * math.pi / 2
        return self.net(torch.cat([x, angle.sin(), angle.cos()], 1))


def eight_gaussians(count, g):
    """The usual toy: centres at radius 4, deviation 0.5, all over sqrt(2)."""
    angle = torch.randint(8, (count,), generator=g) * math.pi / 4
    centre = 4 * torch.stack([angle.cos(), angle.sin()], 1)
    return (centre + 0.5 * torch.randn(count, 2, generator=g)) / math.sqrt(2)


def train_plane(steps=2000):
    torch.manual_seed(0)
    net, g = Plane(), generator(1)
    scheduler = DDPMScheduler(num_train_timesteps=STEPS, beta_start=0.002, beta_end=0.4, clip_sample=False)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x0, noise = eight_gaussians(256, g), torch.randn(256, 2, generator=g)
        t = torch.randint(STEPS, (256,), generator=g)
        loss = (net(scheduler.add_noise(x0, noise, t), t) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return net.eval(), scheduler


def test_must_07_states_of_the_path_give_better_ranges():
    began = time.perf_counter()
    net, scheduler = train_plane()
    noise = torch.randn(1000, 2, generator=generator(99))
    held_out = list(denoising_path(net, noise, copy.deepcopy(scheduler), STEPS, generator(98)))
    errors = {name: [] for name in SOURCES}
    for name, source in SOURCES.items():
        for seed in SEEDS:
            how = Settings(steps=STEPS, calibration=source, seed=seed, batch_size=256)
            quantised = with_codes(net, calibrate(net, scheduler, how, images=noise))
            with torch.no_grad():
                each = [(quantised(v.x, v.t.expand(1000)) - v.output).square().mean() for v in held_out]
            errors[name].append(float(torch.stack(each).mean()))
    for name, values in errors.items():
        print(f"{name:10s} eps-MSE {statistics.mean(values):.5f} +- {statistics.stdev(values):.5f}")
    print(f"{time.perf_counter() - began:.0f} s")
    mean = {name: statistics.mean(values) for name, values in errors.items()}
    assert 2 * mean["skewed"] <= mean["t = 0"]
    assert mean["skewed"] < mean["t = T - 1"]
    assert mean["skewed"] < mean["noise"]


# ---- handwritten digits at 14 x 14 -------------------------------------------------------------------------------


def digits():
    """MNIST at 14 x 14 in [-1, 1], (60000, 1, 14, 14), and its classes."""
    data = load_npz("mnist.npz")
    images, labels = torch.from_numpy(data["x_train"]).float()[:, None], torch.from_numpy(data["y_train"]).long()
    return torch.nn.functional.avg_pool2d(images, 2) / 127.5 - 1, labels


def train_unet(images, steps):
    unet = tiny_unet(14, 1, block_out_channels=(32, 64), seed=1).train()
    average = torch.optim.swa_utils.AveragedModel(unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    scheduler, g = DDPMScheduler(), generator(2)
    optimizer = torch.optim.Adam(unet.parameters(), 1e-3)
    for _ in range(steps):
        x0 = images[torch.randint(len(images), (64,), generator=g)]
        noise, t = torch.randn(x0.shape, generator=g), torch.randint(1000, (64,), generator=g)
        loss = (unet(scheduler.add_noise(x0, noise, t), t).sample - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(unet)
    return average.module.eval()


def features_of_classes(images, labels, steps=600):
    """A small classifier's last hidden layer, 32 numbers an image."""
    torch.manual_seed(3)
    body = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(), nn.Flatten(),
        nn.Linear(32 * 25, 32), nn.ReLU(),
    )  # fmt: skip
    head, g = nn.Linear(32, 10), generator(4)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], 1e-3)
    for _ in range(steps):
        i = torch.randint(len(images), (128,), generator=g)
        loss = nn.functional.cross_entropy(head(body(images[i])), labels[i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    hits = (head(body(images[:2000])).argmax(1) == labels[:2000]).float().mean()
    print(f"classifier: {100 * float(hits):.1f} %")
    return body.eval()


def frechet(a, b):
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two sets of features."""
    (m, c), (n, d) = ((x.double().mean(0), torch.cov(x.double().T)) for x in (a, b))
    root = torch.linalg.eigvals(c @ d).real.clamp(min=0).sqrt().sum()
    return float((m - n).square().sum() + c.trace() + d.trace() - 2 * root)


@torch.no_grad()
def sample(network, scheduler, steps, count=1000):
    noise = torch.randn(count, 1, 14, 14, generator=generator(7))
    parts = [sample_loop(lambda x, t: network(x, t).sample, part, copy.deepcopy(scheduler), steps)
             for part in noise.split(100)]  # fmt: skip
    return torch.cat(parts).clamp(-1, 1)


def test_must_07_eight_bits_sample_as_well():
    began = time.perf_counter()
    images, labels = digits()
    unet = train_unet(images, 800)
    print(f"trained after {time.perf_counter() - began:.0f} s")
    features = features_of_classes(images, labels)
    with torch.no_grad():
        real = features(images[-5000:])
    distance = lambda made: frechet(features(made).detach(), real)  # noqa: E731
    samplers = {"DDIM 20": (DDIMScheduler(), 20), "DPM-Solver 10": (DPMSolverMultistepScheduler(), 10)}
    ratios = {}
    for name, (scheduler, steps) in samplers.items():
        fp = distance(sample(unet, scheduler, steps))
        for source in ("skewed", "noise", 0) if name == "DDIM 20" else ("skewed",):
            got = []
            for seed in SEEDS:
                how = Settings(steps=steps, seed=seed, calibration=source, num_samples=512)
                fast = deploy(with_codes(unet, calibrate(unet, scheduler, how)), "torch-int8")
                got.append(distance(sample(fast, scheduler, steps)))
            ratios[name, source] = statistics.mean(got) / fp
            each = ", ".join(f"{g:.3f}" for g in got)
            print(f"{name} {source}: float {fp:.3f}, int8 {each}: ratio {ratios[name, source]:.3f}")
    print(f"{time.perf_counter() - began:.0f} s")
    assert all(abs(ratio - 1) <= 0.1 for (_, source), ratio in ratios.items() if source == "skewed")


def test_size_and_speed_of_a_larger_network():
    from safetensors.torch import save

    unet = tiny_unet(32, 3, block_out_channels=(64, 128), layers_per_block=2, norm_num_groups=32, attention_head_dim=32)
    fp = copy.deepcopy(unet)
    quantize_unet(unet, DDIMScheduler(), Settings(steps=5, num_samples=8, batch_size=8))
    ratio = len(save(plain_state(unet))) / len(save(plain_state(fp)))
    fast = deploy(unet, "torch-int8")
    print(f"{sum(p.numel() for p in fp.parameters()) / 1e6:.2f} M parameters, file {ratio:.4f} of float32")
    for count in (1, 16):
        x, t = torch.randn(count, 3, 32, 32, generator=generator(0)), torch.full((count,), 500)
        with torch.no_grad():
            plain, simulated, integer = (net(x, t).sample for net in (fp, unet, fast))
        error = lambda got, want: float((got - want).norm() / want.norm())  # noqa: E731
        times = latencies_ms([fp, unet, fast], (x, t), seconds=8.0)
        told = ", ".join(f"{name} {ms:.1f} ms" for name, ms in zip(("float", "decoding", "int8"), times))
        print(f"batch {count}: {told}; int8 / float {times[2] / times[0]:.2f}")
        print(f"relative L2: decoding {error(simulated, plain):.1e} and int8 {error(integer, plain):.1e} of float, "
              f"int8 {error(integer, simulated):.1e} of decoding")  # fmt: skip
        assert error(integer, plain) < 1.1 * error(simulated, plain)
    assert ratio <= 0.27

"""prodiff, claims 5, 6 and 10: x_0 against noise prediction at few steps; two calls like four; spoken digits."""

from __future__ import annotations

import math
import statistics
import time
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader

from effdl import ProDiffModule
from effdl.core.random import generator
from effdl.data.speech import SpokenDigits
from effdl.diffusion.prodiff import absolute_error, alphas_cumprod, noised, sample
from tests.support import real_data

pytestmark = pytest.mark.slow

SEEDS, STEPS = (0, 1, 2), 3000


def sines(count, g):
    """24 points of a sine with the frequency, phase and height of the condition, and a little noise."""
    c = torch.rand(count, 3, generator=g)
    grid = torch.linspace(0, 1, 24)
    x = (0.3 + 0.7 * c[:, 2:]) * torch.sin(2 * math.pi * ((1 + 2 * c[:, :1]) * grid + c[:, 1:2]))
    x = x + 0.1 * torch.randn(count, 24, generator=g)
    return x.view(count, 1, 24, 1), c


class MLP(nn.Module):
    """Two hidden layers of 192 on (x, t, c)."""

    def __init__(self):
        super().__init__()
        layers = [nn.Linear(24 + 9 + 3, 192), nn.SiLU(), nn.Linear(192, 192), nn.SiLU(), nn.Linear(192, 24)]
        self.net = nn.Sequential(*layers)

    def forward(self, x, t, condition):
        one_hot = nn.functional.one_hot(t.clamp(0, 8).long(), 9).to(x)
        return self.net(torch.cat([x.flatten(1), one_hot, condition], 1)).view(x.shape)


def batches(steps, seed):
    g = generator(seed)
    return DataLoader([sines(128, g) for _ in range(steps)], batch_size=None)


def fit(module, loader, steps):
    Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, loader)  # fmt: skip
    return module


def falling(optimizer, steps=STEPS):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))


def adam(parameters):
    return torch.optim.Adam(parameters, 2e-3)


def by_hand(network, seed, loss_of):
    """The same training outside of any module."""
    optimizer = adam(network.parameters())
    schedule = falling(optimizer)
    g = generator(50 + seed)
    for x0, c in batches(STEPS, seed):
        loss = loss_of(x0, c, torch.randn(x0.shape, generator=g), g)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def told(name, values):
    print(f"{name:44s} {statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}")
    return statistics.mean(values)


class Noise(nn.Module):
    """A network of the noise, as one that says x_0."""

    def __init__(self, network, alpha_bar):
        super().__init__()
        self.network, self.alpha_bar = network, alpha_bar

    def forward(self, x, t, condition):
        a, s = (value.float().view(-1, 1, 1, 1) for value in (self.alpha_bar[t].sqrt(), (1 - self.alpha_bar[t]).sqrt()))
        return (x - s * self.network(x, t, condition)) / a


def test_must_05_06_few_steps_want_clean_data_and_two_calls_do_what_four_did():
    rows = {}
    alpha_bar = alphas_cumprod("vpsde", 4)
    for seed in SEEDS:
        begin = time.perf_counter()
        seed_everything(seed, verbose=False)
        settings = {"optimizer": adam, "scheduler": falling}
        teacher = fit(ProDiffModule(MLP(), loss="l1", **settings), batches(STEPS, seed), STEPS)
        student = ProDiffModule(stage="distill", teacher=teacher, **settings)
        fit(student, batches(STEPS, 10 + seed), STEPS)
        of_noise, direct = Noise(MLP(), alpha_bar), MLP()

        def noise_loss(x0, c, eps, g, network=of_noise.network):
            t = torch.randint(0, 5, (len(x0),), generator=g)
            return (network(noised(x0, eps, t, alpha_bar), t, c) - eps).abs().mean()

        def two_step_loss(x0, c, eps, g, network=direct):  # a student's indices and labels, with the data as target
            t = 2 * torch.randint(1, 3, (len(x0),), generator=g)
            return (network(noised(x0, eps, t, alpha_bar), t - 2, c) - x0).abs().mean()

        by_hand(of_noise, seed, noise_loss)
        by_hand(direct, seed, two_step_loss)
        g = generator(900 + seed)
        x0, c = sines(1000, g)
        noise, batch = torch.randn(x0.shape, generator=g), (x0, c)
        four = teacher.sample(batch, noise=noise)
        with torch.no_grad():
            four_of_noise, two_of_noise = (
                sample(lambda x, t: of_noise(x, t, c), noise, alpha_bar, scale, 0) for scale in (1, 2)  # noqa: B023
            )
            two_direct = sample(lambda x, t: direct(x, t, c), noise, alpha_bar, 2, 2)  # noqa: B023
        row = {
            "std / data, x_0, 4 calls": float(four.std() / x0.std()),
            "std / data, noise, 4 calls": float(four_of_noise.std() / x0.std()),
            "std / data, noise, 2 calls": float(two_of_noise.std() / x0.std()),
            "L1 to data, x_0, 4 calls": float(absolute_error(four, x0)),
            "L1 to data, noise, 4 calls": float(absolute_error(four_of_noise, x0)),
            "to the teacher: student, 2 calls": float(absolute_error(student.sample(batch, noise=noise), four)),
            "to the teacher: teacher at 2 calls": float(
                absolute_error(teacher.sample(batch, noise=noise, calls=2), four)
            ),
            "to the teacher: 2 steps on data": float(absolute_error(two_direct, four)),
            "seconds": time.perf_counter() - begin,
        }  # fmt: skip
        print(seed, {key: round(value, 4) for key, value in row.items()}, flush=True)
        for key, value in row.items():
            rows.setdefault(key, []).append(value)
    mean = {key: told(key, values) for key, values in rows.items()}
    assert mean["L1 to data, noise, 4 calls"] >= 5 * mean["L1 to data, x_0, 4 calls"]
    assert mean["std / data, noise, 2 calls"] > 30
    student = mean["to the teacher: student, 2 calls"]
    assert student <= 0.5 * mean["to the teacher: teacher at 2 calls"]
    assert student <= 0.5 * mean["to the teacher: 2 steps on data"]


def test_must_10_spoken_digits_in_two_calls():
    file, rows = str(real_data("fsdd_digits.npz")), {}
    for seed in SEEDS:
        begin = time.perf_counter()
        seed_everything(seed, verbose=False)
        data = SpokenDigits(file, seed=seed, validation=0.0)
        denoiser = {"bins": 20, "condition": 64, "channels": 32, "layers": 4}
        encoder = {"classes": 10, "speakers": 6, "frames": 32, "width": 64}
        settings = {"optimizer": adam, "scheduler": partial(falling, steps=1500)}
        teacher = fit(ProDiffModule(denoiser, encoder, **settings), data.train_dataloader(), 1500)
        student = ProDiffModule(stage="distill", teacher=teacher, **settings)
        fit(student, data.train_dataloader(), 1500)
        batch = data.test_dataset.__getitems__(range(len(data.test_dataset)))
        truth, mask = batch["mel"][:, None], batch["mask"]
        noise = torch.randn(truth.shape, generator=generator(seed))
        four, two = (teacher.sample(batch, noise=noise, calls=calls) for calls in (4, 2))
        ours = student.sample(batch, noise=noise)
        row = {
            "to the teacher: student, 2 calls": absolute_error(ours, four, mask),
            "to the teacher: teacher at 2 calls": absolute_error(two, four, mask),
            "to the truth: student": absolute_error(ours, truth, mask),
            "to the truth: teacher": absolute_error(four, truth, mask),
            "seconds": time.perf_counter() - begin,
        }
        row = {key: float(value) for key, value in row.items()}
        print(seed, {key: round(value, 4) for key, value in row.items()}, flush=True)
        for key, value in row.items():
            rows.setdefault(key, []).append(value)
    mean = {key: told(key, values) for key, values in rows.items()}
    assert mean["to the teacher: student, 2 calls"] <= 0.5 * mean["to the teacher: teacher at 2 calls"]
    assert mean["to the truth: student"] <= 1.1 * mean["to the truth: teacher"]

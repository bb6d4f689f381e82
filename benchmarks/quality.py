"""Image quality against network calls on one class-conditional U-Net: ``python -m benchmarks quality``.

MNIST at 14 x 14 (``EFFDL_DATA``), one architecture, one number of updates for each network (``_quality_networks``), and
every way of the house to sample with 1 to 100 calls. Quality: the Fréchet and kernel distances of torchmetrics on the
64 features of a small classifier trained here, 1,000 images against the 10,000 test images. Everything is kept in
``folder``; a seed that is there is not made again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor, nn

from benchmarks._quality_networks import SIDE, Judge, Networks, digits, train_all, trained_judge
from effdl.core.capture import evaluating
from effdl.core.random import generator, preserved_rng
from effdl.core.solvers import odeint, sample_loop
from effdl.diffusion.instaflow import euler
from effdl.diffusion.score_sde import VP, ODESampler, PCSampler, ScoreAdapter

CALLS = (1, 2, 4, 8, 25, 100)
COUNT, BATCH = 1000, 250
Draw = Callable[[Networks, Tensor, Tensor, int], Tensor | None]


class Labelled(nn.Module):
    """A network ``(x, t)`` for these classes, which counts its calls."""

    def __init__(self, network: nn.Module, labels: Tensor) -> None:
        super().__init__()
        self.network, self.labels, self.calls = network, labels, 0

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.network(x, t, class_labels=self.labels).sample


def scheduled(which: str, network: str, **settings: Any) -> Draw:
    """A scheduler of diffusers, its timesteps spaced from the noisy end: others start too late for few calls."""
    makers = {"DDIM": DDIMScheduler, "DPM-Solver++": DPMSolverMultistepScheduler}

    def draw(networks: Networks, noise: Tensor, labels: Tensor, calls: int) -> Tensor:
        scheduler = makers[which](timestep_spacing="trailing", **settings)
        return sample_loop(Labelled(networks[network], labels), noise, scheduler, calls, generator(1))

    return draw


def predictor_corrector(networks: Networks, noise: Tensor, labels: Tensor, calls: int) -> Tensor:
    """Half of the calls correct, where that leaves the predictor more than beta_max = 20 steps, which the paper's
    discrete forms need; with fewer calls all of them predict, and with fewer than 21 by Euler-Maruyama."""
    corrector, steps = ("langevin", calls // 2) if calls > 40 else ("none", calls)
    predictor = "reverse_diffusion" if steps > 20 else "euler_maruyama"
    score = ScoreAdapter(Labelled(networks["noise"], labels), VP())
    return PCSampler(predictor, corrector)(VP(steps=steps), score, noise, generator(1))


def flow_ode(networks: Networks, noise: Tensor, labels: Tensor, calls: int) -> Tensor:
    """The probability-flow ODE by Euler steps of equal length."""
    sde, score = VP(), ScoreAdapter(Labelled(networks["noise"], labels), VP())
    grid = torch.linspace(1, sde.eps, calls + 1)
    return odeint(lambda t, x: sde.flow(score, x, x.new_full((len(x),), float(t))), noise, grid, "euler")[-1]


def rectified(network: str, only: int | None = None) -> Draw:
    """Euler steps along a velocity; a distilled network is valid at its own number of calls."""

    def draw(networks: Networks, noise: Tensor, labels: Tensor, calls: int) -> Tensor | None:
        if only not in (None, calls):
            return None
        return euler(lambda x, t: networks.velocity(network)(x, t, labels), noise, calls)

    return draw


def progressive(networks: Networks, noise: Tensor, labels: Tensor, calls: int) -> Tensor | None:
    """The student that was distilled to this number of calls."""
    student = networks.students.get(calls)
    return None if student is None else student.sample({"condition": labels}, noise=noise)


def before_distillation(networks: Networks, noise: Tensor, labels: Tensor, calls: int) -> Tensor | None:
    """The teacher of the progressive distillation, which says x_0, at fewer calls than it was trained for."""
    if calls not in networks.students:
        return None
    return networks.teacher.sample({"condition": labels}, noise=noise, calls=calls)


SAMPLERS: dict[str, Draw] = {
    "DDIM": scheduled("DDIM", "noise"),
    "DPM-Solver++": scheduled("DPM-Solver++", "noise"),
    "score-sde, predictor-corrector": predictor_corrector,
    "score-sde, ODE (Euler)": flow_ode,
    "8-bit network (ptq4dm), DDIM": scheduled("DDIM", "int8"),
    "rectified flow": rectified("flow"),
    "2-reflow": rectified("reflow"),
    "2-reflow, distilled to one step": rectified("distilled", 1),
    "x_0 teacher (prodiff)": before_distillation,
    "progressive distillation (prodiff)": progressive,
}


@torch.no_grad()
def adaptive(networks: Networks, noise: Tensor, labels: Tensor, tolerance: float) -> tuple[Tensor, float]:
    """The same ODE by Runge-Kutta 4(5), and the calls that it took."""
    parts, calls = [], []
    for x, y in zip(noise.split(BATCH), labels.split(BATCH)):
        counted = Labelled(networks["noise"], y)
        parts.append(ODESampler(tolerance)(VP(), ScoreAdapter(counted, VP()), x))
        calls.append(counted.calls)
    return torch.cat(parts), sum(calls) / len(calls)


@torch.no_grad()
def distances(judge: Judge, images: Tensor, real: Tensor) -> dict[str, float]:
    """Fréchet and kernel distance of torchmetrics, on the judge's features."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    fid = FrechetInceptionDistance(feature=judge.features, input_img_size=(1, SIDE, SIDE))
    kid = KernelInceptionDistance(feature=judge.features, subsets=20, subset_size=500)
    for metric in (fid, kid):
        metric.update(real, real=True)
        metric.update(images.clamp(-1, 1), real=False)
    with preserved_rng():
        torch.manual_seed(0)  # of the subsets
        return {"fid": float(fid.compute()), "kid": float(kid.compute()[0])}


@torch.no_grad()
def one_seed(folder: Path, seed: int) -> dict[str, Any]:
    """Every sampler at every number of calls."""
    judge, (real, _) = trained_judge(folder), digits("test")
    networks = train_all(folder / f"seed{seed}", seed)
    labels, found = torch.arange(COUNT) % 10, {}
    noise = torch.randn(COUNT, 1, SIDE, SIDE, generator=generator(10_000 + seed))
    for name, draw in SAMPLERS.items():
        for calls in CALLS:
            began = time.perf_counter()
            with evaluating(networks):
                parts = [draw(networks, x, y, calls) for x, y in zip(noise.split(BATCH), labels.split(BATCH))]
            if parts[0] is None:
                continue
            images, seconds = torch.cat(parts).clamp(-1, 1), time.perf_counter() - began
            found[f"{name} @ {calls}"] = {**distances(judge, images, real), "seconds": seconds}
            if seed == 0:
                torch.save(images[:10].contiguous(), folder / f"{name.replace('/', '_')} @ {calls}.pt")
    for tolerance in (1e-1, 1e-2, 1e-3):
        images, calls = adaptive(networks, noise, labels, tolerance)
        found[f"score-sde, ODE (RK45, {tolerance:g})"] = {**distances(judge, images, real), "calls": calls}
    return {"rows": found, "training": networks.seconds}


def measure(folder: Path, seeds: int = 3) -> list[dict[str, Any]]:
    """One dictionary for each seed, from ``folder`` where it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        path = folder / f"seed{seed}.json"
        if not path.is_file():
            path.write_text(json.dumps(one_seed(folder, seed), indent=1))
    return [json.loads((folder / f"seed{seed}.json").read_text()) for seed in range(seeds)]


def lines(found: list[dict[str, Any]], metric: str = "fid") -> list[list[str]]:
    """For printing: a row per way of sampling, a column per number of calls."""

    def cell(key: str) -> str:
        values = torch.tensor([run["rows"][key][metric] for run in found if key in run["rows"]])
        return "–" if not len(values) else f"{values.mean():.3g} ± {values.std():.2g}"

    table = [[f"{metric}, calls", *map(str, CALLS)]]
    table += [[name, *(cell(f"{name} @ {calls}") for calls in CALLS)] for name in SAMPLERS]
    for key in (key for key in found[0]["rows"] if "RK45" in key):
        calls = [run["rows"][key]["calls"] for run in found]
        table.append([f"{key}: {sum(calls) / len(calls):.0f} calls", cell(key)])
    return table


def pictures(folder: Path, found: list[dict[str, Any]]) -> list[Path]:
    """``quality.png``: the curves; ``quality_samples.png``: the same noises, by way and number of calls."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9.5, 5), layout="constrained")
    for name in SAMPLERS:
        points = [(calls, [run["rows"][f"{name} @ {calls}"]["fid"] for run in found])
                  for calls in CALLS if f"{name} @ {calls}" in found[0]["rows"]]  # fmt: skip
        means = [sum(values) / len(values) for _, values in points]
        spread = [torch.tensor(values).std().item() if len(values) > 1 else 0.0 for _, values in points]
        axis.errorbar([calls for calls, _ in points], means, spread, marker="o", capsize=2, label=name)
    axis.set(xscale="log", yscale="log", xlabel="network calls per image", ylabel="Fréchet distance (lower is better)")
    axis.set_xticks(CALLS, map(str, CALLS))
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(folder / "quality.png", dpi=120)
    plt.close(figure)
    return [folder / "quality.png", _samples(folder)]


def _samples(folder: Path) -> Path:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(SAMPLERS), len(CALLS), figsize=(13, 6), layout="constrained")
    for name, row in zip(SAMPLERS, axes):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        for calls, cell in zip(CALLS, row):
            path = folder / f"{name.replace('/', '_')} @ {calls}.pt"
            cell.set(xticks=[], yticks=[], frame_on=False)
            if path.is_file():
                images = torch.load(path, weights_only=True)[:6, 0]
                cell.imshow(torch.cat(list(images), 1), cmap="gray", vmin=-1, vmax=1)
    for calls, cell in zip(CALLS, axes[0]):
        cell.set_title(f"{calls} call{'s' * (calls > 1)}", fontsize=9)
    figure.savefig(folder / "quality_samples.png", dpi=110)
    plt.close(figure)
    return folder / "quality_samples.png"

"""ptq4dm: the states that a denoising network is looked at with, and the time each of them was asked at."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from effdl.core.errors import ConfigurationError, check, check_choice
from effdl.core.random import generator
from effdl.core.solvers import denoising_path
from effdl.diffusion._ptq4dm_settings import Settings
from effdl.diffusion.ptq4dm import time_steps

PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")
Condition = dict[str, Tensor]
TIME_NAMES = ("t", "time", "times", "timesteps", "sigma", "sigmas", "noise_level")


@dataclass
class Samples:
    """Calls of a network.

    Args:
        states: [N, ...], what it was given.
        times: [N], at which of the scheduler's times.
        steps: int64 [N], the same counted from the image's end in steps of the sampler, 0 .. T - 1.
        total: T.
        condition: keyword arguments, rows of [N, ...].
    """

    states: Tensor
    times: Tensor
    steps: Tensor
    total: int
    condition: Condition = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.states)

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, Condition]]:
        """``(x, t, condition)`` of ``size`` rows each."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            yield self.states[part], self.times[part], rows(self.condition, part)

    def example(self, network: nn.Module, count: int = 1) -> tuple[tuple, dict[str, Any]]:
        """``(args, kwargs)`` of one call of the network, with the first rows."""
        x, t, condition = next(self.batches(count))
        return ((x,), {"timestep": t, **condition}) if _names_time(network) else ((x, t), dict(condition))

    def histogram(self, bins: int = 20) -> list[int]:
        """How many states lie in each of equal runs of steps, the image's end first."""
        return torch.histc(self.steps.float(), bins, 0, self.total).long().tolist()


def rows(condition: Condition, part: slice) -> Condition:
    """Rows of every tensor."""
    return {name: value[part] for name, value in condition.items()}


def call(network: nn.Module | Callable, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """The network's output (B, C, ...): what it predicts, without a variance beside it."""
    time = {"timestep": t} if _names_time(network) else {}
    output = network(x, *([] if time else [t]), **time, **condition)
    return output if isinstance(output, Tensor) else output[0]


def _names_time(network: nn.Module | Callable) -> bool:
    """Whether time is a keyword: not every transformer of diffusers has it second."""
    run = network.forward if isinstance(network, nn.Module) else network
    return "timestep" in inspect.signature(run).parameters


def takes_time(network: nn.Module | Callable) -> bool:
    """Whether a network can be asked ``network(x, t)``: its second argument is a time, or has no default."""
    run = network.forward if isinstance(network, nn.Module) else network
    given = list(inspect.signature(run).parameters.values())
    if any(p.name == "timestep" or p.kind is p.VAR_POSITIONAL for p in given):
        return True
    named = [p for p in given if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][1:2]
    return any(p.default is p.empty or p.name in TIME_NAMES for p in named)


def points(scheduler: Any, steps: int | None) -> tuple[Any, Tensor, int]:
    """A copy of the scheduler with its timesteps set, these (from the noisy end), and the inference steps.

    Raises:
        ConfigurationError: no scheduler, an unknown prediction, or no timesteps.
    """
    known = scheduler is not None and hasattr(scheduler, "set_timesteps") and hasattr(scheduler, "step")
    check(known, "scheduler", type(scheduler).__name__, "a diffusers scheduler")
    prediction = getattr(scheduler, "config", {}).get("prediction_type", "epsilon")
    check_choice("prediction_type", prediction, PREDICTIONS)
    given = getattr(scheduler, "num_inference_steps", None)
    fix = "Give steps=50, or call scheduler.set_timesteps first."
    check(steps is not None or given is not None, "steps", steps, "the sampler's inference steps", fix)
    scheduler = copy.deepcopy(scheduler)
    steps = steps or int(given)
    scheduler.set_timesteps(steps)
    return scheduler, scheduler.timesteps, steps


def walk(
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    chosen: Tensor,
    scheduler: Any,
    steps: int | None = None,
    stream: torch.Generator | None = None,
    pairing: str = "matched",
) -> tuple[Tensor, Tensor]:
    """Chains from ``noise`` along the sampler's path, each looked at once.

    Args:
        predict: ``predict(x_t, t)``, the network as the sampler calls it (guided, where it is).
        noise: unit noise [B, ...].
        chosen: t_i of each chain, int64 [B], 0 at the image's end.
        scheduler: a copy of it walks.
        steps: inference steps; ``None``: as its timesteps are set.
        stream: of the noise that stochastic samplers add.
        pairing: ``"matched"``: the state that the network is called with at step t_i, and the time it is called at;
            ``"official"``: the state after the t_i-th step from the noisy end, labelled t_i, as released.

    Returns:
        states [B, ...] and times [B].

    Example::

        states, times = walk(lambda x, t: unet(x, t).sample, noise, time_steps(xi, 50), DDIMScheduler(), steps=50)
    """
    check_choice("pairing", pairing, ("matched", "official"))
    scheduler, timesteps, steps = points(scheduler, steps)
    chosen = chosen.to(noise.device)
    turn = len(timesteps) - 1 - chosen if pairing == "matched" else chosen
    states, times = torch.empty_like(noise), timesteps.to(noise.device)[len(timesteps) - 1 - chosen]
    last = int(turn.max())
    for k, visit in enumerate(denoising_path(predict, noise, scheduler, steps, stream)):
        now = turn == k
        states[now] = (visit.x if pairing == "matched" else visit.after)[now].to(states.dtype)
        if k == last:
            break
    return states, times


def state_shape(network: nn.Module, images: Tensor | None) -> tuple[int, ...]:
    """Of one state of the network, by its configuration, else by the data's."""
    config = getattr(network, "config", None) or {}
    config = config if hasattr(config, "get") else {}
    channels, size = config.get("in_channels"), config.get("sample_size")
    if channels is not None and size is not None:
        return (channels, *((size, size) if isinstance(size, int) else size))
    if images is None:
        raise ConfigurationError("images: needed once, since the network has no configuration with a sample_size.")
    return tuple(images.shape[1:])


def draw(
    network: nn.Module,
    scheduler: Any,
    settings: Settings,
    condition: Condition | None = None,
    empty: Condition | None = None,
    images: Tensor | None = None,
) -> Samples:
    """The calibration set of :func:`effdl.diffusion.ptq4dm.calibrate`; with guidance each state twice, as the pipeline
    asks: with its condition, and with the empty one."""
    guided = settings.guidance != 1
    check(not guided or bool(condition and empty), "guidance", settings.guidance, "1 without condition and empty")
    device = next(network.parameters()).device
    stream = generator(settings.seed)
    _, timesteps, _ = points(scheduler, settings.steps)
    total, count = len(timesteps), settings.num_samples
    chosen = _chosen(settings, total, count, stream)
    repeat = lambda tensor: tensor.to(device)[torch.arange(count, device=device) % len(tensor)]  # noqa: E731
    conditions = [{k: repeat(v) for k, v in given.items()} for given in ((condition or {}), *[empty] * guided)]
    states, times = [], []
    for start in range(0, count, settings.batch_size):
        part = slice(start, min(start + settings.batch_size, count))
        noise = torch.randn(part.stop - start, *state_shape(network, images), generator=stream).to(device)
        if settings.calibration in CALIBRATIONS_OFF_PATH:
            x, t = _off_path(scheduler, settings, noise, timesteps[total - 1 - chosen[part]], images, start)
        else:
            predict = _predict(network, scheduler, [rows(c, part) for c in conditions], settings.guidance)
            x, t = walk(predict, noise, chosen[part], scheduler, settings.steps, stream)
        states.append(x)
        times.append(t.to(device))
    times = torch.cat(times).repeat(len(conditions))
    both = {key: torch.cat([c[key] for c in conditions]) for key in conditions[0]}
    return Samples(torch.cat(states * len(conditions)), times, chosen.repeat(len(conditions)), total, both)


CALIBRATIONS_OFF_PATH = ("noise", "forward", "raw")


def _chosen(settings: Settings, total: int, count: int, stream: torch.Generator) -> Tensor:
    if settings.calibration == "skewed":
        return time_steps(torch.randn(count, generator=stream), total, settings.mu, settings.sigma)
    if isinstance(settings.calibration, int):
        check(settings.calibration < total, "calibration", settings.calibration, f"a step below {total}")
        return torch.full((count,), settings.calibration)
    return torch.randint(total, (count,), generator=stream)


def _predict(
    network: nn.Module, scheduler: Any, conditions: list[Condition], guidance: float
) -> Callable[[Tensor, Tensor], Tensor]:
    variance = str(getattr(scheduler, "config", {}).get("variance_type", "")).startswith("learned")

    def ask(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        out = call(network, x, t, condition).float()
        learned = out.shape[1] == 2 * x.shape[1]
        out = out[:, : x.shape[1]] if learned and not variance else out
        valid = f"a network whose output fits its input {tuple(x.shape)}"
        check(out.shape == x.shape or (learned and variance), "model", tuple(out.shape), valid)
        return out

    def predict(x: Tensor, t: Tensor) -> Tensor:
        out = ask(x, t, conditions[0])
        if len(conditions) == 1:
            return out
        without = ask(x, t, conditions[1])
        return without + guidance * (out - without)

    return predict


def _off_path(
    scheduler: Any, settings: Settings, noise: Tensor, times: Tensor, images: Tensor | None, start: int
) -> tuple[Tensor, Tensor]:
    """Unit noise, data, or noised data, at given times."""
    if settings.calibration == "noise":
        return noise, times
    check(images is not None, "calibration", settings.calibration, "another one: there are no images")
    index = torch.arange(start, start + len(noise)) % len(images)
    data = images[index.to(images.device)].to(noise)
    return (data if settings.calibration == "raw" else scheduler.add_noise(data, noise, times)), times

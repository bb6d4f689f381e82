"""ptq4dm: what is told of a quantised denoising network, in numbers and in pictures."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effdl.callbacks._quantized_report import Finished
from effdl.core.calibrate import to_device
from effdl.core.capture import evaluating
from effdl.core.deploy import UnsupportedBackendError, deploy
from effdl.core.export import plain_state, product
from effdl.core.input_quantizers import QuantizedInput
from effdl.core.random import generator
from effdl.core.report import latencies_ms
from effdl.core.solvers import sample_loop
from effdl.diffusion._ptq4dm_samples import Samples, call

LATENCY_BATCH = 16


def compared(
    told: dict[str, Any], run: Finished, samples: Samples, inputs: dict[str, QuantizedInput], images: list[Tensor]
) -> dict[str, Any]:
    """A quantiser's report with what W8A8 adds: errors, ranges, time steps, integer kernels.

    ``output_error`` is of the network's answer at the calibrated states. Near the image's end it is large for a network
    that predicts noise, because there the noise is below the first layer's step; ``sample_error`` is of the samples
    (the same noises through both networks, :func:`sampled`), where it does not count.
    """
    from safetensors.torch import save

    network, reference = product(run.module).cpu(), run.compared.cpu()
    x, t, condition = to_device(next(samples.batches(LATENCY_BATCH)), "cpu")
    with evaluating(network), evaluating(reference), torch.no_grad():
        want = call(reference, x, t, condition).float()
        told["output_error"] = _relative(call(network, x, t, condition), want)
        models = {"float": reference, "decoding": network}
        try:
            models["int8"] = deploy(network, "torch-int8")
            told["int8_disagrees"] = _relative(call(models["int8"], x, t, condition), call(network, x, t, condition))
        except UnsupportedBackendError as refusal:
            told["int8"] = str(refusal)
    args, kwargs = samples.example(network, LATENCY_BATCH)
    times = latencies_ms(list(models.values()), *to_device((args, kwargs), "cpu"), seconds=3.0)
    told |= {f"batch_of_{len(x)}_{name}_ms": time for name, time in zip(models, times)}
    told["artifact_ratio"] = told["artifact_bytes"] / len(save(plain_state(reference)))
    told["sample_error"] = _relative(images[1], images[0])
    told["time_steps"] = samples.histogram()
    for name, record in inputs.items():
        row = next((row for key, row in told["layers"].items() if f"{name}.weight".endswith(key)), None)
        if row is None:  # an attention module: its four operands
            row = told.setdefault("matmuls", {}).setdefault(name, {})
        row |= {"input_bits": record.bits, "low": record.low.tolist(), "high": record.high.tolist()}
        row |= {end: value[0] for end, value in row.items() if isinstance(value, list) and len(value) == 1}
    return told


def _relative(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want.float()).norm() / want.float().norm().clamp(min=1e-30))


def draw_figures(folder: Path, samples: Samples, images: list[Tensor]) -> None:
    """The same noises through both networks (rows), and the histogram of the time steps."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(6, 2.6), layout="constrained")
    axes = figure.subplots()
    axes.hist(samples.steps.numpy(), bins=range(samples.total + 1))
    axes.set_xlabel("step of the sampler, 0 at the image's end")
    axes.set_ylabel("states")
    figure.savefig(folder / "time_steps.png", dpi=150)
    if samples.states.dim() == 4 and samples.states.shape[1] in (1, 3):
        _grid(images, folder / "samples.png")


def sampled(run: Finished, samples: Samples, scheduler: Any, steps: int) -> list[Tensor]:
    """What the float and the quantised network make of the same noises, on the device of the run."""
    both = (run.compared, product(run.module))
    return [_draw(network, samples, scheduler, steps, run.device) for network in both]


def _draw(
    network: nn.Module, samples: Samples, scheduler: Any, steps: int, device: torch.device, count: int = 8
) -> Tensor:
    x, _, condition = to_device(next(samples.batches(count)), device)
    stream = generator(1)
    noise = torch.randn(x.shape, generator=stream).to(device)
    network.to(device)
    try:
        with evaluating(network):
            predict = lambda x, t: call(network, x, t, condition).float()  # noqa: E731
            return sample_loop(predict, noise, copy.deepcopy(scheduler), steps, stream).cpu()
    finally:
        network.cpu()


def _grid(rows: list[Tensor], path: Path) -> None:
    from torchvision.utils import make_grid, save_image

    images = torch.cat(rows).float().clamp(-1, 1)
    grid = make_grid(images, nrow=len(rows[0]), value_range=(-1, 1), normalize=True)
    zoom = max(1, 64 // images.shape[-1])
    save_image(grid.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2), path)

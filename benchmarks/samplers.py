"""Sampling steps beside diffusers' own pipelines: the same network, schedule, number of steps and noise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler
from torch import Tensor

from benchmarks.race import in_turns, ratios
from effdl.core.random import generator
from effdl.tasks._denoising import stream

STEPS = 10


def _row(name: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor], pairs: int) -> dict[str, Any]:
    """Time ratio of whole samplings, and how far the two images are apart."""
    difference = float((ours() - theirs()).abs().max())
    found = ratios(in_turns({"ours": ours, "theirs": theirs}, pairs), "ours", "theirs")
    return {"name": f"{name}, {STEPS} steps, ours / diffusers", "difference": difference, **found}


def unconditional(pairs: int, batch: int) -> list[dict[str, Any]]:
    """``DiffusionModule.sample`` and ``DDIMPipeline``: 32x32 colour images, ten steps."""
    from effdl.tasks.diffusion import DiffusionModule
    from effdl.tasks.tiny import tiny_unet

    scheduler = DDIMScheduler()
    module = DiffusionModule(tiny_unet(block_out_channels=(32, 64)), scheduler).eval()
    pipeline = DDIMPipeline(module.model, scheduler)
    pipeline.set_progress_bar_config(disable=True)

    def theirs() -> Tensor:
        images = pipeline(batch, stream([0], "cpu"), num_inference_steps=STEPS, output_type="np").images
        return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1

    return [_row("DDIM", lambda: module.sample(batch, steps=STEPS).clamp(-1, 1), theirs, pairs)]


def text_to_image(pairs: int, batch: int) -> list[dict[str, Any]]:
    """``TextToImageModule.sample`` and ``StableDiffusionPipeline`` on a tiny pipeline, without guidance."""
    from effdl.tasks.text_to_image import TextToImageModule
    from effdl.tasks.tiny import tiny_stable_diffusion

    pipeline = tiny_stable_diffusion()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    module, prompts = TextToImageModule(pipeline).eval(), ["a cat"] * batch
    settings = {"num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "pt"}

    def ours() -> Tensor:
        return module.sample(prompts=prompts, steps=STEPS, noise_scheduler=pipeline.scheduler).clamp(-1, 1)

    def theirs() -> Tensor:
        return pipeline(prompts, generator=stream([0], "cpu"), **settings).images * 2 - 1

    return [_row("Stable Diffusion", ours, theirs, pairs)]


@torch.no_grad()
def eight_bits(pairs: int, batch: int) -> list[dict[str, Any]]:
    """A U-Net quantised by ptq4dm, as integer kernels run it and as its codes are decoded, over the fp32 one."""
    from effdl.core.deploy import deploy
    from effdl.diffusion.ptq4dm import Settings, quantize_unet
    from effdl.tasks.tiny import tiny_unet

    float_net = tiny_unet(32, 3, block_out_channels=(64, 128)).eval()
    net = copy.deepcopy(float_net)
    quantize_unet(net, DDIMScheduler(), Settings(steps=4, num_samples=16, batch_size=16))
    x, t = torch.randn(batch, 3, 32, 32, generator=generator(0)), torch.full((batch,), 500)
    runs = {"fp32": lambda: float_net(x, t).sample, "codes": lambda: net(x, t).sample}
    integer = deploy(net, "torch-int8")
    runs["int8"] = lambda: integer(x, t).sample
    outputs, times = {name: run() for name, run in runs.items()}, in_turns(runs, pairs)
    largest = float(outputs["fp32"].abs().max())
    return [
        {
            "name": f"8-bit U-Net, {kind} / fp32", **ratios(times, name, "fp32"),
            "difference": float((outputs[name] - outputs["fp32"]).abs().max()) / largest,
        }
        for name, kind in (("int8", "integer kernels"), ("codes", "codes decoded at each call"))
    ]  # fmt: skip

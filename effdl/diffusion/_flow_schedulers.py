"""Euler on a flow with shifted times, and the stock schedulers that do it for a saved one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effdl.core.errors import check_integer
from effdl.diffusion._flow import Velocity, wide
from effdl.diffusion._timestep_densities import check_shift, shift_time


def sigma_grid(steps: int, shift: float = 1.0, flux: bool = False) -> Tensor:
    """Times ``[steps + 1]`` from 1 to 0, as ``FlowMatchEulerDiscreteScheduler(shift)`` has them, in fp32.

    Evenly spaced between the *shifted* ends S(1) and S(1/1000), then shifted once more, then 0: the smallest but one is
    shifted twice.

    Args:
        steps: N >= 1.
        shift: alpha > 0 of :func:`shift_time`.
        flux: as ``FluxPipeline`` has them: 1, (N - 1) / N, ..., 1 / N, shifted once, then 0.

    Raises:
        ConfigurationError: N < 1, alpha <= 0.
    """
    check_integer("steps", steps, 1)
    check_shift(shift)
    first, last = shift_time(torch.tensor([1.0, 1e-3], dtype=torch.float64), shift).tolist()
    first, last = (1.0, 1 / steps) if flux else (first, last)
    grid = shift_time(torch.linspace(first, last, steps, dtype=torch.float64), shift)
    return torch.cat([grid, grid.new_zeros(1)]).float()


def integrate(velocity: Velocity, noise: Tensor, sigmas: Tensor) -> Tensor:
    """``z <- z + (sigma_{i+1} - sigma_i) v(z, sigma_i)`` from noise to data; one call of ``velocity`` per step.

    Args:
        velocity: ``v(z, t)``, t ``[B]``.
        noise: z at the first sigma, ``[B, ...]``; the state is kept in fp32 at least.
        sigmas: ``[N + 1]``, falling.

    Example::

        latent = integrate(net, torch.randn(4, 16, 32, 32), sigma_grid(28, shift=3.0))
    """
    z = wide(noise)
    for now, following in zip(sigmas.tolist(), sigmas[1:].tolist()):
        z = z + (following - now) * velocity(z, z.new_full((len(z),), now))
    return z


def flow_match_scheduler(shift: float = 1.0) -> Any:
    """diffusers' scheduler of rectified flows, for ``StableDiffusion3Pipeline``, ``DDPMPipeline`` and single networks.

    Args:
        shift: alpha of ``alpha t / (1 + (alpha - 1) t)``.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=shift)


def unet_flow_scheduler(shift: float = 1.0) -> Any:
    """The same for ``StableDiffusionPipeline``, which needs members that diffusers' schedulers of flows lack.

    A step of DPM-Solver of first order on a flow is Euler's; its grid of times begins at 0.999 where the other's does
    at 1.
    """
    from diffusers import DPMSolverMultistepScheduler

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 1, "flow_shift": shift}
    return DPMSolverMultistepScheduler(**flow, steps_offset=1)  # without meaning here, but the pipeline asks for it


def scheduler_of(pipeline: Any, scheduler: Any, shift: float) -> Any:
    """The scheduler with which the stock pipeline (``None``: a network alone) samples a flow trained with this shift.

    One that is diffusers' Euler on flows already keeps its other settings, but for a shift by the number of tokens.
    """
    if type(scheduler).__name__.startswith("FlowMatchEuler"):
        return type(scheduler).from_config(scheduler.config, shift=shift, use_dynamic_shifting=False)
    text_unet = hasattr(pipeline, "encode_prompt") and getattr(pipeline, "unet", None) is not None
    return (unet_flow_scheduler if text_unet else flow_match_scheduler)(shift)

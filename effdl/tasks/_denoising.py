"""One training step of denoising, in plain terms: what is drawn, what is noised, what is to be predicted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from effdl.core.noise import add_noise, alpha_sigma, prediction_of


class Denoising(NamedTuple):
    """What a training step computes before its loss: the ``outputs`` of ``compute_loss``.

    ``prediction`` and ``target`` (B, C, H, W), ``noisy`` the network's input x_t, ``timesteps`` (B,) int, ``condition``
    its keyword arguments.
    """

    prediction: Tensor
    target: Tensor
    noisy: Tensor
    timesteps: Tensor
    condition: dict[str, Any] = {}


def diffuse(
    x0: Tensor, noise: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction: str
) -> tuple[Tensor, Tensor]:
    """``x_t = a x_0 + s eps`` with ``a^2 = alpha-bar_t = 1 - s^2`` (DDPM, eq. 4), and what is to be predicted from it.

    Args:
        x0, noise: (B, ...).
        timesteps: (B,) int.
        alphas_cumprod: alpha-bar, (T,).
        prediction: ``"epsilon"`` (eps), ``"sample"`` (x_0) or ``"v_prediction"`` (a eps - s x_0; Salimans & Ho 2022).

    Returns:
        ``(x_t, target)``, both (B, ...).

    Example::

        noisy, target = diffuse(images, torch.randn_like(images), t, DDPMScheduler().alphas_cumprod, "epsilon")
    """
    a, s = (value.to(x0.dtype) for value in alpha_sigma(alphas_cumprod, timesteps, x0))
    return add_noise(x0, noise, a, s), prediction_of(x0, noise, a, s, prediction)


def stream(seed: Sequence[int], device: torch.device | str) -> torch.Generator:
    """A stream of its own for every (seed, epoch, batch, process)."""
    state = np.random.SeedSequence(list(seed)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) >> 1)

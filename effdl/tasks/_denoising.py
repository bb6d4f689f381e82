"""One training step of denoising, in plain terms: what is drawn, what is noised, what is to be predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from effdl.core.noise import add_noise, alpha_sigma, prediction_of

PROMPT_KEYS = ("prompt", "caption", "text")


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


def prompts_of(batch: Any) -> list[str] | None:
    """The strings of a batch, or ``None``."""
    batch = batch if isinstance(batch, Mapping) else {}
    return next((list(batch[key]) for key in PROMPT_KEYS if key in batch), None)


def min_snr_weight(alphas_cumprod: Tensor, timesteps: Tensor, prediction: str, gamma: float = 5.0) -> Tensor:
    """Min-SNR-gamma weights of the squared error (Hang et al., 2303.09556, section 3.4).

    With ``SNR = a^2 / s^2``: ``min(SNR, gamma)`` on the error of x_0, which is ``min(SNR, gamma) / SNR`` on that of eps
    and ``min(SNR, gamma) / (SNR + 1)`` on that of v. At ``SNR = 0`` (zero terminal SNR) they are 0, 1 and 0.

    Args:
        alphas_cumprod: alpha-bar ``[T]``.
        timesteps: int ``[B]``.
        prediction: ``"epsilon"``, ``"sample"`` or ``"v_prediction"``.
        gamma: the paper's 5.

    Returns:
        Weights ``[B]``, fp32.

    Example::

        loss = (min_snr_weight(scheduler.alphas_cumprod, t, "epsilon") * error).mean()
    """
    a, s = alpha_sigma(alphas_cumprod, timesteps)
    snr = (a / s).square()
    if prediction == "epsilon":
        return (gamma / snr).clamp(max=1)
    return snr.clamp(max=gamma) / (snr + 1 if prediction == "v_prediction" else 1)


def logit_normal(count: int, shift: float, device: Any, generator: torch.Generator | None = None) -> Tensor:
    """Times ``[count]`` in (0, 1), noise at 1: ``u = sigmoid(N(0, 1))``, then ``shift u / (1 + (shift - 1) u)``.

    Source: Esser et al., 2403.03206, sections 3.1 and 5.3.2; the shift is the scheduler's.
    """
    u = torch.randn(count, device=device, generator=generator).sigmoid()
    return shift * u / (1 + (shift - 1) * u)

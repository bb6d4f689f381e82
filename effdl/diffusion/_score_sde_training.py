"""score-sde: a network as a score, denoising score matching, dequantised data."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effdl.core.capture import uncompiled
from effdl.core.errors import check, check_choice, check_integer
from effdl.core.noise import convert, expand
from effdl.diffusion._denoiser import kind
from effdl.diffusion._flow import wide
from effdl.diffusion._score_sde_equations import SDE, Score

TIME_SCALE = 999.0  # label of t = 1, as in DDPM's table of a thousand steps
TRAIN_EPS = 1e-5
Prediction = Literal["epsilon", "score"]


class ScoreAdapter:
    """A network ``h(x, label)`` as a score ``s(x, t)``; the one place that knows labels and scales.

    ========== ========= ========== ==================
    prediction equation  label      s
    ========== ========= ========== ==================
    epsilon    any       999 t      -h / std(t)
    score      ve        sigma(t)   h
    score      vp, subvp 999 t      h
    ========== ========= ========== ==================

    Labels are floats. Under "score" and ve the network divides by sigma itself, as NCSN++ does and as a ``UNet2DModel``
    with ``time_embedding_type="fourier"``, which reads ln sigma. The score is divided in fp32 at least.

    Args:
        network: an unconditional ``UNet2DModel``, or any ``network(x, label)``; it is called with ``x`` in its own
            floating dtype.
        sde: the forward equation.
        prediction: ``None``: ``"score"`` for ve, unless the network is a ``UNet2DModel`` that reads positions; else
            ``"epsilon"``.

    Raises:
        ConfigurationError: no callable, a class-conditional U-Net (classes enter by a classifier, at sampling), one
            that divides by its label (``"fourier"``) with anything but ve and ``"score"``.

    Example::

        score = ScoreAdapter(tiny_unet(8, 1), VP())
        score(torch.randn(2, 1, 8, 8), torch.tensor([0.1, 0.9]))
    """

    def __init__(self, network: Any, sde: SDE, prediction: Prediction | None = None) -> None:
        check_choice("prediction", prediction, (None, "epsilon", "score"))
        check(callable(network), "model", type(network).__name__, "a callable (x, label)")
        stock = kind(network)
        check(stock in ("", "UNet2DModel"), "model", stock, "a UNet2DModel or any network(x, label)")
        config = uncompiled(network).config if stock else {}
        check(config.get("num_class_embeds") is None, "model", "num_class_embeds", "an unconditional network",
              "Classes enter at sampling, by a classifier on noisy data.")  # fmt: skip
        fourier = config.get("time_embedding_type") == "fourier"
        usual = "score" if sde.name == "ve" and (fourier or not stock) else "epsilon"
        self.network, self.sde, self.prediction = network, sde, prediction or usual
        by_sigma = sde.name == "ve" and self.prediction == "score"
        check(by_sigma or not fourier, "model", "time_embedding_type='fourier'", "'positional'",
              "A network with Fourier features divides by its label: it is made for ve and 'score'.")  # fmt: skip
        self._by_sigma = by_sigma

    def label(self, t: Tensor) -> Tensor:
        """What the network is told of times ``[B]``."""
        return self.sde.std(t) if self._by_sigma else TIME_SCALE * t

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """grad log p_t(x), ``[B, ...]``, at times ``[B]``."""
        dtype = x.dtype
        if isinstance(self.network, nn.Module):
            dtype = next((p.dtype for p in self.network.parameters() if p.is_floating_point()), dtype)
        output = self.network(x.to(dtype), self.label(t))
        output = wide(output if isinstance(output, Tensor) else output[0])
        check(output.shape == x.shape, "model", tuple(output.shape), f"an output of its input's shape {tuple(x.shape)}")
        a, s = expand(self.sde.scale(t), x), expand(self.sde.std(t), x)
        return convert(output, x, a, s, self.prediction, "score")


def score_matching_loss(
    sde: SDE, score: Score, x0: Tensor, t: Tensor, noise: Tensor,
    likelihood_weighting: bool = False, reduce_mean: bool = True, per_example: bool = False,
) -> Tensor:  # fmt: skip
    """Denoising score matching, averaged over the batch (eq. 7).

    ``reduce((std s + z)^2)``, the weight std^2, or ``g^2 reduce((s + z / std)^2)``, with which the loss bounds the
    negative log-likelihood. ``reduce`` is the mean over the elements of an example, or half their sum.

    Args:
        sde: the forward equation.
        score: s(x, t).
        x0: data ``[B, ...]``.
        t: times ``[B]`` in (0, 1]; training draws them from U(1e-5, 1).
        noise: z ``[B, ...]``.
        likelihood_weighting: lambda = g^2 in place of std^2.
        reduce_mean: the paper: yes for vp and subvp, no for ve; learning rate and clipping depend on it.
        per_example: ``[B]``, not yet averaged.

    Example::

        t = torch.rand(len(x0)) * (1 - 1e-5) + 1e-5
        loss = score_matching_loss(sde, score, x0, t, torch.randn_like(x0))
    """
    noise = wide(noise)
    mean, std = sde.marginal(x0, t)
    s = score(mean + std * noise, t)
    residual = s + noise / std if likelihood_weighting else std * s + noise
    square = residual.square().flatten(1)
    reduced = square.mean(1) if reduce_mean else 0.5 * square.sum(1)
    losses = sde.diffusion(t).square() * reduced if likelihood_weighting else reduced
    return losses if per_example else losses.mean()


def dequantise(x: Tensor, levels: int, uniform: Tensor | None = None) -> Tensor:
    """Uniform noise within each grey level: ``2 (k + u) / levels - 1`` of ``x = 2 k / (levels - 1) - 1``.

    Args:
        x: in [-1, 1], ``[B, ...]``, of ``levels`` equidistant values.
        levels: >= 2.
        uniform: u in [0, 1), like ``x``; drawn from the global stream by default.

    Example::

        likelihood(sde, score, dequantise(images, 256), offset=dequantised_offset(256))
    """
    check_integer("levels", levels, 2)
    k = ((wide(x) + 1) / 2 * (levels - 1)).round()
    return 2 * (k + (torch.rand_like(k) if uniform is None else uniform.to(k))) / levels - 1


def dequantised_offset(levels: int) -> float:
    """log2 of levels per unit of [-1, 1]: 7 for 256, 3 for 16; what bits per dimension of densities lack."""
    return math.log2(levels / 2)

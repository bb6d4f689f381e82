"""smooth-diffusion's mathematics: how far the one-step estimate moves with the noise; how smooth a path of images is.

Guo et al., Smooth Diffusion (arXiv 2312.04410), sections 3.2 and 4.1; the running mean is that of StyleGAN2's
path-length regulariser. ``a = sqrt(alpha-bar)``, ``s = sqrt(1 - alpha-bar)``, ``x_t = a x_0 + s eps``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from effdl.core.distributed import all_reduce_mean
from effdl.core.errors import ConfigurationError, check, check_integer
from effdl.core.noise import alpha_sigma, convert
from effdl.diffusion._flow import wide


def weighted_direction(noise: Tensor, s: Tensor) -> Tensor:
    """``Delta y = s N(0, I) / sqrt(C H W)``, ``[B, ...]``: of length about s.

    The weight s tempers low-noise timesteps, where eps hardly enters the input: one running mean serves every t.

    Args:
        noise: raw N(0, I) draws ``[B, ...]``.
        s: ``[B, 1, ...]``.
    """
    return s * noise / noise[0].numel() ** 0.5


def noise_variations(estimate: Tensor, noise: Tensor, direction: Tensor) -> Tensor:
    """``r_i = || d <x0_hat, Delta y> / d eps ||_2`` per sample, with a graph for the second derivative.

    Args:
        estimate: x0_hat ``[B, ...]``, made from ``noise``.
        noise: what to differentiate by, ``[B, ...]``, requiring a gradient.
        direction: Delta y ``[B, ...]``.

    Returns:
        ``[B]``, in at least fp32.

    Raises:
        ConfigurationError: ``estimate`` does not depend on ``noise``: the network detaches its input.

    Example::

        r = noise_variations(x0_hat, eps, weighted_direction(torch.randn_like(eps), s))
    """
    return torch.linalg.vector_norm(wide(_pulled_back(estimate, direction, noise)).flatten(1), dim=1)


def _pulled_back(estimate: Tensor, direction: Tensor, noise: Tensor, *others: Tensor) -> Tensor:
    """``d <estimate, direction> / d noise``, plus the same by ``others``; an estimate must depend on ``noise``."""
    inner = (estimate * direction).sum()
    inputs = (noise, *others)
    grads = torch.autograd.grad(inner, inputs, create_graph=True, allow_unused=True) if inner.requires_grad else [None]
    if grads[0] is None:
        raise ConfigurationError(
            "the network's output does not depend on its noisy input as autograd sees it: the network detaches its "
            "input or runs under no_grad, and its variation cannot be measured."
        )
    return sum(grad for grad in grads if grad is not None)


def denoiser_variations(
    x_t: Tensor, output: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, prediction: str, noise: Tensor
) -> Tensor:
    """r of a network's own call: eps enters by ``x_t`` alone, so the gradient by eps is s times the one by ``x_t``.

    Args:
        x_t: the network's input ``[B, ...]``, requiring a gradient.
        output: what the network said ``[B, ...]``.
        timesteps: int ``[B]``.
        alphas_cumprod: alpha-bar ``[T]``.
        prediction: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``; converted to x0_hat, in fp32 (1/a is up to 15).
        noise: raw N(0, I) for the direction ``[B, ...]``.

    Returns:
        ``[B]``, in at least fp32.
    """
    with torch.autocast(x_t.device.type, enabled=False):
        a, s = alpha_sigma(alphas_cumprod, timesteps, x_t)
        # x0_hat also holds x_t itself: apart, so that a network that ignores its input is noticed
        direct = x_t.detach().requires_grad_()
        estimate = convert(wide(output), wide(direct), a, s, prediction, "sample")
        v = s * wide(_pulled_back(estimate, weighted_direction(wide(noise), s), x_t, direct))
        return torch.linalg.vector_norm(v.flatten(1), dim=1)


def variation_penalty(
    r: Tensor, running: Tensor, decay: float = 0.01, mean: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``mean (r - a)^2`` around the *new* running mean ``a = running + decay (mean(r) - running)``.

    The gradient goes through ``decay mean(r)`` as well; only the stored a is detached.

    Args:
        r: variations ``[B]``.
        running: a before this step, a scalar; 0 at first.
        decay: of the running mean, in (0, 1].
        mean: of r over all processes, detached; ``None``: of ``r``. The processes' gradients then average to those
            of one process with the joined batch, without a collective in the backward pass.

    Returns:
        ``(penalty, a)``, a detached.

    Example::

        penalty, running = variation_penalty(r, running)
    """
    local = r.mean()
    mean = local.detach() if mean is None else mean
    a = running + decay * (mean - running)
    # d/dr of -2 mean(r - a) a(r): worth zero, there for its gradient, whose factor is known beforehand
    through_a = -2 * decay * (mean - a) * (local - local.detach())
    return (r - a).square().mean() + through_a, a


class RunningVariation:
    """The running mean a over the steps of a training, the same on every process.

    A plain tensor and no buffer: it stays fp32 under bf16-true, and out of averaged weights. A batch that comes again
    at once (SAM, LBFGS) counts once.

    Args:
        decay: in (0, 1].
    """

    def __init__(self, decay: float) -> None:
        self.decay, self.mean = decay, torch.zeros(())
        self.restart()

    def restart(self) -> None:
        """Forget which batch came last."""
        self._last, self._before = None, self.mean

    def penalty(self, r: Tensor, batch: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """Penalty and mean r over all processes; moves a.

        Args:
            r: ``[B]``.
            batch: its epoch and number; ``None``: certainly a new one.
        """
        if batch is None or batch != self._last:
            self._last, self._before = batch, self.mean
        mean = r.detach().mean()
        all_reduce_mean(mean)
        with torch.autocast(r.device.type, enabled=False):
            penalty, self.mean = variation_penalty(r, self._before.to(r), self.decay, mean)
        return penalty, mean


def slerp(start: Tensor, end: Tensor, weights: Tensor) -> Tensor:
    """Spherical interpolation per sample: ``sin((1-w) th)/sin th start + sin(w th)/sin th end``, th the angle between.

    Args:
        start, end: ``[B, ...]``, not parallel.
        weights: ``[K]`` in [0, 1].

    Returns:
        ``[B, K, ...]``.
    """
    flat = [wide(x).flatten(1) for x in (start, end)]
    angle = torch.arccos(torch.nn.functional.cosine_similarity(*flat).clamp(-1, 1))[:, None]
    left, right = ((w * angle).sin() / angle.sin() for w in (1 - weights, weights))
    path = left[..., None] * flat[0][:, None] + right[..., None] * flat[1][:, None]
    return path.view(len(start), len(weights), *start.shape[1:])


def path_distances(images: Tensor) -> Tensor:
    """``d_k = || x_{k+1} - x_k ||_2`` along paths of images: ``[P, K + 1, ...]`` to ``[P, K]``."""
    return torch.linalg.vector_norm(wide(images).diff(dim=1).flatten(2), dim=2)


def interpolation_std(images: Tensor) -> Tensor:
    """ISTD: the mean over paths of the standard deviation of adjacent images' distances; lower is smoother.

    Args:
        images: ``[P, K + 1, ...]``, K >= 2, made from evenly spaced slerps of P pairs of noises.

    Returns:
        A scalar.

    Example::

        paths = slerp(noise_a, noise_b, torch.linspace(0, 1, 10))
        value = interpolation_std(generate(paths.flatten(0, 1)).view(len(paths), 10, 3, 32, 32))
    """
    check(images.dim() >= 3 and images.shape[1] >= 3, "images", tuple(images.shape), "[pairs, 3 points or more, ...]")
    return path_distances(images).std(dim=1, correction=0).mean()


@torch.no_grad()
def interpolated_images(
    generate: Callable[[Tensor, Tensor], Tensor], start: Tensor, end: Tensor, points: int = 10
) -> Tensor:
    """Images along ``points`` evenly spaced slerps of pairs of noises.

    Args:
        generate: ``generate(noise [N, ...], pair [N]) -> [N, ...]``, deterministic; ``pair`` numbers the rows of
            ``start``, for conditions that stay fixed along a path.
        start, end: noises ``[P, ...]``.
        points: 3 or more.

    Returns:
        ``[P, points, ...]``.
    """
    check_integer("points", points, 3)
    noise = slerp(start, end, torch.linspace(0, 1, points, device=start.device, dtype=wide(start).dtype))
    pair = torch.arange(len(start), device=start.device).repeat_interleave(points)
    images = generate(noise.flatten(0, 1), pair)
    return images.view(len(start), points, *images.shape[1:])

"""Smooth Grad-CAM++ (slug ``smooth-gradcampp``): class heat-maps, averaged over noisy inputs.

Omeiza et al., "Smooth Grad-CAM++: An Enhanced Inference Level Visualization Technique for Deep Convolutional Neural
Network Models", arXiv 1908.01224. Symbols: ``A`` (B, K, h, w) the target layer's output on the clean input, ``S`` the
logit of the class, ``G = dS/dA`` on one noisy copy, ``D1, D2, D3`` the averages of ``G, G^2, G^3`` over the copies.

The functions are the paper's equations, :class:`SmoothGradCAMpp` runs them on a model.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effdl.attribution import _layers
from effdl.attribution._double import double_copy
from effdl.attribution._explanation import Explanation, LayerMap
from effdl.attribution._layers import channels_last_to_map, tokens_to_map
from effdl.core.capture import capture, uncompiled, undisturbed
from effdl.core.errors import check, check_choice, check_integer, check_number
from effdl.core.random import generator, preserved_rng
from effdl.core.select import Targets, check_targets, select_modules

__all__ = [
    "Explanation",
    "LayerMap",
    "SmoothGradCAMpp",
    "channel_weights",
    "channels_last_to_map",
    "combine",
    "normalize_map",
    "pixel_weights",
    "tokens_to_map",
]


def pixel_weights(
    activation: Tensor, D1: Tensor, D2: Tensor, D3: Tensor, numerator: str = "second", denominator: str = "map"
) -> Tensor:
    """``alpha = D2 / (2 D2 + (sum_ab A_ab) D3)``, 0 where the denominator vanishes (dead gradient). Elementwise.

    The score is ``exp(S)``; on a piecewise-linear net its p-th derivative is ``exp(S) G^p`` and the factor cancels
    (Grad-CAM++ eq. 19), so no higher-order graph is needed.

    Args:
        activation: A of the clean input, (B, K, *spatial), float32 or wider; D1, D2, D3 have the same shape.
        numerator: ``"second"``: D2. ``"first"``: D1, as the paper prints it (a slip: alpha would not be a pure number).
        denominator: ``"map"``: D3 times the sum of A over the map, as in both papers. ``"elementwise"``: the sum of
            A*D3 over the map, as in torch-cam; equal only where G is spatially constant.
    """
    space = tuple(range(2, activation.ndim))
    if denominator == "map":
        tail = activation.sum(space, keepdim=True) * D3
    else:
        tail = (activation * D3).sum(space, keepdim=True)
    below = 2 * D2 + tail
    # Relative to D2: on large maps an honest G^2 is often below 1e-12, so an absolute threshold would blank them.
    dead = below.abs() <= 1e-12 * D2
    return torch.where(dead, 0.0, (D2 if numerator == "second" else D1) / torch.where(dead, 1.0, below))


def channel_weights(alpha: Tensor, D1: Tensor) -> Tensor:
    """``w_k = sum_ij alpha_k(i, j) ReLU(D1_k(i, j))``: (B, K, *spatial) twice -> (B, K)."""
    return (alpha * D1.relu()).flatten(2).sum(2)


def combine(weights: Tensor, activation: Tensor) -> Tensor:
    """``sum_k w_k A_k``, before the ReLU: (B, K) and (B, K, *spatial) -> (B, *spatial)."""
    return (weights.reshape(*weights.shape, *[1] * (activation.ndim - 2)) * activation).sum(1)


def normalize_map(raw: Tensor, eps: float = 1e-8) -> Tensor:
    """ReLU, then min-max to [0, 1] per sample: (B, *spatial). A constant map becomes all zeros."""
    positive = raw.relu()
    low, high = positive.flatten(1).aminmax(dim=1)
    shape = (-1, *[1] * (raw.ndim - 1))
    return (positive - low.view(shape)) / (high - low + eps).view(shape)


class SmoothGradCAMpp:
    """Smooth Grad-CAM++ heat-maps of any ``nn.Module`` that classifies images (or sequences, or volumes).

    The model is left as it was found: ``training`` flags, ``.grad``, buffers and the global random stream, also when
    an error is raised. Works under ``torch.inference_mode``; a compiled model runs uncompiled meanwhile. Powers and
    sums are taken in float32 (G^3 underflows in half precision). Cost: n_samples + 1 forwards, n_samples backwards
    from the output to the layer. Of little use where the map is tiny (2x2), or the evidence negative (all-zero map).

    Args:
        model: returns logits (B, C), a tuple that starts with them, or an object with ``.logits``.
        targets: layers to explain, by module-name glob or type; ``None``: the last layer with a spatial map.
        exclude: layers that ``targets`` (or its default) must not be.
        n_samples: noisy copies per image, >= 1.
        sigma: standard deviation of the noise, >= 0; 0 with ``n_samples=1`` is Grad-CAM++.
        sigma_mode: ``"range"``: sigma times each image's max - min (SmoothGrad's rule); ``"absolute"``: sigma itself.
        mode: ``"derivatives"``: the paper. ``"maps"``: the mean of the normalised Grad-CAM++ maps of the noisy copies.
        alpha_numerator, denominator: see :func:`pixel_weights`.
        channels: feature maps to explain; ``None``: all.
        neurons: region of the layer to explain: a bool mask (h, w) or a half-open box (top, left, bottom, right).
        reshape_transform: layer output -> (B, K, h, w) for token models: ``"vit"``, ``"swin"`` or a function that only
            rearranges entries, such as ``functools.partial(tokens_to_map, grid=(14, 7))``.
        target_fn: model output -> (B,) scores, for segmentation or detection; replaces the class.
        internal_batch_size: the most images in one noisy forward (never fewer than the batch).
        seed: of the noise, the same in every precision; each call draws on.
        double: explain a float64 copy of the model, made anew in each call; the model itself is not touched, all
            results are float64. For exact weights: alpha has a pole where 2 D2 + (sum A) D3 nears 0, and beside it a
            float32 backward is not enough (alpha = 41 is off by 2e-5 of itself); maps hardly change. The copy takes
            twice the memory of float32 parameters, four times that of half precision; 4 to 7 times the time on a CPU,
            on most GPUs more. Where the forward itself casts to float32, it stays as inexact as that, or fails.

    Raises:
        ConfigurationError: a bad argument, an unknown layer (close names are listed), a layer without a spatial map, a
            class out of range, a score that does not depend on the layer; with ``double`` a device without
            float64 or a model that cannot be deep-copied.

    Example::

        import timm, torch

        cam = SmoothGradCAMpp(timm.create_model("resnet18"), targets="layer4")
        maps = cam(torch.randn(8, 3, 224, 224), class_idx=281)        # {"layer4": (8, 224, 224) in [0, 1]}
        one = cam.explain(torch.randn(8, 3, 224, 224))                # predicted classes, with weights and scores
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Targets = None,
        *,
        exclude: Targets = None,
        n_samples: int = 25,
        sigma: float = 0.15,
        sigma_mode: str = "range",
        mode: str = "derivatives",
        alpha_numerator: str = "second",
        denominator: str = "map",
        channels: Sequence[int] | None = None,
        neurons: Tensor | Sequence[int] | None = None,
        reshape_transform: str | Callable[[Tensor], Tensor] | None = None,
        target_fn: Callable[[Any], Tensor] | None = None,
        internal_batch_size: int = 64,
        seed: int = 0,
        double: bool = False,
    ) -> None:
        check_settings(n_samples, sigma, sigma_mode, internal_batch_size, seed, double)
        check_choice("mode", mode, ("derivatives", "maps"))
        check_choice("alpha_numerator", alpha_numerator, ("second", "first"))
        check_choice("denominator", denominator, ("map", "elementwise"))
        check(target_fn is None or callable(target_fn), "target_fn", target_fn, "a function of the model's output")
        self.model, self.n_samples, self.sigma, self.sigma_mode, self.mode = model, n_samples, sigma, sigma_mode, mode
        self.alpha_numerator, self.denominator = alpha_numerator, denominator
        self.channels, self.neurons, self.double = channels, neurons, double
        self.reshape = _layers.resolve_reshape(reshape_transform)
        check_targets("targets", targets)
        check_targets("exclude", exclude)
        self.candidates = list(select_modules(uncompiled(model), targets, exclude))
        self.layers = None if targets is None else self.candidates
        self.target_fn, self.internal_batch_size, self.generator = target_fn, internal_batch_size, generator(seed)

    def __call__(self, x: Tensor, class_idx: int | Sequence[int] | Tensor | None = None, noise: Tensor | None = None):
        """Heat-maps at the input's resolution, {layer: (B, H, W)} in [0, 1]; arguments as in :meth:`explain`."""
        layers = self.explain(x, class_idx, noise).layers
        return {name: _layers.resize(layer.cam, x.shape[2:]) for name, layer in layers.items()}

    def explain(
        self, x: Tensor, class_idx: int | Sequence[int] | Tensor | None = None, noise: Tensor | None = None
    ) -> Explanation:
        """Heat-maps at the layers' resolution, with everything they were made of.

        Args:
            x: (B, C, H, W) floating, in the model's normalised input space.
            class_idx: one class for all, one per sample, or ``None``: the argmax of the *clean* logits, for all copies.
            noise: (n, B, C, H, W) added to ``x`` in place of the drawn noise.
        """
        check(x.is_floating_point() and x.ndim >= 3, "x", tuple(x.shape), "a floating tensor (B, C, *spatial)")
        good = noise is None or (noise.ndim == x.ndim + 1 and noise.shape[1:] == x.shape and len(noise) > 0)
        check(good, "noise", getattr(noise, "shape", None), f"a tensor (n, *{tuple(x.shape)})")
        if self.double:
            return self._explain_in_double(x, class_idx, noise)
        with undisturbed(uncompiled(self.model)), preserved_rng(), torch.compiler.set_stance("force_eager"):
            x = x.detach().clone()
            if self.layers is None:
                dry = (x if self.target_fn else x[:1], self._best_score, self.reshape)
                self.layers = [_layers.default_layer(self.model, self.candidates, *dry)]
            output, tensors = self._run(x)
            classes = None if self.target_fn else _layers.pick_classes(output, class_idx)
            said = [] if self.target_fn else [classes, *_layers.beliefs(output, classes)]
            scores = self._score(output, classes).detach()
            clean = {name: self._map(tensor, name, x.ndim) for name, tensor in tensors.items()}
            del output, tensors  # and with them the clean graph
            sums = self._average(x.detach(), classes, noise, clean)
        return Explanation({name: self._finish(clean[name], sums[name]) for name in self.layers}, scores, *said)

    def _explain_in_double(self, x: Tensor, class_idx: Any, noise: Tensor | None) -> Explanation:
        twin = copy.copy(self)  # draws from the same generator
        twin.model, twin.double = double_copy(self.model, x.device), False
        with torch.autocast(x.device.type, enabled=False):
            explanation = twin.explain(x.double(), class_idx, noise)
        self.layers = twin.layers
        return explanation

    def _run(self, x: Tensor) -> tuple[Any, dict[str, Tensor]]:
        """The model's output and its layers' outputs; the graph starts at ``x``, since all parameters may be frozen."""
        with capture(self.model, self.layers, clone=True) as tensors:
            output = self.model(x.requires_grad_())
        for name in self.layers:
            check(name in tensors, "targets", name, "a layer that runs in the forward pass")
        return output, tensors

    def _average(self, x: Tensor, classes: Tensor | None, noise: Tensor | None, clean: dict) -> dict[str, list[Tensor]]:
        """{layer: [D1, D2, D3]}, or {layer: [mean map]} with ``mode="maps"``: running sums over the noisy copies."""
        sums: dict[str, list[Tensor]] = {}
        n = self.n_samples if noise is None else len(noise)
        for copies in self._copies(x, noise):
            count = len(copies)
            output, tensors = self._run(copies.flatten(0, 1))
            score = self._score(output, classes if classes is None else classes.repeat(count))
            for name, gradient in _layers.gradients(score, tensors).items():
                G = self._map(gradient, name, x.ndim) * _layers.neuron_mask(self.neurons, clean[name])
                terms = [G, G * G, G * G * G]
                if self.mode == "maps":
                    terms = [normalize_map(self._weigh(self._map(tensors[name], name, x.ndim), *terms)[2])]
                means = [term.unflatten(0, (count, len(x))).sum(0) / n for term in terms]
                sums[name] = [a + b for a, b in zip(sums[name], means)] if name in sums else means
        return sums

    def _finish(self, clean: Tensor, sums: list[Tensor]) -> LayerMap:
        if self.mode == "maps":
            return LayerMap(sums[0], clean)
        alpha, weights, raw = self._weigh(clean, *sums)
        return LayerMap(normalize_map(raw), clean, raw, weights, alpha, *sums)

    def _weigh(self, A: Tensor, D1: Tensor, D2: Tensor, D3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, w, and the raw map restricted to the chosen channels and neurons."""
        alpha = pixel_weights(A, D1, D2, D3, self.alpha_numerator, self.denominator)
        weights = channel_weights(alpha, D1)
        chosen = slice(None) if self.channels is None else _layers.check_channels(self.channels, A.shape[1])
        seen = A * _layers.neuron_mask(self.neurons, A)
        return alpha, weights, combine(weights[:, chosen], seen[:, chosen])

    def _copies(self, x: Tensor, noise: Tensor | None) -> Iterator[Tensor]:
        """Noisy copies in chunks (c, B, ...): one draw per copy, so the chunk size does not change the noise."""
        n = self.n_samples if noise is None else len(noise)
        # target_fn may close over the batch (masks, boxes), so it always sees exactly B rows.
        size = 1 if self.target_fn else max(1, self.internal_batch_size // len(x))
        wide = x.flatten(1).to(torch.promote_types(x.dtype, torch.float32))
        spread = wide.amax(1) - wide.amin(1) if self.sigma_mode == "range" else torch.ones_like(wide[:, 0])
        scale = (self.sigma * spread).view(-1, *[1] * (x.ndim - 1))
        for begin in range(0, n, size):
            rows = range(begin, min(begin + size, n))
            if noise is not None:
                e = noise[rows.start : rows.stop].to(x)
            else:
                e = torch.stack([torch.randn(x.shape, generator=self.generator, dtype=torch.float32) for _ in rows])
                e = (e.to(x.device) * scale).to(x.dtype)
            yield x + e

    def _score(self, output: Any, classes: Tensor | None) -> Tensor:
        if self.target_fn is None:
            return _layers.class_logits(output).gather(1, classes[:, None]).squeeze(1)
        score = self.target_fn(output)
        check(isinstance(score, Tensor) and score.ndim == 1, "target_fn", score, "a function that returns scores (B,)")
        return score

    def _best_score(self, output: Any) -> Tensor:
        return self._score(output, None if self.target_fn else _layers.pick_classes(output, None))

    def _map(self, tensor: Tensor, name: str, ndim: int) -> Tensor:
        """The layer's tensor as (B, K, *spatial), detached, float32 or wider."""
        maps = tensor.detach() if self.reshape is None else self.reshape(tensor.detach())
        _layers.check_map(maps, name, ndim)
        return maps.to(torch.promote_types(maps.dtype, torch.float32))


def check_settings(
    n_samples: int, sigma: float, sigma_mode: str, internal_batch_size: int, seed: int, double: bool
) -> None:
    """The settings that the attributor and its callback share."""
    check_integer("n_samples", n_samples, 1)
    check_number("sigma", sigma, 0, math.inf, closed="[)", fix="0.15 is SmoothGrad's default.")
    check_choice("sigma_mode", sigma_mode, ("range", "absolute"))
    check_integer("internal_batch_size", internal_batch_size, 1)
    check_integer("seed", seed, 0)
    check(isinstance(double, bool), "double", double, "True or False")
    if sigma == 0 and n_samples > 1:
        warnings.warn("sigma=0 makes all n_samples copies equal; n_samples=1 gives the same map.", stacklevel=3)

"""ptq4dm: a trained denoising network in 8-bit weights and activations, without training (PTQ4DM, 2211.15736).

Weights are rounded in ranges of their own channel, the inputs of every linear layer and convolution in one range each.
What those ranges must hold is learned from the denoising network itself: it walks its own sampling path from noise, and
is looked at where the walk passes time steps t ~ N(mu T, (sigma T)^2), more of them near the image than near the noise
("normally distributed time-step calibration"). A range [-theta, theta] ([0, theta] for tensors without negative values)
is the one of a hundred that minimises mean |x - x_q|^2.4.

=============================== =====================================================================
:func:`time_steps`              which steps of the path are looked at
:func:`search_range`            one tensor's range, per tensor or per channel
:func:`quantize_unet`           all of it on a bare diffusers network and scheduler
:func:`calibrate`               the records alone; nothing is changed
=============================== =====================================================================

Two things differ from the released script, on purpose. It stores the state *after* the k-th step from the noisy end
under the label k, so that image and time do not belong together; here each state has the time it was asked at
(``pairing="official"`` is kept for comparison). It quantises outputs of layers, before the normalisation; here their
inputs are, which is what integer kernels take (``site="output"`` is kept for comparison). And zero is code 2^(b-1) of a
signed range, where the script's (2^b - 1) / 2 is a tie that float noise decides. The operands of attention's products
are quantised on demand (``quantize_matmul``); the sampler's own update stays float.

Example::

    from effdl.diffusion.ptq4dm import Settings, quantize_unet

    pipeline = DDPMPipeline.from_pretrained("google/ddpm-cifar10-32")
    quantize_unet(pipeline.unet, pipeline.scheduler, Settings(steps=100))
    images = pipeline(num_inference_steps=100).images
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effdl.core.capture import evaluating
from effdl.core.errors import check, check_integer
from effdl.core.input_quantizers import QuantizedInput
from effdl.core.input_ranges import Found, best_candidate, candidate_errors, side_of
from effdl.core.quantized import quantize_
from effdl.core.quantizers import QuantizedWeight, check_finite
from effdl.core.select import Targets, select_modules
from effdl.diffusion._ptq4dm_settings import EDGE_BITS, Settings

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d)


# ---- which steps -------------------------------------------------------------------------------------------------


def time_steps(draws: Tensor, steps: int, mu: float = 0.4, sigma: float = 0.4) -> Tensor:
    """``t_i = clamp(int(T (mu + sigma xi_i)), 0, T - 1)``, rounded towards zero; 0 is the image's end.

    Args:
        draws: xi, standard normal, [N].
        steps: T, network calls of the sampler.
        mu, sigma: fractions of T.

    Returns:
        int64 [N].
    """
    return (steps * (mu + sigma * draws.double())).trunc().clamp(0, steps - 1).long()


# ---- which range -------------------------------------------------------------------------------------------------


def search_range(
    x: Tensor, bits: int = 8, p: float = 2.4, candidates: int = 100, per_channel: bool = False, side: str | None = None
) -> Found:
    """The range of one tensor that minimises mean |x - x_q|^p.

    Args:
        x: any shape; float64 is searched in float64, everything else in float32.
        bits: b.
        p, candidates: see :class:`Settings`.
        per_channel: a range for each entry of the first dimension.
        side: ``"signed"``, ``"positive"`` or ``"negative"``; ``None``: by the sign of all values.

    Raises:
        ConfigurationError: NaN or infinite entries.

    Example::

        found = search_range(activations, bits=8)
        x_q = core.input_ranges.rounded(activations, found.delta, found.zero_point, bits=8)
    """
    check_integer("bits", bits, 2, 8)
    check_finite(x, "x")
    wide = x if x.dtype == torch.float64 else x.float()
    rows = wide.reshape(len(wide), -1) if per_channel else wide.reshape(1, -1)
    largest = rows.abs().amax(1)
    side = side or side_of(float(rows.min()), float(rows.max()))
    errors = candidate_errors(rows, largest, side, bits, p, candidates)
    found = best_candidate(errors, largest, side, bits, rows.shape[1])
    return found if per_channel else found._replace(delta=found.delta[0], theta=found.theta[0], error=found.error[0])


def moving_range(batches: Iterable[Tensor], bits: int = 8, keep: float = 0.9) -> tuple[Tensor, Tensor]:
    """The released script's range of several batches: a search in each, then ``keep`` old + (1 - keep) new.

    It depends on the order of the batches; :func:`calibrate` pools them instead.

    Returns:
        ``(low, high)``, both [].
    """
    low = high = None
    for x in batches:
        found = search_range(x, bits)
        now_low = torch.zeros_like(found.theta) if found.side == "positive" else -found.theta
        now_high = torch.zeros_like(found.theta) if found.side == "negative" else found.theta
        low = now_low if low is None else keep * low + (1 - keep) * now_low
        high = now_high if high is None else keep * high + (1 - keep) * now_high
    check(low is not None, "batches", "none", "one batch or more")
    return low, high


@torch.no_grad()
def weight_record(weight: Tensor, bits: int, p: float = 2.4, candidates: int = 100) -> QuantizedWeight:
    """Codes of a weight, a symmetric range for each output channel (the first dimension)."""
    found = search_range(weight, bits, p, candidates, per_channel=True, side="signed")
    scale = found.delta.to(weight.dtype)  # in which it decodes
    half = 2 ** (bits - 1)
    codes = (weight.float().flatten(1) / scale.float()[:, None]).round().clamp(-half, half - 1).to(torch.int8)
    return QuantizedWeight(codes.view(weight.shape), bits, scale)


# ---- a network ---------------------------------------------------------------------------------------------------


class Calibration(NamedTuple):
    """What :func:`calibrate` found: records of weights and of inputs by layer name (of attention modules' operands by
    the module's), and where it looked."""

    weights: dict[str, QuantizedWeight]
    inputs: dict[str, QuantizedInput]
    samples: Any
    """:class:`effdl.diffusion._ptq4dm_samples.Samples`: the states, their times and their steps."""


def bit_map(names: list[str], bits: int) -> dict[str, int]:
    """Bits of each layer: 8 for the first and the last, by their order in the network."""
    return {name: EDGE_BITS if name in (names[0], names[-1]) else bits for name in names}


def calibrate(
    network: nn.Module,
    scheduler: Any,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    layers: dict[str, nn.Module] | None = None,
    condition: dict[str, Tensor] | None = None,
    empty: dict[str, Tensor] | None = None,
    images: Tensor | None = None,
    context: AbstractContextManager | None = None,
) -> Calibration:
    """Records of all weights and inputs of a denoising network, which is left as it is.

    Args:
        network: a diffusers U-Net or transformer, or any ``network(x, t, **condition)``; called in eval mode.
        scheduler: a diffusers scheduler, as at inference; a copy of it walks.
        settings: see :class:`Settings`.
        layers: which, by name; default every Linear, Conv1d and Conv2d.
        condition: keyword arguments of the network, rows of [M, ...], repeated to ``num_samples``.
        empty: the same of the unconditional half, where ``guidance`` is not 1.
        images: [M, C, H, W] as the network sees data: their shape, where the network has no configuration that tells
            it, and the data of ``calibration="forward"`` or ``"raw"``.
        context: of every call of the network (autocast).

    Raises:
        ConfigurationError: a scheduler without timesteps or of an unknown prediction; nothing to quantise; a layer that
            the network never calls; activations that are not finite, naming layer and time step.
    """
    from effdl.diffusion import _ptq4dm_ranges as ranges
    from effdl.diffusion import _ptq4dm_samples as sampling

    layers = select_modules(network, default=KINDS) if layers is None else layers
    weight_bits, input_bits = (bit_map(list(layers), bits) for bits in settings.bits)
    last = list(layers)[-1] if settings.site == "output" else None  # the network's answer stays float
    with evaluating(network), torch.inference_mode(False), torch.no_grad(), context or nullcontext():
        for name, layer in layers.items():
            check_finite(layer.weight, f"{name}.weight")
        samples = sampling.draw(network, scheduler, settings, condition, empty, images)
        find = (settings.p, settings.candidates)
        weights = {name: weight_record(layer.weight, weight_bits[name], *find) for name, layer in layers.items()}
        shown = {name: layer for name, layer in layers.items() if name != last}
        measured = ranges.Measurement(network, shown, samples, input_bits, settings)
        with ranges.rounded_weights(layers, weights):
            inputs = measured.run()
        if settings.adaround:
            from effdl.diffusion._ptq4dm_rounding import learn_rounding

            weights = learn_rounding(network, layers, weights, inputs, samples, settings)
    return Calibration(weights, inputs, samples)


def quantize_unet(
    unet: nn.Module,
    scheduler: Any,
    settings: Settings = Settings(),  # noqa: B008 (frozen)
    condition: dict[str, Tensor] | None = None,
    empty: dict[str, Tensor] | None = None,
    images: Tensor | None = None,
    targets: Targets = None,
    exclude: Targets = None,
) -> Calibration:
    """Quantise a network in place: no float weight of a selected layer remains, its input has a fixed range.

    The pipeline it belongs to goes on working. ``core.export.save_model(unet, folder)`` writes the codes;
    ``core.deploy.deploy(unet, "torch-int8")`` gives the network that computes with integers.

    Args:
        unet, scheduler, settings, condition, empty, images: as for :func:`calibrate`.
        targets, exclude: layers by name glob or type; default every Linear, Conv1d and Conv2d.

    Raises:
        ConfigurationError: as :func:`calibrate`; the network is as it was then.
    """
    layers = select_modules(unet, targets, exclude, KINDS)
    found = calibrate(unet, scheduler, settings, layers, condition, empty, images)
    quantize_(unet, {f"{name}.weight": record for name, record in found.weights.items()}, found.inputs)
    return found

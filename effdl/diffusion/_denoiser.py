"""Networks as velocities: which time label a network expects, which way its output points, how it is called."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effdl.core.errors import check, check_choice, check_integer
from effdl.diffusion._flow import Condition, wide
from effdl.diffusion._flux import FLUX, call_flux

Denoiser = Callable[[Tensor, Tensor, Any], Tensor]


@dataclass(frozen=True)
class TimeConvention:
    """How a network counts time. Here noise is at t = 0 and data at t = 1; the one place that converts.

    Args:
        time_scale: the label of the last point in time; labels are floats (1000 overflows an embedding table).
        reverse_time: the network counts from data to noise: label ``time_scale (1 - t)`` instead of ``time_scale t``.
        sign: +1 if the network says ``x1 - x0`` (data minus noise), -1 if it says noise minus data.

    Example::

        velocity = TimeConvention(1000.0, True, 1.0).denoiser(unet)
        image = velocity(noise, torch.zeros(4), prompt_embeds) + noise
    """

    time_scale: float = 1.0
    reverse_time: bool = False
    sign: float = 1.0

    def label(self, t: Tensor) -> Tensor:
        """Time labels ``[B]`` of times ``[B]`` in [0, 1]."""
        return self.time_scale * (1 - t if self.reverse_time else t)

    def as_list(self) -> list[Any]:
        """Time scale, direction and sign as JSON and checkpoints hold them."""
        return [self.time_scale, self.reverse_time, self.sign]

    def denoiser(self, network: nn.Module | Callable) -> Denoiser:
        """``network`` as ``v(x, t, condition)``, answering in at least fp32."""

        def velocity(x: Tensor, t: Tensor, condition: Condition = None) -> Tensor:
            out = wide(call_network(network, x, self.label(t), condition))
            check(out.shape == x.shape, "model", tuple(out.shape), f"an output of its input's shape {tuple(x.shape)}")
            return self.sign * out

        return velocity


CONVENTIONS = {
    "instaflow": TimeConvention(1000.0, True, 1.0),  # its released nets: SD's labels, output data - noise
    "diffusers": TimeConvention(1000.0, True, -1.0),  # SD3 and diffusers' flow schedulers: sigma = 1 - t
    "rectified_flow": TimeConvention(999.0, False, 1.0),  # Flow Straight and Fast
    "plain": TimeConvention(1.0, False, 1.0),  # network(x, t, condition) as in the papers' equations
}


def convention_of(name: str | TimeConvention) -> TimeConvention:
    """A convention by name, or itself."""
    if isinstance(name, TimeConvention):
        return name
    check_choice("convention", name, CONVENTIONS)
    return CONVENTIONS[name]


def kind(network: Any) -> str:
    """Class name of a stock diffusers network among those that :func:`call_network` knows, else ``""``."""
    network = getattr(network, "_orig_mod", network)  # torch.compile's wrapper
    names = {base.__name__ for base in type(network).__mro__}
    return next((name for name in ARGUMENT if name in names), "")


# stock network -> the keyword that takes a bare tensor condition
ARGUMENT = {
    "UNet2DModel": "class_labels",
    "UNet2DConditionModel": "encoder_hidden_states",
    "SD3Transformer2DModel": "encoder_hidden_states",
    FLUX: "encoder_hidden_states",
}


def call_network(network: nn.Module | Callable, x: Tensor, label: Tensor, condition: Condition) -> Tensor:
    """One forward pass of a diffusers network, or of any ``network(x, label, condition)``.

    Args:
        network: ``UNet2DModel``, ``UNet2DConditionModel``, ``SD3Transformer2DModel``, ``FluxTransformer2DModel`` (see
            :func:`call_flux`), or any callable.
        x: state ``[B, ...]``; cast, as embeddings are, to the network's own floating dtype.
        label: time labels ``[B]``, floats.
        condition: a tensor (class labels or text embeddings), a dict of keyword arguments for the network's
            ``forward`` (``{"encoder_hidden_states": ..., "pooled_projections": ...}``), or ``None``.

    Returns:
        The raw output ``[B, ...]``.
    """
    if isinstance(network, nn.Module):
        dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), x.dtype)
        x, condition = x.to(dtype), _as_dtype(condition, dtype)
    if not kind(network):
        return network(x, label, condition)
    if kind(network) == FLUX:
        return call_flux(network, x, label, condition)
    if isinstance(condition, Tensor):
        condition = {ARGUMENT[kind(network)]: condition}
    output = network(x, timestep=label, return_dict=False, **(condition or {}))
    return output[0]


def _as_dtype(condition: Condition, dtype: torch.dtype) -> Condition:
    if isinstance(condition, dict):
        return {name: _as_dtype(value, dtype) for name, value in condition.items()}
    return condition.to(dtype) if isinstance(condition, Tensor) and condition.is_floating_point() else condition


class StackedDenoiser(nn.Module):
    """Copies of one network in series, each fed the output of the one before (InstaFlow-1.7B's student).

    ``f_n(... f_2(f_1(x, t, c), t, c) ..., t, c)``. The paper also drops some blocks at the joint, to keep latency near
    one network's, without saying which: they are kept here. The result is no stock network: rebuild it with this
    class before loading its weights.

    Args:
        base: the network to copy; it is not changed.
        copies: n >= 2.

    Example::

        module = ReflowModule(model=StackedDenoiser(unet), teacher=unet, stage="distill")
    """

    def __init__(self, base: nn.Module, copies: int = 2) -> None:
        super().__init__()
        check(isinstance(base, nn.Module), "base", type(base).__name__, "a torch.nn.Module")
        check_integer("copies", copies, 2)
        self.networks = nn.ModuleList(copy.deepcopy(base) for _ in range(copies))

    def forward(self, x: Tensor, label: Tensor, condition: Condition = None) -> Tensor:
        """State, time labels and condition as :func:`call_network` takes them; returns ``[B, ...]``."""
        for network in self.networks:
            x = call_network(network, x, label, condition)
        return x

"""Listening to the one call of a diffusion network inside somebody's training step, ready for second derivatives."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from effdl.core.capture import named_module, uncompiled
from effdl.core.errors import ConfigurationError
from effdl.core.select import NothingMatched

INPUTS = ("sample", "hidden_states", "x")
TIMES = ("timestep", "timesteps", "t")
NETWORKS = ("model", "unet", "transformer", "network", "denoiser")


class NoSuchNetwork(NothingMatched):
    """Not there, or not yet: a module may build its layers late."""


@dataclass
class DenoiserCall:
    """``x_t`` ``[B, ...]`` requiring a gradient, ``timesteps`` int ``[B]``, ``output`` ``[B, ...]`` made from it."""

    x_t: Tensor
    timesteps: Tensor
    output: Tensor

    def normal(self, rows: int, stream: torch.Generator) -> Tensor:
        """N(0, I) of the input's shape, with another number of rows."""
        return torch.randn(rows, *self.x_t.shape[1:], generator=stream, device=self.x_t.device)


def require_first(cls: type, mixin: type) -> None:
    """Raise where a class with a training step of its own stands ahead of the mixin."""
    ahead = cls.__mro__[: cls.__mro__.index(mixin)]
    wrong = [c.__name__ for c in ahead if "training_step" in vars(c) and not issubclass(c, mixin)]
    if wrong:
        name = mixin.__name__
        raise ConfigurationError(f"{name} must come first: class {cls.__name__}({name}, {wrong[0]}).")


def find_network(module: nn.Module, name: str | None = None) -> nn.Module:
    """The diffusion network of a LightningModule: the one named, else by its usual names, else the only child.

    Raises:
        NoSuchNetwork: it is not there, or it is unclear which.
    """
    if name is not None:
        try:
            return named_module(module, name, "network")
        except ConfigurationError as error:
            raise NoSuchNetwork(str(error)) from None
    children = dict(module.named_children())
    found = [children[usual] for usual in NETWORKS if usual in children] or list(children.values())[-1:]
    if not found or (len(children) > 1 and not set(children) & set(NETWORKS)):
        raise NoSuchNetwork(f"which part of {type(module).__name__} predicts? Name it: network='...'.")
    return found[0]


def find_schedule(module: nn.Module) -> tuple[Tensor, str]:
    """``(alpha-bar [T], prediction)`` of a LightningModule that holds a diffusers scheduler, or a part with one.

    Raises:
        ConfigurationError: nothing on the module has ``alphas_cumprod``.
    """
    owners = [module, *vars(module).values(), *module.children()]
    owner = next((part for part in owners if getattr(part, "alphas_cumprod", None) is not None), None)
    if owner is None:
        raise ConfigurationError(
            f"{type(module).__name__} has no noise schedule: keep a DDPM-family scheduler as self.noise_scheduler, or "
            "override diffusion_schedule() to return (alphas_cumprod, prediction)."
        )
    config = getattr(owner, "config", None) or {}
    said = getattr(module, "prediction", None)
    return owner.alphas_cumprod, said if isinstance(said, str) else config.get("prediction_type", "epsilon")


def _argument(args: tuple, kwargs: dict[str, Any], position: int, names: tuple[str, ...]) -> Any:
    keyword = next((kwargs[name] for name in names if name in kwargs), None)
    return keyword if keyword is not None else (args[position] if len(args) > position else None)


@contextlib.contextmanager
def tap_denoiser(network: nn.Module) -> Iterator[list[DenoiserCall]]:
    """Record the network's calls; its noisy input is made to require a gradient on the way in.

    Args:
        network: called as ``network(x_t, timesteps, ...)``, by position or by diffusers' keywords.

    Example::

        with tap_denoiser(self.model) as calls:
            loss = super().training_step(batch, batch_idx)
        x_t, output = calls[-1].x_t, calls[-1].output
    """
    calls: list[DenoiserCall] = []
    inputs: list[Tensor] = []

    def before(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        given = _argument(args, kwargs, 0, INPUTS)
        x_t = given if given.requires_grad else given.detach().requires_grad_()
        inputs[:] = [x_t]
        swap = lambda value: x_t if value is given else value  # noqa: E731
        return tuple(map(swap, args)), {name: swap(value) for name, value in kwargs.items()}

    def after(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        (x_t,) = inputs
        said = output if isinstance(output, Tensor) else output[0]
        said = said[:, : x_t.shape[1]]  # DiT: noise and variance in one output
        times = torch.as_tensor(_argument(args, kwargs, 1, TIMES), device=x_t.device).long()
        calls.append(DenoiserCall(x_t, times.expand(len(x_t)), said))

    network = uncompiled(network)
    handles = [
        network.register_forward_pre_hook(before, with_kwargs=True),
        network.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


REASONS = {
    "is not implemented": "an operation of the network has no second derivative, as fused attention (xformers, flash, "
    "memory-efficient): use diffusers' native attention, which falls back on the plain formula here",
    "use_reentrant=True": "gradient checkpointing must be use_reentrant=False",
    "double backward": "compiled code has no second derivative: train without torch.compile",
}


@contextlib.contextmanager
def twice_differentiable() -> Iterator[None]:
    """The math kernel of attention, the only one with a second derivative, and eager code; errors say what to do."""
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.compiler.set_stance("force_eager"):
            yield
    except RuntimeError as error:
        reason = next((reason for sign, reason in REASONS.items() if sign in str(error)), None)
        if reason is None:
            raise
        raise ConfigurationError(f"smooth-diffusion differentiates the network twice: {reason}.") from error


def is_compiled(module: nn.Module) -> bool:
    """Whether a module or something in it was compiled."""
    whole = getattr(module, "_compiler_ctx", None) is not None  # Lightning's mark
    return whole or any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in module.modules())

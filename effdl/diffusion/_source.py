"""What a flow starts from: a diffusers pipeline, a stock network or any other, loaded, taken apart and saved again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effdl.core.errors import check, check_integer
from effdl.core.export import WEIGHTS, save_safetensors
from effdl.core.fingerprint import fingerprint as weights_of
from effdl.core.random import generator
from effdl.core.teacher import Frozen
from effdl.diffusion._denoiser import TimeConvention, call_network, convention_of, kind
from effdl.diffusion._flow import Condition, Velocity, euler, guided_velocity, wide
from effdl.diffusion._flow_schedulers import unet_flow_scheduler
from effdl.diffusion._flux import FLUX, encode_flux

RECORD = "reflow.json"  # beside model_index.json or config.json: which flow the weights are
DEFAULT_CONVENTION = {
    "UNet2DModel": "instaflow",
    "UNet2DConditionModel": "instaflow",
    "SD3Transformer2DModel": "diffusers",
    FLUX: "diffusers",
}


class FlowSource:
    """A network with everything it needs to be trained on images and prompts, and saved.

    No ``nn.Module``, and a deep copy is itself: VAE, text encoder and the network it was given stay out of the module
    tree, the ``state_dict``, the optimizer and the average.

    Args:
        model: a diffusers pipeline (object, folder or hub id), a stock network (object, folder or configuration), or
            any ``network(x, label, condition)``.
        convention: how the network counts time; ``None``: as its folder records, else by its class.

    Attributes:
        network: the U-Net or transformer.
        pipeline: or ``None``.
        scheduler: or ``None``.
        record: what ``reflow.json`` says, ``{}`` without one.
        is_diffusion: no record, no convention given, and a scheduler that is none for flows.

    Example::

        source = FlowSource("runs/instaflow/version_0/model")
        x1 = source.solve(torch.randn(2, *source.shape), ["a fox", "a crow"], steps=25, guidance=1.5)
    """

    def __init__(self, model: Any, convention: str | TimeConvention | None = None) -> None:
        self.record: dict[str, Any] = {}
        if isinstance(model, (str, Path)):
            model = str(model)
            if (Path(model) / RECORD).is_file():
                self.record = json.loads((Path(model) / RECORD).read_text())
        self.network, self._surroundings, self.scheduler = _take_apart(model)
        self.pipeline = getattr(self._surroundings, "pipeline", None)
        parts = self.pipeline.components if self.pipeline is not None else {}
        beside = [part for role, part in parts.items() if isinstance(part, nn.Module) and role != self.role]
        self._frozen = [Frozen(part) for part in beside]
        recorded = TimeConvention(*self.record["convention"]) if self.record else None
        fallback = DEFAULT_CONVENTION.get(kind(self.network), "plain")
        self.convention = convention_of(convention or recorded or fallback)
        flows = type(self.scheduler).__name__.startswith("FlowMatch") or self.scheduler is None
        self.is_diffusion = not flows and not self.record and convention is None

    def __deepcopy__(self, memo: dict[int, Any]) -> FlowSource:
        return self

    @property
    def role(self) -> str:
        """What the pipeline calls the network: ``"unet"`` or ``"transformer"``; ``""`` without a pipeline."""
        parts = self.pipeline.components if self.pipeline is not None else {}
        return next((role for role in ("unet", "transformer") if parts.get(role) is not None), "")

    @property
    def vae(self) -> nn.Module | None:
        """The autoencoder of a latent pipeline, or ``None``."""
        return self.pipeline.components.get("vae") if self.pipeline is not None else None

    def accepted(self, condition: Any) -> Condition:
        """A batch's condition as far as the network takes one: labels are nothing to an unconditional U-Net.

        Raises:
            ConfigurationError: labels for a network that reads text.
        """
        if not isinstance(condition, Tensor) or condition.is_floating_point():
            return condition
        if kind(self.network) == "UNet2DModel":
            return condition if self.network.class_embedding is not None else None
        check(kind(self.network) == "", "batch", "class labels", f"a 'prompt' per example for {kind(self.network)}")
        return condition

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of one state x (a latent, or an image where there is no VAE); ``None`` where the network does not say."""
        config = getattr(self.network, "config", None)
        size = getattr(config, "sample_size", None)
        if kind(self.network) == FLUX:  # packed: four latents per token, of any number
            size = getattr(self.pipeline, "default_sample_size", None)
            return None if size is None else (config.in_channels // 4, size, size)
        if size is None:
            return None
        return (config.in_channels, *((size, size) if isinstance(size, int) else size))

    def noise(self, condition: Any, seed: int) -> Tensor:
        """x0 for each of the conditions (one for ``None``), drawn on the CPU: the same on every machine."""
        check(self.shape is not None, "noise", None, "a tensor [B, ...]: the network has no sample_size")
        first = next(iter(condition.values())) if isinstance(condition, dict) else condition
        shape = (1 if first is None else len(first), *self.shape)
        return torch.randn(shape, generator=generator(seed))

    def to(self, device: torch.device | str) -> None:
        """Move VAE and text encoders (the network is moved by whoever uses it)."""
        for part in self._frozen:
            part.on(device)

    def encode(self, prompts: Sequence[str], device: torch.device | str) -> Condition:
        """Text embeddings of prompts ``[B]`` as the network takes them: a tensor, or a dict for SD3 and Flux."""
        check(hasattr(self.pipeline, "encode_prompt"), "prompt", prompts[0], "a pipeline with a text encoder")
        if kind(self.network) == FLUX:
            self.to(device)
            return encode_flux(self.pipeline, prompts, device)
        found = self._surroundings.encode_prompts(list(prompts), device)
        known, fix = "a Stable Diffusion 1.x, 2.x, 3 or Flux pipeline", "Give embeddings as 'condition' in the batch."
        check("text_embeds" not in found, "model", type(self.pipeline).__name__, known, fix)
        return found if len(found) > 1 else found["encoder_hidden_states"]

    def latents(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """States of images in [-1, 1]: a sample of the VAE's posterior, shifted and scaled; the image without VAE."""
        return images if self.vae is None else self._surroundings.encode_images(images, generator)

    def decode(self, latents: Tensor) -> Tensor:
        """Images of states; differentiable."""
        return latents if self.vae is None else self._surroundings.decode_images(latents)

    @torch.no_grad()
    def solve(
        self, x0: Tensor, condition: Any = None, steps: int = 25, guidance: float = 1.0,
        network: nn.Module | None = None,
    ) -> Tensor:  # fmt: skip
        """The state at t = 1 of the ODE that starts in ``x0``.

        A flow is integrated by Euler, a diffusion model by DPM-Solver, from N(0, I) to a latent; nothing else of the
        diffusion enters.

        Args:
            x0: noise ``[B, ...]``.
            condition: prompts ``[B]``, or what the network takes (labels ``[B]``, embeddings, a dict, ``None``).
            steps: of the solver.
            guidance: alpha; above 1 it needs prompts, whose null condition is the empty one.
            network: in place of the source's own: then it is a flow.
        """
        check_integer("steps", steps, 1)
        text = isinstance(condition, (list, tuple)) and len(condition) > 0 and isinstance(condition[0], str)
        null = self.encode([""] * len(x0), x0.device) if text and guidance > 1 else None
        condition = self.encode(condition, x0.device) if text else condition
        if network is None and self.is_diffusion:
            return self._denoise(guided_velocity(self._raw, condition, null, guidance), x0, steps)
        denoiser = self.convention.denoiser(self.network if network is None else network)
        return euler(guided_velocity(denoiser, condition, null, guidance), x0, steps)

    def _raw(self, x: Tensor, label: Tensor, condition: Condition) -> Tensor:
        return wide(call_network(self.network, x, label, condition))

    def _denoise(self, predict: Velocity, x: Tensor, steps: int) -> Tensor:
        from diffusers import DPMSolverMultistepScheduler

        solver = DPMSolverMultistepScheduler.from_config(self.scheduler.config)
        solver.set_timesteps(steps, device=x.device)
        for time in solver.timesteps:
            x = solver.step(predict(x, time.expand(len(x))), time, x, return_dict=False)[0]
        return x

    def save(self, folder: str | Path, network: nn.Module, record: dict[str, Any], scheduler: Any = None) -> None:
        """Write the pipeline with ``network`` in it (or ``network`` alone) as stock diffusers loads it.

        A network of no diffusers class becomes ``model.safetensors``. ``scheduler`` replaces the pipeline's, or lies
        beside a network; by default a U-Net pipeline under the diffusers convention gets one for flows.
        """
        network = getattr(network, "_orig_mod", network)
        if self.pipeline is None and scheduler is not None:
            scheduler.save_pretrained(Path(folder) / "scheduler")
        if not hasattr(network, "save_pretrained"):
            save_safetensors(network, Path(folder) / WEIGHTS)
        elif self.pipeline is None:
            network.save_pretrained(folder)
        else:
            own = {self.role: self.network, "scheduler": self.pipeline.scheduler}
            if scheduler is None and self.role == "unet" and self.convention == convention_of("diffusers"):
                scheduler = unet_flow_scheduler()
            self.pipeline.register_modules(**{self.role: network, "scheduler": scheduler or own["scheduler"]})
            try:
                self.pipeline.save_pretrained(folder)
            finally:
                self.pipeline.register_modules(**own)
        (Path(folder) / RECORD).write_text(json.dumps(record, indent=1) + "\n")


class OnlineTeacher:
    """Makes reflow's end points inside the training step: ``x1 = ODE[v_k](x0 | c)`` by Euler.

    Args:
        source: of v_k, frozen here. No part of the module tree: a deep copy is itself.
        steps: Euler steps, N >= 1.
        guidance: alpha.

    Raises:
        ConfigurationError: N < 1, or a diffusion model, which is no flow yet.
    """

    def __init__(self, source: FlowSource, steps: int, guidance: float = 1.0) -> None:
        check_integer("online_steps", steps, 1)
        check(not source.is_diffusion, "online_steps", steps, "None for a diffusion model",
              "It is no flow yet: make its pairs with ReflowPairs.")  # fmt: skip
        self.source, self.steps, self.guidance = source, steps, guidance
        self.network = Frozen(source.network)

    def __deepcopy__(self, memo: dict[int, Any]) -> OnlineTeacher:
        return self

    @torch.no_grad()
    def __call__(self, x0: Tensor, condition: Condition) -> Tensor:
        """End points ``[B, ...]`` of noise ``[B, ...]``."""
        null = self.source.encode([""] * len(x0), x0.device) if self.guidance > 1 else None
        denoiser = self.source.convention.denoiser(self.network.on(x0))
        return euler(guided_velocity(denoiser, condition, null, self.guidance), x0, self.steps)


def _take_apart(model: Any) -> tuple[Any, Any, Any]:
    """Network, surroundings and noise scheduler, ``None`` for what there is not."""
    if isinstance(model, nn.Module) or (callable(model) and not hasattr(model, "components")):
        return model, None, None  # without waking diffusers
    from effdl.tasks._diffusers import take_apart

    network, scheduler, surroundings = take_apart(model)
    return network, surroundings, scheduler


def fingerprint(network: Any) -> str:
    """Sixteen hex digits of a network's weights, ``""`` for a callable without any."""
    return weights_of(network) if isinstance(network, nn.Module) else ""


def merge_delta(
    state: dict[str, Tensor], custom: dict[str, Tensor], base: dict[str, Tensor]
) -> dict[str, Tensor]:
    """``W + (W_custom - W_base)``: what a fine-tuned base model learned, added to the one-step net of that base.

    Args:
        state: of the one-step net.
        custom: of the fine-tuned (DreamBooth, fused LoRA) network.
        base: of the network that both come from.

    Returns:
        A new state dict; entries that ``custom`` or ``base`` lack are kept.

    Raises:
        ConfigurationError: nothing in common, or shapes that differ.

    Example::

        unet.load_state_dict(merge_delta(unet.state_dict(), dreambooth.state_dict(), sd15.state_dict()))
    """
    common = [name for name in state if name in custom and name in base]
    check(len(common) > 0, "custom", sorted(custom)[:3], f"names among {sorted(state)[:3]} ...")
    merged = dict(state)
    for name in common:
        shapes = {tuple(s[name].shape) for s in (state, custom, base)}
        check(len(shapes) == 1, "custom", f"{name}: {sorted(shapes)}", "the same shape in all three networks")
        if state[name].is_floating_point():
            delta = custom[name].float() - base[name].float()
            merged[name] = (state[name].float() + delta).to(state[name].dtype)
    return merged

"""diffusers' folders and pipelines, taken apart for training, put together again for sampling and saving."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from effdl.core.adapters import merged
from effdl.core.errors import ConfigurationError, check
from effdl.core.hub import from_hub
from effdl.core.teacher import Frozen
from effdl.tasks.tiny import tiny_ddpm

NETWORKS = ("unet", "transformer")
INSTEAD = "a diffusers folder, or a configuration as in its config.json"
# Without `accelerate` diffusers prints a paragraph unless it is told that the plain way of loading is wanted.
_LOADING = {"low_cpu_mem_usage": False}


class Surroundings:
    """What stands frozen beside a trained network: the rest of its pipeline, if it has one.

    Not an ``nn.Module``: outside checkpoint, optimizer and DDP. A deep copy (WeightAveraging makes one) shares it.
    """

    def __init__(self, pipeline: DiffusionPipeline | None = None) -> None:
        self.pipeline = pipeline
        self.vae = self._frozen("vae")
        self.text_encoder = self._frozen("text_encoder")
        self.tokenizer = getattr(pipeline, "tokenizer", None)
        names = [] if pipeline is None else pipeline.components
        self.text_encoders = {name: self._frozen(name) for name in names if name.startswith("text_encoder")}
        self.text_encoders = {name: part for name, part in self.text_encoders.items() if part is not None}
        self._empty: dict[str, Tensor] = {}

    def _frozen(self, name: str) -> Frozen | None:
        module = getattr(self.pipeline, name, None)
        return None if module is None else Frozen(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> Surroundings:
        return self

    @property
    def role(self) -> str:
        """What the pipeline calls the network: ``"unet"`` or ``"transformer"``; ``""`` without a pipeline."""
        return "" if self.pipeline is None else _network_name(self.pipeline)

    @property
    def takes_prompts(self) -> bool:
        """Whether :meth:`encode_prompts` knows the pipeline."""
        try:
            return bool(_text_arguments(self.pipeline))
        except ConfigurationError:
            return False

    @property
    def factor(self) -> int:
        """Pixels per latent, along a side."""
        return 1 if self.vae is None else getattr(self.pipeline, "vae_scale_factor", 1)

    def to(self, device: torch.device | str) -> None:
        """Move the VAE and the text encoders; whoever needs one later moves it back."""
        for part in (*self.text_encoders.values(), *([self.vae] if self.vae else [])):
            part.on(device)

    @torch.no_grad()
    def image_moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents' posterior, unscaled, in the dtype of the VAE."""
        vae = self.vae.on(images)
        # half precision overflows some VAEs
        with torch.autocast(images.device.type, enabled=False):
            posterior = vae.encode(images.to(vae.dtype)).latent_dist
        return posterior.mean, posterior.std

    def draw_latents(self, mean: Tensor, std: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A sample of the posterior at unit scale, in fp32."""
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        vae = self.vae.module
        return ((mean + std * noise).float() - _shift(vae)) * vae.config.scaling_factor

    @torch.no_grad()
    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents of unit scale, in fp32; without a VAE the images themselves."""
        if self.vae is None:
            return images.float()
        return self.draw_latents(*self.image_moments(images), generator)

    def decode_images(self, latents: Tensor) -> Tensor:
        """The inverse of :meth:`encode_images`; differentiable."""
        if self.vae is None:
            return latents.float()
        vae = self.vae.on(latents)
        with torch.autocast(latents.device.type, enabled=False):
            return vae.decode((latents.float() / vae.config.scaling_factor + _shift(vae)).to(vae.dtype)).sample.float()

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str], device: torch.device | str) -> dict[str, Tensor]:
        """What the network takes of B prompts, by the pipeline's own rule.

        Returns:
            ``encoder_hidden_states`` (B, L, D); Stable Diffusion XL adds ``text_embeds`` (B, E), 3 adds
            ``pooled_projections`` (B, E).

        Raises:
            ConfigurationError: no text encoder, or a pipeline of another kind.
        """
        takes = _text_arguments(self.pipeline)
        for encoder in self.text_encoders.values():
            encoder.on(device)
        plain = {"device": device, "do_classifier_free_guidance": False}
        arguments: dict[str, Any] = {name: list(prompts) for name in takes}
        with torch.autocast(torch.device(device).type, enabled=False):
            encoded = self.pipeline.encode_prompt(**arguments, num_images_per_prompt=1, **plain)
        if len(encoded) == 2:
            return {"encoder_hidden_states": encoded[0]}
        return {"encoder_hidden_states": encoded[0], POOLED[self.role]: encoded[2]}

    def unconditional(self, device: torch.device | str) -> dict[str, Tensor]:
        """What the pipeline guides away from, for one image: the empty prompt, or zeros where it is told so (XL)."""
        with torch.inference_mode(False):  # asked for in a validation, it must still serve in training
            if not self._empty:
                self._empty = self.encode_prompts([""], device)
                if self.pipeline.config.get("force_zeros_for_empty_prompt"):
                    self._empty = {name: torch.zeros_like(value) for name, value in self._empty.items()}
            self._empty = {name: value.to(device) for name, value in self._empty.items()}
        return self._empty

    @torch.no_grad()
    def encode_tokens(self, input_ids: Tensor) -> Tensor:
        """Hidden states (B, L, D) of token ids (B, L)."""
        if self.text_encoder is None:
            raise ConfigurationError("tokens and prompts need a pipeline with a tokenizer and a text encoder.")
        return self.text_encoder.on(input_ids)(input_ids)[0]

    def tokens(self, prompts: list[str]) -> Tensor:
        """Token ids (B, L) of B strings, at the tokenizer's full length."""
        if self.tokenizer is None:
            raise ConfigurationError("prompts need a pipeline with a tokenizer and a text encoder.")
        length = self.tokenizer.model_max_length
        full = {"padding": "max_length", "truncation": True, "max_length": length}
        return self.tokenizer(prompts, return_tensors="pt", **full).input_ids


POOLED = {"unet": "text_embeds", "transformer": "pooled_projections"}  # the network's names of the pooled text
TEXT_KEYS = ("encoder_hidden_states", *POOLED.values(), "time_ids")


def _text_arguments(pipeline: DiffusionPipeline | None) -> list[str]:
    """Names of the arguments of ``encode_prompt``, of the pipelines whose answer is known here."""
    encode = getattr(pipeline, "encode_prompt", None)
    if encode is None or getattr(pipeline, "tokenizer", None) is None:
        raise ConfigurationError("prompts need a pipeline with a tokenizer and a text encoder.")
    names = [name for name in inspect.signature(encode).parameters if name in ("prompt", "prompt_2", "prompt_3")]
    known = len(names) == 3 if _network_name(pipeline) == "transformer" else len(names) < 3
    check(known, "model", type(pipeline).__name__, "a Stable Diffusion 1.x, 2.x, XL or 3 pipeline",
          "Give embeddings as 'encoder_hidden_states' in the batch.")  # fmt: skip
    return names


def arguments(noisy: Tensor, condition: dict[str, Any], factor: int = 1) -> dict[str, Any]:
    """A condition as the network's forward takes it.

    For Stable Diffusion XL ``text_embeds`` and ``time_ids`` (B, 6) become its ``added_cond_kwargs``; without
    ``time_ids`` an image is said to be whole and of the size that it has, ``factor`` pixels per latent.
    """
    if "text_embeds" not in condition:
        return condition
    condition = dict(condition)
    height, width = (factor * side for side in noisy.shape[-2:])
    ids = noisy.new_tensor([height, width, 0, 0, height, width]).expand(len(noisy), 6)
    added = {"text_embeds": condition.pop("text_embeds"), "time_ids": condition.pop("time_ids", ids)}
    return {**condition, "added_cond_kwargs": added}


def call(network: nn.Module, noisy: Tensor, timesteps: Tensor, condition: dict[str, Any], factor: int = 1) -> Tensor:
    """One forward pass of a U-Net, a transformer, or any ``network(noisy, timesteps, **condition)``; see
    :func:`arguments`."""
    condition = arguments(noisy, condition, factor)
    if "pooled_projections" in condition:
        output = network(hidden_states=noisy, timestep=timesteps, **condition)
    else:
        output = network(noisy, timesteps, **condition)
    return output if isinstance(output, Tensor) else output[0]


def class_tokens(labels: Tensor, width: int) -> Tensor:
    """One-hot tokens (B, 1, width) of classes (B,), for cross-attention; zero for a label outside: the null class."""
    return (labels[:, None] == torch.arange(width, device=labels.device)).float()[:, None]


def _shift(vae: Any) -> float:
    return vae.config.get("shift_factor") or 0.0


def take_apart(model: nn.Module | DiffusionPipeline | dict[str, Any] | str) -> tuple[nn.Module, Any, Surroundings]:
    """Network, noise scheduler (or ``None``) and surroundings of a network, a pipeline, a configuration as in
    ``config.json``, a local folder, a pipeline's hub id, or ``"tiny"``."""
    if isinstance(model, str):
        return _opened(model)
    if isinstance(model, DiffusionPipeline):
        return getattr(model, _network_name(model)), model.scheduler, Surroundings(model)
    if isinstance(model, dict):
        return _configured(model), None, Surroundings()
    check(isinstance(model, nn.Module), "model", type(model).__name__, f"a network, a pipeline, {INSTEAD}")
    return model, None, Surroundings()


def _network_name(pipeline: DiffusionPipeline) -> str:
    name = next((name for name in NETWORKS if getattr(pipeline, name, None) is not None), None)
    check(name is not None, "model", type(pipeline).__name__, f"a pipeline with one of {NETWORKS}")
    return name


def _opened(name: str) -> tuple[nn.Module, Any, Surroundings]:
    if name == "tiny":
        return take_apart(tiny_ddpm())
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        where = "unet" if (folder / "unet").is_dir() else ""
        valid = "a folder of a diffusers pipeline or network"
        check((folder / where / "config.json").is_file(), "model", name, valid, "It has no model_index.json.")
        network = diffusers.AutoModel.from_pretrained(str(folder), subfolder=where or None, **_LOADING)
        return network, _scheduler(folder / "scheduler"), Surroundings()
    arguments = _LOADING | dict.fromkeys(_absent(folder))
    return take_apart(from_hub(DiffusionPipeline.from_pretrained, str(folder), instead=INSTEAD, **arguments))


def _absent(folder: Path) -> Iterator[str]:
    """Parts that a local pipeline was saved without; Stable Diffusion 3 wants to be told of a missing T5."""
    index = folder / "model_index.json"
    parts = json.loads(index.read_text("utf-8")) if index.is_file() else {}
    return (name for name, what in parts.items() if what == [None, None])


def _scheduler(folder: Path) -> Any:
    if not folder.is_dir():
        return None
    name = diffusers.DDPMScheduler.load_config(str(folder))["_class_name"]
    return getattr(diffusers, name).from_pretrained(str(folder))


def _configured(config: dict[str, Any]) -> nn.Module:
    classes: dict[str, Callable] = {cls.__name__: cls for cls in (UNet2DModel, UNet2DConditionModel)}
    name = config.get("_class_name", "UNet2DConditionModel" if "cross_attention_dim" in config else "UNet2DModel")
    check(name in classes, "model", name, f"a _class_name among {list(classes)}")
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    unknown = sorted(set(config) - set(inspect.signature(classes[name]).parameters))
    check(not unknown, "model", unknown, f"entries of the configuration of {name}")
    return classes[name](**config)


def put_together(surroundings: Surroundings, network: nn.Module, scheduler: Any) -> DiffusionPipeline | None:
    """A pipeline around the network: like the one it came from, or a ``DDPMPipeline`` around a UNet2DModel."""
    if surroundings.pipeline is None:
        return DDPMPipeline(network, scheduler) if isinstance(network, UNet2DModel) else None
    pipeline = copy.copy(surroundings.pipeline)
    pipeline.register_modules(**{_network_name(pipeline): network, "scheduler": scheduler})
    return pipeline


def save(surroundings: Surroundings, network: nn.Module, scheduler: Any, folder: str | Path) -> None:
    """A pipeline's folder; for a network that belongs to no pipeline the folders ``unet`` and ``scheduler``."""
    network = merged(network)  # an adapter is folded in: the architecture is a stock one
    pipeline = put_together(surroundings, network, scheduler)
    if pipeline is not None:
        pipeline.save_pretrained(str(folder))
    elif hasattr(network, "save_pretrained"):
        network.save_pretrained(str(Path(folder) / "unet"))
        scheduler.save_pretrained(str(Path(folder) / "scheduler"))
    else:
        raise ConfigurationError(f"a {type(network).__name__} has no save_pretrained: save its state_dict.")

"""Images to features of a frozen diffusion network: noise to one timestep, run up to one block, read."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effdl.core.errors import check, check_integer
from effdl.core.noise import add_noise, alpha_sigma
from effdl.diffusion._feature_feedback import Feedback, mirrored
from effdl.diffusion._feature_heads import Shape
from effdl.diffusion._unet_blocks import default_block, features_of, list_blocks, number_of
from effdl.tasks._diffusers import arguments


class DiffusionFeatureExtractor:
    """Reads blocks of a denoising network at timesteps; holds it, does not train it.

    ``x_t = a_t x + s_t eps`` with fresh eps at every call, then the network up to the last wanted block (in at least
    fp32 outside, in the network's dtype inside).

    Args:
        network: a ``UNet2DModel``, ``UNet2DConditionModel`` or a network of ``transformer_blocks``.
        alphas_cumprod: alpha-bar of the schedule that it was trained with, ``[T]``.
        blocks: numbers (1-based) or layer names; ``None``: the first third of the decoder.
        timesteps: in [0, T - 1].
        null_class: what a class-conditional network is asked with; it must have been trained with such a class.
        condition: further keyword arguments of the network's forward, for one image ``[1, ...]`` (an empty prompt).
        factor: pixels per latent, which Stable Diffusion XL is told.

    Raises:
        ConfigurationError: a block or a timestep out of range, a class-conditional network without ``null_class``.

    Example::

        extractor = DiffusionFeatureExtractor(unet, DDPMScheduler().alphas_cumprod, blocks=[5], timesteps=[90])
        (features,) = extractor(images)                             # one per (timestep, block)
    """

    def __init__(
        self,
        network: nn.Module,
        alphas_cumprod: Tensor,
        blocks: Sequence[int | str] | None = None,
        timesteps: Sequence[int] = (90,),
        null_class: int | None = None,
        condition: dict[str, Any] | None = None,
        factor: int = 1,
    ) -> None:
        self.network, self.alphas_cumprod, self.factor = network, alphas_cumprod, factor
        self._blocks = list_blocks(network)
        wanted = [default_block(self._blocks)] if blocks is None else [number_of(self._blocks, b) for b in blocks]
        check(len(wanted) > 0 and len(set(wanted)) == len(wanted), "block", blocks, "one or more different blocks")
        check(len(timesteps) > 0, "timestep", timesteps, "one or more timesteps")
        for t in timesteps:
            check_integer("timestep", t, 0, len(alphas_cumprod) - 1, "90 was best on ImageNet, up to 200 hardly worse.")
        self.wanted, self.timesteps = wanted, list(timesteps)
        self.feedback: Feedback | None = None
        self.condition = dict(condition or {})
        classes = getattr(network, "config", {}).get("num_class_embeds")
        if classes is not None:
            fix = "A network that was never trained without its labels gives features that depend on them."
            check(null_class is not None, "null_class", None, "the class that stands for 'no class'", fix)
            check_integer("null_class", null_class, 0, classes - 1)
            self.condition["class_labels"] = torch.tensor([null_class])
        else:
            check(null_class is None, "null_class", null_class, "None: the network knows no classes")

    def blocks(self) -> list[tuple[int, str, str]]:
        """``(number, kind, name of the last layer)`` of every block."""
        return [(number, block.kind, block.name) for number, block in enumerate(self._blocks, start=1)]

    def shapes(self, size: tuple[int, int, int]) -> list[Shape]:
        """(C, H, W) of the features of inputs of a size (C, H, W), one per (timestep, block)."""
        found = self._shapes(size, self.wanted)
        return [found[block] for _ in self.timesteps for block in self.wanted]

    def _shapes(self, size: tuple[int, int, int], blocks: Sequence[int]) -> dict[int, Shape]:
        parameter = next(self.network.parameters())
        flags = {module: module.training for module in self.network.modules()}
        self.network.eval()
        try:
            with torch.no_grad():
                found = self._read(torch.zeros(1, *size, device=parameter.device), self.timesteps[0], blocks)
        finally:
            for module, flag in flags.items():
                module.training = flag
        return {block: tuple(z.shape[1:]) for block, z in found.items()}

    def feed_back(self, blocks: Sequence[int | str], size: tuple[int, int, int]) -> Feedback:
        """From now on read in a second pass, into whose encoder decoder ``blocks`` of the first are fed.

        Args:
            blocks: numbers or layer names.
            size: (C, H, W) of the inputs.

        Returns:
            What there is to train.
        """
        pairs = mirrored(self._blocks, blocks, max(self.wanted))
        shapes = self._shapes(size, [*pairs, *pairs.values()])
        self.feedback = Feedback(pairs, {block: channels for block, (channels, _, _) in shapes.items()})
        return self.feedback

    def __call__(self, x: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        """Features fp32 ``[B, C, H, W]`` of images or latents ``[B, C, H, W]``, timesteps outermost.

        Args:
            x: in [-1, 1], or latents of unit scale.
            generator: of the noise, on the device of ``x``.
        """
        maps = (self.at(x, t, self.wanted, generator, self.feedback) for t in self.timesteps)
        return [z for found in maps for z in found.values()]

    def at(
        self,
        x: Tensor,
        t: int,
        blocks: Sequence[int],
        generator: torch.Generator | None = None,
        feedback: Feedback | None = None,
    ) -> dict[int, Tensor]:
        """The features of some blocks at one timestep, of one noisy input, which both passes of a feedback see."""
        channels = getattr(self.network, "config", {}).get("in_channels", x.shape[1])
        fix = "A latent network wants its pipeline's VAE: give the whole pipeline." if channels == 4 else ""
        check(x.shape[1] == channels, "images", f"{x.shape[1]} channels", f"{channels} channels, the network's", fix)
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        self.alphas_cumprod = self.alphas_cumprod.to(x.device)
        a, s = alpha_sigma(self.alphas_cumprod, torch.tensor(t, device=x.device))
        noisy, added = add_noise(x.float(), noise, a, s), None
        if feedback is not None:
            with torch.no_grad():
                first = self._read(noisy, t, list(feedback.pairs))
            added = feedback(first)
        found = self._read(noisy, t, blocks, added)
        return {block: found[block] for block in blocks}

    def layers_after(self) -> list[nn.Module]:
        """The layers that run after the last wanted block."""
        names = [layer for block in self._blocks[max(self.wanted) :] for layer in block.layers]
        names += [name for name in ("conv_norm_out", "conv_out", "norm_out", "proj_out") if hasattr(self.network, name)]
        return [self.network.get_submodule(name) for name in names]

    def _read(
        self, noisy: Tensor, t: int, blocks: Sequence[int], added: dict[int, Tensor] | None = None
    ) -> dict[int, Tensor]:
        times = torch.full((len(noisy),), t, device=noisy.device)
        dtype = next(self.network.parameters()).dtype
        condition = arguments(noisy, _repeated(self.condition, noisy, dtype), self.factor)
        return features_of(self.network, noisy, times, condition, blocks, added)


def _repeated(value: Any, like: Tensor, dtype: torch.dtype) -> Any:
    """A condition of one image, for every image of a batch."""
    if isinstance(value, dict):
        return {name: _repeated(entry, like, dtype) for name, entry in value.items()}
    value = value.to(like.device, dtype if value.is_floating_point() else value.dtype)
    return value.expand(len(like), *value.shape[1:])


def no_prompt(network: nn.Module, surroundings: Any) -> dict[str, Any]:
    """What a text-conditional network gets in place of a prompt."""
    config = getattr(network, "config", {})
    if config.get("cross_attention_dim") is None and config.get("joint_attention_dim") is None:
        return {}
    if surroundings.text_encoders:
        return surroundings.unconditional("cpu")
    width = config.get("encoder_hid_dim") or config.get("cross_attention_dim") or config.get("joint_attention_dim")
    prompt = {"encoder_hidden_states": torch.zeros(1, 1, width)}
    if pooled := config.get("pooled_projection_dim"):  # Stable Diffusion 3
        prompt["pooled_projections"] = torch.zeros(1, pooled)
    return prompt


def input_size(network: Any) -> tuple[int, int, int]:
    """(C, H, W) of a network's inputs, as its configuration says."""
    size = network.config.get("sample_size")
    check(size is not None, "model", "sample_size=None", "a network whose configuration has a sample_size")
    return (network.config["in_channels"], *((size, size) if isinstance(size, int) else tuple(size)))


def warn_unless_signed(images: Tensor) -> None:
    """A network of [-1, 1] that sees [0, 1] or ImageNet's scale loses accuracy without a word."""
    low, high = float(images.min()), float(images.max())
    if low >= 0 or low < -1.5 or high > 1.5:
        warnings.warn(f"images lie in [{low:.2f}, {high:.2f}]; diffusion networks want [-1, 1].", stacklevel=3)

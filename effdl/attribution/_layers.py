"""Which layer to explain, as a map (B, K, *spatial), and which class: shared by the methods of this family."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effdl.core.batch import logits_of
from effdl.core.capture import capture, first_tensor, named_module, uncompiled
from effdl.core.errors import ConfigurationError, check, check_choice, check_integer

Reshape = Callable[[Tensor], Tensor]


def tokens_to_map(tokens: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
    """Tokens (B, P + h*w, D) of a ViT -> (B, D, h, w), without the P leading class and register tokens.

    ``grid`` is (h, w); ``None``: the largest square that fits, which is right for every square image
    (197 = 14*14 + 1, 198 = 14*14 + 2, 201 = 14*14 + 5).
    """
    check(tokens.ndim == 3, "reshape_transform", "vit", f"tokens (B, N, D), not {tuple(tokens.shape)}")
    height, width = grid or (math.isqrt(tokens.shape[1]),) * 2
    check(height * width <= tokens.shape[1], "grid", (height, width), f"at most {tokens.shape[1]} tokens")
    return tokens[:, tokens.shape[1] - height * width :].unflatten(1, (height, width)).permute(0, 3, 1, 2)


def channels_last_to_map(output: Tensor) -> Tensor:
    """Swin's (B, h, w, D), or (B, h*w, D) with h = w, -> (B, D, h, w)."""
    return output.permute(0, 3, 1, 2) if output.ndim == 4 else tokens_to_map(output)


RESHAPES: dict[str, Reshape] = {"vit": tokens_to_map, "swin": channels_last_to_map}


def resolve_reshape(reshape_transform: str | Reshape | None) -> Reshape | None:
    """A ready-made transform by name, or the user's own."""
    if reshape_transform is None or callable(reshape_transform):
        return reshape_transform
    check_choice("reshape_transform", reshape_transform, RESHAPES)
    return RESHAPES[reshape_transform]


def is_map(tensor: Any, ndim: int) -> bool:
    """Floating (B, K, *spatial) with as many dimensions as the input."""
    return isinstance(tensor, Tensor) and tensor.ndim == ndim and tensor.is_floating_point()


def check_map(tensor: Tensor, name: str, ndim: int) -> None:
    """Raise unless the layer's output (after the transform) is a map."""
    fix = "For token models pass reshape_transform='vit', 'swin' or your own function to (B, K, h, w)."
    check(is_map(tensor, ndim), "targets", name, f"a layer with a {ndim}-d map, not {tuple(tensor.shape)}", fix)


def default_layer(
    model: nn.Module, names: Sequence[str], x: Tensor, score: Callable[[Any], Tensor], reshape: Reshape | None
) -> str:
    """Of the layers ``names``, the last with a map of more than one position that the score depends on.

    One dry forward tells. For a CNN it is what feeds the global pooling. For token models (``reshape`` given) it is the
    last normalisation whose map has a gradient: behind the last attention, patch tokens no longer reach a class token.
    """
    kinds = {name: type(named_module(model, name)).__name__ for name in names}
    passing = ("Pool", "Dropout", "Identity")  # they only hand on another layer's map
    names = [name for name, kind in kinds.items() if not any(word in kind for word in passing)]
    names = [n for n in names if "Norm" in kinds[n]] if reshape else names
    x = x.detach().clone().requires_grad_()
    with capture(model, names, clone=True, pick=_tensor_or_none) as seen:
        value = score(model(x)).sum()
    found = {name: t for name, t in seen.items() if t is not None and t.requires_grad and _fits(t, reshape, x.ndim)}
    gradients = torch.autograd.grad(value, list(found.values()), allow_unused=True) if found else []
    reached = [(name, g) for (name, _), g in zip(found.items(), gradients) if g is not None]
    alive = [name for name, g in reached if bool((g if reshape is None else reshape(g)).any())]
    if not reached:
        raise ConfigurationError(
            f"targets=None: {type(uncompiled(model)).__name__} has no layer with a map (B, K, h, w) that the score "
            "depends on. Name one with targets=[...]; for token models pass reshape_transform='vit' or 'swin'."
        )
    return alive[-1] if alive else reached[-1][0]  # a dead network still has a last layer


def _tensor_or_none(output: Any) -> Tensor | None:
    try:
        return first_tensor(output)
    except ConfigurationError:
        return None


def _fits(tensor: Tensor, reshape: Reshape | None, ndim: int) -> bool:
    try:
        maps = tensor if reshape is None else reshape(tensor)
    except (ConfigurationError, RuntimeError, IndexError):
        return False
    return is_map(maps, ndim) and maps.shape[2:].numel() > 1


def gradients(score: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``d sum(score) / d tensor`` for each captured layer, with an error that names a layer the score ignores.

    The batch's scores may be summed: in eval mode each depends on its own sample alone. ``.grad`` is not touched.
    """
    check(score.requires_grad, "targets", list(tensors), "layers that the score depends on", "The output has no graph.")
    found = torch.autograd.grad(score.sum(), list(tensors.values()), allow_unused=True)
    for name, gradient in zip(tensors, found):
        check(gradient is not None, "targets", name, "a layer that the score depends on")
    return dict(zip(tensors, found))


def resize(maps: Tensor, size: Sequence[int]) -> Tensor:
    """(B, *spatial) -> (B, *size), linear in 1, 2 or 3 dimensions, ``align_corners=False``."""
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    return F.interpolate(maps[:, None], size=tuple(size), mode=mode, align_corners=False)[:, 0]


def check_channels(channels: Sequence[int], count: int) -> list[int]:
    """The chosen feature maps, each in [0, count)."""
    chosen = list(channels)
    check(len(chosen) > 0, "channels", channels, "at least one feature map")
    for k in chosen:
        check_integer("channels", k, 0, count - 1)
    return chosen


def neuron_mask(neurons: Tensor | Sequence[int] | None, like: Tensor) -> Tensor:
    """Bool (h, w) of the chosen neurons: the mask itself, or a half-open box (top, left, bottom, right)."""
    space = like.shape[2:]
    if neurons is None:
        return torch.ones(space, dtype=torch.bool, device=like.device)
    if isinstance(neurons, Tensor):
        check(neurons.shape == space and neurons.dtype == torch.bool, "neurons", neurons, f"a bool mask {tuple(space)}")
        return neurons.to(like.device)
    valid = f"a box (top, left, bottom, right) inside {tuple(space)}"
    check(len(space) == 2 and len(neurons) == 4, "neurons", neurons, valid)
    top, left, bottom, right = neurons
    check(0 <= top < bottom <= space[0] and 0 <= left < right <= space[1], "neurons", neurons, valid)
    mask = torch.zeros(space, dtype=torch.bool, device=like.device)
    mask[top:bottom, left:right] = True
    return mask


def class_logits(output: Any) -> Tensor:
    """The logits (B, C) in a model's output."""
    logits = logits_of(output)
    fix = "Pass target_fn, which turns the output into one score per sample."
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
    check(isinstance(logits, Tensor) and logits.ndim == 2, "model", shape, "logits (B, C)", fix)
    return logits


def pick_classes(output: Any, class_idx: int | Sequence[int] | Tensor | None) -> Tensor:
    """The class to explain for each sample, (B,) int64; ``None``: the argmax."""
    logits = class_logits(output)
    if class_idx is None:
        return logits.detach().argmax(1)
    given = torch.as_tensor(class_idx, device=logits.device)
    count, classes = logits.shape
    fits = not given.is_floating_point() and (given.ndim == 0 or given.shape == (count,))
    check(fits, "class_idx", class_idx, f"an integer or a list of {count} integers")
    check(bool(((given >= 0) & (given < classes)).all()), "class_idx", class_idx, f"classes in [0, {classes})")
    return given.long().expand(count).clone()  # a label from Lightning's inference mode could not be saved for backward


def beliefs(output: Any, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax probability of the given classes, and the predicted classes: (B,) and (B,)."""
    logits = class_logits(output).detach()
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.softmax(1).gather(1, classes[:, None]).squeeze(1), logits.argmax(1)

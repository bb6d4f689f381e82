"""A ProDiff decoder apart from its training: how it is called, saved and opened."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from effdl.core.errors import ConfigurationError, check
from effdl.diffusion._denoiser import call_network
from effdl.diffusion._diffnet import ClassEncoder, DiffNet
from effdl.diffusion._flow import wide

WEIGHTS, RECORD = "model.safetensors", "prodiff.json"


@dataclass
class Decoder:
    """A trained decoder.

    Args:
        denoiser: ``f(x, label, condition)``.
        encoder: of batches, or ``None``.
        alphas_cumprod: ``[T + 1]`` float64.
        label_shift: its label of index t is ``t - label_shift``.
    """

    denoiser: nn.Module
    encoder: nn.Module | None
    alphas_cumprod: Tensor
    label_shift: int


def masked_call(network: nn.Module, condition: Any, mask: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
    """``f(x, label)`` in at least fp32, zero where frames do not count; a network that takes ``mask`` gets it too."""
    takes_mask = mask is not None and "mask" in inspect.signature(network.forward).parameters

    def denoise(x: Tensor, label: Tensor) -> Tensor:
        if takes_mask:
            dtype = next(network.parameters()).dtype
            out = network(x.to(dtype), label, condition.to(dtype), mask=mask)
        else:
            out = call_network(network, x, label, condition)
        out = wide(out)
        return out if mask is None else out * mask[:, None, None]

    return denoise


def module_of(given: nn.Module | dict[str, int], cls: type[nn.Module], argument: str) -> nn.Module:
    """A network itself, or ``cls`` of a dict of arguments."""
    if isinstance(given, dict):
        known = inspect.signature(cls).parameters
        unknown = sorted(set(given) - set(known))
        check(not unknown, argument, unknown, f"arguments of {cls.__name__}: {', '.join(known)}")
        return cls(**given)
    check(isinstance(given, nn.Module), argument, type(given).__name__, f"a module or arguments of {cls.__name__}")
    return given


def save_decoder(decoder: Decoder, folder: str | Path, more: dict[str, Any]) -> None:
    """``model.safetensors`` (``denoiser.*`` and ``encoder.*``: the same keys for teacher and student) and
    ``prodiff.json`` (what makes the networks, schedule, label shift, and ``more``)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"denoiser": decoder.denoiser, "encoder": decoder.encoder}
    tensors = {
        f"{name}.{key}": value.detach().cpu().contiguous()
        for name, part in parts.items() if part is not None for key, value in part.state_dict().items()
    }  # fmt: skip
    save_file(tensors, folder / WEIGHTS)
    record = {name: None if part is None else _described(part) for name, part in parts.items()}
    record |= {"alphas_cumprod": decoder.alphas_cumprod.tolist(), "label_shift": decoder.label_shift, **more}
    (folder / RECORD).write_text(json.dumps(record, indent=2))


def _described(part: nn.Module) -> dict[str, Any]:
    config = {k: v for k, v in dict(getattr(part, "config", {})).items() if not k.startswith("_")}
    return {"class": type(part).__name__, "config": config}


def open_decoder(teacher: Any, alpha_bar: Tensor) -> Decoder:
    """A copy of the decoder of a ``ProDiffModule``, or of the folder that one saved.

    Raises:
        ConfigurationError: something else, a folder whose networks are not known here, another schedule than
            ``alpha_bar``.
    """
    if all(hasattr(teacher, name) for name in ("model", "encoder", "alphas_cumprod", "label_shift")):
        parts = copy.deepcopy((teacher.model, teacher.encoder))
        decoder = Decoder(*parts, teacher.alphas_cumprod.clone(), teacher.label_shift)
    else:
        decoder = _read_folder(teacher)
    same = decoder.alphas_cumprod.shape == alpha_bar.shape
    same = same and torch.allclose(decoder.alphas_cumprod.cpu(), alpha_bar, rtol=1e-6, atol=0)
    valid = "a teacher with the schedule and the steps given here"
    check(same, "teacher", f"one of {len(decoder.alphas_cumprod) - 1} steps", valid)
    return decoder


def _read_folder(teacher: Any) -> Decoder:
    fix = "Train one in stage teacher and give it, or the folder of its save_pretrained."
    path = Path(teacher).expanduser() if isinstance(teacher, (str, Path)) else None
    valid = "a ProDiffModule or its folder"
    check(path is not None and (path / RECORD).is_file(), "teacher", teacher, valid, fix)
    record, tensors = json.loads((path / RECORD).read_text()), load_file(path / WEIGHTS)
    networks = {}
    for name in ("denoiser", "encoder"):
        networks[name] = None if record[name] is None else _made(**{"name": record[name]["class"], **record[name]})
        if networks[name] is not None:
            own = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            networks[name].load_state_dict(own)
    alpha_bar = torch.tensor(record["alphas_cumprod"], dtype=torch.float64)
    return Decoder(networks["denoiser"], networks["encoder"], alpha_bar, record["label_shift"])


def _made(name: str, config: dict[str, Any], **_: Any) -> nn.Module:
    import diffusers

    known = {"DiffNet": DiffNet, "ClassEncoder": ClassEncoder}
    if name in known:
        return known[name](**config)
    if not hasattr(diffusers, name):
        raise ConfigurationError(f"teacher with a {name} is not valid: give the ProDiffModule itself.")
    return getattr(diffusers, name).from_config(config)

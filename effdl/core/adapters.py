"""Low-rank adapters (LoRA, Hu et al. 2021) through peft: put in, kept out of checkpoints, saved as diffusers does.

Only ``up @ down`` of each chosen layer trains; the base weights stay as they are. The house's one place for peft
(extra ``peft``), as plain functions on any ``nn.Module``; nothing here imports peft before an adapter is put in.

Example::

    names = add_lora(unet, rank=8)                        # to_q, to_k, to_v, to_out.0 of every attention
    ...                                                   # train: unet.parameters() that require a gradient
    save_lora({"unet": unet}, "adapter")                  # pipe.load_lora_weights("adapter")
    merged(unet).save_pretrained("unet")                  # the stock architecture, adapter folded in
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effdl.core.errors import ConfigurationError, check, check_integer, check_number, require
from effdl.core.random import preserved_rng
from effdl.core.select import Targets, select_modules

ATTENTION = ("*.to_q", "*.to_k", "*.to_v", "*.to_out.0")
FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers' load_lora_weights looks for
ADAPTER = "default"
_METADATA = "lora_adapter_metadata"  # diffusers' key: without it a loader takes alpha = rank


def add_lora(
    model: nn.Module,
    rank: int = 8,
    targets: Targets = None,
    exclude: Targets = None,
    alpha: float | None = None,
    seed: int = 0,
) -> list[str]:
    """Put ``W + (alpha / rank) up @ down`` in place of W in the chosen layers, and freeze everything else; in place.

    ``up`` starts at zero, so the outputs stay as they are. Factors are fp32 also beside a half-precision W.

    Args:
        model: a diffusers, transformers or other network.
        rank: r >= 1, of every factor.
        targets, exclude: Linear or Conv2d layers as globs or types; ``None``: the attention's four projections.
        alpha: numerator of the scale; ``None``: ``rank``, a scale of one.
        seed: of ``down``; the global random stream goes on untouched.

    Returns:
        The names of the adapted layers.

    Raises:
        MissingExtraError: peft is not installed.
        ConfigurationError: nothing matches, a layer of another kind, an adapter is there already.

    Example::

        add_lora(tiny_unet(), rank=4, targets=["*.to_q", "*.to_v"])
    """
    peft = require("peft", "peft")
    check_integer("rank", rank, 1)
    alpha = float(rank) if alpha is None else alpha
    check_number("alpha", alpha, 0, float("inf"), closed="()")
    if lora_layers(model):
        raise ConfigurationError(f"{type(model).__name__} has an adapter already: fold it in with merged(model) first.")
    found = select_modules(model, list(ATTENTION) if targets is None else targets, exclude, (nn.Linear, nn.Conv2d))
    grouped = [name for name, layer in found.items() if getattr(layer, "groups", 1) != 1]
    check(not grouped, "targets", grouped, "Linear layers and convolutions without groups")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(found), lora_dropout=0.0)
    with preserved_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, ADAPTER)
    if hasattr(model, "_hf_peft_config_loaded"):  # diffusers' and transformers' own adapter methods ask for it
        model._hf_peft_config_loaded = True
    factors = {id(p) for layer in lora_layers(model).values() for p in _factors(layer)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in factors)
        if id(parameter) in factors:
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return list(found)


def lora_layers(root: nn.Module) -> dict[str, Any]:
    """Adapted layers below ``root`` by name; empty where there is no adapter."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.lora import LoraLayer

    found = {name: module for name, module in root.named_modules() if isinstance(module, LoraLayer)}
    return {name: module for name, module in found.items() if ADAPTER in module.lora_A}


def _factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def _folded(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """``W + scale up @ down`` as a new tensor; for a convolution ``down`` has the kernel and ``up`` is 1x1."""
    change = (up.detach().flatten(1) @ down.detach().flatten(1)).view(weight.shape)
    return (weight.detach().to(change.dtype) + scale * change).to(weight.dtype)


@torch.no_grad()
def merged(model: nn.Module) -> nn.Module:
    """A copy in the stock architecture with the adapter folded into its weights; ``model`` itself where it has none."""
    if not lora_layers(model):
        return model
    plain = copy.deepcopy(model)
    for name, layer in lora_layers(plain).items():
        base = layer.get_base_layer()
        base.weight.data = _folded(base.weight, *_factors(layer), layer.scaling[ADAPTER])
        parent, _, child = name.rpartition(".")
        plain.get_submodule(parent)._modules[child] = base
    plain.__dict__.pop("peft_config", None)
    if hasattr(plain, "_hf_peft_config_loaded"):
        plain._hf_peft_config_loaded = False
    return plain


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The factors alone, as ``LAYER.lora_A.weight`` (down) and ``LAYER.lora_B.weight`` (up), on the CPU."""
    state = {}
    for name, layer in lora_layers(model).items():
        for factor, weight in zip(("lora_A", "lora_B"), _factors(layer)):
            state[f"{name}.{factor}.weight"] = weight.detach().cpu().contiguous().clone()
    return state


def save_lora(models: Mapping[str, nn.Module], folder: str | Path) -> Path:
    """Write ``folder/pytorch_lora_weights.safetensors``, which ``pipe.load_lora_weights(folder)`` opens.

    Args:
        models: adapted networks under their names in the pipeline: ``unet``, ``transformer``, ``text_encoder``.
        folder: made where it is missing.

    Raises:
        ConfigurationError: a model without an adapter.
    """
    from safetensors.torch import save_file

    tensors, description = {}, {}
    for prefix, model in models.items():
        layers = lora_layers(model)
        check(bool(layers), prefix, type(model).__name__, "a network with an adapter", "add_lora(model) puts one in.")
        first = next(iter(layers.values()))
        tensors |= {f"{prefix}.{name}": tensor for name, tensor in lora_state(model).items()}
        entry = {"r": first.r[ADAPTER], "lora_alpha": first.lora_alpha[ADAPTER], "target_modules": list(layers)}
        description |= {f"{prefix}.{key}": value for key, value in entry.items()}
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt", _METADATA: json.dumps(description)})
    path.chmod(0o644)  # written as a private file
    return path


def load_lora(model: nn.Module, folder: str | Path, prefix: str = "unet") -> list[str]:
    """Put a saved adapter into a network, also of a class that diffusers has no adapter loader for (``UNet2DModel``).

    Args:
        model: of the architecture that the adapter was trained on, without an adapter.
        folder: where :func:`save_lora` wrote, or the file.
        prefix: the network's name in the file.

    Returns:
        The names of the adapted layers.

    Raises:
        ConfigurationError: nothing under this name, or layers that the network does not have.
    """
    from safetensors import safe_open

    path = Path(folder)
    path = path / FILE if path.is_dir() else path
    check(path.is_file(), "folder", str(folder), f"a folder with {FILE}")
    with safe_open(path, "pt") as file:
        metadata = json.loads((file.metadata() or {}).get(_METADATA, "{}"))
        keys = [key for key in file.keys() if key.startswith(f"{prefix}.")]  # noqa: SIM118
        check(bool(keys), "prefix", prefix, f"a network named in {path.name}")
        state = {key.removeprefix(f"{prefix}."): file.get_tensor(key) for key in keys}
    names = sorted({key.rpartition(".lora_")[0] for key in state})
    rank = state[f"{names[0]}.lora_A.weight"].shape[0]
    add_lora(model, rank, names, alpha=metadata.get(f"{prefix}.lora_alpha"))
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            for factor, weight in zip(("lora_A", "lora_B"), _factors(layer)):
                weight.copy_(state[f"{name}.{factor}.weight"])
    return names


def fold_lora(root: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Make a state dict of ``root`` the stock architecture's, adapter folded in: for ``core.checkpoint``.

    Args:
        root: the module with adapted layers.
        state: its state dict (aliasing live weights), changed by new entries.

    Returns:
        What :func:`unfold_lora` needs for the exact way back: the factors and the base weights.
    """
    kept: dict[str, Tensor] = {}
    for name, layer in lora_layers(root).items():
        down, up = (f"{name}.{factor}.{ADAPTER}.weight" for factor in ("lora_A", "lora_B"))
        base = f"{name}.base_layer.weight"
        kept |= {key: state[key] for key in (base, down, up)}
        state[base] = _folded(state[base], state.pop(down), state.pop(up), layer.scaling[ADAPTER])
        for key in [key for key in state if key.startswith(f"{name}.base_layer.")]:
            state[key.replace(".base_layer.", ".")] = state.pop(key)
    return kept


def unfold_lora(root: nn.Module, state: dict[str, Tensor], kept: Mapping[str, Tensor]) -> None:
    """The way back, in place; with an empty ``kept`` (a stock checkpoint) the adapter stays as it is in ``root``."""
    for name, layer in lora_layers(root).items():
        down, up = (f"{name}.{factor}.{ADAPTER}.weight" for factor in ("lora_A", "lora_B"))
        for key in layer.get_base_layer().state_dict():
            if f"{name}.{key}" in state:
                state[f"{name}.base_layer.{key}"] = state.pop(f"{name}.{key}")
        now = dict(zip((down, up), _factors(layer)))
        for key in (f"{name}.base_layer.weight", down, up):
            if key in kept or key not in state:
                state[key] = kept[key] if key in kept else now[key].detach()

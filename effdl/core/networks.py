"""Networks by name: a timm architecture, a timm folder, a file of weights for a network that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effdl.core.errors import ConfigurationError, check, suggest
from effdl.core.hub import from_hub

LOCAL = "a timm folder as model='local-dir:FOLDER'"


def build_model(model: str | nn.Module, num_classes: int, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    """A timm model by name or folder; an ``nn.Module`` is taken as it is."""
    if isinstance(model, nn.Module):
        fix = "A network comes with its weights; others are loaded by checkpoint."
        check(not pretrained, "pretrained", pretrained, "False where model is a network", fix)
        check(not kwargs, "model_kwargs", kwargs, "nothing where model is a network")
        return model
    import timm

    check(isinstance(model, str), "model", model, f"a timm name, a network or {LOCAL}")
    local, hub = model.startswith("local-dir:"), model.startswith(("hf-hub:", "hf_hub:"))
    if local:
        folder = Path(model.removeprefix("local-dir:"))
        check((folder / "config.json").is_file(), "model", model, "a folder with timm's config.json and weights")
    elif not hub:
        _check_name(model, pretrained)

    def create(name: str) -> nn.Module:
        try:
            return timm.create_model(name, pretrained=pretrained or local, num_classes=num_classes, **kwargs)
        except (TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, ConfigurationError):
                raise
            raise ConfigurationError(f"model={model!r}, model_kwargs={kwargs}: {_line(error)}") from error

    if hub or (pretrained and not local):
        return from_hub(create, model, instead=f"{LOCAL}, or weights as checkpoint='FILE.safetensors'")
    return create(model)


def _check_name(model: str, pretrained: bool) -> None:
    import timm

    name = model.split(".")[0]
    if not timm.is_model(model):
        fix = f"The folder is model='local-dir:{model}'." if Path(model).is_dir() else suggest(name, timm.list_models())
        raise ConfigurationError(f"model={model!r} is no timm model. {fix}")
    versions = [v for v in timm.list_models(f"{name}.*", include_tags=True) if v.split(".")[0] == name]
    if "." in model and model not in versions:
        raise ConfigurationError(f"model={model!r}: timm has {', '.join(map(repr, versions)) or 'no versions of it'}.")
    if pretrained and not timm.is_model_pretrained(model):
        raise ConfigurationError(f"pretrained=True: timm has no weights of model={model!r}.")


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Weights from a local safetensors or weights-only torch file, whose keys may have a prefix (``model.``).

    Raises:
        ConfigurationError: no such file, not a file of weights alone, or keys and shapes that do not fit.
    """
    path = Path(path)
    check(path.is_file(), "checkpoint", str(path), "an existing file")
    try:
        state = _read_weights(path)
    except Exception as error:  # whatever a torn or foreign file makes of torch and safetensors
        raise ConfigurationError(f"checkpoint={str(path)!r} is no file of weights alone: {_line(error)}") from error
    try:
        model.load_state_dict(_without_prefix(state, set(model.state_dict())))
    except RuntimeError as error:
        raise ConfigurationError(f"checkpoint={str(path)!r} does not fit the model: {_line(error)}") from error


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):  # Lightning's and timm's checkpoints; torchvision's
        if isinstance(state.get(key), dict):
            return state[key]
    return state


def _without_prefix(state: dict[str, Any], own: set[str]) -> dict[str, Any]:
    """The entries under the prefix (``model.``, ``module.``, ...) that brings the most of the model's own keys."""
    prefixes = {""} | {key[: i + 1] for key in state for i, letter in enumerate(key) if letter == "."}
    hits = {prefix: sum(prefix + key in state for key in own) for prefix in sorted(prefixes)}
    most = max(hits.values())
    best = [""] if hits[""] == most else [prefix for prefix in hits if hits[prefix] == most]
    best = [prefix for prefix in best if prefix.startswith("model.")] or best
    if len(best) > 1:
        raise RuntimeError(f"it holds several networks like this, under {', '.join(best)}: save the one meant alone")
    return {key.removeprefix(best[0]): value for key, value in state.items() if key.startswith(best[0])}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__

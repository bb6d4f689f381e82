"""``effdl export``: the finished model of a checkpoint, as files that open without effdl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils._pytree import tree_leaves, tree_map

from effdl._cli import recipe
from effdl._cli.dry_run import NOTHING_WRITTEN
from effdl._cli.engine import LAST, RecipeCLI
from effdl._cli.run import Watch, preprocessing, quiet
from effdl._cli.terminal import console
from effdl.core.errors import ConfigurationError, check_choice
from effdl.core.export import export_onnx, export_program, onnx_outputs, product, save_model

FORMATS = ("model", "program", "onnx")


def export(checkpoint: str, formats: list[str], output: str | None, config: str | None) -> list[Path]:
    """Write the model of a checkpoint.

    The run is set up again from the ``config.yaml`` beside the checkpoint and validated (or tested) once with its
    weights: what a method does to a model when it is loaded, replaced layers or a calibration, is done again.

    Args:
        checkpoint: file, or a run folder, whose ``last.ckpt`` is taken.
        formats: of ``"model"`` (folder), ``"program"`` (``torch.export``), ``"onnx"``.
        output: folder; default ``export`` beside the checkpoint.
        config: YAML of the run where it is not beside the checkpoint.

    Raises:
        ConfigurationError: no checkpoint or config, a checkpoint of another model, inputs that cannot be found.
    """
    for name in formats:
        check_choice("format", name, FORMATS)
    quiet()
    path = Path(checkpoint) / LAST if Path(checkpoint).is_dir() else Path(checkpoint)
    if not path.is_file():
        raise ConfigurationError(f"{path} is not a checkpoint: give a .ckpt file or a run folder with {LAST}.")
    (stage,) = recipe.stages_of(recipe.read(_config(path, config)), [])
    cli, watch = load(stage, path)
    folder = Path(output) if output else path.parent / "export"
    written = []
    network = product(cli.model)
    if "model" in formats:
        kind = save_model(cli.model, folder / "model", preprocessing(cli.datamodule, watch.inputs))
        written.append(folder / "model")
        console().print(f"{folder / 'model'}: {_how(kind, folder / 'model')}")
    if {"program", "onnx"} & set(formats) and watch.inputs is None:
        raise ConfigurationError(f"{type(network).__name__} was not called in validation: its inputs are not known.")
    for name in (name for name in formats if name != "model"):
        args, kwargs = _twice(watch.inputs)
        target = folder / ("model.pt2" if name == "program" else "model.onnx")
        (export_program if name == "program" else export_onnx)(network, args, target, kwargs)
        written.append(target)
        console().print(f"{target}: largest difference to the model {_difference(network, target, args, kwargs)}")
    return written


def load(stage: recipe.Stage, checkpoint: Path) -> tuple[RecipeCLI, Watch]:
    """A run set up with the checkpoint's weights in its module, and what the network was called with."""
    cli = RecipeCLI(stage, folder=None, trainer={**NOTHING_WRITTEN, "limit_val_batches": None})
    watch = Watch()
    cli.trainer.callbacks.insert(0, watch)
    evaluate = next((name for name in ("validate", "test") if _evaluates(cli.model, name)), None)
    try:
        if evaluate is None:
            cli.model.load_state_dict(torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"])
        else:
            getattr(cli.trainer, evaluate)(
                cli.model, datamodule=cli.datamodule, ckpt_path=str(checkpoint), weights_only=True, verbose=False
            )
    except RuntimeError as error:
        if "load" not in str(error):
            raise
        raise ConfigurationError(f"{checkpoint} does not fit the model of its config: {error}") from error
    cli.model.cpu()
    return cli, watch


def _evaluates(module: Any, name: str) -> bool:
    return is_overridden("validation_step" if name == "validate" else "test_step", module)


def _config(checkpoint: Path, given: str | None) -> Path:
    candidates = [Path(given)] if given else [folder / "config.yaml" for folder in checkpoint.resolve().parents[:2]]
    for path in candidates:
        if path.is_file():
            return path
    raise ConfigurationError(f"No config.yaml beside {checkpoint}: name the run's config with --config FILE.")


def _twice(inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """Two examples, so that the batch dimension is seen to be one."""
    return tree_map(lambda x: (torch.cat([x, x]) if x.dim() else x).cpu() if isinstance(x, torch.Tensor) else x, inputs)


def _difference(network: torch.nn.Module, path: Path, args: tuple, kwargs: dict[str, Any]) -> str:
    network.eval()
    with torch.no_grad():
        expected = network(*args, **kwargs)
        if path.suffix == ".onnx":
            got: Any = onnx_outputs(path, args)
        else:
            got = torch.export.load(path).module()(*args, **kwargs)
    pairs = zip(tree_leaves(expected), tree_leaves(got))
    return f"{max((float((a - b).abs().max()) for a, b in pairs), default=0.0):.1e}"


def _how(kind: str, folder: Path) -> str:
    return {
        "timm": f"timm.create_model('local-dir:{folder}', pretrained=True)",
        "pretrained": f"from_pretrained('{folder}')",
        "quantized": f"effdl.core.quantized.load_quantized(model, '{folder}')",
        "safetensors": "safetensors.torch.load_file('model.safetensors')",
    }[kind]

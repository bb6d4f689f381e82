"""The finished model as files that open without effdl.

============== ======================================= =============================================
form           function                                opens with
============== ======================================= =============================================
model folder   :func:`save_model`                      timm (``local-dir:``), ``from_pretrained``, safetensors
program        :func:`export_program`                  ``torch.export.load(path).module()``
ONNX           :func:`export_onnx` (extra ``onnx``)    onnxruntime
============== ======================================= =============================================

Example::

    from effdl.core.export import save_model

    save_model(module, Path("model"))            # module.model is a timm network
    network = timm.create_model("local-dir:model", pretrained=True)
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from effdl.core.adapters import merged
from effdl.core.capture import evaluating, uncompiled
from effdl.core.errors import ConfigurationError, require
from effdl.core.qdq import as_qdq
from effdl.core.quantized import DESCRIPTION, describe, quantized_inputs

WEIGHTS = "model.safetensors"


def product(module: nn.Module) -> nn.Module:
    """The network a user takes home: ``module.model`` where there is one, else the module itself; never compiled."""
    model = getattr(module, "model", None)
    return uncompiled(model if isinstance(model, nn.Module) else module)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as safetensors takes it: contiguous, on the CPU, nothing shared between two names."""
    seen: set[int] = set()
    state = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            tensor = tensor.detach().cpu().contiguous()
            pointer = tensor.untyped_storage().data_ptr()
            whole = tensor.untyped_storage().nbytes() == tensor.nbytes
            state[name] = tensor.clone() if pointer in seen or not whole else tensor
            seen.add(pointer)
    return state


def save_safetensors(model: nn.Module, path: Path) -> Path:
    """All parameters and buffers; opens with ``model.load_state_dict(safetensors.torch.load_file(path))``."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(plain_state(model), path, metadata={"format": "pt"})
    path.chmod(0o644)  # written as a private file
    return path


def is_timm(model: nn.Module) -> bool:
    """Whether the network was made by ``timm.create_model``."""
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or "architecture" not in config:
        return False
    import timm

    return timm.is_model(config["architecture"])


def save_timm(model: nn.Module, folder: Path, preprocessing: Mapping[str, Any] | None = None) -> Path:
    """A folder that ``timm.create_model("local-dir:FOLDER", pretrained=True)`` opens.

    Args:
        model: a network of timm's, on any device.
        folder: made where it is missing.
        preprocessing: what the network was trained on, for ``timm.data``: ``mean`` and ``std`` (one number or one per
            channel, of pixels in [0, 1]), ``input_size`` (C, H, W).

    Raises:
        ConfigurationError: timm would build another architecture than this one (layers were replaced).
    """
    import timm
    from timm.models._hub import save_config_for_hf  # save_for_hf cannot write channels-last weights

    save_safetensors(model, folder / WEIGHTS)
    save_config_for_hf(model, str(folder / "config.json"), data_config=dict(preprocessing or {}))
    with torch.device("meta"):
        reopened = timm.create_model(f"local-dir:{folder}")
    if _architecture(reopened) != _architecture(model):
        (folder / "config.json").unlink()
        name = model.pretrained_cfg["architecture"]
        raise ConfigurationError(f"timm's {name!r} is another network than this one: its layers were changed.")
    return folder


def _architecture(model: nn.Module) -> list[Any]:
    layers = [(name, type(module).__name__) for name, module in model.named_modules()]
    return [*layers, *[(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()]]


def _reopens_the_same(model: nn.Module) -> bool:
    """Whether transformers or diffusers build this very network from its configuration: no layer was replaced."""
    make = getattr(type(model), "from_config", None) or getattr(type(model), "_from_config", None)
    config = getattr(model, "config", None)
    if make is None or config is None:
        return True  # another library's save_pretrained: its own affair
    with torch.device("meta"):
        return _architecture(make(copy.deepcopy(config))) == _architecture(model)


def save_model(module: nn.Module, folder: Path, preprocessing: Mapping[str, Any] | None = None) -> str:
    """Write the finished model of a LightningModule (or a network) into ``folder``.

    The first that applies: the module's own ``save_pretrained`` (a diffusers pipeline), its network's (transformers,
    diffusers), timm's folder, else ``model.safetensors`` alone; the last also where layers were replaced, so that the
    library would open another network than this one. ``preprocessing`` is :func:`save_timm`'s.

    Returns:
        ``"pretrained"``, ``"timm"``, ``"quantized"`` (opens with ``core.quantized.load_quantized``) or
        ``"safetensors"``: what was written.
    """
    network = product(module)
    model = merged(network)  # an adapter is folded in
    folder.mkdir(parents=True, exist_ok=True)
    if description := describe(model):
        save_safetensors(model, folder / WEIGHTS)
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1), "utf-8")
        if hasattr(model, "save_config"):  # of diffusers: from_config makes the architecture to load into
            model.save_config(str(folder))
        return "quantized"
    parts = (model if module is network else module, model)
    owner = next((part for part in parts if hasattr(part, "save_pretrained")), None)
    if owner is not None and _reopens_the_same(model):
        owner.save_pretrained(str(folder))
        return "pretrained"
    if is_timm(model):
        with contextlib.suppress(ConfigurationError):
            save_timm(model, folder, preprocessing)
            return "timm"
    save_safetensors(model, folder / WEIGHTS)
    return "safetensors"


def _batch_dimension(args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The first dimension of every tensor is free, where there are two examples or more.

    ``AUTO`` frees what the network leaves free, in one trace: a named ``Dim`` would be refused by diffusers' U-Nets,
    whose upsampling asks for 64 examples or more, and be traced again for nothing.
    """
    size = next((leaf.shape[0] for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor) and leaf.dim()), 1)

    def free(value: Any) -> Any:
        is_batch = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == size and size > 1
        return {0: torch.export.Dim.AUTO} if is_batch else None

    return tuple(map(free, args)), {key: free(value) for key, value in kwargs.items()}


def _own(value: Any) -> Any:
    """A tensor in memory of its own: a program traced on a view asks for that very view of its callers."""
    return value.detach().clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value


def _exported(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> torch.export.ExportedProgram:
    args, kwargs = tree_map(_own, (tuple(args), dict(kwargs)))
    free_args, free_kwargs = _batch_dimension(args, kwargs)
    names = list(inspect.signature(model.forward).parameters)
    shapes = {**dict(zip(names, free_args)), **free_kwargs}
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception:  # a network that takes *args
        return torch.export.export(model, args, kwargs)


def export_program(
    model: nn.Module, args: tuple, path: Path, kwargs: Mapping[str, Any] | None = None
) -> torch.export.ExportedProgram:
    """``torch.export`` in eval mode, saved as ``.pt2``.

    Args:
        model: the network; its training flags are put back.
        args: example inputs of its ``forward``, at least two examples for a free batch size.
        path: of the ``.pt2`` file.
        kwargs: example keyword inputs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with evaluating(model), torch.no_grad():
        program = _exported(model, args, kwargs or {})
    torch.export.save(program, path)
    return program


def export_onnx(
    model: nn.Module,
    args: tuple,
    path: Path,
    kwargs: Mapping[str, Any] | None = None,
    activations: Mapping[str, Any] | None = None,
) -> Path:
    """ONNX through ``torch.export``; weights inside the file, those of quantised layers as codes.

    Layers that take their input in a fixed range become QuantizeLinear and DequantizeLinear (:mod:`effdl.core.qdq`).

    Args:
        model, args, path, kwargs: as for :func:`export_program`.
        activations: of a quantised model, as ``core.deploy.observe(model, batches)`` measures them: convolutions then
            round their output to 8 bits too, which onnxruntime's CPU needs to run them with integers. Without, the file
            says what the model does, and its convolutions are float ones there.

    Raises:
        MissingExtraError: the extra ``onnx`` is not installed.
        ConfigurationError: ONNX has no form of one of the network's operations.
    """
    for package in ("onnx", "onnxscript"):
        require(package, "onnx")
    path.parent.mkdir(parents=True, exist_ok=True)
    if activations or quantized_inputs(model):
        model = as_qdq(model, activations)
    with evaluating(model), torch.no_grad():
        try:
            # the optimizer would decode codes into float constants, but for those before a DequantizeLinear
            program = torch.onnx.export(
                _exported(model, args, kwargs or {}), dynamo=True, verbose=False, optimize=not describe(model)
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise ConfigurationError(f"{type(model).__name__} cannot be written as ONNX: {reason}") from error
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces: this machine's paths, and more bytes than a small network's codes
    program.save(str(path), external_data=False)
    return path


def onnx_outputs(path: Path, args: tuple) -> list[Tensor]:
    """What onnxruntime computes from a file (CPU), for comparison with the original."""
    session = require("onnxruntime", "onnx").InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return [torch.as_tensor(out) for out in session.run(None, {n: a.numpy() for n, a in zip(names, args)})]

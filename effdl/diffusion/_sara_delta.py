"""sara's artifact: the trained values alone, for the base network that they were trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from effdl.core.errors import ConfigurationError
from effdl.diffusion._sara_weight import SparseWeight, small, write_

INDEX = ".index"


@dataclass(frozen=True)
class Delta:
    """What a delta file holds: values (nnz,) by parameter name, perhaps their flat positions, and what they fit."""

    threshold: float
    base: str
    values: dict[str, Tensor]
    indices: dict[str, Tensor]


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of names, shapes, dtypes and bytes."""
    state = hashlib.sha256()
    for name, tensor in tensors:
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return state.hexdigest()


def save_delta(path: str | Path, sparse: Mapping[str, SparseWeight], indices: bool = False) -> Path:
    """Write the trained values in the dtype of their weights; safetensors, 4 bytes a value in fp32.

    Args:
        path: of the file.
        sparse: parameter name (as the network that loads it has it) to sparse weight, attached or merged.
        indices: also the positions (int32, int64 where that is too short): the file then fits any network with these
            names and shapes. Without them they are found again as ``|P| < theta`` of the base, whose hash is stored.

    Example::

        save_delta("style.safetensors", sparsify(unet, threshold=2e-3))
    """
    from safetensors.torch import save_file

    tensors = {}
    for name, weight in sparse.items():
        values = weight.leaf.detach() if weight.attached else weight.values
        tensors[name] = values.to(weight.weight.data.dtype).cpu().contiguous()
        if indices:
            short = weight.weight.data.numel() < 2**31
            tensors[name + INDEX] = weight.index.to(torch.int32 if short else torch.int64).cpu()
    threshold = next(iter(sparse.values())).threshold
    base = digest((name, sparse[name].base()) for name in sorted(sparse))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt", "method": "sara", "threshold": repr(threshold), "base": base})
    path.chmod(0o644)  # written as a private file
    return path


def load_delta(path: str | Path) -> Delta:
    """Read a delta file.

    Raises:
        ConfigurationError: it is none.
    """
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        about = file.metadata() or {}
        if about.get("method") != "sara":
            raise ConfigurationError(f"{path} is no delta of sara: its metadata are {about}.")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    indices = {name.removesuffix(INDEX): t.long() for name, t in tensors.items() if name.endswith(INDEX)}
    values = {name: t for name, t in tensors.items() if not name.endswith(INDEX)}
    return Delta(float(about["threshold"]), about["base"], values, indices)


@torch.no_grad()
def apply_deltas(model: nn.Module, deltas: str | Path | Mapping[str, float]) -> nn.Module:
    """Add deltas to the base network, in place: ``P + sum_i w_i Delta P_i``; one path is ``{path: 1.0}``.

    One delta of weight 1 gives the trained weights bit for bit. All are checked before anything changes.

    Args:
        model: the network that they were trained on.
        deltas: path, or path to weight w_i.

    Raises:
        ConfigurationError: another base, another number of entries, a parameter that the model does not have.

    Example::

        apply_deltas(unet, {"barbie.safetensors": 0.7, "cyberpunk.safetensors": 0.3})
    """
    deltas = deltas if isinstance(deltas, Mapping) else {str(deltas): 1.0}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    read = [(load_delta(path), factor) for path, factor in deltas.items()]
    found = [_positions(parameters, delta, path) for (delta, _), path in zip(read, deltas)]
    alone = list(deltas.values()) == [1]
    steps: list[tuple[str, Tensor, Tensor]] = []
    for (delta, factor), positions in zip(read, found):
        for name, index in positions.items():
            base = parameters[name].reshape(-1)[index]
            values = delta.values[name].to(base)
            steps.append((name, index, values if alone else factor * (values - base)))
    for name, index, step in steps:
        weight = parameters[name]
        write_(weight.data, index, step if alone else weight.reshape(-1)[index] + step)
    return model


def _positions(parameters: Mapping[str, nn.Parameter], delta: Delta, path: str) -> dict[str, Tensor]:
    unknown = sorted(delta.values.keys() - parameters.keys())
    if unknown:
        raise ConfigurationError(f"{path}: the model has no parameter {unknown[0]!r}; the delta is of another network.")
    positions = {}
    for name, values in delta.values.items():
        weight = parameters[name]
        index = delta.indices.get(name)
        index = small(weight, delta.threshold).reshape(-1).nonzero()[:, 0] if index is None else index
        if index.numel() != values.numel() or (index.numel() and int(index.max()) >= weight.numel()):
            raise ConfigurationError(
                f"{path}: {name} has {index.numel()} entries below {delta.threshold:g}, the delta {values.numel()}: "
                "it was trained on another base."
            )
        positions[name] = index.to(weight.device)
    if not delta.indices and digest((name, parameters[name]) for name in sorted(delta.values)) != delta.base:
        raise ConfigurationError(f"{path}: the model's weights are not the ones that the delta was trained on.")
    return positions

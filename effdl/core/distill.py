"""Learning from soft targets: the losses, and the ways to name a teacher.

A teacher is a frozen network: given as a module, as a timm name, or as files that an earlier training left.

Example::

    teacher = resolve_teacher("resnet50.a1_in1k")               # Frozen: outside the student's module tree
    soft = teacher_logits(teacher, images).softmax(-1)
    loss = soft_cross_entropy(student(images), soft)
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effdl.core.batch import INDEX_KEYS, LABEL_KEYS, logits_of, unpack
from effdl.core.capture import uncompiled
from effdl.core.errors import ConfigurationError, check, check_choice, check_number, suggest
from effdl.core.export import WEIGHTS, product
from effdl.core.hub import from_hub
from effdl.core.networks import build_model, load_weights
from effdl.core.surgery import dtype_of
from effdl.core.teacher import Frozen

#: A network, the name or path of one, or ``{"model": ..., "checkpoint": ...}``: see :func:`resolve_teacher`.
Teacher = str | dict[str, Any] | nn.Module
Reduction = Literal["batchmean", "element_mean"]

FORMS = (
    "a network, a timm name, a folder with config.json (a run's, timm's, transformers'), or "
    "{'model': 'resnet50', 'checkpoint': 'weights.safetensors'}"
)
_WEIGHT_FILES = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
_LABELS_AND_INDEX = (*LABEL_KEYS, *INDEX_KEYS)


# ---- losses -------------------------------------------------------------------------------------------------------


def soft_cross_entropy(logits: Tensor, targets: Tensor, reduction: Reduction = "batchmean") -> Tensor:
    """-sum_c q_c log softmax(z)_c, in float32 at least.

    Args:
        logits: z, (..., C), C >= 2.
        targets: q, probabilities (..., C).
        reduction: ``"batchmean"`` divides the sum by the number of distributions, ``"element_mean"`` by that of
            numbers, C times more.

    Raises:
        ConfigurationError: shapes that differ, an unknown reduction.
    """
    check_same_shape(logits, targets)
    return _reduced(-(_float(targets) * _float(logits).log_softmax(-1)), reduction)


def soft_kl(logits: Tensor, targets: Tensor, reduction: Reduction = "batchmean") -> Tensor:
    """KL(q || softmax(z)) = soft cross-entropy less the entropy of q: zero where they agree. Arguments as above."""
    check_same_shape(logits, targets)
    targets = _float(targets)
    return _reduced(torch.xlogy(targets, targets) - targets * _float(logits).log_softmax(-1), reduction)


def temperature_kl(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, reduction: Reduction = "batchmean"
) -> Tensor:
    """T^2 KL(softmax(z_t / T) || softmax(z_s / T)), Hinton et al. 2015; T^2 keeps the gradient's size.

    Args:
        student, teacher: logits (..., C); the teacher's carry no gradient.
        temperature: T > 0.
        reduction: as in :func:`soft_cross_entropy`.
    """
    check_number("temperature", temperature, 0, float("inf"), closed="()")
    check_same_shape(student, teacher)
    log_targets = (_float(teacher.detach()) / temperature).log_softmax(-1)
    log_student = (_float(student) / temperature).log_softmax(-1)
    return temperature**2 * _reduced(log_targets.exp() * (log_targets - log_student), reduction)


def check_same_shape(student: Tensor, teacher: Tensor) -> None:
    """Raise ConfigurationError unless both say something of the same classes."""
    if student.shape != teacher.shape:
        raise ConfigurationError(
            f"teacher: its logits have shape {tuple(teacher.shape)}, the student's {tuple(student.shape)}: "
            "both must tell the same classes apart."
        )


def _float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _reduced(summands: Tensor, reduction: str) -> Tensor:
    check_choice("reduction", reduction, ("batchmean", "element_mean"))
    return summands.sum(-1).mean() if reduction == "batchmean" else summands.mean()


# ---- asking a teacher -----------------------------------------------------------------------------------------------


def network_inputs(batch: Any, input_key: str | None = None) -> Any:
    """What a network is called with: images (B, ...), or the keywords of a text batch without labels and index."""
    if isinstance(batch, Mapping) and "input_ids" in batch and input_key is None:
        return {key: value for key, value in batch.items() if key not in _LABELS_AND_INDEX}
    return unpack(batch, input_key).inputs


def ask(network: Any, inputs: Any) -> Tensor:
    """Logits of a network called with :func:`network_inputs`.

    Raises:
        ConfigurationError: its output holds no logits.
    """
    logits = logits_of(network(**inputs) if isinstance(inputs, Mapping) else network(inputs))
    if not isinstance(logits, Tensor):
        raise ConfigurationError(f"{type(network).__name__} returns no logits: a tensor or .logits is expected.")
    return logits


@torch.no_grad()
def teacher_logits(teacher: Frozen, inputs: Any) -> Tensor:
    """The teacher's logits, on the inputs' device and in its own dtype, or under the autocast that is on."""
    first = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
    network = teacher.on(first)
    if isinstance(inputs, Tensor) and inputs.is_floating_point():
        inputs = inputs.to(dtype_of(network))
    return ask(network, inputs)


def is_frozen(network: nn.Module) -> bool:
    """``eval()`` all through, and nothing to train."""
    return not any(m.training for m in network.modules()) and not any(p.requires_grad for p in network.parameters())


def classes_of(network: nn.Module) -> int | None:
    """C of a classifier: what it says itself (timm, transformers), else the width of its last linear layer."""
    network = uncompiled(network)
    for told in (getattr(network, "num_classes", None), getattr(getattr(network, "config", None), "num_labels", None)):
        if isinstance(told, int) and told > 0:
            return told
    heads = [module.out_features for module in network.modules() if isinstance(module, nn.Linear)]
    return heads[-1] if heads else None


# ---- naming a teacher ---------------------------------------------------------------------------------------------


def resolve_teacher(teacher: Teacher, student: nn.Module | None = None, argument: str = "teacher") -> Frozen[nn.Module]:
    """The frozen network that ``teacher`` names: ``eval()``, ``requires_grad_(False)``, outside any module tree.

    Args:
        teacher: an ``nn.Module`` (frozen in place; of a LightningModule its ``model``); a timm name, whose pretrained
            weights are loaded (old ``gluon_*``, ``*_ns`` names too); a folder (of a run, of timm, of transformers); a
            hub name ``org/name``; a file of weights beside such a ``config.json`` or for the student's own
            architecture; a dict ``model``, ``checkpoint``, ``num_classes``, ``model_kwargs``, as ``ImageClassifier``
            takes them.
        student: the network that will be trained; a teacher that shares a parameter with it is refused.
        argument: its name in errors.

    Raises:
        ConfigurationError: nothing of that name, weights that do not fit, a timm name without weights.
        HubError: weights that neither the hub nor the cache gives.
    """
    if isinstance(teacher, nn.Module):
        network = product(teacher) if hasattr(teacher, "training_step") else uncompiled(teacher)
        own = {id(p) for p in student.parameters()} if student is not None else set()
        shared = any(id(p) in own for p in network.parameters())
        fix = "Give copy.deepcopy(...) of it."
        check(not shared, argument, type(teacher).__name__, "a network that shares no parameter with the student", fix)
        return Frozen(network)
    if isinstance(teacher, Mapping):
        return Frozen(_from_mapping(teacher, student, argument))
    check(isinstance(teacher, str) and teacher != "", argument, teacher, FORMS)
    path = Path(teacher.removeprefix("local-dir:")).expanduser()
    if path.is_dir():
        return Frozen(_from_folder(path, argument))
    if path.is_file():
        return Frozen(_from_file(path, student, argument))
    looks_like_one = path.is_absolute() or path.suffix in _WEIGHT_FILES or teacher.startswith((".", "~", "local-dir:"))
    check(not looks_like_one, argument, teacher, "an existing file or folder")
    return Frozen(_from_name(teacher, argument))


def _from_mapping(teacher: Mapping[str, Any], student: nn.Module | None, argument: str) -> nn.Module:
    known = ("model", "checkpoint", "num_classes", "model_kwargs")
    for key in teacher:
        check_choice(f"{argument} key", key, known)
    check("model" in teacher, argument, dict(teacher), "a dict with 'model'", suggest("model", teacher))
    checkpoint, kwargs = teacher.get("checkpoint"), teacher.get("model_kwargs") or {}
    classes = teacher.get("num_classes") or (classes_of(student) if student is not None else None)
    check(classes is not None, argument, dict(teacher), "a dict that also gives 'num_classes'")
    named = isinstance(teacher["model"], str)
    network = build_model(teacher["model"], classes, named and checkpoint is None, kwargs)
    if checkpoint is not None:
        load_weights(network, checkpoint)
    return network


def _config(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """``config.json`` of a timm or transformers folder, which a run folder has below ``model``."""
    for place in (folder, folder / "model"):
        if (place / "config.json").is_file():
            config = json.loads((place / "config.json").read_text(encoding="utf-8"))
            if "architecture" in config or config.get("architectures"):
                return place, config
    return None


def _from_folder(folder: Path, argument: str) -> nn.Module:
    found = _config(folder)
    if found is None:
        weights = next((p for p in (folder / WEIGHTS, folder / "model" / WEIGHTS) if p.is_file()), None)
        fix = f"Name its architecture: {{'model': ..., 'checkpoint': '{weights}'}}." if weights else ""
        check(False, argument, str(folder), "a folder with the config.json of timm or transformers", fix)
    place, config = found
    if "architecture" in config:
        import timm

        return timm.create_model(f"local-dir:{place}", pretrained=True)
    return _transformer(str(place), config["architectures"][0], argument)


def _transformer(name: str, architecture: str, argument: str) -> nn.Module:
    import transformers

    cls = getattr(transformers, architecture, None)
    check(cls is not None, argument, name, "an architecture of transformers", f"It has no {architecture}.")
    return cls.from_pretrained(name)


def _from_file(path: Path, student: nn.Module | None, argument: str) -> nn.Module:
    found = _config(path.parent)
    fix = f"Name its architecture: {{'model': 'resnet50', 'checkpoint': '{path}'}}."
    check(found is not None or student is not None, argument, str(path), "weights beside their config.json", fix)
    network = copy.deepcopy(product(student)) if found is None else _from_folder(path.parent, argument)
    try:
        load_weights(network, path)
    except ConfigurationError as error:
        raise ConfigurationError(f"{argument}={str(path)!r}: {error} {fix}") from error
    return network


def _from_name(name: str, argument: str) -> nn.Module:
    import timm

    current = timm.models.get_deprecated_models().get(name) or name
    if current.startswith("timm/"):
        current = f"hf-hub:{current}"
    if current.startswith(("hf-hub:", "hf_hub:")):
        return from_hub(lambda it: timm.create_model(it, pretrained=True), current)
    if "/" in current:
        return from_hub(lambda it: _from_transformers_hub(it, argument), current)
    fix = suggest(current.split(".")[0], timm.list_models())
    check(timm.is_model(current), argument, name, FORMS, fix)
    versions = timm.list_models(f"{current.split('.')[0]}.*", pretrained=True, include_tags=True)
    known = current in versions or ("." not in current and bool(versions))
    told = f"timm has weights of {', '.join(versions)}." if versions else "timm has no weights of it."
    check(known, argument, name, "the name of pretrained weights", told)
    return from_hub(lambda it: timm.create_model(it, pretrained=True), current, instead=FORMS)


def _from_transformers_hub(name: str, argument: str) -> nn.Module:
    import transformers

    architectures = transformers.AutoConfig.from_pretrained(name).architectures
    check(bool(architectures), argument, name, "a repository that names its architecture")
    return _transformer(name, architectures[0], argument)


def mean_probabilities(logits: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """q = sum_k w_k softmax(z_k) of K teachers' logits (..., C), in float32; w_k = 1/K by default."""
    weights = weights or [1 / len(logits)] * len(logits)
    return torch.stack([w * _float(z).softmax(-1) for w, z in zip(weights, logits)]).sum(0)

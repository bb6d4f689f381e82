"""Which layers a method acts on: module-name globs, layer types, sensible defaults."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from effdl.core.errors import ConfigurationError, check, suggest

Target = str | type[nn.Module]
Targets = Target | Sequence[Target] | None


class NothingMatched(ConfigurationError):
    """No layer fits; ``core.surgery.when_built`` waits on it for modules that build their layers late."""


def as_list(targets: Targets) -> list[Target]:
    """``None`` -> [], one pattern -> [pattern]."""
    if targets is None:
        return []
    return [targets] if isinstance(targets, (str, type)) else list(targets)


def check_targets(argument: str, targets: Targets) -> None:
    """Raise unless ``targets`` is ``None``, a glob, a module class, or a list of these."""
    valid = "a module-name glob, a layer type, a list of these, or None"
    check(targets is None or isinstance(targets, (str, type, list, tuple)), argument, targets, valid)
    for target in as_list(targets):
        is_layer_type = isinstance(target, type) and issubclass(target, nn.Module)
        is_glob = isinstance(target, str) and target != ""
        check(is_layer_type or is_glob, argument, targets, valid, "For example targets=['layer1.*', 'Linear'].")


def matches(name: str, module: nn.Module, target: Target) -> bool:
    """Whether a module fits one target: a type, a glob of its name (:func:`named`) or the name of its class.

    A string without ``.`` or wildcard that is a class name of the module's MRO counts as that type (for YAML).
    """
    if isinstance(target, type):
        return isinstance(module, target)
    return named(target, name) or any(cls.__name__ == target for cls in type(module).__mro__[:-1])


def named(pattern: str, name: str) -> bool:
    """Whether a name fits a glob, also below any prefix: ``layer1.*`` fits ``model.layer1.0``.

    ``torch.compile`` puts ``_orig_mod`` into the names of what it wraps; the pattern may leave it out.
    """
    plain = ".".join(part for part in name.split(".") if part != "_orig_mod")
    return any(fnmatch.fnmatchcase(n, p) for n in {name, plain} for p in (pattern, f"*.{pattern}"))


def select_modules(
    root: nn.Module,
    targets: Targets = None,
    exclude: Targets = None,
    default: Iterable[type[nn.Module] | str] = (),
) -> dict[str, nn.Module]:
    """Modules below ``root`` that fit ``targets`` (or, for ``None``, one of the ``default`` types) and no ``exclude``.

    A container that matches a glob brings its descendants of a ``default`` type, so ``targets="layer4"`` means
    "what you would choose, in layer4". A tied module appears once, under its first name.

    Raises:
        ConfigurationError: a pattern fits nothing (close names are listed), or nothing is left.

    Example::

        select_modules(model, targets="layer1.*", exclude="*.downsample.*", default=(nn.Conv2d,))
    """
    modules = dict(root.named_modules())
    default = tuple(default)
    kinds = tuple(t for t in default if isinstance(t, type))
    names = {t for t in default if isinstance(t, str)}

    def usual(module: nn.Module) -> bool:
        return not default or isinstance(module, kinds) or any(c.__name__ in names for c in type(module).__mro__)

    if targets is None:
        chosen = {name for name, module in modules.items() if name and usual(module)}
    else:
        chosen = set()
        for target in as_list(targets):
            hit = {n for n, m in modules.items() if n and matches(n, m, target)}
            found = {n for n in hit if usual(modules[n])}
            found |= {n for n, m in modules.items() if usual(m) and any(n.startswith(f"{h}.") for h in hit - found)}
            if not found:
                raise NothingMatched(_nothing("targets", target, modules))
            chosen |= found
    for target in as_list(exclude):
        hit = {n for n, m in modules.items() if n and matches(n, m, target)}
        if not hit:
            raise NothingMatched(_nothing("exclude", target, modules))
        chosen = {n for n in chosen if n not in hit and not any(n.startswith(f"{h}.") for h in hit)}
    if not chosen:
        raise NothingMatched(
            f"targets={targets!r}, exclude={exclude!r} leave no layer to act on in {type(root).__name__}"
            + (f": it has no {', '.join(sorted({*(k.__name__ for k in kinds), *names}))}." if targets is None else ".")
        )
    return {name: modules[name] for name in modules if name in chosen}


def _nothing(argument: str, target: Target, modules: dict[str, nn.Module]) -> str:
    if isinstance(target, type):
        return f"{argument}={target.__name__} matches no layer: the model has none of this type."
    types = {type(m).__name__ for m in modules.values()}
    plain = re.sub(r"[*?\[\]]", "", target)
    suffixes = {name.split(".", i)[-1] for name in modules for i in range(name.count(".") + 1)}
    near = suggest(plain, [*filter(None, modules), *sorted(types | suffixes - {""})])
    return f"{argument}={target!r} matches no layer. {near or _sample(modules)}"


def _sample(modules: dict[str, nn.Module]) -> str:
    names = [n for n in modules if n][:6]
    return "Layers are named like " + ", ".join(map(repr, names)) + "."


@dataclass(frozen=True)
class Weight:
    """One weight tensor of a layer, looked up anew each time, since surgery and loading may replace the object."""

    name: str
    module: nn.Module
    attribute: str

    @property
    def parameter(self) -> nn.Parameter:
        return self.module._parameters[self.attribute]  # type: ignore[return-value]

    @property
    def data(self) -> Tensor:
        """Its values; what they decode to, where codes have taken the parameter's place by now."""
        parameter = self.module._parameters.get(self.attribute)
        return getattr(self.module, self.attribute) if parameter is None else parameter.data

    @property
    def transposed(self) -> bool:
        """Input features first: transformers' ``Conv1D`` (in, out), transposed convolutions (in, out/groups, ...)."""
        return type(self.module).__name__ == "Conv1D" or isinstance(self.module, nn.modules.conv._ConvTransposeNd)


WEIGHTED = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.Embedding,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.Bilinear,
    "Conv1D",
)


def weight_names(module: nn.Module) -> list[str]:
    """Parameters of one layer that are weight matrices: not biases, not norms, at least two dimensions."""
    wanted = re.compile(r"(weight|in_proj_weight|[qkv]_proj_weight|weight_(ih|hh|hr)(_l\d+(_reverse)?)?)$")
    return [n for n, p in module._parameters.items() if p is not None and wanted.fullmatch(n) and p.dim() >= 2]


def select_weights(
    root: nn.Module, targets: Targets = None, exclude: Targets = None, min_numel: int = 2
) -> list[Weight]:
    """Weight tensors of the selected layers (Linear, convolutions, Embedding, attention, recurrent, HF ``Conv1D``).

    A tensor shared by several layers appears once; not at all, where one of the layers is excluded. Tensors with fewer
    than ``min_numel`` entries are left out.

    Raises:
        ConfigurationError: nothing matched, or a matched weight is on the meta device or sharded.
    """
    found: list[Weight] = []
    left_out = [m for n, m in root.named_modules() if n and any(matches(n, m, t) for t in as_list(exclude))]
    seen = {id(parameter) for module in left_out for parameter in module.parameters()}
    for name, module in select_modules(root, targets, exclude, WEIGHTED).items():
        for attribute in weight_names(module):
            weight = Weight(f"{name}.{attribute}", module, attribute)
            if id(weight.parameter) in seen or weight.parameter.numel() < min_numel:
                continue
            seen.add(id(weight.parameter))
            refuse_sharded(weight)
            found.append(weight)
    if not found:
        raise NothingMatched(f"targets={targets!r}: no selected layer has a weight of {min_numel} or more entries.")
    return found


def refuse_sharded(weight: Weight) -> None:
    """Raise where this process does not hold the whole tensor."""
    parameter = weight.parameter
    sharded = hasattr(parameter, "placements") or hasattr(parameter, "_local_shards")
    if parameter.is_meta or sharded or isinstance(parameter, torch.nn.parameter.UninitializedParameter):
        raise ConfigurationError(
            f"targets: {weight.name} is not a full tensor here (meta, lazy or sharded). "
            "Use a strategy that keeps whole parameters on each rank (ddp), or materialise the layer first."
        )

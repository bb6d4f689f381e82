"""A weight seen through a function, without touching parameter names, order or autograd nodes: a class swap.

``torch.nn.utils.parametrize`` replaces the AccumulateGrad node (DDP fails on its second step when attached after
wrapping) and reorders ``parameters()`` (WeightAveraging zips wrong shapes; a resumed optimizer's momentum lands on the
wrong weight). Changing the instance's class and reading the attribute through a property does neither.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor, nn

from effdl.core.errors import ConfigurationError
from effdl.core.steps import Handle

Transform = Callable[[Tensor], Tensor]


def reweight(module: nn.Module, attribute: str, transform: Transform) -> Handle:
    """Let ``module.<attribute>`` read ``transform(raw parameter)``; the raw one stays the registered parameter.

    Several attributes of one module may be swapped; transforms on the same attribute apply in the order given.
    A module cannot be pickled while swapped. ``handle.remove()`` takes this transform away, the last one restores the
    class.

    Raises:
        ConfigurationError: the module has no such parameter.

    Example::

        handle = reweight(layer, "weight", lambda w: w * mask)
    """
    if module._parameters.get(attribute) is None:
        raise ConfigurationError(f"{type(module).__name__} has no parameter {attribute!r} to reweight.")
    if not hasattr(type(module), "_effdl_swapped"):
        _swap_class(module)
    transforms: dict[str, tuple[Transform, ...]] = module.__dict__["_effdl_transforms"]
    if attribute not in type(module).__dict__:
        setattr(type(module), attribute, property(lambda self: _seen(self, attribute)))
    transforms[attribute] = (*transforms.get(attribute, ()), transform)
    return Handle(lambda: _remove(module, attribute, transform))


def reweight_everywhere(root: nn.Module, parameter: nn.Parameter, transform: Transform) -> list[Handle]:
    """:func:`reweight` under every name that a tied parameter has below ``root``."""
    places = [(m, name) for m in root.modules() for name, p in m._parameters.items() if p is parameter]
    return [reweight(module, name, transform) for module, name in places]


def raw(module: nn.Module, attribute: str) -> nn.Parameter:
    """The registered parameter behind a reweighted attribute."""
    return module._parameters[attribute]  # type: ignore[return-value]


def _swap_class(module: nn.Module) -> None:
    base = type(module)
    body: dict[str, object] = {"_effdl_base": base, "_effdl_swapped": True}
    if isinstance(module, nn.RNNBase):
        # recurrent layers read a cached list of their weights, not the attributes
        body["_flat_weights"] = property(lambda self: [getattr(self, n) for n in self._flat_weights_names], _ignore)
    module.__class__ = type(f"Reweighted{base.__name__}", (base,), body)
    module.__dict__["_effdl_transforms"] = {}


def _ignore(module: nn.Module, value: object) -> None:
    """``RNNBase`` refills its list now and then; the property makes it anew on each read."""


def _seen(module: nn.Module, attribute: str) -> Tensor | None:
    weight = module._parameters[attribute]
    if weight is None:
        return None
    seen: Tensor = weight
    for transform in module.__dict__["_effdl_transforms"].get(attribute, ()):
        seen = transform(seen)
    return seen


def _remove(module: nn.Module, attribute: str, transform: Transform) -> None:
    transforms = module.__dict__.get("_effdl_transforms", {})
    transforms[attribute] = tuple(t for t in transforms.get(attribute, ()) if t is not transform)
    if not any(transforms.values()):
        module.__dict__.pop("_effdl_transforms", None)
        module.__class__ = type(module)._effdl_base  # type: ignore[attr-defined]
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [module._parameters[n] for n in module._flat_weights_names]


def plain_copy(root: nn.Module) -> nn.Module:
    """A deep copy that reads its raw parameters: what tracing tools can look at while the original is reweighted."""
    twin = copy.deepcopy(root)
    for module in twin.modules():
        if hasattr(type(module), "_effdl_swapped"):
            for attribute, transforms in list(module.__dict__["_effdl_transforms"].items()):
                for transform in transforms:
                    _remove(module, attribute, transform)
    return twin

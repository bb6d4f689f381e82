"""polycom in whole models: activations of MLP blocks replaced, gated MLPs rebuilt without their gate.

The architecture changes on purpose. :func:`polycom_model` is the pure function that rebuilds it around a checkpoint.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from effdl.architectures.polycom import PolyNorm, PolyReLU, polynomial
from effdl.core.errors import ConfigurationError
from effdl.core.select import NothingMatched, Targets, select_modules
from effdl.core.surgery import disable_transformer_fast_path, replace_modules

#: Children (gate, up, down) of the gated MLPs that can be rebuilt without their gate: Llama and its heirs, T5 v1.1.
GATED_LAYOUTS = (("gate_proj", "up_proj", "down_proj"), ("wi_0", "wi_1", "wo"))
#: By name, where the class is timm's or transformers'.
ACTIVATIONS = (nn.ReLU, nn.GELU, nn.SiLU, "GELU", "GELUTanh", "QuickGELU", "Swish", "GELUActivation",
               "NewGELUActivation", "FastGELUActivation", "QuickGELUActivation", "AccurateGELUActivation",
               "ClippedGELUActivation", "SiLUActivation", "ReLUSquaredActivation")  # fmt: skip
#: Their activation is a function by default, not a layer.
HOSTS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
POLYNOMIALS = (PolyReLU, PolyNorm)
_CONVOLUTION = nn.modules.conv._ConvNd


def polycom_model(
    model: nn.Module,
    targets: Targets = None,
    exclude: Targets = None,
    match_params: bool = True,
    seed: int = 0,
    **options: Any,
) -> nn.Module:
    """Put a polynomial in place of the activations of ``model``'s MLP blocks; in place, returns ``model``.

    A gated MLP of a known layout becomes a plain one (:func:`ungate`). ``nn.TransformerEncoderLayer`` leaves its fast
    path, which computes its activation past the module. Where all of it was done before, nothing happens.

    Args:
        model: any network.
        targets, exclude: activations, or what contains them, as globs or types. ``None``: ReLU, GELU and SiLU (also
            timm's and transformers') next to the linear layers of an MLP block, not behind convolutions, not in a
            projection that does not widen.
        match_params: give an ungated MLP the parameters of the gated one.
        seed: of the weights that this needs.
        options: of :func:`~effdl.architectures.polycom.polynomial`: kind, order, eps, norm, init, dim, checkpoint.

    Raises:
        ConfigurationError: nothing matched; a gated MLP of another layout (fused projections, experts in one tensor);
            PolyNorm over the last dimension of feature maps. The model is then as it was.

    Example::

        model = polycom_model(timm.create_model("vit_tiny_patch16_224"), kind="polynorm")
        model.load_state_dict(torch.load("trained.pt", weights_only=True))
    """
    found = select_activations(model, targets, exclude)
    _refuse_other_settings(model, found, options)
    hosts = {name: module for name, module in found.items() if isinstance(module, HOSTS)}
    inside = {name: module for name, module in found.items() if name not in hosts}
    generator = torch.Generator().manual_seed(seed)
    _refuse_last_dimension_of_maps(model, inside, options)

    def make(name: str, old: nn.Module) -> nn.Module:
        if gated_layout(old):
            return ungate(old, polynomial(**options), match_params=match_params, generator=generator)
        return _beside(_parent(model, name), model, polynomial(**options))

    replace_modules(model, inside, make)
    for host in hosts.values():
        host.activation = _beside(host, model, polynomial(**options)).train(host.training)
    if any(isinstance(module, HOSTS) for module in model.modules()):
        disable_transformer_fast_path(model)
    return model


def select_activations(model: nn.Module, targets: Targets = None, exclude: Targets = None) -> dict[str, nn.Module]:
    """What :func:`polycom_model` replaces, by name: activations, whole gated MLPs, layers with a functional activation.

    Empty where that has been done before.
    """
    try:
        candidates = select_modules(model, targets, exclude, default=(*ACTIVATIONS, *HOSTS))
        found = _units(model, candidates, usual=targets is None)
        if not found:
            raise NothingMatched(f"targets={targets!r}: no activation in an MLP block of {type(model).__name__}.")
        return found
    except NothingMatched:
        try:
            select_modules(model, targets, exclude, default=POLYNOMIALS)
            return {}
        except NothingMatched:
            pass
        raise


def polynomials(model: nn.Module) -> dict[str, PolyReLU | PolyNorm]:
    """The polynomial activations of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, POLYNOMIALS)}


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What a state dict does not say of each polynomial: its kind, order, eps, norm and dimension."""
    return {name: _settings(layer) for name, layer in polynomials(model).items()}


def _settings(layer: PolyReLU | PolyNorm) -> dict[str, Any]:
    names = ("order", "eps", "norm", "dim")
    return {"kind": type(layer).__name__, **{name: getattr(layer, name) for name in names if hasattr(layer, name)}}


def no_decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups for ``configure_optimizers``: the coefficients of the polynomials apart, without weight decay.

    Example::

        def configure_optimizers(self):
            return torch.optim.AdamW(no_decay_groups(self, weight_decay=0.1), lr=4e-4)
    """
    coefficients = {id(p) for layer in polynomials(module).values() for p in layer.parameters()}
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in coefficients], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in coefficients], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def matched_width(width: int, multiple: int = 8) -> int:
    """Hidden width at which an MLP without gate has a gated one's parameters: ``3 * width / 2``, rounded."""
    return max(multiple, round(1.5 * width / multiple) * multiple)


def gated_layout(mlp: nn.Module) -> tuple[str, str, str] | None:
    """The names of ``mlp``'s gate, up- and down-projection, or ``None`` where it is not a gated MLP known here."""
    children = dict(mlp.named_children())
    for names in GATED_LAYOUTS:
        if all(isinstance(children.get(name), nn.Linear) for name in names):
            return names
    return None


def ungate(
    mlp: nn.Module, activation: nn.Module, *, match_params: bool = True, generator: torch.Generator | None = None
) -> nn.Sequential:
    """``down(act(up(x)))`` in place of ``down(silu(gate(x)) * up(x))``: a plain ``nn.Sequential`` with the same names.

    Args:
        mlp: a gated MLP of a known layout, hidden width ``f``; left as it is.
        activation: the one to put between the projections.
        match_params: width :func:`matched_width` of ``f``, with new projections drawn from a normal distribution with
            the old ones' standard deviation (and zero bias); ``False``: width ``f`` and the old up- and
            down-projections themselves, a third fewer parameters.
        generator: draws the new projections; CPU. ``None``: a new one with seed 0.

    Raises:
        ConfigurationError: ``mlp`` has no known layout.

    Example::

        mlp = model.model.layers[0].mlp                  # a LlamaMLP, d = 256, f = 688
        model.model.layers[0].mlp = ungate(mlp, PolyNorm())
        print(model.model.layers[0].mlp.up_proj)         # Linear(256 -> 1032): as many parameters as before
    """
    names = gated_layout(mlp)
    if names is None:
        raise ConfigurationError(f"mlp={type(mlp).__name__} is not a gated MLP known here (linear layers {_known()}).")
    _, up, down = (mlp.get_submodule(name) for name in names)
    if match_params:
        generator = generator or torch.Generator().manual_seed(0)
        width = matched_width(up.out_features)
        up, down = _redraw(up, up.in_features, width, generator), _redraw(down, width, down.out_features, generator)
    between = [("dropout", mlp.dropout)] if isinstance(getattr(mlp, "dropout", None), nn.Module) else []
    act_name = "act" if hasattr(mlp, "act") else "act_fn"
    activation = activation.to(up.weight.device, up.weight.dtype)
    return nn.Sequential(OrderedDict([(names[1], up), (act_name, activation), *between, (names[2], down)]))


@torch.no_grad()
def _redraw(linear: nn.Linear, in_features: int, out_features: int, generator: torch.Generator) -> nn.Linear:
    """A ``linear`` of another size, weights normal with the old standard deviation."""
    device, dtype = linear.weight.device, linear.weight.dtype
    new = nn.utils.skip_init(nn.Linear, in_features, out_features, linear.bias is not None, device=device, dtype=dtype)
    new.weight.copy_(torch.randn(new.weight.shape, generator=generator)).mul_(linear.weight.std())
    if new.bias is not None:
        new.bias.zero_()
    return new.train(linear.training).requires_grad_(linear.weight.requires_grad)


def _units(model: nn.Module, candidates: dict[str, nn.Module], usual: bool) -> dict[str, nn.Module]:
    """Candidates of MLP blocks (all, unless ``usual``), an activation that gates widened to its whole MLP."""
    units: dict[str, nn.Module] = {}
    for name, module in candidates.items():
        parent = _parent(model, name)
        if isinstance(module, HOSTS):
            if not isinstance(module.activation, nn.Module):
                units[name] = module
        elif gated_layout(parent):
            if "." not in name:
                raise ConfigurationError(f"{type(model).__name__} is itself a gated MLP: use ungate(model, ...).")
            units[name.rpartition(".")[0]] = parent
        elif _gates(parent):
            raise ConfigurationError(
                f"{name} gates in a {type(parent).__name__}, which cannot be rebuilt without its gate here (known: "
                f"linear layers {_known()}). A polynomial on top of a gate is another model: exclude={name!r}."
            )
        elif not usual or _widens(parent, module):
            units[name] = module
    return units


def _known() -> str:
    return "; ".join("/".join(layout) for layout in GATED_LAYOUTS)


def _gates(parent: nn.Module) -> bool:
    """Whether an MLP multiplies its activation by something, as far as names and widths tell."""
    if isinstance(parent, nn.Sequential):
        return False
    own = (name.split(".") for name, _ in parent.named_parameters())
    named = any("gate" in path[0] for path in own if len(path) < 3)  # its tensors and its layers', nothing deeper
    linears = [child for child in parent.children() if _is_linear(child)]
    fused = len(linears) == 2 and any(a is not b and _out(a) == 2 * _in(b) for a in linears for b in linears)
    return named or fused or any(word in type(parent).__name__.lower() for word in ("glu", "gated"))


def _widens(parent: nn.Module, activation: nn.Module) -> bool:
    """Whether the activation sits in an MLP: two linear layers and no convolution beside it, or one that widens."""
    if _reads_convolution(parent, activation):
        return False
    linears = [child for child in parent.children() if _is_linear(child)]
    return len(linears) > 1 or any(_out(linear) > _in(linear) for linear in linears)


def _reads_convolution(parent: nn.Module, activation: nn.Module) -> bool:
    """In a Sequential the last layer with weights before it is what counts, elsewhere order says nothing."""
    children: Iterable[nn.Module] = parent.children()
    if isinstance(parent, nn.Sequential):
        children = list(children)
        before = children[: children.index(activation)]
        children = [child for child in before if _is_linear(child) or isinstance(child, _CONVOLUTION)][-1:]
    return any(isinstance(child, _CONVOLUTION) for child in children)


def _refuse_other_settings(model: nn.Module, found: dict[str, nn.Module], options: dict[str, Any]) -> None:
    """Nothing to do because it was done before must not hide that something else was done."""
    wanted, present = _settings(polynomial(**options)), list(describe(model).values())
    if not found and wanted not in present:
        raise ConfigurationError(f"kind: the model has {present[0]} already, and nothing left to make {wanted} of.")


def _refuse_last_dimension_of_maps(model: nn.Module, found: dict[str, nn.Module], options: dict[str, Any]) -> None:
    layer = polynomial(**options)
    for name, module in found.items():
        if isinstance(layer, PolyNorm) and layer.dim == -1 and _reads_convolution(_parent(model, name), module):
            raise ConfigurationError(
                f"dim=-1 would normalise the rows of the feature maps at {name}: use dim=1 for [N, C, H, W], "
                "or kind='polyrelu'."
            )


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _beside(parent: nn.Module, model: nn.Module, layer: nn.Module) -> nn.Module:
    """``layer`` on the device and in the dtype of the weights around it: the old activation had none."""
    for parameter in (*parent.parameters(), *model.parameters()):
        if parameter.is_floating_point() and not parameter.is_meta:
            return layer.to(parameter.device, parameter.dtype)
    return layer


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # transformers' transposed Linear


def _in(linear: nn.Module) -> int:
    return linear.in_features if isinstance(linear, nn.Linear) else linear.weight.shape[0]


def _out(linear: nn.Module) -> int:
    return linear.out_features if isinstance(linear, nn.Linear) else linear.weight.shape[1]

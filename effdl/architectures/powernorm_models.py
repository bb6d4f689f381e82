"""PowerNorm (slug ``powernorm``) in whole models: put in place of LayerNorm and RMSNorm, and folded away when trained.

The architecture changes on purpose. :func:`powernorm_model` is the pure function that rebuilds it around a checkpoint;
:func:`fold_power_norm` leaves a model without running statistics, and where only Linear layers read a norm, without
the norm (group scaling stays).
"""

from __future__ import annotations

import copy
import itertools
import re
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from effdl.architectures.powernorm import PowerNorm, group_scale
from effdl.core.errors import ConfigurationError, check
from effdl.core.select import Targets, select_modules
from effdl.core.surgery import disable_transformer_fast_path, replace_modules

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead")
_READERS = {F.linear: (0, 1), torch.addmm: (1, 2)}  # where input and weight stand; addmm: transformers' Conv1D
_SAME_TOKENS = (Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten)
_QUERY_KEY_NORM = re.compile(r"(.*\.)?((q|k|query|key)_(layer_?)?norm|norm_(q|k))")


def powernorm_model(
    model: nn.Module,
    targets: Targets = None,
    exclude: Targets = None,
    group_num: int | Literal["auto"] | None = "auto",
    **options: Any,
) -> nn.Module:
    """Replace LayerNorm and RMSNorm in ``model``, in place, by :class:`PowerNorm`; returns ``model``. Again: no change.

    gamma and beta start from the replaced layer's (an RMSNorm has no beta: it starts at 0; a LayerNorm without affine
    parameters becomes a PowerNorm without). ``nn.TransformerEncoderLayer`` leaves its fast path, which reads norms
    past their forward.

    Args:
        model: any network over tokens [..., C].
        targets, exclude: layers, as globs or types; ``None``: every LayerNorm and RMSNorm but those of queries, keys.
        group_num: ``"auto"``: the number of heads of the attention next to each norm.
        options: the other arguments of :class:`PowerNorm`.

    Raises:
        ConfigurationError: nothing matched, no attention to read heads from, a norm over more than the last dimension.

    Example::

        model = powernorm_model(timm.create_model("vit_tiny_patch16_224"), warmup_iters=1000)
        model.load_state_dict(torch.load("trained.pt", weights_only=True))
    """
    selected = select_norms(model, targets, exclude)
    selected = {name: norm for name, norm in selected.items() if not isinstance(norm, PowerNorm)}

    def make(name: str, old: nn.Module) -> PowerNorm:
        features = _features(name, old)
        groups = attention_heads(model, name, features) if group_num == "auto" else group_num
        norm = PowerNorm(features, group_num=groups, affine=_has_affine(old), **options)
        norm.name = name
        return _copy_affine(old, norm)

    replace_modules(model, selected, make)
    disable_transformer_fast_path(model)
    return model


def select_norms(model: nn.Module, targets: Targets = None, exclude: Targets = None) -> dict[str, nn.Module]:
    """The norms that :func:`powernorm_model` is about, by name, those that are a PowerNorm already among them."""
    kinds = {type(m) for m in model.modules() if isinstance(m, (nn.LayerNorm, PowerNorm)) or _is_rms_norm(m)}
    selected = select_modules(model, targets, exclude, default=tuple(kinds) or (nn.LayerNorm, "RMSNorm"))
    if targets is not None:
        return selected
    return {name: norm for name, norm in selected.items() if not _QUERY_KEY_NORM.fullmatch(name)}


def _is_rms_norm(module: nn.Module) -> bool:
    return type(module).__name__.lower().endswith("rmsnorm")  # torch, timm and every transformers model have their own


def _features(name: str, norm: nn.Module) -> int:
    shape = getattr(norm, "normalized_shape", None)
    if shape is None and getattr(norm, "weight", None) is not None:
        shape = norm.weight.shape
    shape = (shape,) if isinstance(shape, int) else tuple(shape or ())
    last_only = len(shape) == 1 and not type(norm).__name__.endswith("2d")
    valid = "norms over the last dimension of [..., C]"
    check(last_only, "targets", f"{name} ({type(norm).__name__})", valid, "Leave this one out with exclude=...")
    return int(shape[0])


def attention_heads(model: nn.Module, name: str, features: int) -> int:
    """Heads of the attention nearest to the layer ``name``: below its parent, else its parent's parent, ...

    Raises:
        ConfigurationError: there is no attention, or its heads do not divide ``features``.
    """
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        for module in model.get_submodule(".".join(parts[:depth])).modules():
            for source, attribute in itertools.product((module, getattr(module, "config", None)), _HEADS):
                heads = getattr(source, attribute, None)
                if isinstance(heads, int) and heads > 0 and features % heads == 0:
                    return heads
    raise ConfigurationError(
        f"group_num='auto': no attention near {name} whose head count divides {features}. Give group_num as an "
        "integer, or None for no group scaling."
    )


def _has_affine(norm: nn.Module) -> bool:
    return getattr(norm, "weight", None) is not None


@torch.no_grad()
def _copy_affine(old: nn.Module, new: PowerNorm) -> PowerNorm:
    if new.weight is None or old.weight.is_meta:
        return new
    if _is_rms_norm(old):  # asked, not read: some add 1 to their weight
        new.weight.copy_(old(torch.ones_like(old.weight).unsqueeze(0))[0])
    else:
        new.weight.copy_(old.weight)
        if old.bias is not None:
            new.bias.copy_(old.bias)
    return new


class FoldedNorm(nn.Module):
    """What is left of a trained PowerNorm that no Linear could take in: y = group_scale(x) * weight + bias.

    Args:
        weight, bias: [C] or ``None``.
        group_num, group_eps: of the group scaling; ``None`` for none.
    """

    def __init__(self, weight: Tensor | None, bias: Tensor | None, group_num: int | None, group_eps: float) -> None:
        super().__init__()
        self.weight = None if weight is None else nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.group_num, self.group_eps = group_num, group_eps

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.group_num is None else group_scale(x, self.group_num, self.group_eps)
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"group_num={self.group_num}, affine={self.weight is not None}"


@torch.no_grad()
def fold_power_norm(model: nn.Module, *example: Any) -> nn.Module:
    """A copy of a trained model, in eval mode, with its PowerNorms folded away.

    gamma / sqrt(phi + eps) and beta go into the Linear layers that read the norm, where one forward of ``example``
    shows that nothing else does; the group scaling stays in its place (without it the norm is gone). Elsewhere, and
    without an example, the norm becomes one multiply-add per channel.

    Args:
        model: the trained model, left as it is.
        example: positional inputs of one forward.

    Example::

        dense = fold_power_norm(model, torch.randn(1, 3, 224, 224))
    """
    folded = copy.deepcopy(model).eval()
    readers = _linear_readers(folded, example) if example else {}
    norms = {name: module for name, module in folded.named_modules() if isinstance(module, PowerNorm)}
    for norm in norms.values():
        for linear in readers.get(norm, ()):
            _fold_into(linear, *_coefficients(norm))

    def remainder(_name: str, norm: nn.Module) -> nn.Module:
        weight, bias = (None, None) if readers.get(norm) else _coefficients(norm)
        if weight is None and norm.group_num is None:
            return nn.Identity()
        return FoldedNorm(weight, bias, norm.group_num, norm.group_eps)

    replace_modules(folded, norms, remainder)
    return folded


def _coefficients(norm: PowerNorm) -> tuple[Tensor, Tensor | None]:
    inverse = (norm.running_phi + norm.eps).rsqrt()
    weight = inverse if norm.weight is None else inverse * norm.weight
    return weight, None if norm.bias is None else norm.bias.detach().clone()


def _fold_into(linear: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    by_input = linear.weight.data if _is_conv1d(linear) else linear.weight.data.T  # [inputs, outputs]
    if bias is not None:
        shift = bias.to(by_input.dtype) @ by_input
        linear.bias = nn.Parameter(shift if linear.bias is None else linear.bias + shift)
    by_input.mul_(weight.unsqueeze(1))


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # transformers' Linear with the weight the other way round


def _linear_readers(model: nn.Module, example: tuple) -> dict[PowerNorm, list[nn.Module]]:
    """Norms whose output is read by Linear layers only, each of which reads nothing else and shares no weight."""
    linears = {id(m.weight): m for m in model.modules() if isinstance(m, nn.Linear) or _is_conv1d(m)}
    with _ReadLog(model, linears) as log:
        outputs = tree_leaves(model(*example))
    log.note_others(outputs)
    owners = [id(p) for m in model.modules() for p in m._parameters.values() if p is not None]
    readers = {}
    for norm, weights in log.weights_of.items():
        private = all(log.inputs_of[w] == {norm} and owners.count(w) == 1 for w in weights)
        if weights and private and norm not in log.read_elsewhere:
            readers[norm] = [linears[w] for w in weights]
    return readers


class _ReadLog(TorchFunctionMode):
    """Which operation reads the output of which PowerNorm, during one forward."""

    def __init__(self, model: nn.Module, linears: dict[int, nn.Module]) -> None:
        self.source: dict[int, PowerNorm] = {}
        self.read_elsewhere: set[PowerNorm] = set()
        self.weights_of: dict[PowerNorm, set[int]] = {}
        self.inputs_of: dict[int, set[PowerNorm | None]] = {weight: set() for weight in linears}
        self._alive: list[Tensor] = []  # an id is one tensor's only as long as that lives
        norms = [m for m in model.modules() if isinstance(m, PowerNorm)]
        self._hooks = [norm.register_forward_hook(self._on_norm) for norm in norms]

    def _on_norm(self, norm: nn.Module, _args: tuple, output: Tensor) -> None:
        self.weights_of.setdefault(norm, set())
        self._is_output(output, norm)

    def _is_output(self, tensor: Tensor, norm: PowerNorm) -> None:
        self.source[id(tensor)] = norm
        self._alive.append(tensor)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            return result  # .shape, .dim() and the like
        norm = self.source.get(id(args[0])) if args else None
        if norm is not None and func in _SAME_TOKENS and result.shape[-1] == norm.num_features:
            self._is_output(result, norm)
            return result
        read, (at_input, at_weight) = list(args), _READERS.get(func, (0, len(args)))
        if at_weight < len(args) and id(args[at_weight]) in self.inputs_of:
            weight, norm = id(read.pop(at_weight)), self.source.get(id(read.pop(at_input)))
            self.inputs_of[weight].add(norm)
            if norm is not None:
                self.weights_of[norm].add(weight)
        self.note_others(tree_leaves((read, kwargs)))
        return result

    def note_others(self, leaves: Any) -> None:
        for leaf in leaves:
            if id(leaf) in self.source:
                self.read_elsewhere.add(self.source[id(leaf)])
            if id(leaf) in self.inputs_of:
                self.inputs_of[id(leaf)].add(None)

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

"""Records the operations of a forward pass with their relevance rules; autograd then runs the rules backwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from effdl.core._lrp_rules import Affine, Composite, Rule
from effdl.core.errors import ConfigurationError
from effdl.core.select import matches

#: (module, inputs, output, relevance of the output) -> relevance of each input (one tensor, or a tuple)
ModuleRule = Callable[[nn.Module, tuple, Tensor, Tensor], Any]
REGISTERED: dict[type[nn.Module], ModuleRule] = {}

_CONVOLUTIONS = {f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3)}
_PASSED = {"relu", "relu_", "relu6", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "threshold"} | {
    f"{kind}dropout{n}" for kind in ("", "feature_", "alpha_") for n in ("", "1d", "2d", "3d", "_")
}
_SHARED = {"mean", "sum"} | {f"{kind}avg_pool{n}d" for kind in ("", "adaptive_") for n in (1, 2, 3)}
_SUMS = {"add": 1, "add_": 1, "__add__": 1, "__iadd__": 1, "__radd__": 1, "sub": -1, "__sub__": -1, "__isub__": -1}
_SCALED = {"mul", "__mul__", "__rmul__", "div", "true_divide", "__truediv__", "mul_", "div_", "__imul__"}
# the gradient of these is 0 or 1 (or counts copies), so it carries relevance as it carries gradients
_FOLLOWED = {
    "flatten", "view", "view_as", "reshape", "reshape_as", "unflatten", "permute", "transpose", "movedim", "swapaxes",
    "t", "__get__", "squeeze", "unsqueeze", "contiguous", "__getitem__", "cat", "concat", "concatenate", "stack",
    "chunk", "split", "unbind", "narrow", "select", "index_select", "expand", "expand_as", "repeat", "pad", "clone",
    "to", "type", "type_as", "float", "double", "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "amax", "pixel_shuffle", "channel_shuffle", "roll", "flip",
    "requires_grad_", "register_hook", "identity",
}  # fmt: skip


class LRPRuleNotFound(ConfigurationError):
    """The network computes something that has no relevance rule; the message names the module."""


class _Redistribute(torch.autograd.Function):
    """Any operation whose backward is ``hand_back(relevance) -> relevance of each input``."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, hand_back: Callable, *inputs: Tensor) -> Tensor:
        ctx.hand_back = hand_back
        return out.detach()

    @staticmethod
    def backward(ctx: Any, value: Tensor) -> tuple:
        handed = ctx.hand_back(value)
        return None, None, *(handed if isinstance(handed, tuple) else (handed,))


@dataclass(frozen=True)
class _Made:
    """How a tensor came about: an affine layer of input ``a``; ``dim`` is where its weight counts outputs."""

    out: Tensor
    a: Tensor
    layer: Affine
    kind: str
    name: str
    dim: int = 0


class Recorder(TorchFunctionMode):
    """Replaces each operation's backward by its rule while the network runs."""

    def __init__(
        self, model: nn.Module, x: Tensor, rules: Composite, observe: Callable, wanted: set[str] | None
    ) -> None:
        self.model, self.x, self.rules, self.observe, self.wanted = model, x, rules, observe, wanted
        self.stack: list[tuple[str, nn.Module]] = []
        self.made: dict[int, _Made] = {}  # by id; the records keep the tensors alive

    def __enter__(self) -> Any:
        self.undo = contextlib.ExitStack()
        try:
            for name, module in self.model.named_modules():
                rule = next((REGISTERED[c] for c in type(module).__mro__ if c in REGISTERED), None)
                if rule is not None:
                    self.undo.enter_context(_opaque(module, rule))
                enter = module.register_forward_pre_hook(self._push(name), prepend=True)
                leave = module.register_forward_hook(lambda *_: self.stack.pop() and None, always_call=True)
                self.undo.callback(enter.remove)
                self.undo.callback(leave.remove)
            return super().__enter__()
        except BaseException:
            self.undo.close()
            raise

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.undo.close()

    def _push(self, name: str) -> Callable:
        return lambda module, _args: self.stack.append((name, module))

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if not args and "input" in kwargs:
            args = (kwargs.pop("input"),)
        if not any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name in _CONVOLUTIONS or name == "linear":
            return self._affine(name, func, args, kwargs)
        if name == "batch_norm":
            return self._batch_norm(func, *args, **kwargs)
        if name in _PASSED:
            return self._passed(func, args, kwargs)
        if name in _SHARED and not kwargs.get("out"):
            return self._summed(lambda a: func(a, *args[1:], **kwargs), [args[0]])
        if name in _SUMS and self._is_sum(args, kwargs):
            return self._summed(lambda a, b=args[1]: a + _SUMS[name] * b, list(args[:2]))
        if name in _SCALED and isinstance(args[0], Tensor) and not _carries(args[1]):
            return self._passed(torch.mul if "mul" in name else torch.true_divide, args[:2], {})
        out = func(*args, **kwargs)
        if name not in _FOLLOWED and any(isinstance(o, Tensor) and o.requires_grad for o in tree_leaves(out)):
            raise self._unknown(name)
        return out

    def _unknown(self, operation: str) -> LRPRuleNotFound:
        path, module = self.stack[-1] if self.stack else ("", self.model)
        kind = type(module).__name__
        return LRPRuleNotFound(
            f"no relevance rule for {operation!r} in {path or 'the network'!r} ({kind}): give the module one with "
            f"effdl.core.lrp.register_rule({kind}, rule); pass_through suits activations."
        )

    def _rule(self, kind: str, name: str, a: Tensor) -> Rule:
        module = dict(self.model.named_modules()).get(name, self.model) if self.rules.layers else self.model
        for target, rule in self.rules.layers:
            if matches(name, module, target):
                return rule
        if self.rules.first is not None and a is self.x:
            return self.rules.first
        return {"conv": self.rules.conv, "linear": self.rules.linear}.get(kind, self.rules.other)

    def _explained(self, made: _Made) -> Tensor:
        """The tensor, with its rule behind it and a listener in front."""
        rule = self._rule(made.kind, made.name, made.a)
        out = _Redistribute.apply(made.out, lambda r: rule(made.layer, made.a.detach(), r), made.a)
        if made.kind != "norm" and (self.wanted is None or made.name in self.wanted):
            out.register_hook(lambda r: self.observe(made.name, r))
        self.made[id(out)] = _Made(out, made.a, made.layer, made.kind, made.name, made.dim)
        return out

    def _affine(self, operation: str, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        named = dict(zip(("input", "weight", "bias"), args)) | kwargs
        a, weight, bias = named.pop("input"), named.pop("weight").to(args[0].dtype), named.pop("bias", None)
        rest = args[3:]
        if _carries(weight) or _carries(bias):
            raise self._unknown(operation)
        bias = None if bias is None else bias.to(a.dtype)
        transposed, linear = "transpose" in operation, operation == "linear"

        def apply(x: Tensor, w: Tensor) -> Tensor:
            return func(x, w, None, *rest, **named)

        with torch.no_grad():
            out = func(a, weight, bias, *rest, **named)
        shift = None if bias is None else bias if linear else bias.view(-1, *[1] * (weight.dim() - 2))
        layer, source = Affine(apply, weight, shift), self.made.get(id(a))
        if source is not None and source.kind == "norm" and not transposed:
            a, layer = source.a, _behind_norm(layer, source)
        groups = weight.dim() > 2 and transposed and (named.get("groups", (*rest, 1, 1, 1, 1)[3]) != 1)
        dim = -1 if groups else 1 if transposed else 0
        kind = "linear" if linear else "conv"
        name = self.stack[-1][0] if self.stack else operation
        return self._explained(_Made(out, a, layer, kind, name, dim))

    def _batch_norm(
        self, func: Callable, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
        weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False, momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:  # fmt: skip
        if training or running_mean is None or running_var is None:
            raise self._unknown("batch_norm on the statistics of the batch")
        mean, variance = running_mean.to(input), running_var.to(input)
        scale = (variance + eps).rsqrt() * (1 if weight is None else weight.to(input))
        shift = (0 if bias is None else bias.to(input)) - mean * scale
        along = (-1, *[1] * (input.dim() - 2))
        scale, shift = scale.view(along), shift.view(along)
        out = (input * scale + shift).detach()
        source = self.made.get(id(input))
        if source is not None and source.kind in ("conv", "linear") and source.dim >= 0:
            layer = source.layer.scaled(scale, shift, source.dim)
            return self._explained(_Made(out, source.a, layer, source.kind, source.name, source.dim))
        layer = Affine(lambda a, w: a * w, scale, shift)
        return self._explained(_Made(out, input, layer, "norm", self.stack[-1][0] if self.stack else "batch_norm"))

    def _passed(self, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        with torch.no_grad():  # in-place ones act on the copy
            out = func(args[0].detach().clone(), *args[1:], **kwargs)
        return _Redistribute.apply(out, lambda r: r, args[0])

    def _is_sum(self, args: tuple, kwargs: dict) -> bool:
        return len(args) == 2 and isinstance(args[0], Tensor) and not kwargs

    def _summed(self, func: Callable, terms: list) -> Tensor:
        """Averages and sums: each carrying summand gets its proportion (the rule ``other`` on the stack of them)."""
        carrying = [i for i, term in enumerate(terms) if _carries(term)]
        values = [t.detach() if isinstance(t, Tensor) else t for t in terms]
        with torch.no_grad():
            out = func(*values)

        def hand_back(r: Tensor) -> tuple:
            handed = []
            for i in carrying:

                def part(a: Tensor, _w: Tensor, i: int = i) -> Tensor:
                    return func(*[a if j == i else v if len(values) == 1 else v * 0 for j, v in enumerate(values)])

                one = torch.ones((), dtype=r.dtype, device=r.device)
                alone = part(values[i], one)
                handed.append(self.rules.other(Affine(part, one, out - alone), values[i], r))
            return tuple(handed)

        return _Redistribute.apply(out, hand_back, *[terms[i] for i in carrying])


def _carries(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _behind_norm(layer: Affine, norm: _Made) -> Affine:
    """A layer that sees a BatchNorm's output, as a layer of the BatchNorm's input; its bias is a tensor (padding)."""
    scale, weight = norm.layer.weight.reshape(-1), layer.weight
    inner = weight.shape[1]
    rows = scale.view(-1, 1, inner).expand(-1, weight.shape[0] * inner // len(scale), -1).reshape(-1, inner)
    weight = weight * rows.view(*rows.shape, *[1] * (weight.dim() - 2))
    with torch.no_grad():
        shift = layer.linear(norm.layer.shift.expand_as(norm.a[:1]).contiguous(), layer.weight)
    return Affine(layer.linear, weight, shift if layer.shift is None else shift + layer.shift)


@contextlib.contextmanager
def _opaque(module: nn.Module, rule: ModuleRule) -> Iterator[None]:
    """The module as one operation with a rule of its own."""
    forward, own = module.forward, module.__dict__.get("forward")

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction(), torch.no_grad():
            out = forward(*args, **kwargs)
        inputs = [arg for arg in args if _carries(arg)]
        return _Redistribute.apply(out, lambda r: rule(module, args, out, r), *inputs) if inputs else out

    module.__dict__["forward"] = call
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own

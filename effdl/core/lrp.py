"""Layer-wise Relevance Propagation: from the logit of a class back to every layer, by a rule per layer.

The network runs once, forward, as it is; each operation it calls is recorded with its rule, and autograd's backward
pass then carries relevance where it would carry gradients. Functional operations (``x + y``, ``flatten``, ``F.relu``),
layers that are used twice and in-place activations need no rewriting of the network; it is not changed, not copied.

============================================= =====================================================
operation                                     relevance
============================================= =====================================================
convolutions, Linear                          :class:`Composite`: a rule each
BatchNorm behind or before one                folded into it (canonisation)
ReLU, leaky ReLU, ReLU6, dropout, x * number  passed through
max-pooling                                   to the argmax
average-pooling, mean, sums (skips)           in proportion to the summands
reshaping, slicing, concatenation, padding    follows the values
anything else                                 :class:`LRPRuleNotFound`, :func:`register_rule`
============================================= =====================================================

Example::

    found = relevance(model.eval(), images, labels)             # labels (B,) long
    heatmap, conv = found.inputs, found.layers["layer1.0.conv1"]
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effdl.core._lrp_recorder import REGISTERED, LRPRuleNotFound, ModuleRule, Recorder
from effdl.core._lrp_rules import COMPOSITES, Affine, AlphaBeta, Composite, Epsilon, Rule, ZBox
from effdl.core.batch import logits_of
from effdl.core.capture import named_module, uncompiled, undisturbed
from effdl.core.errors import check, check_choice

__all__ = [
    "COMPOSITES", "Affine", "AlphaBeta", "Composite", "Epsilon", "LRPRuleNotFound", "Relevance", "Rule", "ZBox",
    "pass_through", "register_rule", "relevance",
]  # fmt: skip


def pass_through(module: nn.Module, inputs: tuple, output: Tensor, relevance: Tensor) -> Tensor:
    """A rule for :func:`register_rule`: an activation that hands on what it gets."""
    return relevance


def register_rule(layer_type: type[nn.Module], rule: ModuleRule) -> None:
    """Give a module type (and its subclasses) a rule of its own, for the module as a whole.

    Args:
        layer_type: an ``nn.Module`` class.
        rule: ``(module, inputs, output, relevance) -> relevance of each input``, shapes as the inputs'.

    Example::

        register_rule(nn.GELU, pass_through)
    """
    legal = isinstance(layer_type, type) and issubclass(layer_type, nn.Module)
    check(legal, "layer_type", layer_type, "a class of nn.Module")
    check(callable(rule), "rule", rule, "a function (module, inputs, output, relevance)")
    REGISTERED[layer_type] = rule


@dataclass(frozen=True)
class Relevance:
    """What :func:`relevance` found.

    Args:
        logits: (B, C) of the network.
        inputs: relevance of the input, in its shape.
        layers: layer name to the relevance of its output (B, channels, ...); a layer used twice: their sum.
    """

    logits: Tensor
    inputs: Tensor
    layers: dict[str, Tensor]


def relevance(
    model: nn.Module,
    inputs: Tensor,
    start: Tensor,
    *,
    rule: str | Composite = "composite",
    layers: Iterable[str] | None = None,
) -> Relevance:
    """Propagate relevance from the output to the input, in eval mode and float32 (float64 for float64 inputs).

    Args:
        model: the network; parameters, flags, buffers and hooks are afterwards what they were.
        inputs: (B, ...) floating point.
        start: class labels (B,), each sample starting with relevance 1 at its label, or the relevance (B, C) itself.
        rule: a :class:`Composite`, or ``"composite"`` (epsilon in Linear, z+ in convolutions), ``"zplus"``,
            ``"epsilon"``, ``"alpha2-beta1"``.
        layers: convolutions and Linear layers whose relevance is wanted; ``None``: all.

    Raises:
        LRPRuleNotFound: an operation without a rule.
        ConfigurationError: an unknown rule or layer.
        RuntimeError: relevance of a layer that is not finite; the message names it.
    """
    if isinstance(rule, str):
        check_choice("rule", rule, COMPOSITES)
        rule = COMPOSITES[rule]
    model = uncompiled(model)
    for name in layers or ():
        named_module(model, name, "layers")
    found: dict[str, Tensor] = {}

    def observe(name: str, value: Tensor) -> None:
        if not bool(torch.isfinite(value).all()):
            raise RuntimeError(f"the relevance of {name!r} is not finite (NaN or infinity in weights or activations).")
        found[name] = found[name] + value if name in found else value

    eager = torch.compiler.set_stance("force_eager")
    with undisturbed(model), eager, torch.autocast(inputs.device.type, enabled=False):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        x = (inputs if inputs.dtype == torch.float64 else inputs.float()).detach().clone().requires_grad_()
        with Recorder(model, x, rule, observe, None if layers is None else set(layers)):
            logits = logits_of(model(x))
        first = start.to(logits) if start.is_floating_point() else F.one_hot(start, logits.shape[-1]).to(logits)
        (back,) = torch.autograd.grad(logits, x, first)
    if not bool(torch.isfinite(back).all()):
        raise RuntimeError("the relevance of the input is not finite (NaN or infinity in weights or activations).")
    return Relevance(logits.detach(), back, found)

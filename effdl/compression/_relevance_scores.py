"""Scores of filters on reference data: relevance, and the criteria it competes with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effdl.core.batch import logits_of
from effdl.core.capture import capture, uncompiled, undisturbed
from effdl.core.distributed import all_reduce_sum, rank, world_size
from effdl.core.errors import ConfigurationError, check, check_choice, check_integer
from effdl.core.lrp import Composite, relevance
from effdl.core.random import generator
from effdl.core.structure import weight_rows, width_of

CRITERIA = ("lrp", "weight", "gradient", "taylor", "random")
Scores = dict[str, Tensor]


def per_channel(value: Tensor, layer: nn.Module) -> Tensor:
    """Sum over everything but the channels: (B, C, H, W) or (B, ..., C) of a Linear layer to float64 (C,)."""
    channel = value.dim() - 1 if isinstance(layer, nn.Linear) else 1
    return value.double().movedim(channel, 0).flatten(1).sum(1)


def filter_scores(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    layers: Sequence[str],
    criterion: str = "lrp",
    *,
    rule: str | Composite = "composite",
    absolute: bool = False,
    batch_size: int = 64,
    seed: int = 0,
) -> Scores:
    """Raw scores of all filters (output channels) of the named layers, before any normalisation.

    ``lrp``: relevance that enters the layer's output from above, summed over samples and positions, each sample
    starting with 1 at its true class. ``gradient``: mean over samples and positions of dL/da, ``taylor``: of a dL/da
    (Molchanov et al. 2017), with a the layer's output and L the mean cross-entropy. ``weight``: sum of |W|.
    ``random``: uniform numbers of ``seed``.

    Args:
        model: the network, any mode; nothing of it is changed.
        inputs: (N, ...) reference samples on the network's device. Under DDP each process takes its share of them, and
            the sums are all-reduced.
        labels: (N,) int64, their classes.
        layers: names of convolutions and Linear layers.
        criterion: one of the above.
        rule: of ``lrp``, see ``effdl.core.lrp.relevance``.
        absolute: ``lrp``: sum |R| instead of R.
        batch_size: samples per pass.
        seed: of ``random``.

    Returns:
        Layer name to float64 (filters,).

    Raises:
        ConfigurationError: unknown criterion, labels missing or of another length, no samples.
        LRPRuleNotFound: an operation without a rule, ``criterion="lrp"``.
        RuntimeError: a score that is not finite; the message names the layer.

    Example::

        scores = filter_scores(model, images, labels, ["conv1", "conv2"])
    """
    check_choice("criterion", criterion, CRITERIA)
    check_integer("batch_size", batch_size, 1)
    model = uncompiled(model)
    modules = {name: model.get_submodule(name) for name in layers}
    if criterion == "weight":
        return {name: _weight_norms(module) for name, module in modules.items()}
    if criterion == "random":
        stream = generator(seed)
        return {
            name: torch.rand(width_of(module), generator=stream, dtype=torch.float64)
            for name, module in modules.items()
        }
    check_labels(inputs, labels)
    mine = slice(rank(), None, world_size())
    parts = zip(inputs[mine].split(batch_size), labels[mine].split(batch_size))
    if criterion == "lrp":

        def one(x: Tensor, y: Tensor) -> Scores:
            found = relevance(model, x, y, rule=rule, layers=layers).layers
            return {n: per_channel(r.abs() if absolute else r, modules[n]) for n, r in found.items()}
    else:
        one = _derivatives(model, modules, criterion, len(labels))
    scores = {
        name: torch.zeros(width_of(module), dtype=torch.float64, device=inputs.device)
        for name, module in modules.items()
    }
    for x, y in parts:
        for name, score in one(x, y).items():
            scores[name] += score
    all_reduce_sum(*scores.values())
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise RuntimeError(f"the scores of {name!r} are not finite: NaN or infinity in weights or activations.")
    return scores


def check_labels(inputs: Tensor, labels: Tensor | None) -> None:
    """Raise ConfigurationError unless there are samples and a class for each of them."""
    fix = "Batches are (x, y) or dicts with 'label'; relevance starts at the true class."
    check(isinstance(labels, Tensor) and labels.dim() == 1, "reference", None, "samples with labels (N,)", fix)
    check(len(inputs) == len(labels) > 0, "reference", len(inputs), f"as many samples as labels ({len(labels)})", fix)


def _weight_norms(layer: nn.Module) -> Tensor:
    return weight_rows(layer).double().abs().sum(1)


def _derivatives(
    model: nn.Module, modules: dict[str, nn.Module], criterion: str, total: int
) -> Callable[[Tensor, Tensor], Scores]:
    """Mean over samples and positions of dL/da, or of a dL/da, for one part of ``total`` samples."""

    def one(x: Tensor, y: Tensor) -> Scores:
        with undisturbed(model), torch.autocast(x.device.type, enabled=False):
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            x = x.detach().clone().requires_grad_()
            with capture(model, modules, clone=True) as seen:  # an in-place ReLU must not reach a
                loss = F.cross_entropy(logits_of(model(x)).float(), y, reduction="sum") / total
            if missing := [name for name in modules if name not in seen]:
                raise ConfigurationError(f"targets: {missing} took no part in the network's forward pass.")
            slopes = torch.autograd.grad(loss, list(seen.values()))
        found = {}
        for (name, a), slope in zip(seen.items(), slopes):
            value = a.detach() * slope if criterion == "taylor" else slope
            channels = width_of(modules[name])
            positions = total * value.numel() / (channels * len(x))
            found[name] = per_channel(value, modules[name]) / positions
        return found

    return one


def normalised(raw: Scores, alive: dict[str, Tensor], criterion: str = "lrp") -> Scores:
    """Scores that can be ranked over all layers: divided per layer by a norm over its live filters.

    ``lrp`` and ``weight``: by the sum of |score|; ``gradient`` and ``taylor``: |score| by the Euclidean norm.

    Args:
        raw: from :func:`filter_scores`.
        alive: layer name to bool (filters,).
    """
    if criterion == "random":
        return raw
    result = {}
    for name, score in raw.items():
        live = score[alive[name].to(score.device)]
        if criterion in ("gradient", "taylor"):
            result[name] = score.abs() / live.norm().clamp_min(1e-300)
        else:
            result[name] = score / live.abs().sum().clamp_min(1e-300)
    return result

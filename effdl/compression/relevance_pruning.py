"""relevance-pruning: Pruning by Explaining (Yeom et al. 2021, arXiv 1912.08881).

Filters that contribute nothing to the true class of a few reference images are removed, lowest first. Relevance R is
propagated from the true class's logit to the input (``effdl.core.lrp``); a filter c of layer l scores

    score_lc = sum over samples and positions of R[:, c]         relevance that enters its output from above
    rank by    score_lc / sum_c |score_lc|                       over the layer's live filters, all layers in one list

and the lowest ``step_sparsity`` share goes, again and again with new scores, until ``sparsity`` of the filters are
gone. Then dead filters are taken out (``effdl.core.structure.compact``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from effdl.compression._relevance_groups import filters_of, prunable, uncoupled
from effdl.compression._relevance_scores import CRITERIA, Scores, check_labels, filter_scores, normalised
from effdl.core.batch import logits_of, unpack
from effdl.core.capture import uncompiled, undisturbed
from effdl.core.distributed import all_reduce_sum, rank, world_size
from effdl.core.errors import ConfigurationError, check, check_choice, check_integer, check_number
from effdl.core.lrp import COMPOSITES, Composite
from effdl.core.select import NothingMatched, Targets
from effdl.core.structure import (
    ChannelGroup,
    channel_groups,
    channel_parameters,
    compact,
    multiply_accumulates,
    width_of,
)

__all__ = [
    "CRITERIA", "FilterPruner", "Pruned", "balanced", "filter_scores", "normalised", "prunable", "prune_filters",
    "reference_samples",
]  # fmt: skip


def reference_samples(batches: Iterable[Any], per_class: int | None = 10) -> tuple[Tensor, Tensor]:
    """Inputs (N, ...) and labels (N,) of some batches, the first ``per_class`` of each class; ``None``: all.

    Raises:
        ConfigurationError: no batches, or batches without labels.
    """
    parts = [unpack(batch) for batch in batches]
    check(len(parts) > 0, "reference", batches, "batches of reference samples (x, y)")
    for part in parts:
        check_labels(part.inputs, part.labels)
    inputs, labels = (torch.cat([getattr(part, key) for part in parts]) for key in ("inputs", "labels"))
    chosen = balanced(labels, per_class)
    return inputs[chosen], labels[chosen]


def balanced(labels: Tensor, per_class: int | None) -> Tensor:
    """Indices of the first ``per_class`` samples of each class, in their order; a class with fewer is warned of."""
    if per_class is None:
        return torch.arange(len(labels), device=labels.device)
    check_integer("samples_per_class", per_class, 1)
    classes = labels.unique()
    own = labels[:, None] == classes
    few = classes[own.sum(0) < per_class].tolist()
    if few:
        warnings.warn(
            f"Fewer than {per_class} reference samples of classes {few[:10]}: their relevance counts less.",
            stacklevel=2,
        )
    return (own & (own.cumsum(0) <= per_class)).any(1).nonzero().flatten()


@dataclass
class FilterPruner:
    """Ranks the filters of a network and marks the lowest dead, a ``step_sparsity`` at a time.

    Args:
        model: the network; :meth:`advance` leaves it as it is and returns masks, :func:`prune_filters` applies them.
        inputs, labels: (N, ...) and (N,), the reference samples, on the network's device.
        sparsity: share of the filters to remove, in (0, 1).
        step_sparsity: share of the *original* filters that goes in one step, in (0, 1].
        criterion, rule, absolute, batch_size, seed: see :func:`filter_scores`.
        coupled: channels that a residual sum or a depthwise convolution couples go together, by the sum of their
            scores, so that they can be taken out; ``False``: each filter by itself, only masked (the paper's code).
        strict: raise instead of keeping one where the last filter of a layer would go.
        targets, exclude: layers, see :func:`prunable`. Layers that make the network's output always stay.

    Raises:
        ConfigurationError: an argument outside its range, nothing matched, or a ``sparsity`` that would empty layers.
    """

    model: nn.Module
    inputs: Tensor
    labels: Tensor
    sparsity: float = 0.6
    step_sparsity: float = 0.05
    criterion: str = "lrp"
    rule: str | Composite = "composite"
    absolute: bool = False
    coupled: bool = True
    strict: bool = False
    targets: Targets = None
    exclude: Targets = None
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self.sparsity, self.step_sparsity, self.criterion, self.rule)
        check_labels(self.inputs, self.labels)
        self.model = uncompiled(self.model)
        layers = prunable(self.model, self.targets, self.exclude)
        self.groups = self._prunable_groups(layers)
        self.members = [filters_of(self.model, group) for group in self.groups]
        widths = {n: width_of(self.model.get_submodule(n)) for members in self.members for n in members}
        self.dead = {name: torch.zeros(width, dtype=torch.bool) for name, width in widths.items()}
        self.total = sum(widths.values())
        self.goal = round(self.sparsity * self.total)
        most = sum((group.size - 1) * len(members) for group, members in zip(self.groups, self.members))
        possible = most / self.total
        check(self.goal <= most, "sparsity", self.sparsity, f"at most {possible:.3f}: a filter of each layer stays")
        if self.step_sparsity * self.total < 1:
            warnings.warn(
                f"step_sparsity={self.step_sparsity} of {self.total} filters is less than one: one goes a step.",
                stacklevel=3,
            )
        self.per_step = max(1, round(self.step_sparsity * self.total))
        self._stuck = False

    def _prunable_groups(self, layers: list[str]) -> list[ChannelGroup]:
        groups = [g for g in channel_groups(self.model, self.inputs[:2], layers) if not g.is_output]
        if not self.coupled:
            apart = uncoupled(self.model, self.inputs[:2], groups)
            groups = [g for g in apart if g.makers[0] in layers]
        else:
            groups = [g for g in groups if all(name in layers for name in filters_of(self.model, g))]
        if not groups:
            raise NothingMatched(f"targets={self.targets!r}: these layers make the network's output, or are coupled.")
        return groups

    @property
    def layers(self) -> list[str]:
        """Names of the layers that lose filters."""
        return list(self.dead)

    @property
    def removed(self) -> int:
        return sum(int(dead.sum()) for dead in self.dead.values())

    @property
    def reached(self) -> float:
        """Share of the filters that are dead."""
        return self.removed / self.total

    @property
    def done(self) -> bool:
        return self._stuck or self.removed >= self.goal

    def scores(self) -> Scores:
        """Normalised scores of the network as it is now."""
        raw = filter_scores(
            self.model, self.inputs, self.labels, self.layers, self.criterion, rule=self.rule, absolute=self.absolute,
            batch_size=self.batch_size, seed=self.seed + self.removed,
        )  # fmt: skip
        alive = {name: ~dead for name, dead in self.dead.items()}
        return normalised({name: score.cpu() for name, score in raw.items()}, alive, self.criterion)

    def ranking(self, scores: Scores) -> list[tuple[int, int, float]]:
        """``(group, channel, score)`` of all live channels, the lowest first; a channel's score is its members' sum."""
        units = []
        for number, (group, members) in enumerate(zip(self.groups, self.members)):
            total, dead = torch.zeros(group.size, dtype=torch.float64), torch.zeros(group.size, dtype=torch.bool)
            for name, member in members.items():
                total.index_add_(0, member.channel, scores[name][member.index])
                dead[member.channel[self.dead[name][member.index]]] = True
            live = (~dead).nonzero().flatten().tolist()
            units += [(float(total[channel]), number, channel) for channel in live]
        return [(number, channel, score) for score, number, channel in sorted(units)]

    def advance(self) -> dict[str, Tensor]:
        """Score, mark the lowest filters dead, and return the masks of all parameters behind dead filters.

        Returns:
            Parameter name to bool mask in its shape, ``False`` where it must be zero.
        """
        self.mark(self.ranking(self.scores()), min(self.per_step, self.goal - self.removed))
        return self.masks()

    def mark(self, ranking: Sequence[tuple[int, int, float]], count: int) -> None:
        """Mark channels dead in the order of ``ranking`` until ``count`` filters are; one of each layer stays."""
        left = count
        for number, channel, _ in ranking:
            if left <= 0:
                return
            chosen = {name: m.index[m.channel == channel] for name, m in self.members[number].items()}
            emptied = [n for n, index in chosen.items() if len(self.dead[n]) - int(self.dead[n].sum()) <= len(index)]
            if emptied and self.strict:
                raise ConfigurationError(
                    f"sparsity={self.sparsity!r} would remove the last filter of {emptied[0]!r}: lower it, "
                    "name the layer in exclude, or keep one filter with strict=False."
                )
            if not emptied:
                for name, index in chosen.items():
                    self.dead[name][index] = True
                    left -= len(index)
        self._stuck = left > 0

    def masks(self) -> dict[str, Tensor]:
        """Parameter name to bool mask, ``False`` behind dead filters: weights, biases, BatchNorm scale and shift."""
        masks: dict[str, Tensor] = {}
        for group, members in zip(self.groups, self.members):
            name, first = next(iter(members.items()))
            gone = torch.zeros(group.size, dtype=torch.bool)
            gone[first.channel[self.dead[name][first.index]]] = True
            for parameter, dim, member in channel_parameters(self.model, group) if gone.any() else []:
                shape = self.model.get_parameter(parameter).shape
                mask = masks.setdefault(parameter, torch.ones(shape, dtype=torch.bool))
                mask.index_fill_(dim, member.index[gone[member.channel]], False)
        return masks

    def compacted(self) -> tuple[nn.Module, dict[str, dict[str, int]]]:
        """The masked network without its dead filters, and the counts that rebuild it (``core.structure``)."""
        return compact(self.model, self.inputs[:2], self.dead)

    def row(self) -> dict[str, float]:
        """Of the masked network: share of dead filters, accuracy on the reference, parameters and MACs without them."""
        small, _ = self.compacted()
        return {
            "sparsity": self.reached,
            "reference_accuracy": self.accuracy(),
            "parameters": sum(p.numel() for p in small.parameters()),
            "macs": multiply_accumulates(small, self.inputs[:1]),
        }

    def accuracy(self) -> float:
        """Share of the reference samples that the network gets right."""
        mine = slice(rank(), None, world_size())
        right = torch.zeros((), dtype=torch.float64, device=self.inputs.device)
        with undisturbed(self.model), torch.no_grad():
            for x, y in zip(self.inputs[mine].split(self.batch_size), self.labels[mine].split(self.batch_size)):
                right += (logits_of(self.model(x)).argmax(-1) == y).sum()
        all_reduce_sum(right)
        return float(right) / len(self.labels)


def check_settings(sparsity: Any, step_sparsity: Any, criterion: Any, rule: Any) -> None:
    """Raise ConfigurationError for an illegal share, criterion or rule."""
    check_number("sparsity", sparsity, 0, 1, closed="()", fix="0.6 removes six filters of ten.")
    check_number("step_sparsity", step_sparsity, 0, 1, closed="(]", fix="0.05 is the paper's.")
    check_choice("criterion", criterion, CRITERIA)
    if not isinstance(rule, Composite):
        check_choice("rule", rule, COMPOSITES)


@dataclass(frozen=True)
class Pruned:
    """What :func:`prune_filters` did.

    Args:
        dead: layer name to bool (filters,).
        history: a row before the first and after each step: ``sparsity``, ``reference_accuracy``, ``parameters``,
            ``macs`` (of one example), the last two as they are once dead filters are taken out.
    """

    dead: dict[str, Tensor]
    history: list[dict[str, float]]


def prune_filters(
    model: nn.Module, inputs: Tensor, labels: Tensor, sparsity: float, *, history: bool = True, **settings: Any
) -> Pruned:
    """Prune without training in between: masks filters in place until ``sparsity`` of them are gone.

    Args:
        model: the network; weights, biases and BatchNorm parameters of dead filters become zero.
        inputs, labels: the reference samples, see :func:`reference_samples`.
        sparsity: share of the filters to remove.
        history: measure after each step.
        settings: further arguments of :class:`FilterPruner`.

    Example::

        x, y = reference_samples(train_loader, per_class=10)
        done = prune_filters(model, x, y, sparsity=0.6)
        small, counts = effdl.core.structure.compact(model, x[:2], done.dead)
    """
    pruner = FilterPruner(model, inputs, labels, sparsity, **settings)
    rows = [pruner.row()] if history else []
    while not pruner.done:
        masks = pruner.advance()
        with torch.no_grad():
            for name, mask in masks.items():
                parameter = pruner.model.get_parameter(name)
                parameter.mul_(mask.to(parameter))
        rows += [pruner.row()] if history else []
    return Pruned(pruner.dead, rows)

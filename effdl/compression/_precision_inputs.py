"""hessian-mixed-precision: the share of the activations in what a unit's quantisation does to a loss.

With activations a unit's error is delta_i = (Q_b(W_i) - W_i, Q_b(x) - x of every x that enters its layer). The Hessian
block of the inputs is that of the loss with respect to a shift of them, e = 0 added to every input: one product with
directions in the weights and in the shifts serves traces and interactions of both. The mean error of the inputs is
known from calibration, so that their part of the score is ``tr(H_ee) E (x - x_q)^2``.

Example::

    inputs = InputHessian(loss, weights, layers, batches)
    estimates = inputs.traces(probes=64, generator=generator(0))          # float64 [64, layers]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from effdl.core.distributed import all_reduce_mean
from effdl.core.input_quantizers import QuantizedInput, channel_dim


class UnitLayer(NamedTuple):
    """A layer whose input is quantised with a unit; a tied weight has several."""

    unit: int
    layer: nn.Module


@contextmanager
def shifted(layers: Sequence[nn.Module]) -> Iterator[list[list[tuple[Tensor, Tensor]]]]:
    """Inside, each input of each layer has a zero added that wants a gradient; per layer (input, zero) of its calls."""
    seen: list[list[tuple[Tensor, Tensor]]] = [[] for _ in layers]

    def hook(calls: list[tuple[Tensor, Tensor]]) -> Callable[..., tuple]:
        def add(_layer: nn.Module, args: tuple) -> tuple:
            zero = torch.zeros_like(args[0], requires_grad=True)
            calls.append((args[0].detach(), zero))
            return (args[0] + zero, *args[1:])

        return add

    with ExitStack() as hooks:
        for layer, calls in zip(layers, seen):
            hooks.callback(layer.register_forward_pre_hook(hook(calls)).remove)
        yield seen


@dataclass(frozen=True)
class InputHessian:
    """Second derivatives of a mean loss by weights and by shifts of inputs.

    Args:
        loss: batch -> mean loss of that batch.
        weights: one of each unit; each needs ``requires_grad``.
        layers: whose inputs count, with their units.
        batches: the probe set; each counts as much as another.
    """

    loss: Callable[[Any], Tensor]
    weights: Sequence[Tensor]
    layers: Sequence[UnitLayer]
    batches: Sequence[Any]

    def _graph(self, batch: Any) -> tuple[list[list[tuple[Tensor, Tensor]]], list[Tensor], list[Tensor]]:
        """Inputs and shifts by layer; weights and shifts in one list; the loss' gradients by them, with their graph."""
        with shifted([place.layer for place in self.layers]) as seen:
            value = self.loss(batch)
        variables = [*self.weights, *(zero for calls in seen for _, zero in calls)]
        grads = torch.autograd.grad(value, variables, create_graph=True, materialize_grads=True)
        return seen, variables, grads

    def traces(self, probes: int, generator: torch.Generator) -> Tensor:
        """Hutchinson's estimates of ``tr(H_ee)`` of each layer's inputs, a mean over examples; float64 [probes, L]."""
        found = torch.zeros(probes, len(self.layers), dtype=torch.float64, device=self.weights[0].device)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for batch in self.batches:
                seen, variables, grads = self._graph(batch)
                shifts, slopes = variables[len(self.weights) :], grads[len(self.weights) :]
                counts = [len(calls) for calls in seen]
                for probe in range(probes):
                    signs = [torch.randint(0, 2, g.shape, generator=generator, dtype=torch.int8) for g in shifts]
                    v = [(2 * sign - 1).to(g) for sign, g in zip(signs, shifts)]
                    rows = _product(slopes, shifts, v)
                    parts = torch.stack([(r * d).sum().double() for r, d in zip(rows, v)]).split(counts)
                    found[probe] += torch.stack([part.sum() for part in parts]) / len(self.batches)
        all_reduce_mean(found)
        return found.cpu()

    def interactions(
        self, deltas: Sequence[Tensor], records: Sequence[QuantizedInput], units: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """As ``hvp_interactions``, of units with their inputs: ``(1/2 delta_i' H_ii delta_i, delta_i' H_ij delta_j)``.

        Args:
            deltas: of all weights.
            records: of each layer's input.
            units: N of them, by index.
        """
        omega = torch.zeros(len(units), len(units), dtype=torch.float64, device=self.weights[0].device)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            for batch in self.batches:
                seen, variables, grads = self._graph(batch)
                moves, owner = list(deltas), list(range(len(deltas)))
                for (unit, layer), record, calls in zip(self.layers, records, seen):
                    moves += [record.apply(x, channel_dim(layer)) - x for x, _ in calls]
                    owner += [unit] * len(calls)
                for row, unit in enumerate(units):
                    v = [move if whose == unit else torch.zeros_like(move) for move, whose in zip(moves, owner)]
                    rows = _product(grads, variables, v)
                    parts = torch.stack([(r * move).sum().double() for r, move in zip(rows, moves)])
                    whose = torch.tensor(owner, device=parts.device)
                    omega[row] += torch.stack([parts[whose == j].sum() for j in units]) / len(self.batches)
        all_reduce_mean(omega)
        omega = (omega + omega.T).cpu() / 2
        return omega.diagonal() / 2, omega - torch.diag(omega.diagonal())


def _product(grads: Sequence[Tensor], variables: Sequence[Tensor], direction: Sequence[Tensor]) -> Sequence[Tensor]:
    slope = sum((g * v).sum() for g, v in zip(grads, direction))
    if not slope.requires_grad:  # a loss linear in all of them
        return [torch.zeros_like(variable) for variable in variables]
    return torch.autograd.grad(slope, variables, retain_graph=True, materialize_grads=True)

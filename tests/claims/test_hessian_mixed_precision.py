"""hessian-mixed-precision, check 7: which order of the layers costs least, on digits at 3 bits."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from effdl.compression.hessian_mixed_precision import (
    augmented_order,
    hessian_scores,
    hvp_interactions,
    measured_interactions,
    pairs_of,
    quantise,
    relative_errors,
    row_sum_order,
)
from effdl.core.hessian import HessianOperator, block_traces
from effdl.core.random import generator

pytestmark = pytest.mark.slow
SEEDS = (0, 1, 2)
BITS = 3
LAYOUT = "tensor"


def network():
    def block(inputs, outputs):
        return nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()

    convolutions = [*block(1, 8), *block(8, 16), nn.MaxPool2d(2), *block(16, 16), *block(16, 32), nn.MaxPool2d(2)]
    linear = [nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), *linear, nn.Linear(32, 10))


def trained(seed, epochs=25):
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    torch.manual_seed(seed)
    g = torch.Generator().manual_seed(seed)
    train, test = torch.randperm(len(x), generator=g).tensor_split([1297])
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(epochs):
        for rows in train[torch.randperm(len(train), generator=g)[:1280]].view(20, 64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model.eval(), [(x[rows], y[rows]) for rows in train[:512].split(128)], [(x[test], y[test])]


class Losses:
    """Losses of a network with some of its weights quantised."""

    def __init__(self, model, batches):
        self.model, self.batches = model, batches
        self.weights = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        self.floats = [w.detach().clone() for w in self.weights]
        self.quantised = [quantise(w, BITS, LAYOUT).dequantize() for w in self.floats]
        self.deltas = [q - w for q, w in zip(self.quantised, self.floats)]

    def loss(self, batch):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    @torch.no_grad()
    def __call__(self, units, batches=None):
        for i in units:
            self.weights[i].copy_(self.quantised[i])
        try:
            return torch.stack([self.loss(batch).double() for batch in batches or self.batches])
        finally:
            for i in units:
                self.weights[i].copy_(self.floats[i])

    def area(self, order, batches=None):
        """Sum over the prefixes of an order of what they add to the loss."""
        curve = [float(self(frozenset(order[:k]), batches).mean()) for k in range(len(order) + 1)]
        return sum(curve) - len(curve) * curve[0]


def orders_of(losses, seed):
    n = len(losses.weights)
    operator = HessianOperator(losses.loss, losses.weights, losses.batches)
    traces = block_traces(operator, 64, generator(seed)).mean(0)
    scores = hessian_scores(traces / torch.tensor([w.numel() for w in losses.weights]), losses.deltas)
    found = measured_interactions(losses, pairs_of(n), n)
    quadratic = hvp_interactions(operator, losses.deltas)
    g = generator(seed)
    orders = {
        "augmented": [augmented_order(scores / 2, found.omega)],
        "augmented, measured diagonal": [augmented_order(found.single, found.omega)],
        "augmented, Hessian-vector products": [augmented_order(scores / 2, quadratic[1])],
        "row sum": [row_sum_order(scores, found.omega)],
        "single": [found.single.argsort().tolist()],
        "Hessian only": [scores.argsort().tolist()],
        "relative error": [relative_errors(losses.floats, losses.deltas).argsort().tolist()],
        "random": [torch.randperm(n, generator=g).tolist() for _ in range(50)],
    }
    ratio = float(found.omega.triu(1).abs().sum() / found.single.abs().sum())
    return orders, ratio


def test_must_07_augmented_orders_cost_less():
    began, rows, ratios = time.process_time(), {}, []
    for seed in SEEDS:
        model, calibration, test = trained(seed)
        losses = Losses(model, calibration)
        orders, ratio = orders_of(losses, seed)
        ratios.append(ratio)
        for name, several in orders.items():
            for where, batches in (("calibration", calibration), ("test", test)):
                areas = [losses.area(order, batches) for order in several]
                rows.setdefault((name, where), []).append(statistics.mean(areas))
    for (name, where), values in rows.items():
        spread = f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
        print(f"{name} | {where} | {spread} | {[round(value, 3) for value in values]}")
    print(f"sum|Omega| / sum|single| {ratios}; {time.process_time() - began:.0f} s of CPU time")
    mean = {name: statistics.mean(values) for (name, where), values in rows.items() if where == "calibration"}
    assert mean["augmented"] <= mean["Hessian only"]
    assert mean["random"] >= 1.2 * mean["augmented"]
    assert statistics.mean(ratios) > 1  # interactions are not small

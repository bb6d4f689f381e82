"""relevance-pruning: official numbers and the rules of relevance."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effdl.compression.relevance_pruning import FilterPruner, filter_scores
from effdl.core.lrp import Composite, Epsilon, relevance
from tests.compression.relevance_pruning_nets import X, Y, doubles, plain
from tests.support import golden

CASES = golden("relevance-pruning")["cases"]


def golden_network(case):
    c, w = case["config"], case["weights"]
    net = nn.Sequential(
        nn.Conv2d(c["ci"], c["c1"], 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(c["c1"], c["c2"], 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(len(w["6.weight"][0]), len(w["6.weight"])), nn.ReLU(),
        nn.Linear(len(w["8.weight"][0]), c["ncls"]),
    ).double()  # fmt: skip
    net.load_state_dict({name: doubles(value) for name, value in w.items()})
    return net, doubles(case["x"]), torch.tensor(case["y"])


def agree(got, want, errors):
    want = doubles(want)
    errors.append(float((got - want).abs().max()))
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", CASES, ids=["first", "second"])
def test_must_01_golden_parity(case):
    net, x, y = golden_network(case)
    errors = []
    for rule, key in (("zplus", "zplus"), ("epsilon", "z_simple")):
        found, want = relevance(net, x, y, rule=rule), case[key]
        agree(found.logits, case["logits"], errors)
        agree(found.inputs.flatten(1).sum(1), want["input_relevance_sum_per_sample"], errors)
        scores = filter_scores(net, x, y, ["0", "3"], rule=rule, batch_size=2)
        for layer in ("0", "3"):
            agree(scores[layer], want[f"filter_scores_conv{layer}"], errors)
            if rule == "zplus":
                agree(found.layers[layer].flatten(1).sum(1), want[f"total_relevance_conv{layer}_per_sample"], errors)
        if "relevance_conv3" in want:
            agree(found.layers["3"][0], want["relevance_conv3"], errors)
    pruner = FilterPruner(net, x, y, 0.5, rule="zplus")
    ranking = [(float(pruner.groups[g].makers[0]), float(c), s) for g, c, s in pruner.ranking(pruner.scores())]
    agree(doubles(ranking), case["prune_order_lowest_first"], errors)
    for criterion, key in (("taylor", "taylor_raw"), ("gradient", "grad_raw"), ("weight", "weight_raw")):
        raw = filter_scores(net, x, y, ["0", "3"], criterion, batch_size=2)
        for layer, want in case[key].items():
            agree(raw[layer], want, errors)
    print(f"largest golden error {max(errors):.1e}")


def test_must_02_relevance_is_conserved():
    net = plain().double()
    with torch.no_grad():
        net[6].weight[2] = -net[6].weight[2].abs()  # no positive contribution: relevance 0 everywhere, no NaN
    found = relevance(net, X.double(), Y, rule="zplus")
    for value in (*found.layers.values(), found.inputs):
        if value is not found.layers["6"]:
            assert torch.allclose(value.flatten(1).sum(1), (Y != 2).double(), atol=1e-5)


def test_must_03_epsilon_is_gradient_times_input():
    net = plain().double()
    x = X.double().requires_grad_()
    logit = net(x).gather(1, Y[:, None])
    slope = torch.autograd.grad(logit.sum(), x)[0]
    tiny = Epsilon(1e-12)
    found = relevance(net, x.detach(), Y, rule=Composite(conv=tiny, linear=tiny, other=tiny)).inputs
    assert torch.allclose(found * logit.view(-1, 1, 1, 1), x * slope, atol=1e-4)
    composite = relevance(net, x.detach(), Y).inputs
    assert not torch.allclose(composite * logit.view(-1, 1, 1, 1), x * slope, atol=1e-2)


def test_must_04_dead_inhibiting_and_duplicate_filters():
    net = plain().double()
    with torch.no_grad():
        net[0].weight[0] = 0  # dead
        net[3].weight[:, 1] = -net[3].weight[:, 1].abs()  # only inhibits
        net[0].weight[2] = net[0].weight[2].abs()
        net[3].weight[:, 2] = net[3].weight[:, 2].abs()
        net[0].weight[3] = net[0].weight[2]  # twice the same
        net[3].weight[:, 3] = net[3].weight[:, 2]
    scores = filter_scores(net, X.double(), Y, ["0"], rule="zplus")["0"]
    assert scores[0] == 0
    assert scores[1] == 0
    assert torch.allclose(scores[2], scores[3], rtol=1e-9)
    assert scores[2] > 0


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.p, self.q, self.head = (nn.Linear(4, 5, bias=False) for _ in range(3))
        self.head = nn.Linear(5, 2, bias=False)

    def forward(self, x):
        return self.head(self.p(x) + self.q(x))


def test_must_06_a_sum_splits_in_proportion():
    torch.manual_seed(3)
    net, x = Sum().double(), torch.rand(3, 4, dtype=torch.float64)
    found = relevance(net, x, torch.tensor([0, 1, 0]), rule="epsilon").layers
    p, q = net.p(x), net.q(x)
    weight = net.head.weight[[0, 1, 0]]
    total = (p + q) * weight / ((p + q) * weight).sum(1, keepdim=True)
    assert torch.allclose(found["p"] + found["q"], total, rtol=1e-5)
    assert torch.allclose(found["p"], total * p / (p + q), rtol=1e-5)

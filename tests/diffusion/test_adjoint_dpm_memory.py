"""adjoint-dpm: memory and network calls."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from effdl.diffusion._adjoint_dpm_ode import stage_weights
from effdl.diffusion._adjoint_dpm_sampler import AdjointSampler
from tests.diffusion.adjoint_dpm_problems import SCHEDULE

WIDTH, ROWS = 128, 16


class Watched(nn.Module):
    """A wide network that counts its calls; ``saved`` counts what autograd holds, and of how many calls."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        layers = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.Tanh())]
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), *layers, nn.Linear(width, 2))
        self.calls, self.graphs = 0, 0

    def forward(self, x, t, c):
        self.calls += 1
        self.graphs += torch.is_grad_enabled()
        return self.net(x)


class Ledger:
    """Bytes of saved activations and the network calls they belong to, as they are held and freed."""

    def __init__(self, net: Watched) -> None:
        self.net, self.held, self.peak, self.live = net, 0, 0, {}
        self.most_graphs = 0

    def pack(self, tensor):
        return _Held(self, tensor)

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *args):
        self.hooks.__exit__(*args)


class _Held:
    def __init__(self, ledger: Ledger, tensor) -> None:
        self.ledger, self.tensor, self.call = ledger, tensor, ledger.net.graphs
        ledger.held += tensor.nbytes
        ledger.peak = max(ledger.peak, ledger.held)
        if not isinstance(tensor, nn.Parameter) and tensor.dim() == 2 and tensor.shape[1] == WIDTH:  # an activation
            ledger.live[self.call] = ledger.live.get(self.call, 0) + 1
            ledger.most_graphs = max(ledger.most_graphs, len(ledger.live))
            self.counted = True

    def __del__(self) -> None:
        self.ledger.held -= self.tensor.nbytes
        if getattr(self, "counted", False):
            self.ledger.live[self.call] -= 1
            if not self.ledger.live[self.call]:
                del self.ledger.live[self.call]


def footprint(how: str, steps: int, **kwargs) -> Ledger:
    torch.manual_seed(0)
    net = Watched()
    for p in net.parameters():
        p.requires_grad_(False)  # the weights' own bytes are not the question
    made = AdjointSampler(net, SCHEDULE, steps, "euler", **kwargs)
    x_T = torch.randn(ROWS, 2, requires_grad=True)
    gc.collect()
    with Ledger(net) as ledger:
        (made(x_T) if how == "adjoint" else made.backprop(x_T)).square().mean().backward()
    assert x_T.grad is not None
    return ledger


def test_must_04_memory_does_not_grow_with_the_steps():
    few, many = footprint("adjoint", 5), footprint("adjoint", 50)
    assert (few.most_graphs, many.most_graphs) == (1, 1)
    states = 51 * ROWS * 2 * 4  # stored on purpose
    assert many.peak - states <= 1.3 * few.peak, (few.peak, many.peak)
    plain = [footprint("backprop", n).peak for n in (5, 50)]
    assert plain[1] >= 8 * plain[0]
    assert footprint("backprop", 5).most_graphs == 5
    recomputed = footprint("adjoint", 50, state="recompute")
    assert recomputed.peak < many.peak
    print(f"\nsaved bytes at 5 and 50 steps: adjoint {few.peak} {many.peak}, backpropagation {plain}")


@pytest.mark.parametrize(("solver", "stages"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_must_06_network_calls(solver, stages):
    net = Watched(8)
    x_T = torch.randn(3, 2, requires_grad=True)
    x_0 = AdjointSampler(net, SCHEDULE, 7, solver, backward_steps=14)(x_T)
    assert (net.calls, net.graphs) == (7 * stages, 0)
    x_0.sum().backward()
    assert (net.calls, net.graphs) == (21 * stages, 14 * stages)
    assert sum(stage_weights(solver)) == pytest.approx(1)

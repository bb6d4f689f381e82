"""Problems with a known answer for the tests of adjoint-dpm: a Gaussian, and the golden network."""

from __future__ import annotations

import functools

import torch
from torch import nn

from effdl.core.noise import LinearVP
from effdl.diffusion._adjoint_dpm_sampler import AdjointSampler
from tests.support import golden

DOUBLE = torch.float64


def error(found, expected) -> float:
    """Largest difference, relative to the largest entry."""
    return float((found - expected).abs().max() / expected.abs().max())


SCHEDULE, SPREAD = LinearVP(0.1, 20.0), 0.5


def gaussian(x, t, c=None):
    """The exact eps of data N(0, SPREAD^2)."""
    a, s = SCHEDULE.alpha(t)[:, None], SCHEDULE.sigma(t)[:, None]
    return s * x / (a.square() * SPREAD**2 + s.square())


def true_ratio(start: float = 1.0, end: float = 1e-3) -> float:
    a, s = (f(torch.tensor([start, end], dtype=DOUBLE)) for f in (SCHEDULE.alpha, SCHEDULE.sigma))
    spread = a.square() * SPREAD**2 + s.square()
    return float((spread[1] / spread[0]).sqrt())


NUMBERS = golden("adjoint-dpm")
NAMES = ("W1", "b", "u", "W2")


class Tanh(nn.Module):
    """eps = W2 tanh(W1 x + b + t u + c)."""

    def __init__(self) -> None:
        super().__init__()
        for name in NAMES:
            setattr(self, name, nn.Parameter(torch.tensor(NUMBERS["params"][name], dtype=DOUBLE)))

    def forward(self, x, t, c):
        return torch.tanh(x @ self.W1.T + self.b + t[:, None] * self.u + c) @ self.W2.T


@functools.cache
def official(solver: str, steps: int = 20, how: str = "adjoint", **kwargs) -> dict[str, torch.Tensor]:
    """x_0, the loss and all gradients of the golden problem."""
    net = Tanh()
    made = AdjointSampler(net, LinearVP(0.1, 8.0), steps, solver, guidance_scale=1.0, **kwargs)
    x_T = torch.tensor(NUMBERS["params"]["x_T"], dtype=DOUBLE, requires_grad=True)
    c = torch.tensor(NUMBERS["params"]["c"], dtype=DOUBLE)[None].requires_grad_()
    x_0 = made(x_T, c) if how == "adjoint" else made.backprop(x_T, c)
    loss = 0.5 * (x_0 - torch.tensor(NUMBERS["target"], dtype=DOUBLE)).square().sum()
    loss.backward()
    grads = {name: getattr(net, name).grad for name in NAMES}
    return {"x_0": x_0.detach(), "loss": loss.detach(), "x_T": x_T.grad, "c": c.grad[0], **grads}


def expected(name: str) -> dict[str, torch.Tensor]:
    result = NUMBERS["results"][name]
    grads = result.get("grads") or {"x_T": result["grad_x_T"]}
    found = {**grads, "x_0": result["x_0"], "loss": result["loss"]}
    return {name: torch.tensor(value, dtype=DOUBLE) for name, value in found.items()}

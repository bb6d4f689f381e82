"""What the tests of score-sde share: official numbers, exact scores of Gaussians and mixtures."""

from __future__ import annotations

import torch
from torch import Tensor

from effdl.core.noise import expand
from effdl.diffusion.score_sde import VE, VP, SubVP
from tests.support import golden

GOLDEN = golden("score-sde")
X, Z, T, U, NOISE = (torch.tensor(GOLDEN[name]) for name in ("x", "z", "t", "u", "noise"))
MAKERS = {"vp": VP, "sub": SubVP, "ve": VE}
ERRORS: dict[str, float] = {}


def official(name: str):
    return MAKERS[name](**{{"N": "steps"}.get(k, k): v for k, v in GOLDEN["params"][name].items()})


def toy(x: Tensor, label: Tensor) -> Tensor:
    a, b, c = (GOLDEN["net"][key] for key in "abc")
    return a * x + b + c * expand(label, x) / 100


def near(got: Tensor | float, want, key: str = "", rtol: float = 1e-4) -> None:
    """Relative tolerance, against the largest number of the tensor where one is near zero."""
    got, want = torch.as_tensor(got).double(), torch.tensor(want, dtype=torch.float64)
    error = (got.reshape(want.shape) - want).abs() / want.abs().clamp(min=1e-3 * float(want.abs().max()) + 1e-12)
    ERRORS[key] = max(ERRORS.get(key, 0.0), float(error.max()))
    assert float(error.max()) < rtol, (key, float(error.max()))


def gaussian(sde, mean: Tensor | float = 0.4, covariance: Tensor | float = 0.36):
    """The exact score where the data are N(mean, covariance): a number for isotropic data, else a matrix."""

    def score(x: Tensor, t: Tensor) -> Tensor:
        scale, std = expand(sde.scale(t), x), expand(sde.std(t), x)
        if not isinstance(covariance, Tensor):
            return -(x - scale * mean) / (scale.square() * covariance + std.square())
        at_t = scale.square()[..., None] * covariance + std.square()[..., None] * torch.eye(len(covariance)).to(x)
        return -torch.linalg.solve(at_t, (x - scale * mean)[..., None])[..., 0]

    return score


def mixture_logits(sde, weights=(0.3, 0.7), std: float = 0.5):
    """log w_k + log N(x; scale mu_k, v) for modes (-2, 0) and (2, 0)."""
    modes = torch.tensor([[-2.0, 0.0], [2.0, 0.0]])

    def logits(x: Tensor, t: Tensor) -> Tensor:
        scale, v = sde.scale(t)[:, None, None], (sde.scale(t) * std).square() + sde.std(t).square()
        square = (x[:, None] - scale * modes).square().sum(2)
        return torch.tensor(weights).log() - 0.5 * square / v[:, None]

    return logits


def mixture(sde, **kwargs):
    logits = mixture_logits(sde, **kwargs)

    def score(x: Tensor, t: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            return torch.autograd.grad(logits(x, t).logsumexp(1).sum(), x)[0]

    return score


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

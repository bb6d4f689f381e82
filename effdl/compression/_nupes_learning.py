"""nupes: codes and exponent of one layer, learned from its inputs and outputs (the data-driven stage, 2308.05600).

The layer is fitted to what it computed before, E ||f(X) - f^(X_q; D_a(round(v)))||^2. The continuous codes v range over
all of [-n, n], not only over the two neighbours of the weight as in AdaRound. A coordinate descent over whole codes
ends it, since a straight-through gradient comes to rest where several codes keep flipping.

Example::

    from effdl.compression._nupes_learning import Learning, learn_layer

    record = power_quantize(weight, bits=2, layout="tensor")
    run = lambda w, x: torch.nn.functional.linear(x, w)
    record = learn_layer(weight, record, run, inputs, run(weight, inputs), Learning(iterations=800))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from effdl.compression.nupes import _power, _wide, largest, power_codes, power_decode, top_code
from effdl.core.quantizers import QuantizedWeight, grouped, ungrouped
from effdl.core.random import generator

LOWEST, HIGHEST = 0.3, 1.5  # of a learned exponent: a lower one underflows in fp16 tables


@dataclass(frozen=True)
class Learning:
    """What is learned, and how.

    Args:
        codes, exponent: which of the two; the exponent alone keeps every code the rounded one of its weight.
        iterations: Adam steps per layer.
        code_rate: of the codes, in units of a code; it falls linearly to 0, which calms codes that flip.
        exponent_rate: of the exponent, likewise.
        batch_size: examples (of a convolution) or rows (of a linear layer) per step.
        seed: of the batches' order.
    """

    codes: bool = True
    exponent: bool = False
    iterations: int = 1000
    code_rate: float = 1e-2
    exponent_rate: float = 1e-3
    batch_size: int = 32
    seed: int = 0


# ---- gradients ---------------------------------------------------------------------------------------------------


def straight_through(
    weight: Tensor, bits: int, exponent: Tensor, layout: str = "row", scale: Tensor | None = None
) -> Tensor:
    """D_a(Q_a(W)) with the rounding passed straight through: gradients to the weight and to the exponent, M constant.

    dŴ/da = Ŵ (-ln r / a^2 + u ln(|W|/M) / (a r)) with u = (|W|/M)^a and r = |q|/n; dŴ/dW = r^(1/a-1) (|W|/M)^(a-1);
    both 0 where q = 0. In float32 (float64 for such a weight), whatever the dtype of the weight.
    """
    rows = grouped(_wide(weight), layout)
    n = top_code(bits)
    scale = (largest(weight, layout) if scale is None else scale).detach()[:, None]
    u = n * _power(rows.abs() / scale, exponent)
    r = (u + (u.round().clamp(max=n) - u).detach()) / n
    return ungrouped(rows.sign().detach() * _power(r, 1 / exponent) * scale, weight.shape, layout)


def decode_relaxed(v: Tensor, scale: Tensor, bits: int, exponent: float | Tensor, layout: str = "row") -> Tensor:
    """D_a(round(v)) of continuous codes v, with a slope to v that lets every code move over its whole range.

    D is flat (a < 1) or singular (a > 1) at 0, so that its own slope would keep zero codes where they are. The slope
    taken here is the secant's, (D(q + 1) - D(q - 1)) / 2, one-sided at +-n.

    Args:
        v: float, the shape of the weight.
        scale: M [groups].
        bits, exponent, layout: see :func:`power_decode`; the gradient to a tensor ``exponent`` is D's, codes fixed.
    """
    n = top_code(bits)
    q = v.detach().round().clamp(-n, n)
    high, low = (q + 1).clamp(max=n), (q - 1).clamp(min=-n)
    a = exponent.detach() if isinstance(exponent, Tensor) else exponent
    rise = power_decode(high, scale, bits, a, layout) - power_decode(low, scale, bits, a, layout)
    return power_decode(q, scale, bits, exponent, layout) + rise / (high - low) * (v - v.detach())


# ---- one layer ---------------------------------------------------------------------------------------------------


def learn_layer(
    weight: Tensor,
    record: QuantizedWeight,
    run: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    how: Learning,
    outputs: int = 0,
) -> QuantizedWeight:
    """Better codes, and perhaps a better exponent, for one weight.

    Args:
        weight: W, as it was.
        record: of :func:`effdl.compression.nupes.power_quantize`, to start from.
        run: ``(weight, inputs) -> outputs`` of the layer.
        inputs: X_q, (N, ...).
        targets: f(X), (N, ...): outputs for the same examples.
        how: see :class:`Learning`. Weights that are exactly 0 stay so.
        outputs: dimension of the weight that counts output channels.

    Returns:
        the best of all records seen, by the error of the *rounded* codes on all examples; at worst the one given.
    """
    scale, bits, layout = largest(weight, record.layout), record.bits, record.layout
    start = 1.0 if record.exponent is None else float(record.exponent)
    rows = grouped(weight.float(), layout)
    v = ungrouped(rows.sign() * top_code(bits) * _power(rows.abs() / scale[:, None], start), weight.shape, layout)
    alive = weight != 0  # what was pruned stays so

    def seen(v: Tensor, a: Tensor) -> Tensor:
        if how.codes:
            return decode_relaxed(v, scale, bits, a, layout)
        return straight_through(weight, bits, a, layout, scale)

    v, exponent = _fit(seen, v, start, alive * top_code(bits), run, inputs, targets, how)
    if how.codes:
        decode = partial(power_decode, scale=scale, bits=bits, exponent=exponent, layout=layout)
        codes = descend(v.round(), decode, bits, run, inputs, targets, outputs, alive).to(torch.int8)
    else:
        codes = power_codes(weight, bits, exponent, layout, scale)
    if exponent == start:
        return replace(record, codes=codes)
    table = torch.tensor([exponent], device=weight.device)
    return replace(record, codes=codes, scale=scale.float(), exponent=table)


def _fit(
    seen: Callable[[Tensor, Tensor], Tensor],
    v: Tensor,
    start: float,
    limit: Tensor,
    run: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    how: Learning,
) -> tuple[Tensor, float]:
    """Adam on codes v within +-``limit`` and on the exponent, from ``start``; the best of both by the error of the
    rounded weight ``seen(v, a)``, which is looked at after each pass over the examples.
    """
    v = v.detach().clone().requires_grad_(how.codes)
    a = torch.tensor([start], device=v.device, requires_grad=how.exponent)
    learned = [(v, how.code_rate)] * how.codes + [(a, how.exponent_rate)] * how.exponent
    optimizer = torch.optim.Adam([{"params": [parameter], "lr": rate} for parameter, rate in learned])
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / how.iterations)
    order, every = _order(len(inputs), how), max(1, len(inputs) // how.batch_size)
    best, least = (v.detach().clone(), start), _error(run, seen(v, a), inputs, targets)
    for step in range(how.iterations):
        picked = next(order).to(inputs.device)
        with torch.enable_grad():
            loss = (run(seen(v, a), inputs[picked]) - targets[picked]).square().mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        decay.step()
        with torch.no_grad():
            v.clamp_(-limit, limit)
            a.clamp_(LOWEST, HIGHEST)
            if (step + 1) % every == 0:
                error = _error(run, seen(v, a), inputs, targets)
                if error < least:
                    best, least = (v.clone(), a.item()), error
    return best


def descend(
    codes: Tensor,
    decode: Callable[[Tensor], Tensor],
    bits: int,
    run: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    outputs: int = 0,
    alive: Tensor | None = None,
    passes: int = 60,
) -> Tensor:
    """Coordinate descent over whole codes: while one helps, the best step of +-1 in each output channel is taken.

    A layer is linear in its weight and its output channels do not share weights, so the error of a step is known
    exactly from the gradient and the diagonal of the Hessian, and the channels may step together.

    Args:
        codes: float of integer value.
        decode: codes to weight.
        bits, run, inputs, targets, outputs: see :func:`learn_layer`.
        alive: bool, the codes that may step; ``None``: all.
        passes: over the examples, at most.
    """
    n = top_code(bits)
    for _ in range(passes):
        gradient, curvature = _quadratic(decode(codes), run, inputs, targets)
        steps = torch.stack([(codes + 1).clamp(max=n), (codes - 1).clamp(min=-n)])
        change = torch.stack([decode(moved) for moved in steps]) - decode(codes)
        gain = change * (gradient + 0.5 * change * curvature)
        gain = (gain if alive is None else gain * alive).movedim(outputs + 1, 0)
        least, which = gain.flatten(1).min(1)
        helps = least < -1e-7 * gain.abs().amax()
        if not bool(helps.any()):
            break
        taken = torch.zeros_like(gain).flatten(1).scatter_(1, which[:, None], helps.to(gain.dtype)[:, None])
        up, down = taken.view_as(gain).movedim(0, outputs + 1).bool()
        codes = torch.where(up, steps[0], torch.where(down, steps[1], codes))
    return codes


def _quadratic(
    weight: Tensor, run: Callable, inputs: Tensor, targets: Tensor, chunk: int = 256
) -> tuple[Tensor, Tensor]:
    """Gradient of the mean squared error, and the diagonal of its Hessian, over all examples."""
    gradient, curvature = torch.zeros_like(weight), torch.zeros_like(weight)
    weight = weight.detach().requires_grad_()
    for x, y in zip(inputs.split(chunk), targets.split(chunk)):
        with torch.enable_grad():
            (g,) = torch.autograd.grad((run(weight, x) - y).square().sum(), weight)
            (h,) = torch.autograd.grad(run(weight, x.square()).sum(), weight)
        gradient, curvature = gradient + g, curvature + 2 * h
    return gradient / targets.numel(), curvature / targets.numel()


@torch.no_grad()
def _error(run: Callable, weight: Tensor, inputs: Tensor, targets: Tensor, chunk: int = 256) -> float:
    parts = [(run(weight, x) - y).square().sum() for x, y in zip(inputs.split(chunk), targets.split(chunk))]
    return float(torch.stack(parts).sum() / targets.numel())


def _order(count: int, how: Learning) -> Iterator[Tensor]:
    """Indices of one batch after the other, each pass over the examples in a new order."""
    stream = generator(how.seed)
    while True:
        for picked in torch.randperm(count, generator=stream).split(how.batch_size):
            if len(picked) == min(count, how.batch_size):
                yield picked

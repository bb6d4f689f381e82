"""ptq4dm: how a denoising network is quantised, checked where it is said."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from effdl.core.errors import check, check_choice, check_integer, check_number
from effdl.core.input_quantizers import SITES

EDGE_BITS = 8  # of the first and the last layer, always
CALIBRATIONS = ("skewed", "uniform", "noise", "forward", "raw")


@dataclass(frozen=True)
class Settings:
    """How a denoising network is quantised; checked where it is made.

    Args:
        bits: of weights and of activations, 2 to 8 each; the first and the last layer take 8.
        num_samples: N, states to calibrate on, >= batch_size.
        batch_size: of the network's calls.
        steps: T, inference steps of the sampler; ``None``: as the scheduler's timesteps are set.
        calibration: ``"skewed"``: on the sampling path at normal time steps (the method); ``"uniform"``: at uniform
            ones; an integer in 0 .. T - 1: all at this step (0 is the image's end). Not on the path, for comparison:
            ``"noise"`` (unit noise, any step), ``"forward"`` (noised data), ``"raw"`` (data, any step).
        mu, sigma: of the normal, as fractions of T; mu above 0.5 looks at noise more than at images, and warns.
        guidance: classifier-free, as at inference; 1 is off.
        p: of the error |x - x_q|^p, 1 to 4 (2: mean square, 1: absolute).
        candidates: ranges tried.
        split_shortcut: two ranges for layers that read a skip concatenation, whose halves differ.
        quantize_matmul: the operands of both products of attention too (query, key, probabilities, value), one range
            each; of diffusers' attention modules. Without, they stay float.
        site: ``"input"``: what integer kernels take, behind normalisation and activation. ``"output"``, as the
            released script does: what a layer answers, before them, so that the next one still reads float numbers. For
            comparison: no integer kernel runs it. The network's answer (its last layer) stays float.
        sequential: a layer's input is measured behind quantised layers, three passes for each layer; otherwise all
            inputs in the same three passes, behind quantised weights alone.
        adaround: learn to round weights up or down, block by block (:mod:`effdl.diffusion._ptq4dm_rounding`).
        iterations: of AdaRound, for each block.
        seed: of steps, noise and stochastic samplers.
    """

    bits: tuple[int, int] = (8, 8)
    num_samples: int = 1024
    batch_size: int = 64
    steps: int | None = None
    calibration: str | int = "skewed"
    mu: float = 0.4
    sigma: float = 0.4
    guidance: float = 1.0
    p: float = 2.4
    candidates: int = 100
    split_shortcut: bool = False
    quantize_matmul: bool = False
    site: str = "input"
    sequential: bool = False
    adaround: bool = False
    iterations: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        pair = isinstance(self.bits, (tuple, list)) and len(self.bits) == 2
        check(pair, "bits", self.bits, "a pair (weights, activations)", "For example (8, 8).")
        for width in self.bits:
            check_integer("bits", width, 2, 8)
        check_integer("batch_size", self.batch_size, 1)
        check_integer("num_samples", self.num_samples, 1)
        enough = self.num_samples >= self.batch_size
        check(enough, "num_samples", self.num_samples, f"at least one batch of batch_size={self.batch_size}")
        if self.steps is not None:
            check_integer("steps", self.steps, 1)
        if isinstance(self.calibration, int):
            check_integer("calibration", self.calibration, 0)
        else:
            check_choice("calibration", self.calibration, CALIBRATIONS)
        check_number("mu", self.mu, 0, 1)
        check_number("sigma", self.sigma, 0, 10, closed="(]")
        check_number("guidance", self.guidance, 0, float("inf"), closed="[)")
        check_number("p", self.p, 1, 4)
        check_integer("candidates", self.candidates, 1, 10_000)
        check_choice("site", self.site, SITES)
        for name in ("split_shortcut", "quantize_matmul", "sequential", "adaround"):
            check(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        split = self.split_shortcut and self.site == "output"
        check(not split, "split_shortcut", True, "False with site='output': a concatenation is no layer's output")
        check_integer("iterations", self.iterations, 1)
        check_integer("seed", self.seed, 0)
        if self.mu > 0.5 and self.calibration == "skewed":
            warnings.warn(f"mu={self.mu} is above 0.5: more noise than images is looked at.", stacklevel=3)

"""score-sde: what one trained network serves: samples, classes, inpainting, colours, likelihoods, codes, files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from effdl.core.capture import evaluating, named_module
from effdl.core.errors import check, check_choice, check_integer
from effdl.core.random import generator
from effdl.diffusion._figures import save_rows
from effdl.diffusion._score_sde_conditional import Classifier, class_score, colourise, inpaint
from effdl.diffusion._score_sde_equations import SDE, Score
from effdl.diffusion._score_sde_files import save_network
from effdl.diffusion._score_sde_likelihood import Likelihood, likelihood
from effdl.diffusion._score_sde_samplers import ODESampler, PCSampler, solve_flow
from effdl.diffusion._score_sde_training import TRAIN_EPS, Prediction, ScoreAdapter, dequantise, dequantised_offset

SAMPLERS: dict[str, type[PCSampler] | type[ODESampler]] = {"pc": PCSampler, "ode": ODESampler}
SHOWN = 10  # images in a row of samples.png


class ScoreServices:
    """The methods of ``ScoreSDEMixin`` that use a finished network; all run it in eval mode."""

    sde: SDE
    prediction: Prediction | None
    sampler: PCSampler | ODESampler
    levels: int | None
    device: torch.device
    _network: str
    _shape: tuple[int, ...] | None
    _told: dict[str, float]
    _rows: list[Tensor]

    @property
    def score_network(self) -> nn.Module:
        """The network that learns the score.

        Raises:
            ConfigurationError: there is no submodule of that name.
        """
        try:
            return self.get_submodule(self._network)
        except AttributeError:
            return named_module(self, self._network, "network")  # says what there is

    @property
    def score(self) -> ScoreAdapter:
        """The network as s(x, t)."""
        return ScoreAdapter(self.score_network, self.sde, self.prediction)

    @torch.no_grad()
    def sample(
        self,
        count: int = 1,
        sampler: PCSampler | ODESampler | str | None = None,
        steps: int | None = None,
        classifier: Classifier | None = None,
        labels: Tensor | None = None,
        shape: tuple[int, ...] | None = None,
        seed: int = 0,
    ) -> Tensor:
        """New data ``[count, ...]``, float32.

        Args:
            count: how many.
            sampler: ``None``: the module's.
            steps: N of a ``PCSampler``; ``None``: the equation's.
            classifier, labels: logits ``[B, K]`` of noisy data at times ``[B]``, and classes ``[count]`` to ask for.
            shape: of one example; ``None``: the U-Net's, or that of the data last seen.
            seed: of prior and noise, drawn on the CPU: the same on every machine.
        """
        check_integer("count", count, 1)
        check((classifier is None) == (labels is None), "labels", labels, "given together with a classifier")
        check(labels is None or len(labels) == count, "labels", labels, f"{count} classes")
        sampler, sde = sampler_of(sampler or self.sampler, self.sde), self.sde.with_steps(steps)
        score = self.score if labels is None else class_score(self.score, classifier, labels)
        draw = generator(seed)
        with evaluating(self.score_network):
            return sampler(sde, score, sde.prior((count, *self.example_shape(shape)), draw).to(self.device), draw)

    @torch.no_grad()
    def inpaint(
        self, data: Tensor, mask: Tensor, basis: Tensor | None = None, sampler: PCSampler | None = None,
        steps: int | None = None, seed: int = 0,
    ) -> Tensor:  # fmt: skip
        """Samples ``[B, ...]`` with the known part of ``data``; see :func:`inpaint` and :class:`Known`."""
        with evaluating(self.score_network):
            sde, data = self.sde.with_steps(steps), data.to(self.device)
            return inpaint(sde, self.score, data, mask, sampler, basis, generator(seed))

    @torch.no_grad()
    def colourise(
        self, grey: Tensor, sampler: PCSampler | None = None, steps: int | None = None, seed: int = 0
    ) -> Tensor:
        """Colours ``[B, 3, H, W]`` for grey images ``[B, 1, H, W]``; see :func:`colourise`."""
        with evaluating(self.score_network):
            return colourise(self.sde.with_steps(steps), self.score, grey.to(self.device), sampler, generator(seed))

    def likelihood(
        self, x: Tensor, divergence: Literal["rademacher", "gaussian", "exact"] = "rademacher",
        tolerance: float = 1e-5, seed: int = 0,
    ) -> Likelihood:  # fmt: skip
        """Bits per dimension, log-density and latent code of data in [-1, 1]; dequantised here if ``levels`` is set."""
        draw, x = generator(seed), x.to(self.device)
        if self.levels is not None:
            x = dequantise(x, self.levels, torch.rand(x.shape, generator=draw))
        with evaluating(self.score_network):
            options = {"offset": self.offset, "tolerance": tolerance, "generator": draw}
            return likelihood(self.sde, self.score, x, divergence, **options)

    @torch.no_grad()
    def encode(self, x: Tensor, tolerance: float = 1e-5) -> Tensor:
        """Latent code x(1) ``[B, ...]`` of (dequantised) data at t = 1e-5, by the ODE; unique, whatever the network."""
        with evaluating(self.score_network):
            return solve_flow(self.sde, self.score, x.to(self.device), TRAIN_EPS, 1.0, tolerance)

    @torch.no_grad()
    def decode(self, code: Tensor, tolerance: float = 1e-5) -> Tensor:
        """The inverse of :meth:`encode`."""
        with evaluating(self.score_network):
            return solve_flow(self.sde, self.score, code.to(self.device), 1.0, TRAIN_EPS, tolerance)

    @property
    def offset(self) -> float:
        """What the bits per dimension of a density in [-1, 1] lack; 256 levels unless told otherwise."""
        return dequantised_offset(256 if self.levels is None else self.levels)

    def example_shape(self, shape: tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Of ``[C, H, W]``: as given, as of the data last seen, or as the U-Net's configuration says."""
        config = getattr(self.score_network, "config", None)
        size = getattr(config, "sample_size", None)
        square = () if size is None else (size, size) if isinstance(size, int) else tuple(size)
        known = shape or self._shape or ((config.in_channels, *square) if square else None)
        check(known is not None, "shape", shape, "the shape of one example: this network does not say")
        return tuple(known)

    def report(self) -> dict[str, Any]:
        """Bits per dimension of the last validation, and the calls that each way of sampling takes."""
        counted = CountedScore(self.score)
        self._rows = []
        for name, make in SAMPLERS.items():
            with evaluating(self.score_network):
                start = self.sde.prior((SHOWN, *self.example_shape()), generator(0)).to(self.device)
                counted.calls = 0
                self._rows.append(make()(self.sde, counted, start, generator(1)))
            self._told[f"{name}_calls"] = counted.calls
        return dict(self._told)

    def figures(self, folder: Path) -> None:
        """``samples.png``: predictor-corrector and ODE, from the same noises."""
        if self._rows:
            save_rows(self._rows, folder / "samples.png")

    def record(self) -> dict[str, Any]:
        """What ``sde.json`` and checkpoints say beside the weights."""
        return {"sde": self.sde.config(), "prediction": self.score.prediction, "levels": self.levels}

    def save_pretrained(self, folder: str | Path) -> None:
        """The network as stock diffusers opens it, and ``sde.json``; ``ScoreSDEModule(folder)`` opens both."""
        record = self.record()
        save_network(folder, self.score_network, self.sde, record["prediction"], record)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint.setdefault("effdl", {})["score-sde"] = self.record()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        saved = checkpoint.get("effdl", {}).get("score-sde", {}).get("sde", self.sde.config())
        same = saved | {"steps": self.sde.steps} == self.sde.config()
        check(same, "sde", self.sde.config(), f"{saved}, the equation of the checkpoint")


class CountedScore:
    """A score that counts its calls."""

    def __init__(self, score: Score) -> None:
        self.score, self.calls = score, 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.score(x, t)


def sampler_of(given: PCSampler | ODESampler | str, sde: SDE) -> PCSampler | ODESampler:
    """A sampler by name, or itself; raise where it does not exist for this equation."""
    if isinstance(given, str):
        check_choice("sampler", given, SAMPLERS)
        given = SAMPLERS[given]()
    check(isinstance(given, (PCSampler, ODESampler)), "sampler", given, "'pc', 'ode', a PCSampler or an ODESampler")
    given.check(sde)
    return given

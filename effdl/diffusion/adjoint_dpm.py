"""adjoint-dpm: a loss on generated images, differentiated with respect to noise, conditioning or weights.

The ODE and its adjoint: :mod:`effdl.diffusion._adjoint_dpm_ode`; the sampler, usable alone:
:class:`AdjointSampler`; here the training loop around it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from effdl.core.batch import unpack
from effdl.core.contract import ContractExample
from effdl.core.errors import check, check_integer, check_number
from effdl.core.paper import Paper
from effdl.core.random import generator
from effdl.core.teacher import Frozen
from effdl.diffusion._adjoint_dpm_ode import adjoint_odeint, stage_weights
from effdl.diffusion._adjoint_dpm_parts import ClassifierLoss, SampleRows
from effdl.diffusion._adjoint_dpm_sampler import AdjointSampler, guided_noise, rho_grid, time_grid
from effdl.diffusion._draws import Draws
from effdl.diffusion._figures import save_rows
from effdl.tasks._diffusers import call
from effdl.tasks.diffusion import DiffusionModule

__all__ = [
    "AdjointDPMModule", "AdjointSampler", "ClassifierLoss", "SampleRows", "adjoint_odeint", "guided_noise", "rho_grid",
    "stage_weights", "time_grid",
]  # fmt: skip

OPTIMISED = ("noise", "cond", "weights")
ROW_KEYS = ("index", "label", "prompt", "image", "encoder_hidden_states")
ARTIFACT = "optimised.safetensors"
SHOWN = 10  # images in a row of samples.png


class AdjointDPMModule(DiffusionModule):
    """Optimises what a diffusion model starts from or is made of, for a differentiable score of its images.

    Each step samples images by a deterministic ODE, scores them, and solves the adjoint ODE backwards
    (:class:`AdjointSampler`): the activations of one network call are all that is held, however many steps there are.

    Args:
        model: as :class:`DiffusionModule` takes it: a network or a pipeline (object, folder, hub id, configuration).
            Unless its weights are optimised it stays frozen and out of the checkpoint.
        loss: ``loss(images, batch) -> scalar`` (or one per image) on images ``[B, C, H, W]``, about [-1, 1], averaged
            over the batch. An ``nn.Module`` is frozen and kept out of the checkpoint; :class:`ClassifierLoss`.
        optimise: a subset of ``"noise"`` (x_T, one for each of ``num_examples``), ``"cond"`` (the text embeddings),
            ``"weights"`` (all parameters of the network that require grad: put adapters in before, as
            ``core.adapters.add_lora`` does, to train these alone).
        num_examples: of the samples; row ``index`` of a batch is one. :class:`SampleRows` makes such batches. With
            ``effdl run`` linked to the data module's.
        condition: prompts (one for all samples, or one each), or the network's keyword arguments as tensors
            (``{"encoder_hidden_states": [1 or num_examples, L, D]}``); ``None``: as each batch says (``label``,
            ``prompt``, ``encoder_hidden_states``). ``"cond"`` needs it: that is where the embeddings start.
        noise: x_T to start from ``[num_examples, ...]``; ``None``: drawn from ``seed``.
        steps, solver, backward_steps, skip_type, t_start, t_end, state, denoise_to_zero: of the sampler.
        guidance_scale: w; ``None``: 7.5 with a text encoder, else 1 (no guidance). The empty prompt is the pipeline's.
        radius: keeps each element of x_T within this distance of where it began (the paper's attack: 0.1).
        noise_scheduler, prediction: as :class:`DiffusionModule` takes them; only the table of alpha-bar is used.
        seed: of x_T; where that is not optimised, it is drawn anew in each step, a function of (seed, epoch, batch).
        optimizer, scheduler: as LightningCLI injects them; default AdamW 1e-3.

    Logged: ``train/loss``, ``val/loss``, ``adjoint-dpm/noise_rms`` (1 for noise that the model knows). Saved:
    ``optimised.safetensors`` (``noise``, ``embeddings.*``) and, with ``"weights"``, the pipeline as diffusers opens it.

    Suggested: AdamW 0.01 and 30 epochs for noise, 0.05 and 50 for prompts, 30 steps (the paper's); 0.1 in small models.
    Cost of a step: as a forward and a backward pass through all N (2N with midpoint) calls of the network, and one
    forward pass more. Fails when: the score can be fooled (a classifier: adversarial images, which is what the paper
    audits), steps are few and the solver is Euler (gradients off by tens of percent, see :class:`AdjointSampler`).

    Raises:
        ConfigurationError: an argument out of range, nothing to differentiate, a scheduler that thresholds.

    Example::

        def loss(images, batch):
            return -images.mean()                                       # brighter

        module = AdjointDPMModule("my-pipeline", loss, num_examples=8, optimizer=lambda p: torch.optim.AdamW(p, 0.05))
        Trainer(max_epochs=30).fit(module, SampleRows(8))
        images = module.images({"index": torch.arange(8)})
    """

    _frozen: Frozen | None = None
    _first: tuple[Any, Tensor] | None = None  # batch and loss of the first step

    paper: ClassVar[Paper] = Paper(
        slug="adjoint-dpm",
        title="AdjointDPM: Adjoint Sensitivity Method for Gradient Backpropagation of Diffusion Probabilistic Models",
        authors=("Pan, Jiachun", "Liew, Jun Hao", "Tan, Vincent Y. F.", "Feng, Jiashi", "Yan, Hanshu"),
        year=2024,
        arxiv="2307.10711",
        venue="ICLR",
    )

    def __init__(
        self,
        model: nn.Module | dict[str, Any] | str = "tiny",
        loss: Callable | None = None,
        optimise: Sequence[str] = ("noise",),
        num_examples: int = 8,
        condition: list[str] | dict[str, Tensor] | None = None,
        noise: Tensor | None = None,
        steps: int = 30,
        solver: str = "midpoint",
        backward_steps: int | None = None,
        skip_type: str = "time_uniform",
        t_start: float = 1.0,
        t_end: float | None = None,
        guidance_scale: float | None = None,
        state: str = "stored",
        denoise_to_zero: bool = False,
        radius: float | None = None,
        noise_scheduler: SchedulerMixin | None = None,
        prediction: str | None = None,
        seed: int = 0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(model, noise_scheduler, prediction, seed, optimizer, scheduler)
        check(callable(loss), "loss", loss, "a callable loss(images, batch) -> Tensor")
        known = len(optimise) > 0 and not isinstance(optimise, str) and set(optimise) <= set(OPTIMISED)
        check(known, "optimise", optimise, f"a subset of {OPTIMISED}", "" if optimise else "Nothing to differentiate.")
        check_integer("num_examples", num_examples, 1)
        if radius is not None:
            check_number("radius", radius, 0, float("inf"), closed="()")
            check("noise" in optimise, "radius", radius, "None unless the noise is optimised")
        self.loss = Frozen(loss) if isinstance(loss, nn.Module) else loss
        self.optimise, self.num_examples, self.radius = tuple(optimise), num_examples, radius
        if "weights" not in self.optimise:
            self._frozen = Frozen(self._modules.pop("model"))
        self.model.eval()
        self._hold_condition(condition)
        self._hold_noise(noise)
        text = self.surroundings.text_encoder is not None
        guidance_scale = (7.5 if text else 1.0) if guidance_scale is None else guidance_scale
        check(text or guidance_scale == 1, "guidance_scale", guidance_scale, "1 without a text encoder")
        self.settings = {
            "steps": steps, "solver": solver, "backward_steps": backward_steps, "skip_type": skip_type,
            "t_start": t_start, "t_end": t_end, "guidance_scale": guidance_scale, "prediction": self.prediction,
            "state": state, "denoise_to_zero": denoise_to_zero,
        }  # fmt: skip
        _ = self.sampler  # checks the settings
        some = any(p.requires_grad for p in self.parameters())
        check(some, "optimise", optimise, "something that requires grad", "Nothing to differentiate.")

    @property
    def model(self) -> nn.Module:
        """The network: a submodule where its weights are optimised, else frozen beside the module."""
        return self._modules["model"] if self._frozen is None else self._frozen.on(self.device)

    @property
    def sampler(self) -> AdjointSampler:
        """Noise and conditions to latents."""
        weights = tuple(p for p in self.model.parameters() if p.requires_grad)
        return AdjointSampler(self._predict, self.noise_scheduler, parameters=weights, **self.settings)

    def train(self, mode: bool = True) -> AdjointDPMModule:
        """The network stays in eval mode: dropout would make the backward pass's network another one."""
        super().train(mode)
        self.model.eval()
        return self

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss, size = self._score(batch, Draws(self.seed, self.current_epoch, batch_idx, self.device))
        self._first = (batch, loss.detach()) if self._first is None else self._first
        self.log("train/loss", loss, prog_bar=True, batch_size=size)
        if "noise" in self.optimise:
            self.log("adjoint-dpm/noise_rms", self.noise.detach().square().mean().sqrt(), batch_size=size)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss, size = self._score(batch, Draws(self.seed, -1, batch_idx, self.device))
        self.log("val/loss", loss, prog_bar=True, sync_dist=True, batch_size=size)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        loss, size = self._score(batch, Draws(self.seed, -1, batch_idx, self.device))
        self.log("test/loss", loss, sync_dist=True, batch_size=size)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.images(batch, Draws(self.seed, -1, batch_idx, self.device))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.radius is not None:
            with torch.no_grad():
                self.noise.clamp_(self.first_noise - self.radius, self.first_noise + self.radius)

    def images(self, batch: Any, draws: Draws | None = None, noise: Tensor | None = None) -> Tensor:
        """Images ``[B, C, H, W]`` of a batch's rows, differentiable; ``noise`` ``[B, ...]`` replaces the module's."""
        draws = Draws(self.seed, -1, 0, self.device) if draws is None else draws
        index, size = self._rows(batch)
        if noise is None and "noise" in self.optimise:
            noise = self.noise if index is None else self.noise[index]
        noise = draws.noise((size, *self._shape())) if noise is None else noise
        condition = self._condition(batch, index, size)
        null = None
        if self.settings["guidance_scale"] != 1:
            empty = self.surroundings.unconditional(self.device)
            null = {name: value.expand(size, *value.shape[1:]) for name, value in empty.items()}
        return self.surroundings.decode_images(self.sampler(noise, condition or None, null))

    def _score(self, batch: Any, draws: Draws) -> tuple[Tensor, int]:
        images = self.images(batch, draws)
        loss = self.loss.on(images) if isinstance(self.loss, Frozen) else self.loss
        return loss(images, batch).float().mean(), len(images)

    def _predict(self, x: Tensor, label: Tensor, condition: dict[str, Tensor] | None) -> Tensor:
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), x.dtype)
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in (condition or {}).items()}
        return call(self.model, x.to(dtype), label, given, self.surroundings.factor)

    def _rows(self, batch: Any) -> tuple[Tensor | None, int]:
        """The samples' numbers, if the batch has any, and how many there are."""
        if isinstance(batch, Mapping):
            index = batch.get("index")
            sized = next((batch[key] for key in ROW_KEYS if key in batch), range(self.num_examples))
        else:
            sized, _, index = unpack(batch)
        alone = index is None and "noise" in self.optimise
        size = len(sized)
        check(not alone or size == self.num_examples, "batch", f"{size} rows without an 'index'",
              f"all {self.num_examples} samples, or an index", "SampleRows makes such batches.")  # fmt: skip
        return index, size

    def _condition(self, batch: Any, index: Tensor | None, size: int) -> dict[str, Tensor]:
        """The network's keyword arguments: of the module where it holds any, else of the batch."""
        held = dict(self.embeddings) if len(self.embeddings) else self.held
        if not held:
            return self.condition({"image": (), **batch} if isinstance(batch, Mapping) else batch)
        take = lambda v: v.expand(size, *v.shape[1:]) if len(v) == 1 else v if index is None else v[index]  # noqa: E731
        return {name: take(value.to(self.device)) for name, value in held.items()}

    def _hold_condition(self, condition: list[str] | dict[str, Tensor] | None) -> None:
        if condition is not None and not isinstance(condition, Mapping):
            texts = isinstance(condition, (list, tuple)) and all(isinstance(text, str) for text in condition)
            texts = texts and len(condition) > 0 and self.surroundings.text_encoder is not None
            check(texts, "condition", condition, "prompts for a pipeline with a text encoder, or a dict of tensors")
            condition = self.surroundings.encode_prompts(list(condition), "cpu")
        held = dict(condition or {})
        fits = all(isinstance(v, Tensor) and len(v) in (1, self.num_examples) for v in held.values())
        check(fits, "condition", sorted(held), f"tensors with 1 or num_examples={self.num_examples} rows")
        learned = {k: v for k, v in held.items() if v.is_floating_point() and "cond" in self.optimise}
        check(bool(learned) or "cond" not in self.optimise, "optimise", "cond", "other names without a condition",
              "Class labels cannot be differentiated; embeddings start from condition=...")  # fmt: skip
        self.embeddings = nn.ParameterDict({k: nn.Parameter(v.detach().clone()) for k, v in learned.items()})
        self.held = {} if learned else held

    def _hold_noise(self, noise: Tensor | None) -> None:
        check(noise is None or "noise" in self.optimise, "noise", "a tensor", "None unless it is optimised")
        check(noise is None or len(noise) == self.num_examples, "noise", None if noise is None else tuple(noise.shape),
              f"{self.num_examples} rows, as num_examples says")  # fmt: skip
        if "noise" in self.optimise:
            if noise is None:
                noise = torch.randn(self.num_examples, *self._shape(), generator=generator(self.seed))
            self.noise = nn.Parameter(noise.detach().float().clone())
            self.register_buffer("first_noise", noise.detach().float().clone(), persistent=False)

    def _shape(self) -> tuple[int, ...]:
        check(hasattr(self.model, "config"), "noise", None, "x_T itself: the network has no config.sample_size")
        return super()._shape()

    def save_pretrained(self, folder: str | Path) -> None:
        """``optimised.safetensors`` with noise and embeddings; the pipeline too, where its weights were optimised."""
        from safetensors.torch import save_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        if "weights" in self.optimise:
            super().save_pretrained(folder)
        own = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items() if not k.startswith("model.")}
        if own:
            save_file(own, Path(folder) / ARTIFACT)

    def report(self) -> dict[str, Any]:
        """The loss of the first step, for the final table."""
        first = {} if self._first is None else {"train/loss": float(self._first[1])}
        return {"before": {"name": "at first", "metrics": first}, "curves": ["train/loss", "adjoint-dpm/noise_rms"]}

    def figures(self, folder: Path) -> None:
        """``samples.png``: the first batch's samples, from the noise that they began with (above) and as they are."""
        if "noise" not in self.optimise or self._first is None:
            return
        index, _ = self._rows(batch := self._first[0])
        with torch.no_grad():
            first = self.first_noise if index is None else self.first_noise[index]
            rows = [self.images(batch, noise=noise)[:SHOWN] for noise in (first, None)]
        save_rows(rows, folder / "samples.png")

    @classmethod
    def contract_example(cls) -> ContractExample:
        from effdl.diffusion._adjoint_dpm_example import example

        return example()

"""ptq4dm on a Trainer: when a trained denoising network becomes 8-bit, and what is told of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor, nn

from effdl.callbacks._calibrated_quantizer import CalibratedQuantizer
from effdl.callbacks._ptq4dm_example import contract_example
from effdl.callbacks._ptq4dm_report import compared, draw_figures, sampled
from effdl.callbacks._quantized_training import install
from effdl.core.attention_matmuls import attentions
from effdl.core.batch import unpack
from effdl.core.distributed import broadcast
from effdl.core.errors import ConfigurationError, check
from effdl.core.export import product
from effdl.core.input_quantizers import QuantizedInput
from effdl.core.paper import Paper
from effdl.core.quantizers import QuantizedWeight
from effdl.core.select import NothingMatched, Targets, Weight, check_targets, select_modules
from effdl.diffusion._ptq4dm_samples import Samples, points, takes_time
from effdl.diffusion.ptq4dm import KINDS, Calibration, Settings, calibrate


class DiffusionPTQCallback(CalibratedQuantizer):
    """Quantises a trained denoising network to 8-bit weights and activations, without training (PTQ4DM).

    At the end of training (of the averaged weights, where there are some), or without a fit under
    ``trainer.validate(module, loader)``, the network samples with its own sampler, and the states it passes, more of
    them near the image than near the noise, tell the range of every layer's input. Then every Linear and convolution
    holds codes and quantises its input; the rest (normalisation, SiLU, softmax, embeddings) stays float. The float
    network samples ``num_samples`` times once: that is the cost, a matter of minutes on a GPU.

    It attaches to any LightningModule around a diffusers U-Net or transformer, or around any ``network(x, t)``:
    ``DiffusionModule``, or your own, which then has the network as ``model``, a diffusers scheduler as
    ``noise_scheduler`` (or pass one), and, where the network takes more than image and time, a method
    ``condition(batch) -> dict`` of keyword arguments. Without Lightning: ``diffusion.ptq4dm.quantize_unet``.

    The artifact is a quarter of the float file. As it stands it decodes its weights on every call, and is not faster;
    ``core.deploy.deploy(network, "torch-int8")`` computes with integers on a CPU (Linear and Conv2d). GroupNorm,
    attention products and SiLU stay float, so a U-Net gains less than its convolutions do.

    Args:
        bits: of weights and of activations, 2 to 8 each. The first and the last layer take 8. Below 6 the gain over
            other calibrations is gone.
        steps: inference steps of the sampler.
        scheduler: the sampler: a diffusers scheduler, or the name of a class (``"DDIMScheduler"``), made from the
            module's own; default the module's. Guidance, clipping and steps should be those of inference.
        num_samples: states to calibrate on.
        batch_size: of the network's calls meanwhile.
        mu, sigma: the time steps looked at are normal, mu T and sigma T, clamped to 0 .. T - 1; T is the number of
            steps, 0 the image's end. mu above 0.5 warns.
        guidance: classifier-free, as at inference (text-conditional networks); 1 is off.
        p: ranges minimise mean |x - x_q|^p.
        split_shortcut: two ranges for convolutions that read a skip concatenation.
        quantize_matmul: the operands of attention's two products too (diffusers' attention modules).
        site: ``"input"``, or ``"output"``: layers' outputs, as the released script has it; for comparison, since no
            integer kernel runs it.
        adaround: learn to round weights up or down, for few bits; minutes per million weights on a CPU.
        iterations: of that, for each block.
        seed: of time steps and noise.
        calibration_batches: batches of the training data from which conditions are taken.
        targets, exclude: layers by name glob or type; default every Linear, Conv1d and Conv2d of the network.

    Raises:
        ConfigurationError: an argument out of range; no scheduler, or one of an unknown prediction; nothing matched; a
            layer that is never called; weights or activations that are not finite. The network is as it was then.

    Logs nothing; :meth:`report` has the ranges, the time steps, the output's error and the latencies.

    Example::

        from effdl.callbacks import DiffusionPTQCallback

        ptq = DiffusionPTQCallback(steps=50, scheduler="DDIMScheduler")
        Trainer(callbacks=[ptq]).fit(DiffusionModule("tiny"), data)
        print(ptq.report()["artifact_ratio"])                    # 0.26
    """

    paper = Paper(
        slug="ptq4dm",
        title="Post-training Quantization on Diffusion Models",
        authors=("Shang, Yuzhang", "Yuan, Zhihang", "Xie, Bin", "Wu, Bingzhe", "Yan, Yan"),
        year=2023,
        arxiv="2211.15736",
        venue="CVPR",
    )

    def __init__(
        self,
        bits: tuple[int, int] = (8, 8),
        steps: int = 50,
        scheduler: SchedulerMixin | str | None = None,
        num_samples: int = 1024,
        batch_size: int = 64,
        mu: float = 0.4,
        sigma: float = 0.4,
        guidance: float = 1.0,
        p: float = 2.4,
        split_shortcut: bool = False,
        quantize_matmul: bool = False,
        site: Literal["input", "output"] = "input",
        adaround: bool = False,
        iterations: int = 1000,
        seed: int = 0,
        calibration_batches: int = 8,
        targets: Targets = None,
        exclude: Targets = None,
    ) -> None:
        check(steps is not None, "steps", steps, "an integer >= 1")
        self.settings = Settings(
            bits=bits,
            steps=steps,
            num_samples=num_samples,
            batch_size=batch_size,
            mu=mu,
            sigma=sigma,
            guidance=guidance,
            p=p,
            split_shortcut=split_shortcut,
            quantize_matmul=quantize_matmul,
            site=site,
            adaround=adaround,
            iterations=iterations,
            seed=seed,
        )
        known = scheduler is None or isinstance(scheduler, str) or hasattr(scheduler, "set_timesteps")
        check(known, "scheduler", scheduler, "a diffusers scheduler, the name of one, or None")
        if isinstance(scheduler, str):
            _scheduler_class(scheduler)
        self.check_calibration("end", calibration_batches)
        check_targets("targets", targets)
        check_targets("exclude", exclude)
        self.bits, self.steps, self.scheduler = bits, steps, scheduler
        self.num_samples, self.batch_size = num_samples, batch_size
        self.mu, self.sigma, self.guidance, self.p, self.split_shortcut = mu, sigma, guidance, p, split_shortcut
        self.quantize_matmul, self.site = quantize_matmul, site
        self.adaround, self.iterations, self.seed = adaround, iterations, seed
        self.targets, self.exclude = targets, exclude
        self._begin()

    def _begin(self) -> None:
        super()._begin()
        self.inputs: dict[str, QuantizedInput] = {}
        self.samples: Samples | None = None
        self._drawn: list[Tensor] | None = None

    # ---- attaching -------------------------------------------------------------------------------------------

    def attach(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage in ("fit", "validate"):
            points(self.sampler(pl_module), self.steps)
            network = product(pl_module)
            valid = f"False: {type(network).__name__} has no attention module of diffusers"
            check(not self.quantize_matmul or bool(attentions(network)), "quantize_matmul", True, valid)
            if not takes_time(network):
                raise ConfigurationError(
                    f"DiffusionPTQCallback quantises denoisers network(x, t); {type(network).__name__} takes no time."
                )
        super().attach(trainer, pl_module, stage)

    def sampler(self, pl_module: Any) -> Any:
        """The scheduler that walks: the one given, else the module's, as the named class where a name is given."""
        if self.scheduler is not None and not isinstance(self.scheduler, str):
            return self.scheduler
        own = getattr(pl_module, "noise_scheduler", None) or getattr(pl_module, "scheduler", None)
        if not hasattr(own, "set_timesteps"):
            raise ConfigurationError(
                f"scheduler={self.scheduler!r}: {type(pl_module).__name__} has no diffusers scheduler of its own (as "
                "noise_scheduler). Give one: scheduler=DDIMScheduler(...)."
            )
        return own if self.scheduler is None else _scheduler_class(self.scheduler).from_config(own.config)

    def _choose(self, pl_module: Any) -> list[Weight]:
        start = _prefix(pl_module)
        layers = select_modules(pl_module, self.targets, self.exclude, KINDS)
        chosen = [Weight(f"{n}.weight", layer, "weight") for n, layer in layers.items() if n.startswith(start)]
        if not chosen:
            raise NothingMatched(f"targets={self.targets!r}: no such layer in the network {start.rstrip('.')!r}.")
        return chosen

    # ---- acting ----------------------------------------------------------------------------------------------

    def _records(self, trainer: Any, pl_module: Any, batches: list[Any]) -> dict[str, QuantizedWeight]:
        start = _prefix(pl_module)
        layers = {w.name[len(start) : -len(".weight")]: w.module for w in self.weights.values()}
        batches = batches if trainer is None else [trainer.precision_plugin.convert_input(batch) for batch in batches]
        condition, empty = self._conditions(pl_module, batches)
        found = calibrate(
            product(pl_module),
            self.sampler(pl_module),
            self.settings,
            layers,
            condition,
            empty,
            unpack(batches[0]).inputs if batches else None,
            None if trainer is None else trainer.precision_plugin.forward_context(),
        )
        _agree(found)
        self.samples = found.samples
        self.inputs = {f"{start}{name}": record for name, record in found.inputs.items()}
        return {f"{start}{name}.weight": record for name, record in found.weights.items()}

    def _inputs(self) -> dict[str, QuantizedInput]:
        return self.inputs

    def _conditions(self, pl_module: Any, batches: list[Any]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """The network's keyword arguments for the batches' examples, and for no text."""
        if not batches or not callable(getattr(pl_module, "condition", None)):
            return {}, None
        made = [pl_module.condition(batch) for batch in batches]
        condition = {key: torch.cat([one[key] for one in made]) for key in made[0]}
        if self.guidance == 1:
            return condition, None
        check("encoder_hidden_states" in condition, "guidance", self.guidance, "1: this network knows no text")
        images = unpack(batches[0]).inputs
        return condition, pl_module.condition({"image": images, "prompt": [""] * len(images)})

    def calibrate(self, trainer: Any, pl_module: Any, batches: list[Any]) -> None:
        super().calibrate(trainer, pl_module, batches)
        if self.finished is not None and self.samples is not None:
            self.finished.batches, self.finished.inputs = None, self.samples.example(product(pl_module))

    def quantize(self, pl_module: Any, batches: list[Any] = ()) -> None:
        """Quantise without a Trainer.

        Args:
            pl_module: its network becomes codes.
            batches: as the loader gives them, for the conditions; none for a network without.
        """
        self._begin()
        self.weights = {weight.name: weight for weight in self._choose(pl_module)}
        records = self._records(None, pl_module, list(batches))
        install(pl_module, records, self.inputs)

    # ---- report ----------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """The artifact reopened from its file beside the float network: bytes, errors of outputs and of samples,
        latencies (float, codes decoded on every call, integer kernels); ranges by layer, histogram of the time steps.

        Raises:
            ConfigurationError: nothing was quantised yet.
        """
        told = super().report()
        return compared(told, self.finished, self.samples, self.inputs, self._images())

    def figures(self, folder: Path) -> None:
        """``samples.png``: the same noises (columns) through float and 8-bit network; ``time_steps.png``."""
        if self.finished is not None:
            draw_figures(folder, self.samples, self._images())

    def _images(self) -> list[Tensor]:
        if self._drawn is None:
            self._drawn = sampled(self.finished, self.samples, self.sampler(self.finished.module), self.steps)
        return self._drawn

    @classmethod
    def contract_example(cls) -> Any:
        """For the contract suite."""
        return contract_example()


def _prefix(pl_module: nn.Module) -> str:
    """Of the network's names in the module."""
    network = product(pl_module)
    return next(f"{name}." if name else "" for name, module in pl_module.named_modules() if module is network)


def _agree(found: Calibration) -> None:
    """Every process has walked, on its own conditions; the first one's records are everybody's."""
    for record in found.inputs.values():
        broadcast(record.scale, record.zero_point)
    for record in found.weights.values():
        broadcast(record.codes, record.scale)


def _scheduler_class(name: str) -> Any:
    import diffusers

    made = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    check(made is not None, "scheduler", name, "the name of a diffusers scheduler", "For example 'DDIMScheduler'.")
    return made

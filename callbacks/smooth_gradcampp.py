"""smooth-gradcampp on a Trainer: which images are explained when, and where the pictures go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from effdl.attribution._double import check_double
from effdl.attribution._figures import caption, overlay_figure, pixels, png
from effdl.attribution._layers import resize, resolve_reshape
from effdl.attribution.smooth_gradcampp import Explanation, SmoothGradCAMpp, check_settings
from effdl.callbacks._base import MethodCallback
from effdl.core.batch import unpack
from effdl.core.contract import ContractExample
from effdl.core.errors import ConfigurationError, check, check_integer, suggest
from effdl.core.paper import Paper
from effdl.core.pictures import send_picture
from effdl.core.random import generator
from effdl.core.report import write_report
from effdl.core.schedules import Point, check_point, resolve_point
from effdl.core.select import NothingMatched, Targets, check_targets, select_modules
from effdl.core.surgery import when_built

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class SmoothGradCAMCallback(MethodCallback):
    """Shows, after validation, which parts of the first images speak for a class (Omeiza et al. 2019).

    The run is not disturbed: weights, ``.grad``, buffers, ``training`` flags and random streams end as in a run
    without it. Maps are made while the validated weights (an average, too) are in place, in the precision of the
    parameters (or ``double``), outside autocast. Works in ``validate``, ``test`` and ``predict`` alike, with any
    strategy that keeps whole parameters on each rank, compiled modules, CNNs and (``reshape_transform``) ViT and Swin.

    Pictures go to the loggers that take images (W&B, TensorBoard) as ``smooth-gradcampp/overlay`` and, if there is any
    logger, to ``figures/smooth-gradcampp-step=N.png`` in ``trainer.log_dir``, with a JSON report beside them. A wrong
    prediction is captioned in red. Under DDP each rank explains its own images and the first one writes.
    Cost: n_samples + 1 forwards and n_samples backwards of ``num_images`` images per analysis.

    Args:
        targets, exclude: layers by name glob or type; default the last one with a spatial map.
        n_samples: noisy copies per image.
        sigma, sigma_mode: standard deviation of the noise, times each image's range (``"range"``) or ``"absolute"``.
        class_idx: class to explain; ``None``: the predicted one, ``"label"``: the true one.
        every: optimizer steps, share of the run or epochs between analyses; these happen after a validation.
        num_images: the first so many of the first validation loader.
        network: submodule to explain (its forward takes the images); ``None``: the module's own forward, or else its
            only child with parameters.
        reshape_transform: ``"vit"``, ``"swin"`` or a function to (B, K, h, w), for token models.
        target_fn: module output -> (B,) scores, for segmentation or detection; replaces the class.
        internal_batch_size: the most images in one noisy forward.
        seed: of the noise.
        write: ``False``: no files, no loggers; :meth:`figure` and ``maps`` still hold the last analysis.
        double: explain a float64 copy of the network, whatever the precision of the run; float64 maps. More memory and
            time; for what, see :class:`~effdl.attribution.smooth_gradcampp.SmoothGradCAMpp`.

    Raises:
        ConfigurationError: an argument outside its range; no layer matched, or one without a spatial map; ``double`` on
            a device without float64.

    Example::

        from effdl.callbacks import SmoothGradCAMCallback

        cam = SmoothGradCAMCallback(targets="layer4", every="5ep")
        Trainer(callbacks=[cam]).fit(module, data)
        cam.figure().savefig("overlay.png")
    """

    paper = Paper(
        slug="smooth-gradcampp",
        title="Smooth Grad-CAM++: An Enhanced Inference Level Visualization Technique for Deep Convolutional Neural"
        " Network Models",
        authors=("Omeiza, Daniel", "Speakman, Skyler", "Cintas, Celia", "Weldermariam, Komminist"),
        year=2019,
        arxiv="1908.01224",
        venue="Intelligent Systems Conference (IntelliSys)",
    )

    def __init__(
        self,
        targets: Targets = None,
        exclude: Targets = None,
        n_samples: int = 25,
        sigma: float = 0.15,
        sigma_mode: Literal["range", "absolute"] = "range",
        class_idx: int | Literal["label"] | None = None,
        every: Point = "1ep",
        num_images: int = 8,
        network: str | None = None,
        reshape_transform: str | Callable[[Tensor], Tensor] | None = None,
        target_fn: Callable[[Any], Tensor] | None = None,
        internal_batch_size: int = 64,
        seed: int = 0,
        write: bool = True,
        double: bool = False,
    ) -> None:
        check_targets("targets", targets)
        check_targets("exclude", exclude)
        check_settings(n_samples, sigma, sigma_mode, internal_batch_size, seed, double)
        if class_idx not in (None, "label"):
            check_integer("class_idx", class_idx, 0, fix="Or None for the predicted class, 'label' for the true one.")
        check_point("every", every, positive=True)
        check_integer("num_images", num_images, 1)
        check(network is None or isinstance(network, str), "network", network, "the name of a submodule, or None")
        resolve_reshape(reshape_transform)
        check(target_fn is None or callable(target_fn), "target_fn", target_fn, "a function of the module's output")
        check(isinstance(write, bool), "write", write, "True or False")
        self.targets, self.exclude, self.network = targets, exclude, network
        self.n_samples, self.sigma, self.sigma_mode, self.class_idx = n_samples, sigma, sigma_mode, class_idx
        self.every, self.num_images = every, num_images
        self.reshape_transform, self.target_fn = reshape_transform, target_fn
        self.internal_batch_size, self.seed, self.write, self.double = internal_batch_size, seed, write, double
        self.generator = generator(seed)
        self.interval: int | None = None
        self.step = 0  # of the last analysis
        self.images: Tensor | None = None
        self.maps: dict[str, Tensor] = {}
        self.rows: list[dict[str, Any]] = []
        self.classes: Sequence[str] | None = None
        self._attributor: SmoothGradCAMpp | None = None
        self._collecting = self._resumed = False

    # ---- attaching -------------------------------------------------------------------------------------------

    def attach(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._attributor = None
        if self.double:
            check_double(trainer.strategy.root_device)
        self.keep(when_built(pl_module, lambda: self._select(pl_module)))

    def _select(self, pl_module: Any) -> list[str]:
        return list(select_modules(self._model(pl_module), self.targets, self.exclude))

    def _model(self, pl_module: Any) -> nn.Module:
        if self.network is not None:
            modules = dict(pl_module.named_modules())
            if self.network not in modules:
                raise NothingMatched(f"network={self.network!r}: no such submodule. {suggest(self.network, modules)}")
            return modules[self.network]
        if not type(pl_module).forward.__module__.startswith(("lightning.", "pytorch_lightning.")):
            return pl_module
        networks = [child for child in pl_module.children() if any(True for _ in child.parameters())]
        if len(networks) != 1:
            raise NothingMatched(
                f"network=None: {type(pl_module).__name__} has no forward of its own and {len(networks)} submodules "
                "with parameters. Name the one that maps images to scores: network='...'."
            )
        return networks[0]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not self._resumed:
            self.interval = resolve_point("every", self.every, trainer, interval=True)
        self._resumed = False
        if not trainer.enable_validation:
            rank_zero_warn(f"{type(self).__name__} explains validation images, and this run has none.")

    # ---- one analysis ----------------------------------------------------------------------------------------

    def _begin(self, trainer: Any, pl_module: Any) -> None:
        """At the start of a validation, test or prediction: is an analysis due?"""
        self._collecting = not trainer.sanity_checking
        if self._collecting and trainer.state.fn == "fit":
            passed = self._steps(trainer) - self.step
            self._collecting = passed < 0 or passed >= self.interval  # < 0: a second fit
        if self._collecting:
            self.images, self.maps, self.rows = None, {}, []

    def _collect(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not self._collecting or dataloader_idx or len(self.rows) >= self.num_images:
            return
        inputs, labels, _ = unpack(batch)
        check(isinstance(inputs, Tensor), "batch", type(inputs).__name__, "batches whose input is one tensor of images")
        left = self.num_images - len(self.rows)
        with torch.inference_mode(False):
            x = inputs[:left].detach().clone()
            labels = labels[:left] if isinstance(labels, Tensor) and labels.ndim == 1 else None
            self._keep(x, labels, self._explain(pl_module, x, labels))

    def _explain(self, pl_module: Any, x: Tensor, labels: Tensor | None) -> Explanation:
        if self._attributor is None:
            names = ("targets", "exclude", "n_samples", "sigma", "sigma_mode", "reshape_transform", "target_fn")
            names += ("internal_batch_size", "seed", "double")
            self._attributor = SmoothGradCAMpp(self._model(pl_module), **{name: getattr(self, name) for name in names})
            self._attributor.generator = self.generator
        if self.class_idx == "label":
            check(labels is not None, "class_idx", "label", "batches that carry one label per image")
            return self._attributor.explain(x, labels)
        return self._attributor.explain(x, None if self.target_fn else self.class_idx)

    def _keep(self, x: Tensor, labels: Tensor | None, explanation: Explanation) -> None:
        self.images = x.cpu() if self.images is None else torch.cat([self.images, x.cpu()])
        for name, layer in explanation.layers.items():
            heat = resize(layer.cam, x.shape[2:]).cpu()
            self.maps[name] = torch.cat([self.maps[name], heat]) if name in self.maps else heat
        columns = {"label": labels, "class": explanation.classes, "score": explanation.scores}
        columns |= {"probability": explanation.probabilities, "predicted": explanation.predicted}
        known = {key: values.tolist() for key, values in columns.items() if values is not None}
        self.rows += [dict(zip(known, row)) for row in zip(*known.values())]

    def _finish(self, trainer: Any, pl_module: Any) -> None:
        if not self._collecting:
            return
        self._collecting, self.step = False, self._steps(trainer)
        self.classes = getattr(getattr(trainer, "datamodule", None), "classes", None)
        folder = trainer.log_dir or trainer.default_root_dir  # asks all ranks
        wanted = self.write and trainer.loggers and not trainer.fast_dev_run
        if wanted and trainer.is_global_zero and self.rows and self.images.ndim == 4:
            alone = sum(getattr(other, "slug", None) == self.slug for other in trainer.callbacks) == 1
            name = self.slug if alone else self.state_key
            path, picture = Path(folder) / "figures" / f"{name}-step={self.step}.png", png(self.figure())
            send_picture(trainer.loggers, f"{name}/overlay", pixels(picture), trainer.global_step)
            write_report(path.with_suffix(".json"), self.report())
            path.write_bytes(picture)

    def _steps(self, trainer: Any) -> int:
        # by hand, global_step counts every optimizer
        by_hand = not getattr(trainer.lightning_module, "automatic_optimization", True)
        return trainer.global_step // max(1, len(trainer.optimizers) if by_hand else 1)

    on_validation_epoch_start = on_test_epoch_start = on_predict_epoch_start = _begin
    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _collect
    on_validation_epoch_end = on_test_epoch_end = on_predict_epoch_end = _finish

    # ---- state and report --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "interval": self.interval, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.generator.set_state(state_dict["generator"].cpu())
        self.interval, self.step = state_dict["interval"], state_dict["step"]
        self._resumed = self.interval is not None

    def matched(self, module: Any) -> list[str]:
        """Names of the layers that will be explained; none where the first image decides."""
        return [] if self.targets is None else self._select(module)

    def figure(self) -> Figure:
        """The last analysis: inputs above, overlays below; names of classes where the data module has ``classes``.

        Raises:
            ConfigurationError: before any analysis.
        """
        if self.images is None or self.images.ndim != 4:
            raise ConfigurationError("figure() needs a validation, test or prediction with images (B, C, H, W) first.")
        titles = [caption(row, self.classes) for row in self.rows]
        wrong = ["label" in row and row.get("predicted", row["label"]) != row["label"] for row in self.rows]
        title = f"Smooth Grad-CAM++ at step {self.step} ({self.n_samples} copies, σ = {self.sigma:g})"
        return overlay_figure(self.images, self.maps, titles, title, wrong)

    def report(self) -> dict[str, Any]:
        """Settings and, for each explained image, class, score (logit), probability and label."""
        settings = {key: getattr(self, key) for key in ("n_samples", "sigma", "sigma_mode", "seed", "double", "step")}
        return {**settings, "explained_layers": list(self.maps), "images": self.rows}

    def figures(self, folder: Path) -> list[Path]:
        """Draws the last analysis into ``folder/smooth-gradcampp.png``."""
        if self.images is None or self.images.ndim != 4:
            return []
        path = Path(folder) / f"{self.slug}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(self.figure()))
        return [path]

    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite."""
        return ContractExample(
            kwargs={"n_samples": 2, "every": 1, "num_images": 3},
            second={"seed": 1},
            bad={
                "targets": ["no.such.layer", 3],
                "exclude": "no.such.layer",
                "n_samples": [0, 2.5],
                "sigma": [-0.1, float("nan"), float("inf")],
                "sigma_mode": "relative",
                "class_idx": [-1, "true"],
                "every": [0, -1, "often"],
                "num_images": 0,
                "network": [3, "no.such.module"],
                "reshape_transform": "vitt",
                "target_fn": "logits",
                "internal_batch_size": 0,
                "seed": -1,
                "write": "yes",
                "double": "yes",
            },
        )

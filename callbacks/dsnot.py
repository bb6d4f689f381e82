"""dsnot on a Trainer: when a trained network is made sparse, and how it stays so while it is fine-tuned."""

from __future__ import annotations

from typing import Any, Literal

from effdl.callbacks._calibrated import CalibratedCallback
from effdl.callbacks._masked import MaskedCallback
from effdl.compression._dsnot_masks import check_groups
from effdl.compression.dsnot import Settings, Sparsified, selected, sparsify
from effdl.core.contract import ContractExample
from effdl.core.export import product
from effdl.core.input_statistics import in_features
from effdl.core.masks import MaskStore
from effdl.core.paper import Paper
from effdl.core.revalidate import validate_again
from effdl.core.select import Targets, check_targets
from effdl.core.surgery import when_built


class DSnoTCallback(CalibratedCallback, MaskedCallback):
    """Makes the linear layers of a trained transformer sparse from a few batches, without training (DSnoT, 2024).

    Masks come from Wanda, magnitude or SparseGPT, block by block on the already sparse inputs; DSnoT then swaps entries
    of each row until its expected output is the dense one's again. In place, with exact zeros; names and checkpoints
    stay the module's own. At the end of training (``when="end"``), before a fine-tuning that keeps the zeros
    (``when="start"``), or without a fit, under ``trainer.validate(model, loader)``.

    It attaches to transformers' causal LMs and encoders (``nn.Linear`` and GPT-2's ``Conv1D``), timm ViTs, and any
    network with an ``nn.ModuleList`` of equal blocks; another network is treated as one block. Embeddings and head stay
    dense. Cost: about four forward passes over the calibration data and, per layer, sorting its rows (SparseGPT: a
    Cholesky factorisation of its inputs). Where inputs have mean zero rewiring changes little: see ``swaps`` in the
    report. With some hundred inputs per row it can do harm, most at high sparsity: compare with ``refine=False``, try
    ``cycles=1``. There SparseGPT, which changes the weights that stay, beats all the others.

    Args:
        sparsity: share of zeros in [0, 1); ``None`` only with ``nm``.
        nm: ``(N, M)``, N zeros in each M consecutive inputs of a row: ``(2, 4)`` for semi-structured kernels
            (``gradual_pruning.to_sparse``). What is pruned then lies beside what was grown, whatever its sign: on
            layers of few inputs refining may raise the expected error, see ``eps_after`` in the report.
        init: the initial mask: ``"wanda"``, ``"magnitude"`` or ``"sparsegpt"``.
        refine: rewire it (DSnoT). ``False``: the plain method of ``init``.
        cycles: at most this many swaps per row.
        threshold: rows whose expected output is off by no more than this are left (outputs summed over a sequence).
        power: how much an input's variance counts in choosing what grows.
        same_sign: stop a row before its error changes sign.
        expectation: of the inputs as ``"sum"`` over a sequence or ``"mean"`` over tokens.
        skip: name patterns of layers that keep their initial mask.
        preset: ``"release"``, the defaults of the authors' code: no sign test, MLPs skipped. Made for rows of 4,096
            inputs; below some hundreds it is worse than no refinement.
        when: ``"end"`` or ``"start"`` of training.
        calibration_batches: batches of the training data to look at; the paper's 128 sequences are 8 batches of 16. An
            ``attention_mask`` leaves padding out.
        targets, exclude: layers by name glob or type; default every linear layer of the repeated blocks.

    Raises:
        ConfigurationError: an argument out of range; no linear layer in the blocks; N:M that a layer's inputs do not
            fill; ``ckpt_path`` of a run with other arguments.
        RuntimeError: NaN or infinity in an activation, named with layer and sequence. The weights are put back.

    Logs ``dsnot/sparsity`` and, summed over layers, ``dsnot/swaps``.

    Example::

        from effdl.callbacks import DSnoTCallback

        dsnot = DSnoTCallback(sparsity=0.6)
        Trainer(callbacks=[dsnot]).validate(LanguageModel("facebook/opt-125m"), loader)
        print(dsnot.report()["layers"])
    """

    paper = Paper(
        slug="dsnot",
        title="Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs",
        authors=(
            "Zhang, Yuxin", "Zhao, Lirui", "Lin, Mingbao", "Sun, Yunyun", "Yao, Yiwu", "Han, Xingjia",
            "Tanner, Jared", "Liu, Shiwei", "Ji, Rongrong",
        ),
        year=2024,
        arxiv="2310.08915",
        venue="International Conference on Learning Representations",
    )  # fmt: skip

    def __init__(
        self,
        sparsity: float | None = None,
        nm: tuple[int, int] | None = None,
        init: Literal["wanda", "magnitude", "sparsegpt"] = "wanda",
        refine: bool = True,
        cycles: int = 50,
        threshold: float = 0.1,
        power: float = 1.0,
        same_sign: bool = True,
        expectation: Literal["sum", "mean"] = "sum",
        skip: str | list[str] | None = None,
        preset: Literal["release"] | None = None,
        when: Literal["end", "start"] = "end",
        calibration_batches: int = 8,
        targets: Targets = None,
        exclude: Targets = None,
    ) -> None:
        self.settings = Settings(
            sparsity, nm, init, refine, cycles, threshold, power, same_sign, expectation, skip, preset
        )
        self.check_calibration(when, calibration_batches)
        check_targets("targets", targets)
        check_targets("exclude", exclude)
        self.sparsity, self.nm, self.init, self.refine = sparsity, nm, init, refine
        self.cycles, self.threshold, self.power, self.same_sign = cycles, threshold, power, same_sign
        self.expectation, self.skip, self.preset = expectation, skip, preset
        self.targets, self.exclude = targets, exclude
        self._begin()

    # ---- attaching -------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        super()._begin()
        self.result = Sparsified()

    def attach(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().attach(trainer, pl_module, stage)
        if stage == "validate" and not self.done:
            self._begin()
            self.keep(when_built(pl_module, lambda: self._select(pl_module)))

    def _select(self, pl_module: Any) -> None:
        weights = selected(pl_module, self.targets, self.exclude, network=product(pl_module))
        for weight in weights:
            check_groups(weight.name, in_features(weight.module), self.settings.groups)
        self.store = MaskStore(weights)

    def _is_dense(self) -> bool:
        return self.store is not None and not self.store.masks

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        MaskedCallback.on_fit_start(self, trainer, pl_module)  # masks of a checkpoint, and what holds them
        CalibratedCallback.on_fit_start(self, trainer, pl_module)

    # ---- acting ----------------------------------------------------------------------------------------------

    def calibrate(self, trainer: Any, pl_module: Any, batches: list[Any]) -> None:
        """Sparse weights, their masks, and what is told of them."""
        self._measure_dense(trainer, pl_module)
        # in the precision of the weights, without autocast: statistics should be as exact as they can
        batches = [trainer.precision_plugin.convert_input(batch) for batch in batches]
        weights = list(self.store.weights.values())
        self.result = sparsify(product(pl_module), batches, self.settings, weights=weights)
        self._set_masks(trainer, self.result.masks)
        self._unlogged[f"{self.slug}/swaps"] = float(sum(row["swaps"] for row in self.result.layers.values()))

    def _after_acting(self, trainer: Any, pl_module: Any) -> None:
        self._log_now(trainer)
        # the run's last metrics are to be those of the network it leaves; an averaging callback's network is its own
        averaged = any(cls.__name__ == "WeightAveraging" for c in trainer.callbacks for cls in type(c).__mro__)
        if not averaged and not trainer.fast_dev_run:
            validate_again(trainer)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_validation_start(trainer, pl_module)
        if str(getattr(trainer.state.fn, "value", trainer.state.fn)) == "validate":
            self._log_now(trainer)

    def _log_now(self, trainer: Any) -> None:
        """Where no training step follows, to the loggers directly."""
        for logger in trainer.loggers if self._unlogged else []:
            logger.log_metrics(self._unlogged, step=trainer.global_step)
        self._unlogged = {}

    # ---- state and report --------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        rows = {n: {k: v for k, v in row.items() if k != "seconds"} for n, row in self.result.layers.items()}
        return {**CalibratedCallback.state_dict(self), **MaskedCallback.state_dict(self), "layers": rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        CalibratedCallback.load_state_dict(self, state_dict)
        MaskedCallback.load_state_dict(self, state_dict)

    def _restore(self, saved: dict[str, Any]) -> None:
        super()._restore(saved)
        self.result = Sparsified(layers=dict(saved["layers"]))

    def report(self) -> dict[str, Any]:
        """Per layer counted sparsity, mean |eps| and output error before and after refining, swaps, seconds; seconds
        in all and per million weights; the dense and the sparse model.

        Raises:
            ConfigurationError: nothing was made sparse yet.
        """
        told = super().report()
        for name, row in self.result.layers.items():
            told["layers"][name] |= {k: v for k, v in row.items() if k != "sparsity"}
        if self.result.seconds:
            told |= {"seconds": self.result.seconds, "seconds_per_million": self.result.seconds_per_million}
        told["curves"] = told["curves"][1:]  # sparsity is one point
        return told

    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite: a tiny vision transformer, fine-tuned under its masks."""
        return ContractExample(
            kwargs={"sparsity": 0.5, "when": "start", "calibration_batches": 8},
            module=_tiny_vit_classifier,
            bad={
                "sparsity": [1.0, -0.1, float("nan"), None],
                "nm": [(4, 2), (2, 3), "2:4"],
                "init": "random",
                "refine": "yes",
                "cycles": [0, 1.5],
                "threshold": [-1.0, float("nan")],
                "power": [-1.0, float("nan")],
                "same_sign": "no",
                "expectation": "median",
                "skip": 3,
                "preset": "paper",
                "when": "middle",
                "calibration_batches": [0, 2.5],
                "targets": ["no.such.layer", 3],
                "exclude": "no.such.layer",
            },
        )


def _tiny_vit_classifier() -> Any:
    from timm.models import VisionTransformer

    from effdl.tasks.image import ImageClassifier

    vit = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    return ImageClassifier(vit, num_classes=3)

"""sara on a Trainer: which weights train, the rank term, when they are chosen again, and the delta at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from effdl.callbacks._base import MethodCallback
from effdl.callbacks._sara_state import draw_magnitudes, fold, refuse_company, told, unfold
from effdl.core.checkpoint import fold_checkpoints
from effdl.core.contract import ContractExample
from effdl.core.distributed import check_equal_on_ranks
from effdl.core.errors import ConfigurationError, check, check_choice, check_integer, check_number
from effdl.core.export import product
from effdl.core.paper import Paper
from effdl.core.random import generator
from effdl.core.schedules import Point, check_point, resolve_point, total_steps
from effdl.core.select import Targets, check_targets
from effdl.core.steps import Handle, after_optimizer_step, wrap
from effdl.core.surgery import when_built
from effdl.diffusion.sara import SparseWeight, masks_of, save_delta, sparsify

MATRIX_ENTRIES = 100  # a matrix with fewer trained entries is left out of the rank term (official)


class SaRACallback(MethodCallback):
    """Fine-tunes a pretrained network through its smallest weights alone (SaRA, Hu et al. 2025).

    The 10 to 20 % of the weights that are smallest do nothing: set to zero, they change no sample. They are what is
    trained here, as one sparse vector per parameter that the module's own optimizer gets; everything else is frozen, so
    that the network keeps what it knows. Reach for it to adapt a diffusion model (or any network) with no adapter
    module, no latency, and optimizer memory for the trained entries only. The result is the dense network, and a
    ``delta`` file of a few MB. Checkpoints hold the dense weights under their own names.

    Works with any optimizer and precision, accumulation, DDP, SAM, ``torch.compile`` and ``WeightAveraging`` listed
    behind it. Not with sharded strategies, nor beside callbacks that hold weights at zero or split layers. What users
    ask: choose theta by ``fraction``; take the rate of ``effdl.diffusion.sara.learning_rate`` (1e-3 exp(-350 theta),
    for theta up to 5e-3); AdamW, a cosine rate, 5,000 steps of batch 4. It fails where the small weights are in use: a
    pruned network has no idle ones, a small network few. BatchNorm statistics are no part of the delta.

    Args:
        threshold: theta > 0: weights below it train. 2e-3 is about 20M of Stable Diffusion 1.5's 860M; 5e-4: 5M.
        fraction: choose theta so that this share in (0, 1) of the selected weights trains.
        lambda_rank: of the nuclear norm, >= 0; 0: off. One matrix per step, drawn at random.
        rank_of: whose norm: of the trained ``"weights"`` (the code) or of their ``"delta"`` to the base (the paper).
        rank_min: matrices with a side not above it are left out of the rank term.
        reselect: when theta is asked again: weights that outgrew it keep what they have, the rest goes on with a fresh
            optimizer state. ``None``: never.
        delta: file for the trained values, below ``trainer.log_dir`` (else ``default_root_dir``) unless absolute; read
            by ``effdl.diffusion.sara.apply_deltas``. ``None``: none; :meth:`save` writes one later.
        indices: the delta tells positions too (it then fits another base).
        force: accept that less than 0.01 % or more than 60 % of the weights train.
        targets, exclude: modules by name glob or type, with all that they contain; default all parameters that ask for
            a gradient, biases and norms too. What is not selected is frozen.
        seed: of the draw of a matrix.

    Raises:
        ConfigurationError: an argument outside its range; nothing matched; no weight below theta; too few or too many;
            quantised or sharded weights; a fraction of a run of unknown length; listed after a ``WeightAveraging``;
            beside a callback that it does not go with; ``ckpt_path`` of a run with other arguments.

    Logs ``sara/small`` per epoch: the share of the trained entries that are below theta (still, or again).

    Example::

        from effdl.callbacks import SaRACallback

        sara = SaRACallback(fraction=0.1, delta="style.safetensors")
        Trainer(max_steps=5000, callbacks=[sara]).fit(DiffusionModule("my-pipeline"), data)
        print(sara.report()["trained"])
    """

    paper = Paper(
        slug="sara",
        title="SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation",
        authors=("Hu, Teng", "Zhang, Jiangning", "Yi, Ran", "Huang, Hongrui", "Wang, Yabiao", "Ma, Lizhuang"),
        year=2025,
        arxiv="2409.06633",
        venue="International Conference on Learning Representations",
    )

    def __init__(
        self,
        threshold: float = 2e-3,
        fraction: float | None = None,
        lambda_rank: float = 5e-4,
        rank_of: Literal["weights", "delta"] = "weights",
        rank_min: int = 64,
        reselect: Point | None = 0.5,
        delta: str | None = None,
        indices: bool = False,
        force: bool = False,
        targets: Targets = None,
        exclude: Targets = None,
        seed: int = 0,
    ) -> None:
        check_number("threshold", threshold, 0, float("inf"), closed="()")
        if fraction is not None:
            check_number("fraction", fraction, 0, 1, closed="()")
        check_number("lambda_rank", lambda_rank, 0, float("inf"), closed="[)")
        check_choice("rank_of", rank_of, ("weights", "delta"))
        check_integer("rank_min", rank_min, 0)
        if reselect is not None:
            check_point("reselect", reselect, positive=True)
        check(delta is None or (isinstance(delta, (str, Path)) and str(delta) != ""), "delta", delta, "a path or None")
        for name, flag in (("indices", indices), ("force", force)):
            check(isinstance(flag, bool), name, flag, "True or False")
        check_targets("targets", targets)
        check_targets("exclude", exclude)
        check_integer("seed", seed, 0)
        self.threshold, self.fraction, self.force = threshold, fraction, force
        self.lambda_rank, self.rank_of, self.rank_min, self.seed = lambda_rank, rank_of, rank_min, seed
        self.reselect, self.delta, self.indices = reselect, delta, indices
        self.targets, self.exclude = targets, exclude
        self.weights: dict[str, SparseWeight] = {}
        self._begin()

    def _begin(self) -> None:
        self.step = 0
        self.reselect_step: int | None = None
        self._draws = generator(self.seed)
        self._saved: dict[str, Any] | None = None
        self._prefix, self._total = "", 0

    # ---- attaching -------------------------------------------------------------------------------------------

    def attach(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            return
        refuse_company(self, trainer)
        # a Trainer that goes on (fit called again) goes on with its entries
        known, saved = (self.weights, self.state_dict()) if trainer.global_step else ({}, None)
        self._begin()
        self._saved = saved
        self.keep(when_built(pl_module, lambda: self._sparsify(pl_module, known)))
        folding = (lambda state: fold(self.weights, state), lambda state, kept: unfold(self.weights, state, kept))
        self.keep(fold_checkpoints(pl_module, self.state_key, *folding))
        self.keep(self.same_arguments_on_resume(trainer, pl_module))
        # the module's hooks run after all callbacks', so after WeightAveraging put its average in
        self.keep(wrap(pl_module, "on_train_end", lambda call_next: self._then_merge(trainer, call_next)))

    def _sparsify(self, pl_module: Any, known: dict[str, SparseWeight]) -> None:
        def make(weights: list[Any]) -> list[SparseWeight]:
            self._total = sum(weight.data.numel() for weight in weights)
            if not known:
                return masks_of(weights, self.threshold, self.fraction, self.force)
            return [known[weight.name].again(weight) for weight in weights if weight.name in known]

        asked = {parameter: parameter.requires_grad for parameter in pl_module.parameters()}
        self.weights = sparsify(pl_module, targets=self.targets, exclude=self.exclude, make=make)
        network = product(pl_module)
        prefix = next((f"{name}." for name, module in pl_module.named_modules() if name and module is network), "")
        self._prefix = prefix if all(name.startswith(prefix) for name in self.weights) else ""

        weights = self.weights

        def undo() -> None:
            for weight in weights.values():
                weight.detach()
            for parameter, flag in asked.items():
                parameter.requires_grad_(flag)

        self._undo_sparse = Handle(undo)
        self.keep(self._undo_sparse)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        trained = {id(parameter) for parameter in pl_module.parameters()}
        gone = [name for name, weight in self.weights.items() if id(weight.leaf) not in trained]
        if gone:
            raise ConfigurationError(f"{gone[0]} was replaced by another callback: list SaRACallback behind it.")
        check_equal_on_ranks([w.index.to(pl_module.device) for w in self.weights.values()], "the choice of weights")
        if self._saved is not None:
            self.step, self.reselect_step = self._saved["step"], self._saved["reselect_step"]
            self._draws.set_state(self._saved["draws"])
        self.keep(after_optimizer_step(trainer, lambda opt: self._after_step(trainer, opt), type(self).__name__))

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.reselect is not None and self.reselect_step is None:
            self.reselect_step = resolve_point("reselect", self.reselect, trainer)
            if self.reselect_step >= total_steps(trainer):
                rank_zero_warn(f"reselect={self.reselect!r} is step {self.reselect_step}: this run does not reach it.")

    # ---- one step --------------------------------------------------------------------------------------------

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.lambda_rank and (matrices := self._matrices(optimizer)):
            drawn = int(torch.randint(len(matrices), (), generator=self._draws))
            matrices[drawn].add_nuclear_gradient_(self.lambda_rank, self.rank_of)

    def _matrices(self, optimizer: Any) -> list[SparseWeight]:
        mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}

        def fits(sparse: SparseWeight) -> bool:
            shape = sparse.weight.data.shape
            return len(shape) == 2 and min(shape) > self.rank_min and sparse.index.numel() > MATRIX_ENTRIES

        # no gradient: the layer was not used, and DDP would not know of ours
        return [s for s in self.weights.values() if fits(s) and id(s.leaf) in mine and s.leaf.grad is not None]

    def _after_step(self, trainer: Any, optimizer: Any) -> None:
        for weight in self.weights.values():
            weight.hold_()
        if optimizer is not trainer.optimizers[0]:
            return
        self.step += 1
        if self.step == self.reselect_step:
            for weight in self.weights.values():
                weight.reselect()
                for each in trainer.optimizers:
                    each.state.pop(weight.leaf, None)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        small = torch.stack([weight.still_small().sum() for weight in self.weights.values()]).sum()
        pl_module.log(f"{self.slug}/small", small / self._trained)

    @property
    def _trained(self) -> int:
        return sum(weight.index.numel() for weight in self.weights.values())

    # ---- the end ---------------------------------------------------------------------------------------------

    def _then_merge(self, trainer: Any, call_next: Callable[[], None]) -> None:
        call_next()
        if any(other is self for other in trainer.callbacks):  # the learning-rate finder's trial ends too, without
            self._undo_sparse.remove()
            if self.delta is not None:
                path = Path(trainer.log_dir or trainer.default_root_dir) / self.delta
                if trainer.is_global_zero:
                    self.save(path)

    def save(self, path: str | Path) -> Path:
        """Write the delta, named as in the network ``module.model`` (where there is one).

        Raises:
            ConfigurationError: before any fit.
        """
        if not self.weights:
            raise ConfigurationError("save() needs a fit: nothing was trained yet.")
        named = {name.removeprefix(self._prefix): weight for name, weight in self.weights.items()}
        return save_delta(path, named, self.indices)

    # ---- state and report ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        threshold = next((weight.threshold for weight in self.weights.values()), None)
        own = {"step": self.step, "reselect_step": self.reselect_step, "draws": self._draws.get_state()}
        return {**own, "threshold": threshold}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = state_dict
        for weight in self.weights.values():
            weight.threshold = state_dict["threshold"]

    def matched(self, module: Any) -> list[str]:
        """Names of the parameters with an entry that trains."""
        return list(self.weights)

    def report(self) -> dict[str, Any]:
        """Entries that trained, in all and per parameter, theta, the rate it suggests, the size of the delta.

        Raises:
            ConfigurationError: before any fit.
        """
        if not self.weights:
            raise ConfigurationError("report() needs a fit: nothing was trained yet.")
        return {"curves": [f"{self.slug}/small", "val/loss"], **told(self.weights, self._total)}

    def figures(self, folder: Path) -> None:
        """``magnitudes.png``: the trained entries before and after."""
        draw_magnitudes(self.weights, folder / "magnitudes.png")

    @classmethod
    def contract_example(cls) -> ContractExample:
        """For the contract suite."""
        return ContractExample(
            kwargs={"fraction": 0.3, "reselect": 3, "rank_min": 2},
            bad={
                "threshold": [0, -1e-3, float("nan"), "small"],
                "fraction": [0, 1, 0.7, -0.1, float("nan")],
                "lambda_rank": [-1e-4, float("nan")],
                "rank_of": "norms",
                "rank_min": -1,
                "reselect": [0, -1, 1.5, "3 parsecs"],
                "delta": [3, ""],
                "indices": "yes",
                "force": 1,
                "targets": ["no.such.layer", 3],
                "exclude": "no.such.layer",
                "seed": -1,
            },
            zeros_stay=False,
        )

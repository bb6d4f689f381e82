"""A run that sees its weights quantised: what every such callback does the same, whatever trains there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from effdl.callbacks._base import MethodCallback
from effdl.callbacks._masked import MaskedCallback
from effdl.callbacks._quantized_network import install, thaw
from effdl.callbacks._quantized_report import MASTERS, Finished, plain_copy, quantization_report
from effdl.compression.quantized_distillation import BucketSize, distillation_loss, layout_of
from effdl.core.checkpoint import State, fold_checkpoints
from effdl.core.distill import FORMS, Reduction, Teacher, network_inputs, resolve_teacher, teacher_logits
from effdl.core.errors import ConfigurationError, check, check_choice, check_number
from effdl.core.export import product
from effdl.core.quantizers import QuantizedWeight, check_finite, pack
from effdl.core.report import ForwardProbe
from effdl.core.select import Targets, Weight, check_targets, select_weights
from effdl.core.steps import Handle, require_automatic_optimization, tap_logits, wrap
from effdl.core.surgery import when_built
from effdl.core.teacher import Frozen


class QuantizedTrainingCallback(MethodCallback):
    """Base of the callbacks whose network computes with quantised weights in every batch of a fit.

    A subclass calls :meth:`check_shared` in its constructor and overrides :meth:`_attach_weight`, :meth:`_seen` and
    :meth:`_record`. Checkpoints hold Q(w) under the original names, and what trains beside it; ``validate`` and
    ``test`` of such a checkpoint, and the end of a fit, leave layers that hold codes (``core.quantized``).
    """

    weights: Mapping[str, Weight] = {}
    #: ``weights`` end as codes: no other callback with this mark may have them too.
    quantises = True

    def check_shared(
        self,
        bucket_size: BucketSize,
        teacher: Teacher | None,
        temperature: float,
        teacher_weight: float,
        reduction: Reduction,
        network: str | None,
        quantize_first_last: bool,
        targets: Targets,
        exclude: Targets,
    ) -> None:
        """Check and store the arguments that both callbacks take."""
        self._layout = layout_of(bucket_size)
        check(teacher is None or isinstance(teacher, (str, Mapping, nn.Module)), "teacher", teacher, FORMS)
        check_number("temperature", temperature, 0, float("inf"), closed="()")
        check_number("teacher_weight", teacher_weight, 0, 1)
        fix = "Without one, teacher_weight=0 trains on the labels alone."
        check(teacher is not None or teacher_weight == 0, "teacher", teacher, FORMS, fix)
        check_choice("reduction", reduction, ("batchmean", "element_mean"))
        check(network is None or isinstance(network, str), "network", network, "the name of a submodule, or None")
        check(isinstance(quantize_first_last, bool), "quantize_first_last", quantize_first_last, "True or False")
        check_targets("targets", targets)
        check_targets("exclude", exclude)
        self.bucket_size, self.quantize_first_last = bucket_size, quantize_first_last
        self.teacher, self.temperature, self.teacher_weight = teacher, temperature, teacher_weight
        self.reduction, self.network = reduction, network
        self.targets, self.exclude = targets, exclude
        self._begin()

    def _begin(self) -> None:
        self.weights, self._changes, self._ending = {}, [], False
        self._teacher: Frozen | None = None
        self._probe: ForwardProbe | None = None
        self.finished: Finished | None = None

    # ---- for the subclass ------------------------------------------------------------------------------------

    def _attach_weight(self, pl_module: Any, weight: Weight) -> list[Handle]:
        """Let the network see a weight quantised."""
        raise NotImplementedError

    def _seen(self, name: str, raw: Tensor, points: Tensor | None) -> Tensor:
        """The weight that the network computes with; without a host sync."""
        raise NotImplementedError

    def _record(self, name: str, raw: Tensor, points: Tensor | None) -> QuantizedWeight:
        """Its codes; ``_seen`` bit for bit when decoded."""
        raise NotImplementedError

    def _install(self, pl_module: Any, records: dict[str, QuantizedWeight]) -> None:
        """Codes in the place of weights; the inverse of ``_thaw``."""
        install(pl_module, records)

    def _thaw(self, pl_module: Any) -> bool:
        """Codes of an earlier run become float weights that train; whether there were any."""
        return thaw(pl_module)

    def _keeps_zeros(self) -> bool:
        """Whether zero is always a level."""
        return False

    # ---- attaching -------------------------------------------------------------------------------------------

    def attach(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if stage != "fit":
            load = lambda call_next, checkpoint: self._load_as_codes(pl_module, call_next, checkpoint)  # noqa: E731
            self.keep(wrap(pl_module, "on_load_checkpoint", load))
            return
        self._refuse_masks(trainer)
        self._begin()
        if self._thaw(pl_module):
            rank_zero_warn("The network held quantised weights: training goes on from what they decode to.")
        if self.teacher_weight > 0:
            require_automatic_optimization(pl_module, type(self).__name__)
            if self.network is not None:
                check_submodule(pl_module, self.network)
            self._teacher = resolve_teacher(self.teacher, pl_module)
            self.keep(wrap(pl_module, "training_step", lambda *args: self._distil(pl_module, *args)))
        self.keep(when_built(pl_module, lambda: self._select(trainer, pl_module)))
        self.keep(fold_checkpoints(pl_module, self.state_key, self._fold, self._unfold))
        self.keep(self.same_arguments_on_resume(trainer, pl_module))
        # after all callbacks (WeightAveraging puts its average in, ModelCheckpoint saves) and the module's own hook
        self.keep(wrap(trainer.strategy, "on_train_end", lambda *args: self._then_finish(trainer, pl_module, *args)))

    def _refuse_masks(self, trainer: Any) -> None:
        masked = [type(c).__name__ for c in trainer.callbacks if isinstance(c, MaskedCallback)]
        if masked and not self._keeps_zeros():
            raise ConfigurationError(
                f"{masked[0]} holds weights at zero, which is no level of {type(self).__name__} here, so that they "
                "would not stay zero. QuantizedDistillationCallback(symmetric=True) keeps them."
            )

    def _select(self, trainer: Any, pl_module: Any) -> None:
        chosen = self._chosen(pl_module)
        for other in trainer.callbacks:
            if getattr(other, "quantises", False) and other is not self and other.__dict__.get("_kept"):
                twice = sorted(other.weights.keys() & {weight.name for weight in chosen})
                check(not twice, "targets", self.targets, f"layers of its own: another callback quantises {twice}")
        for weight in chosen:
            half = weight.data.dtype in (torch.float16, torch.bfloat16)
            fix = "Use precision='32-true', 'bf16-mixed' or '16-mixed'."
            check(not half, f"the dtype of {weight.name}", weight.data.dtype, "float32", fix)
            check_finite(weight.data, weight.name)
        self._before_attaching(trainer, pl_module, chosen)
        self.weights = {weight.name: weight for weight in chosen}
        for weight in chosen:
            self._changes += self._attach_weight(pl_module, weight)
        self.keep(Handle(self._detach))

    def _before_attaching(self, trainer: Any, pl_module: Any, chosen: list[Weight]) -> None:
        """The weights are checked and nothing is changed yet."""

    def _chosen(self, pl_module: Any) -> list[Weight]:
        chosen = select_weights(pl_module, self.targets, self.exclude)
        if self.quantize_first_last:
            return chosen
        inner = chosen[1:-1]
        check(len(inner) > 0, "quantize_first_last", False, "True where no more than two layers are selected")
        return inner

    def _detach(self) -> None:
        """Stock layers with their float weights again."""
        while self._changes:
            self._changes.pop().remove()

    # ---- the loss --------------------------------------------------------------------------------------------

    def _distil(self, pl_module: Any, call_next: Callable, batch: Any, *args: Any) -> Any:
        with tap_logits(pl_module, self.network) as tap:
            output = call_next(batch, *args)
        task = output["loss"] if isinstance(output, Mapping) else output
        if task is None:
            return output
        target = teacher_logits(self._teacher, network_inputs(batch))
        loss = distillation_loss(tap.logits(), target, task, self.temperature, self.teacher_weight, self.reduction)
        pl_module.log(f"{self.slug}/task_loss", task.detach())
        pl_module.log(f"{self.slug}/loss", loss.detach())
        return {**output, "loss": loss} if isinstance(output, Mapping) else loss

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self._probe is None and product(pl_module) is not pl_module:
            self._probe = ForwardProbe(product(pl_module))
            self.keep(self._probe)

    # ---- checkpoints -----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {"weights": list(self.weights)}

    @torch.no_grad()
    def _fold(self, state: State) -> dict[str, Any]:
        """Q(w) under the original names; masters and points are kept beside."""
        kept: dict[str, Any] = {"masters": {}, "points": {}, "names": {}, "teacher": self._teacher_name()}
        if self.finished is not None:
            return kept
        for name in [name for name in self.weights if name in state]:
            raw, points = state[name], state.pop(points_key(name), None)
            seen = self._seen(name, raw, points)
            for key in [k for k, v in state.items() if v.data_ptr() == raw.data_ptr() and v.shape == raw.shape]:
                kept["names"][key], state[key] = name, seen
            kept["masters"][name] = raw
            if points is not None:
                kept["points"][name] = points
        return kept

    def _unfold(self, state: State, kept: dict[str, Any]) -> None:
        for key, name in kept["names"].items():
            state[key] = kept["masters"][name]
        for name, points in kept["points"].items():
            state[points_key(name)] = points

    def _teacher_name(self) -> str:
        given = self.teacher
        return given if isinstance(given, str) else "" if given is None else type(given).__name__

    def _load_as_codes(self, pl_module: Any, call_next: Callable, checkpoint: dict[str, Any]) -> None:
        """Under validate, test and predict: the checkpoint's artifact itself is what runs, and stays in the module."""
        state, kept = checkpoint["state_dict"], checkpoint.get("effdl", {}).get(self.state_key, {}).get("state_dict")
        self._thaw(pl_module)
        if kept:
            points = kept["points"]
            records = {name: self._record(name, raw, points.get(name)) for name, raw in kept["masters"].items()}
            self._install(pl_module, records)
            state = checkpoint["state_dict"] = {k: v for k, v in state.items() if k not in kept["names"]}
            for name, record in records.items():
                tables = {"codes": pack(record.codes, record.bits), **record.tables()}
                state.update({f"{name}_{table}": value for table, value in tables.items()})
        call_next(checkpoint)

    # ---- the end ---------------------------------------------------------------------------------------------

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        # lr_find ends its own training behind the callbacks' back: the network must stay as it is then
        self._ending = True

    def _then_finish(self, trainer: Any, pl_module: Any, call_next: Callable, *args: Any) -> None:
        call_next(*args)
        if not self._ending:
            return
        with torch.inference_mode(False), torch.no_grad():
            records = {}
            for name, weight in self.weights.items():
                points = weight.module._parameters.get(points_key(weight.attribute))
                records[name] = self._record(name, weight.data, None if points is None else points.data)
            self._warn(records)
            self._detach()
            self.finished = Finished.of(trainer, pl_module, self._probe, *self._compared(pl_module))
            self._install(pl_module, records)

    def _warn(self, records: dict[str, QuantizedWeight]) -> None:
        """What the user should know of the codes."""

    def _compared(self, pl_module: Any) -> tuple[nn.Module, str]:
        """What the artifact is measured beside, and its name: the teacher, else the masters."""
        if self._teacher is not None:
            return self._teacher.module, "teacher"
        return plain_copy(product(pl_module)), MASTERS

    def matched(self, module: Any) -> list[str]:
        """Names of the weights that are quantised."""
        return list(self.weights)

    def report(self) -> dict[str, Any]:
        """Bits per weight, file bytes, and the accuracy and latency of the artifact as it is reopened from its file.

        Raises:
            ConfigurationError: before a fit has ended.
        """
        if self.finished is None:
            raise ConfigurationError("report() needs a finished fit: nothing was quantised yet.")
        return quantization_report(self.finished)


def points_key(name: str) -> str:
    """Of a weight's name, the name of its points."""
    return f"{name}_points"


def check_submodule(pl_module: nn.Module, name: str) -> None:
    known = name in dict(pl_module.named_modules())
    check(known, "network", name, f"the name of a submodule of {type(pl_module).__name__}")

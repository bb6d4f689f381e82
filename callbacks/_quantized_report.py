"""What a quantised run tells: the artifact, reopened from its file, beside the network it stands for."""

from __future__ import annotations

import copy
import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effdl.compression.quantized_distillation import huffman_bits, level_frequencies
from effdl.core.batch import unpack
from effdl.core.calibrate import to_device
from effdl.core.capture import evaluating
from effdl.core.distill import ask, network_inputs
from effdl.core.errors import ConfigurationError
from effdl.core.export import WEIGHTS, product, save_model
from effdl.core.quantized import dequantize_, load_quantized, payload, quantized_weights
from effdl.core.report import ForwardProbe, latencies_ms, measure

MASTERS = "full-precision masters"


@dataclass
class Finished:
    """What the report needs of a run that has ended."""

    module: Any
    device: torch.device
    compared: nn.Module
    """The teacher, or the network before it was quantised."""
    name: str
    batches: Any
    """The first validation loader and how many of its batches count, or ``None``."""
    metric: str
    inputs: tuple | None

    @classmethod
    def of(cls, trainer: Any, pl_module: Any, probe: ForwardProbe | None, compared: nn.Module, name: str) -> Finished:
        """Called before codes take the place of the weights."""
        loaders = trainer.val_dataloaders
        loader = loaders[0] if isinstance(loaders, (list, tuple)) and loaders else loaders
        counts = trainer.num_val_batches
        count = counts[0] if isinstance(counts, (list, tuple)) and counts else counts
        usable = loader is not None and not isinstance(loader, dict) and trainer.is_global_zero
        logged = [k for k in trainer.callback_metrics if k.startswith("val") and "acc" in k.lower()]
        return cls(
            module=pl_module,
            device=trainer.strategy.root_device,
            compared=compared,
            name=name,
            batches=(loader, None if count == float("inf") else int(count or 0)) if usable else None,
            metric=logged[0] if logged else "val/accuracy",
            inputs=probe.inputs if probe is not None else None,
        )

    def accuracy(self, network: nn.Module) -> dict[str, float]:
        """Share of right classes over the validation batches; empty where they hold no classes."""
        if self.batches is None:
            return {}
        loader, count = self.batches
        right, seen = 0, 0
        network.to(self.device)
        try:
            with evaluating(network), torch.no_grad():
                for batch in itertools.islice(loader, count):
                    batch = to_device(batch, self.device)
                    labels, logits = unpack(batch).labels, ask(network, network_inputs(batch))
                    if not isinstance(labels, Tensor) or logits.dim() != 2 or labels.shape != logits.shape[:1]:
                        return {}
                    right, seen = right + int((logits.argmax(-1) == labels).sum()), seen + labels.numel()
        except ConfigurationError:  # a network without logits
            return {}
        finally:
            network.cpu()
        return {self.metric: right / seen} if seen else {}


def quantization_report(run: Finished) -> dict[str, Any]:
    """``before``, ``after``, ``layers`` and sizes, for ``core.report``."""
    network = product(run.module).cpu()
    records = quantized_weights(network)
    stored = payload(network)
    numel = {name: record.codes.numel() for name, record in records.items()}
    plain = dequantize_(plain_copy(network))  # the architecture, to load the artifact into
    parameters = sum(p.numel() for p in plain.parameters())
    nonzero = sum(int(torch.count_nonzero(p)) for p in plain.parameters())
    with tempfile.TemporaryDirectory() as folder:
        save_model(run.module, Path(folder))
        file_bytes = (Path(folder) / WEIGHTS).stat().st_size
        opened = plain_copy(plain)
        for parameter in opened.parameters():
            parameter.data.zero_()  # so that nothing but the file can be right
        load_quantized(opened, folder)
    after = {"name": "quantised", "metrics": run.accuracy(opened), "parameters": parameters, "nonzero": nonzero}
    before = {"name": run.name, **measure(run.compared.cpu())}
    if run.name != MASTERS:  # BatchNorm statistics were taken under Q(w): masters have no accuracy of their own
        before["metrics"] = run.accuracy(run.compared)
    told: dict[str, Any] = {}
    if run.inputs is not None:
        args, kwargs = to_device(run.inputs, "cpu")
        times = latencies_ms([opened, plain, run.compared], args, kwargs)
        after["latency_ms"], told["latency_decoded_once_ms"], before["latency_ms"] = times
    coded = huffman_bits(level_frequencies(records.values()))
    tables = sum(table.nbytes for record in records.values() for table in record.tables().values())
    return {
        "before": before,
        "after": after,
        "quantised_weights": stored["weights"],
        "bits_per_weight": stored["bits_per_weight"],
        "huffman_bits": coded,
        "huffman_bytes": int(coded * stored["weights"] / 8) + tables,
        "quantised_bytes": stored["bytes"],
        "full_precision_bytes": 4 * stored["weights"],
        "artifact_bytes": file_bytes,
        **told,
        "layers": {
            name: {"weights": numel[name], "bits": record.bits, "bits_per_weight": record.bits_per_weight}
            for name, record in records.items()
        },
    }


def plain_copy(network: nn.Module) -> nn.Module:
    """A deep copy, on the CPU, without the Trainer that a LightningModule refers to."""
    trainer = network.__dict__.get("_trainer")
    try:
        if trainer is not None:
            network.__dict__["_trainer"] = None
        return copy.deepcopy(network).cpu()
    finally:
        if trainer is not None:
            network.__dict__["_trainer"] = trainer

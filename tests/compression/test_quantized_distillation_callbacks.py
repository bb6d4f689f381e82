"""quantized-distillation on a Trainer: checks 3-6 and 9, and what users of the callbacks rely on."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from effdl.callbacks import DifferentiableQuantizationCallback, QuantizedDistillationCallback
from effdl.compression.quantized_distillation import layout_of, quantize_to_points, uniform
from effdl.core.export import save_model
from effdl.core.quantized import load_quantized, quantized_weights
from effdl.core.quantizers import grouped
from effdl.core.select import select_weights
from tests.support import check_quantized_artifact, quiet_fit


def network():
    return nn.Sequential(
        nn.Linear(12, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 3)
    )


class Net(LightningModule):
    """A foreign classifier."""

    def __init__(self, model=None, optimizer=None):
        super().__init__()
        torch.manual_seed(0)
        self.model = model or network()
        self.make = optimizer or (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-3))

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/accuracy", (self(batch[0]).argmax(-1) == batch[1]).float().mean())

    test_step = validation_step

    def configure_optimizers(self):
        return self.make(self.parameters())


def rows(batches=8, size=12):
    g = torch.Generator().manual_seed(1)
    centres = torch.randn(3, 12, generator=g)
    labels = [torch.randint(0, 3, (size,), generator=g) for _ in range(batches)]
    return [(centres[y] + 1.5 * torch.randn(size, 12, generator=g), y) for y in labels]


def data(batches=8, size=12):
    return DataLoader(rows(batches, size), batch_size=None)


def fit(module, callbacks, epochs=2, loader=None, **kwargs):
    return quiet_fit(module, loader or data(), *callbacks, val=data(2), max_epochs=epochs, **kwargs)


def teacher():
    torch.manual_seed(9)
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))


class Watch(Callback):
    """Distinct values per bucket of the weights that forwards see, and of the optimizer's."""

    def __init__(self, layout):
        self.layout, self.seen, self.masters, self.handle = layout, {"train": [], "val": []}, [], None

    def on_fit_start(self, trainer, pl_module):
        layer = pl_module.model[0]

        def hook(module, args, output):
            kind = "train" if trainer.training else "val"
            self.seen[kind].append(distinct(module.weight.detach(), self.layout))

        self.handle = layer.register_forward_hook(hook)

    def on_train_batch_end(self, trainer, *args):
        first = trainer.optimizers[0].param_groups[0]["params"][0]
        self.masters.append(distinct(first.detach(), self.layout))

    def on_fit_end(self, trainer, pl_module):
        self.handle.remove()


def distinct(weight, layout):
    return max(row.unique().numel() for row in grouped(weight, layout))


@pytest.mark.parametrize("bits", [2, 4])
def test_must_03_every_batch_sees_quantised_weights_and_the_optimizer_masters(bits, tmp_path):
    watch, layout = Watch("bucket:96"), "bucket:96"
    callback = QuantizedDistillationCallback(bits, teacher(), bucket_size=96)
    save = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    module = Net()
    fit(module, [callback, watch, save])
    assert len(watch.seen["train"]) == 16
    assert len(watch.seen["val"]) >= 4
    assert max(watch.seen["train"] + watch.seen["val"]) <= 2**bits
    assert min(watch.masters) > 2**bits
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    for name, record in quantized_weights(module).items():
        assert distinct(state[name], layout) <= 2**bits
        assert torch.equal(record.dequantize(), state[name])
        assert record.codes.unique().numel() <= 2**bits
    assert not [n for n, p in module.named_parameters() if p.dim() > 1]


def test_must_03_a_toy_that_quantises_at_the_end_alone_fails_the_same_look():
    class AtTheEnd(QuantizedDistillationCallback):
        def _attach_weight(self, pl_module, weight):
            return []

    watch = Watch("bucket:96")
    fit(Net(), [AtTheEnd(2, teacher(), bucket_size=96), watch], epochs=1)
    assert min(watch.seen["train"]) > 4


def test_must_04_masters_are_bit_identical_after_an_epoch_without_a_rate():
    module = Net(optimizer=lambda p: torch.optim.SGD(p, 0.0, momentum=0.9))
    before, seen = copy.deepcopy(module.model), {}

    class Look(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.update({n: p.detach().clone() for n, p in pl_module.model.named_parameters()})

    fit(module, [QuantizedDistillationCallback(2, teacher()), Look()], epochs=1)
    assert seen.keys() == dict(before.named_parameters()).keys()
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, seen[name]), name


def trained():
    module = Net(optimizer=lambda p: torch.optim.Adam(p, 0.01))
    fit(module, [], epochs=4)
    return module.model


class Losses(Callback):
    def __init__(self):
        self.losses, self.points, self.weights = [], [], []

    def on_train_epoch_end(self, trainer, pl_module):
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self.points.append({n: p.detach().clone() for n, p in pl_module.named_parameters() if n.endswith("_points")})
        self.weights.append({n: p.detach().clone() for n, p in pl_module.named_parameters() if n.endswith("weight")})


def test_must_05_points_alone_train_stay_sorted_and_lower_the_loss():
    full = trained()
    module = Net(copy.deepcopy(full), lambda p: torch.optim.Adam(p, 3e-3))
    look, callback = Losses(), DifferentiableQuantizationCallback(bits=2, bucket_size=None)
    fit(module, [callback, look], epochs=6)
    assert look.losses[-1] < look.losses[0]
    for points in look.points:
        assert sorted(points) == [f"model.{i}.weight_points" for i in (0, 3, 5)]
        assert all(bool((p[1:] >= p[:-1]).all()) for p in points.values())
    assert not torch.equal(look.points[0]["model.0.weight_points"], look.points[-1]["model.0.weight_points"])
    for name, weight in look.weights[-1].items():
        assert torch.equal(weight, full.get_parameter(name.removeprefix("model."))), name
    for name, record in quantized_weights(module).items():
        raw = full.get_parameter(name.removeprefix("model.")).detach()
        assert torch.equal(record.dequantize(), quantize_to_points(raw, look.points[-1][f"{name}_points"], "tensor"))
    assert torch.equal(full[0].bias, module.model[0].bias)  # nothing else has moved
    assert not torch.equal(full[1].running_mean, module.model[1].running_mean)  # statistics have
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("kind", ["masters", "points"])
def test_must_06_accumulation_steps_as_the_larger_batch(kind):
    # without BatchNorm, whose statistics know the batch size; two processes: the contract suite, row C3
    ends = []
    for size, accumulate in ((12, 2), (24, 1)):
        torch.manual_seed(3)
        plain = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3))
        halves = rows(8, 12)
        pairs = [tuple(torch.cat(parts) for parts in zip(*halves[i : i + 2])) for i in range(0, 8, 2)]
        loader = DataLoader(halves if size == 12 else pairs, batch_size=None)
        if kind == "masters":
            callback = QuantizedDistillationCallback(3, teacher(), bucket_size=32)
        else:
            callback = DifferentiableQuantizationCallback(3, 32, teacher=teacher(), teacher_weight=0.5)
        seen = Losses()
        module = Net(plain, lambda p: torch.optim.SGD(p, 0.05))
        fit(module, [callback, seen], epochs=1, loader=loader, accumulate_grad_batches=accumulate)
        ends.append({**seen.weights[-1], **seen.points[-1]})
    assert all(torch.allclose(ends[0][name], ends[1][name], atol=1e-6) for name in ends[1])
    assert len(ends[1]) == (2 if kind == "masters" else 4)


CALLBACKS = {
    "distilled": lambda: QuantizedDistillationCallback(2, teacher()),
    "points": lambda: DifferentiableQuantizationCallback(3, 96),
    "symmetric": lambda: QuantizedDistillationCallback(8, teacher_weight=0.0, bucket_size="row", symmetric=True),
    "vectors": lambda: QuantizedDistillationCallback(4, teacher_weight=0.0, quantize_bias=True),
}


@pytest.mark.parametrize("name", ["distilled", "points"])
def test_must_09_the_artifact_is_small_whole_and_equal(name, tmp_path):
    module = Net()
    callback = CALLBACKS[name]()
    fit(module, [callback], epochs=1)
    if name == "distilled":
        check_quantized_artifact(module.model, network, (rows(1)[0][0],), tmp_path)
    save_model(module, tmp_path / "artifact")
    told = callback.report()
    assert told["after"]["parameters"] == sum(p.numel() for p in network().parameters())
    reopened = load_quantized(Net().model, tmp_path / "artifact").eval()
    x, y = (torch.cat(parts) for parts in zip(*rows(2)))
    accuracy = (reopened(x).argmax(-1) == y).float().mean()
    assert told["after"]["metrics"]["val/accuracy"] == pytest.approx(float(accuracy))
    assert told["bits_per_weight"] == pytest.approx(8 * told["quantised_bytes"] / told["quantised_weights"])
    assert told["huffman_bits"] <= (2 if name == "distilled" else 3)


def test_must_09_two_bits_cost_what_the_paper_counts(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 64, 3), nn.Flatten(), nn.Linear(64 * 4, 64))
    module = Net(net)
    from effdl.callbacks._quantized_training import install

    install(module, {w.name: uniform(w.data, 2, layout_of(256)) for w in select_weights(module)})
    save_model(module, tmp_path)
    full = sum(4 * r.codes.numel() for r in quantized_weights(module).values())
    biases = sum(p.nbytes for p in module.parameters())
    size = (tmp_path / "model.safetensors").stat().st_size - biases
    assert size <= (2 / 32 + 2 * 32 / (256 * 32) + 0.05) * full

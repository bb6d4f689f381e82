"""pdp on a Trainer: checks 7-9, and what users of the callback rely on."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from effdl.callbacks import PDPCallback
from effdl.compression.pdp import hard_mask, last_kept, soft_masked
from effdl.core.errors import ConfigurationError

SIZES = {"model.0.weight": 12 * 32, "model.2.weight": 32 * 4}
GRANULARITIES = ["unstructured", "channel", "2:4"]


def mlp():
    return nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 4))


class Net(LightningModule):
    """A foreign module that notes what its layers see."""

    def __init__(self, make=mlp, optimizer=lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), look=lambda self: None):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.make, self.look = make(), optimizer, look
        self.seen, self.outputs = [], []

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.model(batch[0].to(self.dtype)), batch[1])
        self.seen.append(self.look(self))
        return loss

    def validation_step(self, batch, batch_idx):
        self.outputs.append(self.model(batch[0].to(self.dtype)))
        self.log("val/accuracy", (self.outputs[-1].argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return self.make(self.parameters())


def data(batches=8, shape=(12,)):
    g = torch.Generator().manual_seed(1)
    rows = [(torch.randn(6, *shape, generator=g), torch.randint(0, 4, (6,), generator=g)) for _ in range(batches)]
    return DataLoader(rows, batch_size=None)


def fit(module, *callbacks, val=None, ckpt_path=None, loader=None, **kwargs):
    saves = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    options = {"max_epochs": 3, "enable_checkpointing": saves, "num_sanity_val_steps": 0, **quiet, **kwargs}
    trainer = Trainer(callbacks=list(callbacks), **options)
    trainer.fit(module, loader or data(), val, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


def pdp(**kwargs):
    own = {"sparsity": 0.8, "temperature": "auto", "start": 4, "stop": 16, "every": 4, "targets": "*"}
    own |= {"sparsity": None} if ":" in kwargs.get("granularity", "") else {}
    return PDPCallback(**{**own, **kwargs})


def zeros(module):
    return {n: int((p == 0).sum()) for n, p in module.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("freeze", [None, 18])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_must_07_the_finished_weights_are_the_last_hard_ones(granularity, freeze):
    module, callback = Net(), pdp(granularity=granularity, scope="local", freeze=freeze)
    keys = list(module.state_dict())
    fit(module, callback, val=data(1))
    assert list(module.state_dict()) == keys
    assert type(module.model[0]) is nn.Linear
    with torch.no_grad():
        assert torch.equal(module.eval().model(next(iter(data(1)))[0]), module.outputs[-1])
    sparsity = 0.5 if granularity == "2:4" else 0.8
    for name, count in zeros(module).items():
        rows = module.get_parameter(name).shape[0] if granularity == "channel" else SIZES[name]
        kept = SIZES[name] // 2 if granularity == "2:4" else last_kept(rows, sparsity) + 1
        assert count == SIZES[name] - kept * SIZES[name] // (SIZES[name] if granularity == "2:4" else rows)
        assert abs(count / SIZES[name] - sparsity) <= 1 / rows
    assert callback.report()["layers"]["model.0.weight"]["sparsity"] == zeros(module)["model.0.weight"] / 384


def test_must_08_two_of_four_are_zero_in_every_group():
    fit(module := Net(), pdp(granularity="2:4"))
    for layer in (module.model[0], module.model[2]):
        assert (layer.weight.view(-1, 4) == 0).sum(1).eq(2).all()


def test_must_09_no_parameter_is_added():
    plain, module = Net(), Net(look=lambda self: [(n, p.shape, id(p)) for n, p in self.named_parameters()])
    fit(module, callback := pdp())
    want = [(n, p.shape, id(p)) for n, p in module.named_parameters()]
    assert all(seen == want for seen in module.seen)
    assert [w[:2] for w in want] == [(n, p.shape) for n, p in plain.named_parameters()]
    (group,) = callback_optimizer(module).param_groups
    assert len(group["params"]) == len(list(plain.parameters()))
    assert callback.matched(module) == list(SIZES)


def callback_optimizer(module):
    return module.trainer.optimizers[0]


def test_the_threshold_follows_the_weights_at_every_forward():
    def look(self):
        raw = {name: dict(self.named_parameters())[name].detach().clone() for name in SIZES}
        return {name: (raw[name], self.get_submodule(name[:-7]).weight.detach().clone()) for name in SIZES}

    fit(module := Net(look=look), callback := pdp(), max_epochs=3)
    shares = [0.0] * 4 + [1 / 3] * 4 + [2 / 3] * 4 + [1.0] * 12
    for share, seen in zip(shares, module.seen, strict=True):
        for name, (raw, weight) in seen.items():
            layer = callback.layers[name]
            want = soft_masked(raw, share * layer.sparsity, layer.temperature) if share else raw
            assert torch.equal(weight, want)
    # the global budget was fixed once, from the weights at the start
    at_start = torch.cat([module.seen[4][name][0].abs().flatten() for name in SIZES])
    threshold = at_start.sort(descending=True).values[int(0.2 * at_start.numel())]
    for name, (raw, _) in module.seen[4].items():
        assert callback.layers[name].sparsity == float((raw.abs() < threshold).sum()) / raw.numel()
    assert sum(zeros(module).values()) == pytest.approx(0.8 * at_start.numel(), abs=2)


def test_validation_sees_hard_masks_unless_told_otherwise():
    def look(self):
        return float((self.model[0].weight == 0).float().mean())

    class Watch(Net):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.shares = [*getattr(self, "shares", []), look(self)]

    for eval_hard in (True, False):
        fit(module := Watch(look=look), pdp(eval_hard=eval_hard, scope="local"), val=data(1))
        assert max(module.seen) == 0
        assert module.shares == (pytest.approx([0.8 / 3, 0.8, 0.8], abs=0.01) if eval_hard else [0, 0, 0])


def test_frozen_masks_stay_and_pruned_weights_get_no_gradient():
    def look(self):
        return self.model[0].weight.detach().clone()

    fit(module := Net(look=look, optimizer=lambda p: torch.optim.AdamW(p, 0.02)), pdp(freeze=17))
    patterns = [weight == 0 for weight in module.seen]
    assert not any(p.any() for p in patterns[:17])
    assert all(torch.equal(p, patterns[17]) for p in patterns[17:])
    assert torch.equal(module.model[0].weight == 0, patterns[17])
    assert not torch.equal(module.seen[17], module.seen[-1])


@pytest.mark.parametrize("freeze", [None, 8])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_resume_is_bit_identical(tmp_path, granularity, freeze):
    make = lambda: pdp(granularity=granularity, freeze=freeze)  # noqa: E731
    fit(whole := Net(), make())
    save = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    fit(first := Net(), make(), save, max_epochs=1)
    fit(resumed := Net(), make(), ckpt_path=tmp_path / "last.ckpt")
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters()):
        assert torch.equal(a, b), name
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert {name: int((state[name] == 0).sum()) for name in SIZES} == zeros(first)
    with pytest.raises(ConfigurationError, match="other arguments of PDPCallback"):
        fit(Net(), pdp(sparsity=None if ":" in granularity else 0.5, scope="local", granularity=granularity),
            ckpt_path=tmp_path / "last.ckpt")  # fmt: skip


@pytest.mark.parametrize("order", [0, 1])
def test_weight_averaging_ends_and_is_saved_sparse(tmp_path, order):
    save = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    callbacks = [pdp(scope="local"), EMAWeightAveraging(decay=0.9)]
    fit(module := Net(), *(callbacks if order else callbacks[::-1]), save, val=data(1))
    want = {name: count - last_kept(count, 0.8) - 1 for name, count in SIZES.items()}
    assert zeros(module) == want
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for key in ("state_dict", "current_model_state"):
        assert {name: int((checkpoint[key][name] == 0).sum()) for name in SIZES} == want
    # each state is binarised by its own threshold
    kept = next(value for key, value in checkpoint["effdl"].items() if key.startswith("pdp-"))
    for key, raw in kept.items():
        for name in SIZES:
            assert torch.equal(checkpoint[key][name], raw[name] * hard_mask(raw[name], 0.8))


def test_accumulation_counts_optimizer_steps():
    for accumulate, epochs in ((1, 3), (4, 12)):
        shares = []

        class Watch(PDPCallback):
            def _rise(self, share, shares=shares):
                shares.append((self.step, share))
                super()._rise(share)

        fit(Net(), Watch(0.8, "auto", 4, 16, 4, targets="*"), max_epochs=epochs, accumulate_grad_batches=accumulate)
        assert shares == [(4, 1 / 3), (8, 2 / 3), (12, 1.0), (16, 1.0), (20, 1.0)]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_compiled_networks_are_not_recompiled_when_the_ratio_rises(granularity):
    fit(plain := Net(), pdp(granularity=granularity))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module, graphs = Net(), []
    module.look = lambda self: graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    module.model = torch.compile(module.model, backend="eager")
    try:
        fit(module, pdp(granularity=granularity))
        assert not torch._dynamo.utils.counters["graph_break"]
    finally:
        torch._dynamo.reset()
    assert graphs == [1] * 4 + [2] * 20  # once for the masks; values that rise change no graph
    for a, b in zip(plain.parameters(), module.parameters()):
        assert torch.allclose(a, b, atol=1e-6)


class Sequence(nn.Module):
    """Embedding, LSTM, attention and a tied read-out."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 16)
        self.lstm = nn.LSTM(16, 16, batch_first=True)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 12)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        x, _ = self.lstm(self.embedding(x.abs().long().clamp(max=11)))
        x, _ = self.attention(x, x, x)
        return self.head(x[:, -1])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_recurrent_attention_and_tied_weights(granularity):
    fit(module := Net(Sequence), callback := pdp(granularity=granularity, sparsity=None if ":" in granularity else 0.75,
        scope="local"), max_epochs=2)  # fmt: skip
    layers = callback.report()["layers"]
    assert len(layers) == 5
    want = pytest.approx(0.5 if ":" in granularity else 0.75, abs=0.02)
    assert all(row["sparsity"] == want for row in layers.values())
    assert module.model.head.weight is module.model.embedding.weight


class Conv(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4),
        )  # fmt: skip


def test_by_default_the_first_convolution_and_the_classifier_stay_dense():
    fit(Net(Conv), callback := pdp(targets=None), loader=data(shape=(3, 6, 6)), max_epochs=1)
    assert list(callback.layers) == ["model.3.weight", "model.8.weight"]
    with pytest.raises(ConfigurationError, match="leaves no weight to prune"):
        fit(Net(lambda: nn.Sequential(nn.Linear(12, 4))), pdp(targets=None))


@pytest.mark.parametrize("resume", [False, True])
def test_dead_channels_are_taken_out_exactly(resume, tmp_path):
    pytest.importorskip("torch_pruning")
    from effdl.core.structure import rebuild

    make = lambda: pdp(granularity="channel", sparsity=0.5, scope="local", targets=None, freeze=16, compact=True)  # noqa: E731
    rows = {"loader": data(shape=(3, 6, 6)), "val": data(1, (3, 6, 6))}
    path = None
    if resume:
        save = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
        fit(Net(Conv), make(), save, max_epochs=2, **rows)
        path = tmp_path / "last.ckpt"
    fit(module := Net(Conv), callback := make(), ckpt_path=path, **rows)
    if resume:
        fit(whole := Net(Conv), make(), **rows)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), module.parameters()))
    shapes = [tuple(layer.weight.shape) for layer in module.model if isinstance(layer, (nn.Conv2d, nn.Linear))]
    assert shapes == [(8, 3, 3, 3), (8, 8, 3, 3), (8, 8), (4, 8)]
    # the last validation saw the same network with its silent channels still in
    inputs = next(iter(rows["val"]))[0]
    with torch.no_grad():
        assert torch.allclose(module.eval().model(inputs), module.outputs[-1], atol=1e-6)
    report = callback.report()
    again = rebuild(Conv(), report["channels"])
    again.load_state_dict(module.model.state_dict(), strict=True)
    assert report["sparsity"] == 0.5
    assert report["before"]["parameters"] > sum(p.numel() for p in module.parameters())
    assert {"latency_ms"} <= report["before"].keys() & report["after"].keys()


def test_a_network_that_cannot_be_compacted_is_kept_whole():
    pytest.importorskip("torch_pruning")
    make = lambda: nn.Sequential(nn.Linear(12, 32), nn.Sigmoid(), nn.Linear(32, 4))  # noqa: E731, zero becomes a half
    callback = pdp(granularity="channel", targets="model.0", freeze=20, compact=True)
    with pytest.warns(UserWarning, match="keeps its dead channels"):
        fit(module := Net(make), callback)
    assert module.model[0].weight.shape == (32, 12)
    assert callback.report()["sparsity"] == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize(
    ("kwargs", "change", "message"),
    [
        ({"temperature": 1e-12}, None, "as good as hard"),
        ({"temperature": 1e3}, None, "change the network"),
        ({"stop": 100}, None, "before stop"),
        ({"sparsity": 0.001, "scope": "local"}, None, "model.2.weight stays dense"),
        ({"scope": "local", "start": 0}, lambda m: nn.init.constant_(m.model[0].weight, 0.1), "equal magn.*model.0.w"),
        ({}, lambda m: m.model[0].requires_grad_(False), "frozen and cannot heal: model.0.weight"),
    ],
)
def test_warnings(kwargs, change, message):
    module = Net()
    if change:
        change(module)
    with pytest.warns(UserWarning, match=message):
        fit(module, pdp(**kwargs))


def test_a_good_temperature_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(temperature|magnitudes|dense|stop).*")
        fit(Net(), pdp())


def test_what_cannot_be_pruned_is_refused():
    with pytest.raises(ConfigurationError, match=r"divisible by 8: model.0.weight has not"):
        fit(Net(), pdp(granularity="4:8"))
    module = Net()
    module.model[0].weight.data[0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=r"model\.0\.weight has NaN"):
        fit(module, pdp())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_low_and_high_precision_weights(dtype):
    module = Net().to(dtype)
    fit(module, pdp(scope="local"), precision="bf16-true" if dtype == torch.bfloat16 else "64-true")
    assert module.model[0].weight.dtype == dtype
    assert sum(zeros(module).values()) == pytest.approx(0.8 * 512, rel=0.02)


def test_validating_and_saving_leave_no_trace_in_training(tmp_path):
    fit(plain := Net(), pdp())
    save = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1)
    fit(watched := Net(), pdp(), save, val=data(1), val_check_interval=2)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters()))

"""pdp: kinds of networks, dead channels, compiled and low-precision weights, warnings and refusals."""

from __future__ import annotations

import warnings

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from effdl.core.errors import ConfigurationError
from tests.compression.pdp_parts import GRANULARITIES, Net, data, fit, pdp, zeros
from tests.compression.tied_sequence import Sequence


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


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_recurrent_attention_and_tied_weights(granularity):
    sparsity = None if ":" in granularity else 0.75
    callback = pdp(granularity=granularity, sparsity=sparsity, scope="local")
    fit(module := Net(lambda: Sequence(layers=1)), callback, max_epochs=2)
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

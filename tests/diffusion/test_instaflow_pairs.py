"""instaflow: networks and time labels, pair tables."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from effdl.core.errors import ConfigurationError
from effdl.diffusion.instaflow import (
    CONVENTIONS,
    FlowSource,
    PairTable,
    ReflowModule,
    ReflowPairs,
    StackedDenoiser,
    TimeConvention,
    euler,
    guided_velocity,
    merge_delta,
)
from effdl.tasks.tiny import tiny_sd3_transformer, tiny_stable_diffusion, tiny_unet
from tests.diffusion.instaflow_parts import fit, plane

# --- networks and time labels ------------------------------------------------------------------------------------


def test_time_labels():
    t = torch.tensor([0.0, 0.25, 1.0])
    assert CONVENTIONS["instaflow"].label(t).tolist() == [1000.0, 750.0, 0.0]  # the single step calls the net at 1000
    assert CONVENTIONS["rectified_flow"].label(t).tolist() == [0.0, 249.75, 999.0]
    assert CONVENTIONS["plain"].label(t).tolist() == t.tolist()
    assert (CONVENTIONS["diffusers"].sign, CONVENTIONS["instaflow"].sign) == (-1.0, 1.0)


def test_conventions_describe_one_flow():
    """The Gaussian flow written for each convention, seen through it, is the same flow."""
    m, s = 1.5, 0.5
    x0 = torch.linspace(-2, 2, 5)[:, None]
    for convention in CONVENTIONS.values():

        def network(x, label, condition, convention=convention):
            t = label / convention.time_scale
            t = (1 - t if convention.reverse_time else t)[:, None]
            return convention.sign * (m + (s - 1) * (x - t * m) / (1 - t + t * s))

        velocity = guided_velocity(convention.denoiser(network), None, None, 1.0)
        torch.testing.assert_close(euler(velocity, x0, 1), m + s * x0)
        torch.testing.assert_close(euler(velocity, x0, 7), m + s * x0)


def test_stock_networks_and_any_callable():
    t, seen = torch.tensor([0.0, 0.5]), []
    for network, shape, condition in (
        (tiny_unet(8, 1, num_classes=3), (1, 8, 8), torch.tensor([0, 2])),
        (tiny_unet(8, 1), (1, 8, 8), None),
        (tiny_stable_diffusion(16).unet, (4, 4, 4), torch.randn(2, 16, 32)),
        (tiny_sd3_transformer(), (4, 8, 8), {"encoder_hidden_states": torch.randn(2, 16, 32),
                                             "pooled_projections": torch.randn(2, 32)}),
        (lambda x, label, c: seen.append(label) or x, (3,), None),
    ):  # fmt: skip
        source = FlowSource(network)
        x = torch.randn(2, *shape)
        assert source.convention.denoiser(network)(x, t, condition).shape == x.shape
        assert source.shape in (shape, None)
    assert seen[0].tolist() == [0.0, 0.5]
    half = tiny_stable_diffusion(16).unet.bfloat16()
    out = CONVENTIONS["instaflow"].denoiser(half)(torch.randn(2, 4, 4, 4), t, torch.randn(2, 16, 32))
    assert out.dtype == torch.float32
    with pytest.raises(ConfigurationError, match="model"):
        TimeConvention().denoiser(lambda x, t, c: x[:, :1])(torch.zeros(2, 2), t, None)


def test_stacked_denoiser_feeds_the_output_on():
    net = plane()
    stacked = StackedDenoiser(net)
    x, t, c = torch.randn(4, 2), torch.rand(4), torch.tensor([0, 1, 2, 0])
    assert torch.equal(stacked(x, t, c), net(net(x, t, c), t, c))
    stacked.networks[0].net[0].weight.data.zero_()
    assert not torch.equal(stacked.networks[1].net[0].weight, torch.zeros(16, 6))
    with pytest.raises(ConfigurationError, match="copies"):
        StackedDenoiser(net, 1)
    fit(ReflowModule(StackedDenoiser(net)), max_epochs=1)


def test_delta_merge():
    base, custom, one_step = (plane(i).state_dict() for i in range(3))
    merged = merge_delta(one_step, custom, base)
    for name in base:
        torch.testing.assert_close(merged[name], one_step[name] + custom[name] - base[name])
    assert all(torch.equal(merge_delta(one_step, base, base)[n], one_step[n]) for n in base)
    with pytest.raises(ConfigurationError, match="custom"):
        merge_delta(one_step, {"other": torch.zeros(1)}, base)
    with pytest.raises(ConfigurationError, match="shape"):
        merge_delta(one_step, custom | {"net.2.bias": torch.zeros(3)}, base)


# --- pair table --------------------------------------------------------------------------------------------------


def solve(x0, condition):
    return 2 * x0 + condition[:, None]


def test_table_restarts_where_it_stopped_and_comes_out_the_same(tmp_path):
    labels = np.arange(50) % 3

    def arrays(folder):
        table = PairTable(folder)
        assert table.finished
        return [np.array(getattr(table, name)) for name in ("x0", "x1", "condition")]

    PairTable.create(tmp_path / "whole", labels, (2,), block=8).fill(solve)
    calls = []

    def dying(x0, condition):
        calls.append(len(x0))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return solve(x0, condition)

    with pytest.raises(KeyboardInterrupt):
        PairTable.create(tmp_path / "stopped", labels, (2,), block=8).fill(dying)
    assert PairTable(tmp_path / "stopped").done.sum() == 2
    PairTable.create(tmp_path / "stopped", labels, (2,), block=8).fill(dying)
    assert calls[3:] == [8, 8, 8, 8, 2]
    for rank in (1, 0):  # two processes, in any order
        PairTable.create(tmp_path / "shared", labels, (2,), block=8).fill(solve, rank, world=2)
    for other in ("stopped", "shared"):
        assert all(np.array_equal(a, b) for a, b in zip(arrays(tmp_path / "whole"), arrays(tmp_path / other)))
    batch = PairTable(tmp_path / "whole")[[7, 3]]
    assert (batch["x0"].dtype, batch["x1"].dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(batch["x1"], solve(batch["x0"], batch["condition"]), atol=5e-3, rtol=0)
    assert len({tuple(row) for row in arrays(tmp_path / "whole")[0].tolist()}) == 50


def test_table_refuses_other_settings_and_damage(tmp_path):
    make = lambda guidance, seed=0: PairTable.create(  # noqa: E731
        tmp_path, [0, 1], (2,), {"guidance": guidance}, seed=seed, dtype="float32"
    )
    make(1.5).fill(solve)
    with pytest.raises(ConfigurationError, match=r"guidance=1\.0 .*1\.5"):
        make(1.0)
    with pytest.raises(ConfigurationError, match="seed=1"):
        make(1.5, 1)
    np.save(tmp_path / "x1.npy", np.zeros((3, 2)))
    with pytest.raises(ConfigurationError, match="equal length"):
        PairTable(tmp_path)
    with pytest.raises(ConfigurationError, match="path"):
        PairTable(tmp_path / "nothing")


def test_table_refuses_a_teacher_of_another_shape_and_overflow(tmp_path):
    with pytest.raises(ConfigurationError, match="teacher"):
        PairTable.create(tmp_path / "a", [0], (2,)).fill(lambda x0, c: x0[:, :1])
    with pytest.raises(ConfigurationError, match="dtype"):
        PairTable.create(tmp_path / "b", [0], (2,)).fill(lambda x0, c: 1e6 + x0)


def test_pairs_follow_the_teacher(tmp_path):
    teacher = plane()
    data = ReflowPairs(tmp_path, teacher, conditions=3, count=40, steps=5, shape=[2], batch_size=8, dtype="float32")
    data.setup()
    batch = next(iter(data.train_dataloader()))
    expected = euler(lambda x, t: teacher(x, t, batch["condition"]), batch["x0"], 5)
    torch.testing.assert_close(batch["x1"], expected)
    assert batch["condition"].tolist() == (batch["index"] % 3).tolist()
    assert len(data.val_dataloader().dataset) == 2
    again = ReflowPairs(tmp_path)  # without a teacher: read
    again.setup()
    assert len(again.table) == 40
    assert again.guidance == 1.0
    with torch.no_grad():
        teacher.net[2].bias += 1
    with pytest.raises(ConfigurationError, match="teacher"):
        ReflowPairs(tmp_path, teacher, conditions=3, count=40, steps=5, shape=[2], dtype="float32").setup()


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("count", {"count": 0}), ("steps", {"steps": 0}), ("guidance", {"guidance": -1.0}), ("block", {"block": 0}),
        ("dtype", {"dtype": "bfloat16"}), ("batch_size", {"batch_size": 0}), ("val", {"val": 1.0}),
        ("seed", {"seed": -1}), ("conditions", {"conditions": []}), ("conditions", {"conditions": "no-such.txt"}),
        ("conditions", {"conditions": 0}), ("teacher", {"teacher": None}),
    ],
)  # fmt: skip
def test_bad_arguments_of_pairs_are_named(tmp_path, name, kwargs):
    with pytest.raises(ConfigurationError, match=name):
        ReflowPairs(tmp_path, **{"teacher": plane(), **kwargs})


def test_pairs_want_to_know_the_shape(tmp_path):
    with pytest.raises(ConfigurationError, match="shape"):
        ReflowPairs(tmp_path, plane()).setup()

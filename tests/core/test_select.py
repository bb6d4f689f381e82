"""Layer selection: globs, types, defaults, errors that name what is near."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from effdl.core.errors import ConfigurationError
from effdl.core.select import check_targets, select_modules, select_weights


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.layer1 = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Sequential(nn.Linear(8, 8)))
        self.layer10 = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.cross = nn.MultiheadAttention(8, 2, kdim=4, vdim=4)
        self.lstm = nn.LSTM(8, 4, bidirectional=True, proj_size=2)
        self.cell = nn.GRUCell(8, 4)
        self.hf = Conv1D(6, 8)
        self.embedding = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 5)
        self.head.weight = self.embedding.weight


def names(**kwargs):
    return list(select_modules(nn.ModuleDict({"model": Net()}), default=(nn.Conv2d, nn.Linear), **kwargs))


def test_default_types():
    found = names()
    assert found[:4] == ["model.stem", "model.layer1.0", "model.layer1.2.0", "model.layer10"]
    assert "model.layer1.1" not in found


@pytest.mark.parametrize("pattern", ["model.layer1.*", "layer1.*", "layer1", "model.layer1"])
def test_globs_match_below_any_prefix_and_containers_bring_their_layers(pattern):
    assert names(targets=pattern) == ["model.layer1.0", "model.layer1.2.0"]  # not layer10, not the BatchNorm


def test_types_by_class_and_by_name_and_exclude():
    assert names(targets=nn.Conv2d) == ["model.stem", "model.layer1.0"]
    assert names(targets="Conv2d", exclude="stem") == ["model.layer1.0"]
    assert names(targets=["stem", "head"]) == ["model.stem", "model.head"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"targets": "layer2"}, "targets='layer2' matches no layer.*layer1"),
        ({"exclude": "haed"}, "exclude='haed' matches no layer.*head"),
        ({"targets": nn.Conv3d}, "targets=Conv3d matches no layer"),
        ({"targets": "stem", "exclude": "stem"}, "leave no layer"),
    ],
)
def test_what_matches_nothing_is_an_error_with_close_names(kwargs, message):
    with pytest.raises(ConfigurationError, match=message):
        names(**kwargs)


def test_weights_of_every_kind_of_layer_and_tied_ones_once():
    found = {w.name for w in select_weights(Net())}
    assert {"attention.in_proj_weight", "attention.out_proj.weight", "cross.q_proj_weight"} <= found
    assert {"lstm.weight_ih_l0", "lstm.weight_hh_l0_reverse", "lstm.weight_hr_l0", "cell.weight_hh"} <= found
    assert "hf.weight" in found
    assert "embedding.weight" in found
    assert "head.weight" not in found  # tied: masked once
    assert not any("bias" in n or "layer1.1" in n for n in found)
    assert {w.name for w in select_weights(Net(), min_numel=100)} < found


def test_a_tied_weight_excluded_under_one_name_is_excluded():
    for name in ("embedding", "head"):
        assert not {w.name for w in select_weights(Net(), exclude=name)} & {"embedding.weight", "head.weight"}


def test_a_compiled_networks_layers_go_by_their_own_names():
    model = nn.ModuleDict({"net": torch.compile(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))})
    for pattern in ("net.1", "1", "net._orig_mod.1", "n*.1"):
        assert list(select_modules(model, pattern)) == ["net._orig_mod.1"]
    assert [w.name for w in select_weights(model, "net")] == ["net._orig_mod.0.weight", "net._orig_mod.1.weight"]
    with pytest.raises(ConfigurationError, match=r"Did you mean 'net'\?"):
        select_modules(model, "nets")


def test_transposed_weights():
    weights = {w.name: w for w in select_weights(nn.ModuleDict({"a": Conv1D(6, 8), "b": nn.Linear(8, 6),
                                                               "c": nn.ConvTranspose2d(4, 2, 3)}))}  # fmt: skip
    assert [weights[n].transposed for n in ("a.weight", "b.weight", "c.weight")] == [True, False, True]


def test_sharded_or_meta_weights_are_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ConfigurationError, match=r"0\.weight is not a full tensor"):
        select_weights(model)


@pytest.mark.parametrize("bad", [3, [3], "", [""], int, {"a": 1}])
def test_check_targets(bad):
    with pytest.raises(ConfigurationError, match="targets="):
        check_targets("targets", bad)
    check_targets("targets", [None][0])
    check_targets("targets", ["a.*", nn.Linear])

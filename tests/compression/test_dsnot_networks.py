"""dsnot on whole networks: checks 8 and 9, what is refused, dead inputs, layers without tokens, targets."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from effdl.compression.dsnot import Settings, refine, selected, sparsify
from effdl.core.errors import ConfigurationError
from effdl.tasks.tiny import tiny_gpt2, tiny_llama
from tests.compression.dsnot_parts import tokens


@pytest.mark.parametrize("init", ["wanda", "magnitude", "sparsegpt"])
@pytest.mark.parametrize("refined", [True, False])
def test_must_08_twice_is_once_and_zero_is_nothing(init, refined):
    model = tiny_llama(64, 32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sparsify(model, tokens(), Settings(0.0, init=init, refine=refined))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    first = sparsify(model, tokens(), Settings(0.5, init=init, refine=refined))
    once = {k: v.clone() for k, v in model.state_dict().items()}
    second = sparsify(model, tokens(), Settings(0.5, init=init, refine=refined))
    assert all(torch.equal(first.masks[n], second.masks[n]) for n in first.masks)
    assert all(torch.allclose(v, once[k], atol=1e-6) for k, v in model.state_dict().items())
    assert sum(row["swaps"] for row in second.layers.values()) == 0


def test_must_09_conv1d_is_pruned_along_its_inputs():
    model = tiny_gpt2(64, 32)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    done = sparsify(model, tokens(), Settings(0.5))
    assert len(done.masks) == 8  # two blocks: c_attn, c_proj, c_fc, c_proj
    for name, keep in done.masks.items():
        weight = model.get_parameter(name)  # (in, out)
        assert weight.shape == keep.shape
        assert weight.eq(0).sum(0).eq(weight.shape[0] // 2).all(), name
        assert torch.equal(weight, before[name] * keep)
    sparsify(model := tiny_gpt2(64, 32), tokens(), Settings(nm=(2, 4)))
    weight = model.get_parameter("transformer.h.0.attn.c_attn.weight")
    assert weight.eq(0).view(16, 4, -1).sum(1).eq(2).all()
    assert not model.transformer.wte.weight.eq(0).any()  # the embedding, tied to the head


def test_settings_refuse_what_cannot_be():
    for kwargs, name in (
        ({"sparsity": 1.0}, "sparsity"), ({}, "sparsity"), ({"nm": (4, 2)}, "nm"), ({"nm": "2:4"}, "nm"),
        ({"nm": (2, 4), "sparsity": 0.6}, "sparsity"), ({"sparsity": 0.5, "preset": "paper"}, "preset"),
    ):  # fmt: skip
        with pytest.raises(ConfigurationError, match=f"{name}="):
            Settings(**kwargs)
    model = tiny_llama(64, 32, intermediate_size=54)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ConfigurationError, match=r"nm=\(2, 4\): model.layers.0.mlp.down_proj.weight has 54"):
        sparsify(model, tokens(), Settings(nm=(2, 4)))
    with pytest.raises(ConfigurationError, match="no Linear"):
        sparsify(nn.Sequential(nn.Conv2d(1, 1, 1)), tokens(), Settings(0.5))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    release = Settings(0.5, preset="release")
    assert release.refines("model.layers.0.self_attn.q_proj.weight")
    assert not release.refines("model.layers.0.mlp.up_proj.weight")


def test_dead_inputs_are_never_grown_and_half_precision_is_measured_in_fp32():
    w, scores = torch.ones(1, 4), torch.tensor([[1.0, 2, 3, 4]])
    keep = torch.tensor([[False, False, True, True]])
    expected, variance = torch.tensor([5.0, 1.0, -1.0, -1.0]), torch.tensor([0.0, 1.0, 1.0, 1.0])
    found = refine(w, keep, expected, variance, scores, cycles=1, same_sign=False)
    assert found.keep.tolist() == [[False, True, False, True]]
    model = tiny_llama(64, 32).to(torch.float16)
    model.model.embed_tokens.weight.data *= 300  # squares of 300 sum beyond fp16
    done = sparsify(model, tokens(), Settings(0.5))
    assert all(math.isfinite(v) for row in done.layers.values() for v in row.values())
    assert all(row["sparsity"] == 0.5 for row in done.layers.values())


def test_the_expectation_per_token_is_the_same_where_lengths_are():
    by_sum, by_mean = (sparsify(tiny_llama(64, 32), tokens(), Settings(0.5, expectation=e)) for e in ("sum", "mean"))
    same = [torch.equal(by_sum.masks[n], by_mean.masks[n]) for n in by_sum.masks]
    assert sum(same) >= len(same) - 1  # rounding may move a row at the threshold


def test_layers_without_tokens_stay_dense_and_are_named():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    with pytest.warns(UserWarning, match="layers.0.self_attn.out_proj.weight saw no calibration token"):
        done = sparsify(encoder, [torch.randn(2, 5, 8)], Settings(0.5))
    assert sorted(done.masks) == [f"layers.{i}.linear{j}.weight" for i in (0, 1) for j in (1, 2)]
    assert not encoder.layers[0].self_attn.out_proj.weight.eq(0).any()


def test_targets_and_exclude_choose_inside_the_blocks():
    model = tiny_llama(64, 32)
    assert len(selected(model)) == 14
    assert [w.name for w in selected(model, "layers.1.mlp", "up_proj")] == [
        "model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.down_proj.weight",
    ]  # fmt: skip
    with pytest.raises(ConfigurationError, match="targets='lm_head'"):
        selected(model, "lm_head")

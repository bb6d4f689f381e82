"""core.adapters: nothing changes at first, little trains, and every way out is the stock architecture."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from effdl.core.adapters import add_lora, fold_lora, load_lora, lora_layers, merged, save_lora, unfold_lora
from effdl.core.errors import ConfigurationError
from effdl.tasks.tiny import tiny_stable_diffusion, tiny_unet

INPUTS = (torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 700]))


def adapted(model: nn.Module, **kwargs) -> nn.Module:
    """An adapter that does something."""
    add_lora(model, **kwargs)
    torch.manual_seed(1)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    return model


def test_starts_as_the_identity_and_trains_the_factors_alone():
    unet, before = tiny_unet(8, 1), torch.get_rng_state()
    plain = unet(*INPUTS).sample
    names = add_lora(unet, rank=4)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(unet(*INPUTS).sample, plain)
    assert {name.rpartition("attentions.0.")[2] for name in names} >= {"to_q", "to_k", "to_v", "to_out.0"}
    sizes = sum(4 * (layer.in_features + layer.out_features) for layer in lora_layers(unet).values())
    assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == sizes


@pytest.mark.parametrize("targets", [None, ["conv_in", "*.to_q"], "Conv2d"])
def test_merged_folded_and_saved_agree(targets, tmp_path):
    stock = tiny_unet(8, 1)
    unet = adapted(copy.deepcopy(stock), rank=3, targets=targets, alpha=6.0)
    want = unet(*INPUTS).sample
    assert (want - stock(*INPUTS).sample).abs().max() > 1e-3
    assert torch.allclose(merged(unet)(*INPUTS).sample, want, atol=1e-5)
    state = dict(unet.state_dict())
    kept = fold_lora(unet, state)
    folded = copy.deepcopy(stock)
    folded.load_state_dict(state, strict=True)
    assert torch.allclose(folded(*INPUTS).sample, want, atol=1e-5)
    unfold_lora(unet, state, kept)
    assert state.keys() == unet.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in unet.state_dict().items())
    save_lora({"unet": unet}, tmp_path)
    load_lora(stock, tmp_path)
    assert torch.equal(stock(*INPUTS).sample, want)


def test_diffusers_opens_the_file(tmp_path):
    pipeline = tiny_stable_diffusion()
    unet = adapted(copy.deepcopy(pipeline.unet), rank=2, alpha=1.0)
    save_lora({"unet": unet}, tmp_path)
    inputs = (torch.randn(2, 4, 8, 8), INPUTS[1], torch.randn(2, 16, 32))
    pipeline.load_lora_weights(tmp_path)
    assert torch.equal(pipeline.unet(*inputs).sample, unet(*inputs).sample)
    pipeline.fuse_lora()
    assert torch.allclose(pipeline.unet(*inputs).sample, unet(*inputs).sample, atol=1e-5)


def test_a_stock_checkpoint_loads_beneath_the_adapter():
    unet, other = adapted(tiny_unet(8, 1)), tiny_unet(8, 1, seed=5)
    state = dict(other.state_dict())
    unfold_lora(unet, state, {})
    unet.load_state_dict(state, strict=True)
    layer = lora_layers(unet)["mid_block.attentions.0.to_q"]
    assert torch.equal(layer.base_layer.weight, other.mid_block.attentions[0].to_q.weight)
    assert layer.lora_B["default"].weight.abs().max() > 0


def test_half_precision_weights_get_fp32_factors():
    model = nn.Sequential(nn.Linear(4, 4)).half()
    add_lora(model, rank=2, targets="Linear")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert merged(model)[0].weight.dtype == torch.float16


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [({"rank": 0}, "rank"), ({"alpha": 0.0}, "alpha"), ({"targets": "nowhere"}, "targets"), ({}, "adapter already")],
)
def test_refusals_leave_the_model_alone(kwargs, named):
    unet = tiny_unet(8, 1)
    if not kwargs:
        add_lora(unet)
    before = unet.state_dict().keys()
    with pytest.raises(ConfigurationError, match=named):
        add_lora(unet, **kwargs)
    assert unet.state_dict().keys() == before


def test_refuses_what_has_no_adapter(tmp_path):
    with pytest.raises(ConfigurationError, match="adapter"):
        save_lora({"unet": tiny_unet(8, 1)}, tmp_path)
    with pytest.raises(ConfigurationError, match="folder"):
        load_lora(tiny_unet(8, 1), tmp_path)
    grouped = nn.Sequential(nn.Conv2d(4, 4, 1, groups=2))
    with pytest.raises(ConfigurationError, match="groups"):
        add_lora(grouped, targets="Conv2d")

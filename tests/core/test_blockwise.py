"""core.blocks, core.blockwise and core.input_statistics: which blocks, what they are fed, what is measured."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effdl.core.blocks import find_blocks
from effdl.core.blockwise import run_blocks
from effdl.core.errors import ConfigurationError
from effdl.core.input_statistics import InputStatistics, input_statistics
from effdl.tasks.tiny import tiny_gpt2, tiny_llama


def batches(count=3, length=10, padded=False):
    g = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        ids = torch.randint(1, 60, (2, length), generator=g)
        mask = torch.ones_like(ids)
        if padded:
            mask[0, length - 1 - i :] = 0
        made.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
    return made


def gemma():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, sliding_window=4, max_position_embeddings=32,
    ))  # fmt: skip


def neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    ))  # fmt: skip


def opt():
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=32,
        max_position_embeddings=32,
    ))  # fmt: skip


def vit():
    import timm

    return timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, num_heads=2, depth=3, num_classes=5)


MODELS = {
    "llama": (lambda: tiny_llama(64, 32), "model.layers", 2, "model.norm"),
    "gpt2": (lambda: tiny_gpt2(64, 32), "transformer.h", 2, "transformer.ln_f"),
    "gemma2 (two kinds of masks)": (gemma, "model.layers", 3, "model.norm"),
    "gpt-neox": (neox, "gpt_neox.layers", 2, "gpt_neox.final_layer_norm"),
    "opt": (opt, "model.decoder.layers", 2, "model.decoder.final_layer_norm"),
    "timm vit": (vit, "blocks", 3, "norm"),
}


@pytest.mark.parametrize("name", MODELS)
def test_block_by_block_is_the_whole_forward(name):
    make, where, count, norm = MODELS[name]
    torch.manual_seed(0)
    model = make().train()
    data = [torch.randn(2, 3, 32, 32)] if name == "timm vit" else batches(padded=True)
    seen, want = {}, []

    def treat(block):
        with torch.no_grad():  # the treatment: the next block must be fed by it
            for p in block.module.parameters():
                p.mul_(0.9)
        seen[block.name] = [o.clone() for o in block.run()]
        if block.index == 0:
            assert all(torch.equal(a, b) for a, b in zip(block.inputs, block.dense_inputs))
        else:
            assert not torch.allclose(block.inputs[0], block.dense_inputs[0])
        assert len(block.dense_outputs) == len(data)

    run_blocks(model, data, treat, dense=True)
    assert list(seen) == [f"{where}.{i}" for i in range(count)]
    assert model.training
    assert getattr(getattr(model, "config", None), "use_cache", True) is not False
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    handle = model.get_submodule(norm).register_forward_pre_hook(lambda m, args: want.append(args[0].detach()))
    model.eval()
    for batch in data:
        model(batch) if name == "timm vit" else model(**batch)
    handle.remove()
    for a, b in zip(seen[f"{where}.{count - 1}"], want):
        assert torch.allclose(a, b, atol=1e-5)


def test_an_error_leaves_no_hook_flag_or_configuration():
    model = tiny_llama(64, 32).train()

    def fails(block):
        input_statistics(block, {"x": block.module.mlp.up_proj})
        raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        run_blocks(model, batches(), fails)
    assert model.training
    assert model.config.use_cache
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_what_cannot_run_block_by_block_is_refused():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3))

        def forward(self, x):
            for block in self.blocks:
                x = x + block(x)
            return x

    data = [torch.ones(2, 3, 4)]
    with pytest.raises(ConfigurationError, match="'blocks.1' is not called once, in order"):
        run_blocks(Skips(), data, lambda block: None)
    for name in ("no.such.list", "blocks.0.0"):
        with pytest.raises(ConfigurationError, match="blocks="):
            run_blocks(Skips(), data, lambda block: None, blocks=name)
    with pytest.raises(ConfigurationError, match="calibration_batches"):
        run_blocks(tiny_llama(64, 32), [], lambda block: None)
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    assert find_blocks(plain) == {"": plain}  # nothing repeats: one block


def test_padding_is_left_out_and_batching_does_not_matter():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, 5, generator=g) * 3 + 1
    one, four, padded, flat = (InputStatistics(5, second_moment=True, rows=7) for _ in range(4))
    four.update(x)
    for row in x:
        one.update(row[None])
    wide = torch.cat([x, torch.full((4, 2, 5), torch.nan)], 1)
    tokens = torch.ones(4, 8, dtype=torch.bool)
    tokens[:, 6:] = False
    padded.update(wide, tokens)
    flat.update(wide.view(32, 5), tokens)
    for other in (one, padded, flat):
        assert (other.sequences, other.tokens) == (4, 24)
        for key in ("square_sum", "sum", "mean", "variance", "hessian", "sample"):
            assert torch.allclose(getattr(other, key), getattr(four, key), rtol=1e-5), key
    assert torch.allclose(four.square_sum, x.square().sum(1).mean(0))
    assert torch.allclose(four.sum, x.sum(1).mean(0), rtol=1e-5)
    assert torch.allclose(four.variance, x.var(1, unbiased=False).mean(0), rtol=1e-5)
    assert torch.allclose(four.hessian, 2 * x.flatten(0, 1).T @ x.flatten(0, 1) / 4, rtol=1e-5)
    assert torch.equal(four.sample, x.flatten(0, 1)[:7])


def test_a_nan_names_layer_and_sequence():
    statistics = InputStatistics(2, name="model.layers.3.mlp")
    statistics.update(torch.ones(2, 3, 2))
    bad = torch.ones(2, 3, 2)
    bad[1, 2, 0] = torch.inf
    with pytest.raises(RuntimeError, match=r"model.layers.3.mlp .*sequence 3"):
        statistics.update(bad)


def test_what_a_block_does_not_call_has_no_tokens():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    seen = {}

    def treat(block):
        linears = {n: m for n, m in block.module.named_modules() if isinstance(m, nn.Linear)}
        seen[block.name] = {n: s.tokens for n, s in input_statistics(block, linears).items()}

    run_blocks(encoder, [torch.randn(2, 3, 8)], treat)
    assert all(counts == {"self_attn.out_proj": 0, "linear1": 6, "linear2": 6} for counts in seen.values()), seen

"""rectified-flow-transformer: normalised queries and keys, as a function and on a Trainer."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader

from effdl.callbacks import QKNormCallback
from effdl.core.errors import ConfigurationError
from effdl.core.random import generator
from effdl.diffusion.rectified_flow_transformer import RectifiedFlowModule, add_qk_norm
from effdl.tasks.diffusion import DiffusionModule
from effdl.tasks.tiny import tiny_condition_unet, tiny_sd3_transformer, tiny_unet
from tests.support import BARE


def inputs() -> dict[str, torch.Tensor]:
    g = generator(1)
    shapes = {"hidden_states": (2, 4, 8, 8), "encoder_hidden_states": (2, 5, 32), "pooled_projections": (2, 32)}
    made = {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}
    return {**made, "timestep": torch.tensor([10.0, 700.0])}


def run(model: SD3Transformer2DModel, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        given = {name: value.to(dtype) for name, value in inputs().items()}
        return model(**given, return_dict=False)[0]


def scale_queries(model: SD3Transformer2DModel, factor: float) -> SD3Transformer2DModel:
    with torch.no_grad():
        for layer in model.transformer_blocks:
            layer.attn.to_q.weight *= factor
            layer.attn.to_q.bias *= factor
    return model


def test_must_06_logits_cannot_grow():
    plain, normed = tiny_sd3_transformer(), tiny_sd3_transformer()
    add_qk_norm(normed)
    before = run(plain), run(normed)
    assert (run(scale_queries(plain, 50)) - before[0]).abs().max() > 1e-3
    torch.testing.assert_close(run(scale_queries(normed, 50)), before[1], rtol=0, atol=1e-4)
    seen: dict[str, torch.Tensor] = {}
    attention = normed.transformer_blocks[0].attn
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        with torch.no_grad():
            getattr(attention, name).weight.uniform_(-2, 2, generator=generator(7))
        getattr(attention, name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
    scale_queries(normed, 1e3)
    run(normed)
    d = attention.to_q.out_features // attention.heads
    gains = {name: getattr(attention, name).weight.abs().max().item() for name in seen}
    queries, keys = (torch.cat([seen[f"norm_{x}"], seen[f"norm_added_{x}"]], 2) for x in "qk")
    logits = (queries @ keys.transpose(-1, -2) / math.sqrt(d)).abs().max().item()
    bound = math.sqrt(d) * max(gains["norm_q"], gains["norm_added_q"]) * max(gains["norm_k"], gains["norm_added_k"])
    assert logits <= bound * (1 + 1e-5)
    half = scale_queries(tiny_sd3_transformer(), 1e4)
    add_qk_norm(half)
    assert torch.isfinite(run(half.bfloat16(), torch.bfloat16)).all()


def test_qk_norm_is_the_stock_network(tmp_path):
    model = tiny_sd3_transformer().requires_grad_(False)
    stock = tiny_sd3_transformer(qk_norm="rms_norm")
    report = add_qk_norm(model)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert model.config.qk_norm == "rms_norm"
    assert not any(p.requires_grad for p in model.parameters())
    # the last block has no text output, and norms its text queries all the same
    assert report.delta == sum(p.numel() for n, p in stock.named_parameters() if ".norm_" in n and ".attn." in n)
    assert add_qk_norm(model).replaced == ()  # again: nothing to do
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(run(SD3Transformer2DModel.from_pretrained(tmp_path)), run(model), rtol=0, atol=1e-6)


def test_qk_norm_elsewhere():
    unet = tiny_unet(8, 1)
    add_qk_norm(unet)
    twice = tiny_unet(8, 1)
    add_qk_norm(twice)
    twice.load_state_dict(unet.state_dict(), strict=True)
    assert sum(name.endswith("norm_q.weight") for name in unet.state_dict()) >= 2
    from timm.models import VisionTransformer

    vit = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    assert add_qk_norm(vit, targets="blocks.0.*").delta == 2 * 8
    assert vit(torch.randn(2, 3, 8, 8)).shape == (2, 3)
    partly = tiny_sd3_transformer()
    add_qk_norm(partly, targets="transformer_blocks.0.*")
    assert partly.config.qk_norm is None
    with pytest.raises(ConfigurationError, match="targets"):
        add_qk_norm(torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2)), targets="0")
    deaf = tiny_condition_unet()
    deaf.set_attn_processor(AttnProcessor())
    before = list(deaf.state_dict())
    with pytest.raises(ConfigurationError, match="AttnProcessor"):
        add_qk_norm(deaf)
    assert list(deaf.state_dict()) == before


def test_unet_with_qk_norm_is_rebuilt_by_the_function(tmp_path):
    from safetensors.torch import load_file

    from effdl.core.export import save_model

    module = RectifiedFlowModule(tiny_unet(8, 1), qk_norm=True)
    assert save_model(module, tmp_path) == "safetensors"  # no stock configuration says so
    again = tiny_unet(8, 1)
    add_qk_norm(again)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)


# --- the callback ------------------------------------------------------------------------------------------------


def test_callback_normalises_a_module_that_knows_nothing(tmp_path):
    module = DiffusionModule(tiny_unet(8, 1))
    callback, before = QKNormCallback(), sum(p.numel() for p in module.parameters())
    loader = DataLoader([{"image": torch.randn(4, 1, 8, 8)}] * 2, batch_size=None)
    trainer = Trainer(max_epochs=1, callbacks=[callback], precision="bf16-mixed", **BARE)
    trainer.fit(module, loader)
    gains = [p for name, p in module.named_parameters() if ".norm_q." in name or ".norm_k." in name]
    assert len(gains) == 2 * len(callback.matched(module)) > 0
    assert callback.report()["parameter_delta"] == sum(p.numel() for p in module.parameters()) - before
    assert all((p != 1).any() for p in gains)  # the optimizer has them
    bound = trainer.callback_metrics["rectified-flow-transformer/logit_bound"]
    assert bound == pytest.approx(8**0.5, rel=0.1)  # heads of 8, gains near 1
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = DiffusionModule(tiny_unet(8, 1))
    add_qk_norm(again)
    again.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"], strict=True)
    with pytest.raises(ConfigurationError, match="fit"):
        QKNormCallback().report()
    with pytest.raises(ConfigurationError, match="before"):
        Trainer(max_epochs=1, callbacks=[EMAWeightAveraging(), QKNormCallback()], **BARE).fit(module, loader)

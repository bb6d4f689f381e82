"""powernorm: whole models, converted and folded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from effdl.architectures.powernorm import PowerNorm
from effdl.architectures.powernorm_models import FoldedNorm, attention_heads, fold_power_norm, powernorm_model
from effdl.core.errors import ConfigurationError
from tests.architectures.powernorm_parts import images, settle, tokens, trained


def tiny_vit() -> nn.Module:
    import timm

    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 4, "num_classes": 3}
    return timm.models.VisionTransformer(**options)


def test_timm_vit_is_converted_and_folded():
    model = powernorm_model(tiny_vit(), warmup_iters=2)
    norms = [m for m in model.modules() if isinstance(m, PowerNorm)]
    assert not any(isinstance(m, nn.LayerNorm) for m in model.modules())
    assert len(norms) == 5
    assert all(norm.group_num == 4 for norm in norms)
    x = images()
    folded = fold_power_norm(settle(model, x), x)
    torch.testing.assert_close(folded(x), model(x), atol=1e-5, rtol=0)
    assert not list(folded.blocks[0].norm1.parameters())  # folded into qkv
    assert not any(isinstance(m, PowerNorm) for m in folded.modules())
    torch.export.export(folded, (x,))


def test_huggingface_encoders_are_converted_and_folded():
    from transformers import BertConfig, BertModel, ViTConfig, ViTModel

    shared = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}
    bert = BertModel(BertConfig(vocab_size=11, **shared)).eval()
    vit = ViTModel(ViTConfig(image_size=16, patch_size=8, **shared)).eval()
    ids = torch.randint(11, (2, 6), generator=torch.Generator().manual_seed(0))
    for model, x in ((bert, ids), (vit, images())):
        settle(powernorm_model(model, warmup_iters=2), x)
        assert all(m.group_num == 4 for m in model.modules() if isinstance(m, PowerNorm))
        folded = fold_power_norm(model, x)
        torch.testing.assert_close(folded(x).last_hidden_state, model(x).last_hidden_state, atol=1e-5, rtol=0)
    remainders = [m for m in folded.modules() if isinstance(m, FoldedNorm)]
    assert [m.weight is None for m in remainders] == [True, True, False]  # before q, k, v; before the MLP; the last


def test_language_models_are_converted_and_folded():
    from effdl.tasks.tiny import tiny_gpt2, tiny_llama

    ids = torch.randint(256, (2, 6), generator=torch.Generator().manual_seed(0))
    for model in (tiny_gpt2(), tiny_llama()):
        powernorm_model(model, warmup_iters=2).train()
        for _ in range(4):
            model(input_ids=ids, labels=ids).loss.backward()
        folded = fold_power_norm(model.eval(), ids)
        torch.testing.assert_close(folded(ids).logits, model(ids).logits, atol=1e-4, rtol=0)
        remainders = [m for m in folded.modules() if isinstance(m, FoldedNorm)]
        assert [m.weight is None for m in remainders] == [True] * 4 + [False]  # the last is sliced before the head


@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_encoder_leaves_its_fast_path(norm_first):
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    model = powernorm_model(nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first), warmup_iters=2)
    x = tokens(2, 6, 16, dtype=torch.float32)
    settle(model, x)
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(model(x), fast)
    folded = fold_power_norm(model, x)
    torch.testing.assert_close(folded(x), fast, atol=1e-5, rtol=0)


def test_selection_heads_and_affine():
    model = tiny_vit()
    with torch.no_grad():
        model.norm.weight.fill_(2.0)
    model.norm.weight.requires_grad_(False)
    powernorm_model(model, targets="norm", group_num=None)
    assert isinstance(model.norm, PowerNorm)
    assert isinstance(model.blocks[0].norm1, nn.LayerNorm)
    assert model.norm.weight[0] == 2
    assert not model.norm.weight.requires_grad
    assert attention_heads(model, "blocks.1.norm1", 16) == 4
    with pytest.raises(ConfigurationError, match="group_num"):
        powernorm_model(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)))
    plain = powernorm_model(nn.Sequential(nn.LayerNorm(8, elementwise_affine=False), nn.RMSNorm(8)), group_num=2)
    assert plain[0].weight is None
    assert torch.equal(plain[1].weight, torch.ones(8))
    image_norm = nn.Sequential(nn.LayerNorm((3, 8, 8)))
    with pytest.raises(ConfigurationError, match="targets"):
        powernorm_model(image_norm, group_num=1)
    assert isinstance(image_norm[0], nn.LayerNorm)


def test_fold_leaves_a_weight_that_others_read_alone():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.norm = nn.Embedding(11, 8), trained().float()
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.norm(self.embedding(ids)))

    model, ids = Tied().eval(), torch.arange(6).view(2, 3)
    folded = fold_power_norm(model, ids)
    torch.testing.assert_close(folded(ids), model(ids), atol=1e-5, rtol=0)
    assert folded.norm.weight is not None

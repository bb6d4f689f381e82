"""smooth-gradcampp: volumes, sequences, stock CNNs and transformers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effdl.attribution.smooth_gradcampp import SmoothGradCAMpp, channels_last_to_map, tokens_to_map
from effdl.core.errors import ConfigurationError
from tests.attribution.smooth_gradcampp_parts import images


def test_volumes_sequences_and_target_fn():
    net = nn.Sequential(
        nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3)
    )
    (maps,) = SmoothGradCAMpp(net, n_samples=2)(torch.randn(2, 1, 4, 5, 6)).values()
    assert maps.shape == (2, 4, 5, 6)
    net = nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 3))
    (maps,) = SmoothGradCAMpp(net, n_samples=2)(torch.randn(2, 1, 9)).values()
    assert maps.shape == (2, 9)
    where = torch.zeros(2, 8, 8)
    where[:, 2:5, 3:6] = 1  # a mask per sample, closed over
    segmenter = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    cam = SmoothGradCAMpp(segmenter, "1", target_fn=lambda out: (out[:, 1] * where).sum((1, 2)))
    explanation = cam.explain(images(2, 8))
    assert explanation.classes is None
    assert explanation.layers["1"].cam.shape == (2, 8, 8)


@pytest.mark.parametrize(
    ("name", "size", "layer"),
    [
        ("resnet18", 64, "layer4"),
        ("convnext_atto", 64, "stages"),
        ("efficientnet_b0", 64, "bn2"),
    ],
)
def test_timm_cnns_find_their_last_map(name, size, layer):
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7)
    cam = SmoothGradCAMpp(model, n_samples=2)
    maps = cam(images(2, size))
    assert set(maps) == {layer}
    assert maps[layer].shape == (2, size, size)
    assert maps[layer].isfinite().all()
    assert 0 <= maps[layer].min() <= maps[layer].max() <= 1


@pytest.mark.parametrize(
    ("name", "reshape", "layer", "shape"),
    [
        ("vit_tiny_patch16_224", "vit", "blocks.11.norm1", (192, 4, 4)),
        ("deit_tiny_distilled_patch16_224", "vit", "blocks.11.norm1", (192, 4, 4)),
        ("swin_tiny_patch4_window7_224", "swin", "norm", (768, 2, 2)),
    ],
)
def test_timm_transformers(name, reshape, layer, shape):
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, img_size=64)
    got = SmoothGradCAMpp(model, n_samples=2, reshape_transform=reshape).explain(images(2, 64)).layers
    assert set(got) == {layer}
    assert got[layer].activation.shape[1:] == shape
    assert got[layer].first.any()
    if reshape == "vit":
        with pytest.raises(ConfigurationError, match="reshape_transform"):
            SmoothGradCAMpp(model, layer)(images(1, 64))


def test_transformers_vit_and_swin():
    from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vit = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, num_labels=5, **small))
    (layer,) = SmoothGradCAMpp(vit, n_samples=2, reshape_transform="vit").explain(images(2, 32)).layers.values()
    assert layer.cam.shape == (2, 4, 4)
    assert layer.first.any()
    config = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    swin = SwinForImageClassification(config)
    (layer,) = SmoothGradCAMpp(swin, n_samples=2, reshape_transform="swin").explain(images(2, 32)).layers.values()
    assert layer.cam.shape == (2, 4, 4)
    assert layer.first.any()


def test_reshape_transforms_keep_the_grid():
    maps = torch.randn(2, 5, 3, 4)
    tokens = maps.flatten(2).transpose(1, 2)
    assert torch.equal(tokens_to_map(torch.cat([torch.zeros(2, 3, 5), tokens], 1), grid=(3, 4)), maps)
    assert torch.equal(channels_last_to_map(maps.permute(0, 2, 3, 1)), maps)
    square = torch.randn(1, 5, 4, 4)
    assert torch.equal(tokens_to_map(square.flatten(2).transpose(1, 2)), square)

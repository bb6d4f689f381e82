"""core.export: files that open without effdl, with the same outputs."""

from __future__ import annotations

import builtins

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from effdl.core import export
from effdl.core.errors import ConfigurationError, MissingExtraError


class Tied(nn.Module):
    """Two names for one weight, and a channels-last one."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embedding.weight
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)

    def forward(self, index, scale=1.0):
        return self.head(self.embedding(index)) * scale


class Holder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model


def small_timm(**kwargs):
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=5, in_chans=1, **kwargs)


def test_product_is_the_network():
    network = nn.Linear(2, 2)
    assert export.product(Holder(network)) is network
    assert export.product(network) is network


def test_safetensors_of_tied_and_channels_last_weights(tmp_path):
    model = Tied()
    path = export.save_safetensors(model, tmp_path / "deep" / "m.safetensors")
    fresh = Tied()
    fresh.load_state_dict(load_file(path), strict=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_timm_folder_opens_in_plain_timm(tmp_path):
    model = small_timm().to(memory_format=torch.channels_last).eval()
    kind = export.save_model(Holder(model), tmp_path, {"mean": 0.3, "std": 0.5, "input_size": (1, 32, 32)})
    assert kind == "timm"
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(again(x), model(x))
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    config = timm.data.resolve_model_data_config(again)
    assert [tuple(config[key]) for key in ("input_size", "mean", "std")] == [(1, 32, 32), (0.3,), (0.5,)]


@pytest.mark.parametrize("replace", [nn.GELU, nn.Identity])
def test_changed_timm_network_is_not_passed_off_as_timms(tmp_path, replace):
    model = small_timm()
    model.layer1[0].act1 = replace()
    with pytest.raises(ConfigurationError, match="resnet10t"):
        export.save_timm(model, tmp_path)
    assert export.save_model(model, tmp_path) == "safetensors"
    assert not (tmp_path / "config.json").exists()
    assert (tmp_path / "model.safetensors").exists()


def test_save_pretrained_wins(tmp_path):
    class Pretrained(nn.Linear):
        def save_pretrained(self, folder):
            (tmp_path / "called").write_text(folder)

    assert export.save_model(Holder(Pretrained(2, 2)), tmp_path / "model") == "pretrained"
    assert (tmp_path / "called").read_text() == str(tmp_path / "model")


def test_pretrained_folder_opens_the_same_network_or_is_none(tmp_path):
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=8, vocab_size=11)).eval()
    assert export.save_model(Holder(model), tmp_path / "a") == "pretrained"
    ids = torch.arange(8)[None]
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "a")(ids).logits, model(ids).logits)
    model.transformer.ln_f = nn.BatchNorm1d(8)
    assert export.save_model(Holder(model), tmp_path / "b") == "safetensors"
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["model.safetensors"]


def test_unet_of_diffusers_is_reopened(tmp_path):
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    model = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4, **blocks)
    assert export.save_model(Holder(model), tmp_path) == "pretrained"
    assert UNet2DModel.from_pretrained(tmp_path).config.sample_size == 8


def test_program_has_a_free_batch_and_same_outputs(tmp_path):
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.BatchNorm1d(3))
    model[1].eval()
    export.export_program(model, (torch.randn(2, 4),), tmp_path / "m.pt2")
    assert [m.training for m in model] == [True, False, True]
    x = torch.randn(5, 4)
    again = torch.export.load(tmp_path / "m.pt2").module()
    torch.testing.assert_close(again(x), model.eval()(x))


def test_program_of_a_diffusers_unet_is_traced_once_and_has_a_free_batch(tmp_path, monkeypatch):
    from effdl.tasks.tiny import tiny_unet

    blocks = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")}
    model = tiny_unet(8, 1, add_attention=False, block_out_channels=(8, 8), norm_num_groups=4, **blocks).eval()
    trace, traces = torch.export.export, []
    monkeypatch.setattr(torch.export, "export", lambda *args, **kwargs: traces.append(args) or trace(*args, **kwargs))
    export.export_program(model, (torch.randn(2, 1, 8, 8), torch.tensor([3, 900])), tmp_path / "m.pt2")
    assert len(traces) == 1
    again = torch.export.load(tmp_path / "m.pt2").module()
    for count in (1, 5):
        x, t = torch.randn(count, 1, 8, 8), torch.arange(count)
        with torch.no_grad():
            torch.testing.assert_close(again(x, t)[0], model(x, t, return_dict=False)[0], atol=1e-5, rtol=1e-4)


def test_a_program_traced_on_a_view_takes_any_tensor(tmp_path):
    model = nn.Conv2d(3, 2, 3)
    wide = torch.randn(8, 3, 8, 12)
    for view in (wide[:4], wide[::2], wide[:4, :, :, 2:10], wide[:1].expand(4, -1, -1, -1)):
        x = torch.randn(5, *view.shape[1:])
        again = export.export_program(model, (view,), tmp_path / "m.pt2").module()
        torch.testing.assert_close(again(x), model(x))


def test_program_with_keyword_inputs(tmp_path):
    model = Tied()
    export.export_program(model, (torch.tensor([1, 2]),), tmp_path / "m.pt2", {"scale": 2.0})
    again = torch.export.load(tmp_path / "m.pt2").module()
    torch.testing.assert_close(again(torch.tensor([3, 4, 5]), scale=2.0), model(torch.tensor([3, 4, 5]), 2.0))


def test_program_of_a_network_tied_to_its_batch(tmp_path):
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(2, -1)

    export.export_program(Fixed(), (torch.ones(2, 4),), tmp_path / "m.pt2")
    assert torch.export.load(tmp_path / "m.pt2").module()(torch.ones(2, 4)).shape == (2, 4)


def test_onnx_gives_the_same_outputs(tmp_path):
    pytest.importorskip("onnxruntime")
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    path = export.export_onnx(model, (torch.randn(2, 1, 8, 8),), tmp_path / "m.onnx")
    x = torch.randn(3, 1, 8, 8)
    torch.testing.assert_close(export.onnx_outputs(path, (x,))[0], model(x).detach(), atol=1e-5, rtol=1e-5)


def test_missing_extra_names_itself(tmp_path, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "onnxscript":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr("importlib.import_module", refuse)
    with pytest.raises(MissingExtraError, match=r"effdl\[onnx\]"):
        export.export_onnx(nn.Linear(2, 2), (torch.ones(1, 2),), tmp_path / "m.onnx")

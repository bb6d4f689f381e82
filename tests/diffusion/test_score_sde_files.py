"""score-sde: folders that stock classes open."""

from __future__ import annotations

import json

import pytest
import torch

from effdl.diffusion.score_sde import VE, VP, ScoreAdapter, ScoreSDEModule, SubVP, ancestral
from tests.diffusion.score_sde_nets import plane, unet


def test_a_vp_folder_is_a_ddpm_pipeline(tmp_path):
    from diffusers import DDPMPipeline

    module = ScoreSDEModule(unet(), VP(steps=1000), levels=17)
    module.save_pretrained(tmp_path)
    stock = DDPMPipeline.from_pretrained(tmp_path)
    x, draw = torch.randn(2, 1, 8, 8), torch.Generator().manual_seed(0)
    i = 700
    with torch.no_grad():
        theirs = stock.scheduler.step(stock.unet(x, i).sample, i, x, generator=torch.Generator().manual_seed(0))
        noise = torch.randn(x.shape, generator=draw)
        ours, _ = ancestral(module.sde, module.score, x, torch.full((2,), i / 999), noise)
    torch.testing.assert_close(theirs.prev_sample, ours, atol=1e-3, rtol=0)
    again = ScoreSDEModule(str(tmp_path))
    assert again.record() == module.record() == json.loads((tmp_path / "sde.json").read_text())
    assert torch.equal(again.sample(2, steps=25), module.sample(2, steps=25))


@pytest.mark.parametrize("sde", [VE(0.02, 8.0, 25), SubVP(0.2, 15.0, 25)], ids=lambda sde: sde.name)
def test_other_folders_open_with_stock_classes(tmp_path, sde):
    from diffusers import ScoreSdeVeScheduler, UNet2DModel

    module = ScoreSDEModule(unet(time_embedding_type="fourier" if sde.name == "ve" else "positional"), sde)
    module.save_pretrained(tmp_path)
    network = UNet2DModel.from_pretrained(tmp_path, subfolder="unet")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 0.9])
    assert torch.equal(ScoreAdapter(network.eval(), sde)(x, t), ScoreAdapter(module.model.eval(), sde)(x, t))
    again = ScoreSDEModule(tmp_path)
    assert again.sde.config() == sde.config()
    assert torch.equal(again.sample(2), module.sample(2))
    if sde.name == "ve":
        assert ScoreSdeVeScheduler.from_pretrained(tmp_path / "scheduler").init_noise_sigma == 8.0


def test_any_other_network_is_a_state_dict(tmp_path):
    from safetensors.torch import load_file

    module = ScoreSDEModule(plane(), SubVP(steps=25))
    module.save_pretrained(tmp_path)
    bare = plane(1)
    bare.load_state_dict(load_file(tmp_path / "model.safetensors"))
    again = ScoreSDEModule(bare, sde=json.loads((tmp_path / "sde.json").read_text())["sde"])
    assert torch.equal(again.sample(2, shape=(2,)), module.sample(2, shape=(2,)))

"""adjoint-dpm: the module that trains noise, conditions or weights, and what it saves."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file
from torch import nn

from effdl.core.errors import ConfigurationError
from effdl.diffusion.adjoint_dpm import AdjointDPMModule, AdjointSampler, ClassifierLoss, SampleRows
from effdl.tasks.tiny import tiny_ddpm, tiny_stable_diffusion, tiny_stable_diffusion_xl, tiny_unet
from tests.support import QUIET

SMALL = {
    "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8],
    "norm_num_groups": 4,
}  # fmt: skip


def brightness(images, batch):
    return (images - 0.5).square().mean((1, 2, 3))


def adam(parameters):
    return torch.optim.Adam(parameters, 0.05)


def made(**kwargs) -> AdjointDPMModule:
    options = {"loss": brightness, "num_examples": 4, "steps": 3, "solver": "euler", "optimizer": adam}
    return AdjointDPMModule(**{"model": tiny_unet(8, 1, **SMALL), **options, **kwargs})


def fit(module, data=None, **kwargs):
    callbacks = kwargs.pop("callbacks", [])
    trainer = Trainer(**{**QUIET, "max_epochs": 5, **kwargs, "enable_checkpointing": bool(callbacks)},
                      callbacks=callbacks)  # fmt: skip
    trainer.fit(module, data or SampleRows(4))
    return trainer


def states(module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_noise_alone_changes_and_is_all_that_is_kept(tmp_path):
    module = made()
    assert list(module.state_dict()) == ["noise"]
    network, rows = copy.deepcopy(module.model), torch.arange(4)
    with torch.no_grad():
        before = brightness(module.images({"index": rows}), None).mean()
    trainer = fit(module, callbacks=[ModelCheckpoint(tmp_path, save_last=True)])
    with torch.no_grad():
        after = brightness(module.images({"index": rows}), None).mean()
    assert after < before
    assert {"train/loss", "adjoint-dpm/noise_rms"} <= set(trainer.callback_metrics)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), module.model.parameters()))
    assert not module.model.training
    assert module.report()["before"]["metrics"]["train/loss"] == pytest.approx(float(before), rel=1e-4)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == ["noise"]
    module.save_pretrained(tmp_path / "out")
    assert torch.equal(load_file(tmp_path / "out" / "optimised.safetensors")["noise"], module.noise)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["optimised.safetensors"]
    module.figures(tmp_path)
    assert (tmp_path / "samples.png").is_file()


def test_radius_holds_the_noise_near_its_start():
    module = made(radius=0.1)
    start = module.noise.detach().clone()
    fit(module)
    distance = (module.noise - start).abs()
    assert 0.09 < distance.max() <= 0.1 + 1e-6
    assert torch.equal(module.first_noise, start)


def test_rows_of_a_batch_are_rows_of_the_noise():
    module = made(num_examples=6, noise=torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 8, 8))
    fit(module, SampleRows(6, batch_size=2), max_steps=1, max_epochs=-1)
    moved = (module.noise - module.first_noise).abs().flatten(1).max(1).values > 0
    assert moved.sum() == 2
    both = module.images({"index": torch.tensor([3, 1])})
    torch.testing.assert_close(both[1:], module.images({"index": torch.tensor([1])}), atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigurationError, match="index"):
        module.images({"label": torch.zeros(3, dtype=torch.long)})
    batches = list(SampleRows(5, classes=3, prompts=["a", "b"], batch_size=2).predict_dataloader())
    assert [b["index"].tolist() for b in batches] == [[0, 1], [2, 3], [4]]
    assert batches[1]["label"].tolist() == [2, 0]
    assert batches[1]["prompt"] == ["a", "b"]


def test_weights_make_a_stock_pipeline_with_the_same_images(tmp_path):
    """Saved, opened by diffusers, sampled by its DDIM from the same noise: the module's own images."""
    from diffusers import DDIMScheduler, DDPMPipeline

    module = made(model=tiny_ddpm(8, 1, **SMALL), optimise=["weights", "noise"], steps=9)
    before = states(module)
    fit(module, max_epochs=2)
    assert all(not torch.equal(v, before[k]) for k, v in states(module).items() if k.endswith("weight"))
    module.save_pretrained(tmp_path)
    stock = DDPMPipeline.from_pretrained(tmp_path)
    x = load_file(tmp_path / "optimised.safetensors")["noise"]
    ddim = DDIMScheduler.from_config(stock.scheduler.config, clip_sample=False, set_alpha_to_one=False)
    ddim.set_timesteps(9)
    with torch.no_grad():
        for t in range(999, 0, -111):
            x = ddim.step(stock.unet(x, t).sample, t, x).prev_sample
        ours = module.images({"index": torch.arange(4)})
    torch.testing.assert_close(ours, x, atol=1e-4, rtol=1e-4)
    fresh = made(optimise=["weights"])
    images = [fresh.images({"index": torch.arange(4)}) for _ in range(2)]
    assert torch.equal(*images)
    assert images[0].requires_grad


def test_prompt_embeddings_of_stable_diffusion(tmp_path):
    """One half of the guidance is learned; all of it through a stock pipeline's own U-Net, VAE and empty prompt."""
    pipeline = tiny_stable_diffusion(16)
    module = made(model=pipeline, optimise=["cond"], condition=["a fox"], num_examples=2, steps=2)
    assert list(module.state_dict()) == ["embeddings.encoder_hidden_states"]
    assert module.settings["guidance_scale"] == 7.5
    before = states(module)
    fit(module, SampleRows(2), max_epochs=1)
    assert not torch.equal(before["embeddings.encoder_hidden_states"], module.embeddings["encoder_hidden_states"])
    x_T = torch.randn(2, 4, 4, 4)
    given = module.embeddings["encoder_hidden_states"].detach().expand(2, -1, -1)
    empty = module.surroundings.unconditional("cpu")["encoder_hidden_states"].expand(2, -1, -1)
    plain = AdjointSampler(pipeline.unet, pipeline.scheduler, 2, "euler")(x_T, given, empty)
    ours = module.images({"index": torch.arange(2)}, noise=x_T)
    torch.testing.assert_close(ours, module.surroundings.decode_images(plain), atol=1e-4, rtol=1e-4)
    module.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "optimised.safetensors")["embeddings.encoder_hidden_states"]
    image = pipeline(prompt_embeds=saved, negative_prompt_embeds=empty[:1], num_inference_steps=2, output_type="pt")
    assert image.images.shape == (1, 3, 16, 16)
    prompts = made(model=pipeline, num_examples=2, steps=2)  # the noise, with prompts from the batch
    fit(prompts, SampleRows(2, prompts=["a fox", "a crow"]), max_epochs=1)
    both = {"optimise": ["cond"], "condition": ["a fox", "a cat"], "num_examples": 2, "steps": 2}
    xl = made(model=tiny_stable_diffusion_xl(16), **both)
    assert set(xl.state_dict()) == {"embeddings.encoder_hidden_states", "embeddings.text_embeds"}
    brightness(xl.images({"index": torch.arange(2)}), None).mean().backward()
    assert all(p.grad.abs().max() > 0 for p in xl.parameters())


def test_only_adapters_may_learn():
    network = tiny_unet(8, 1, **SMALL).requires_grad_(False)
    network.conv_out.weight.requires_grad_(True)
    module = made(model=network, optimise=["weights"])
    before = states(module)
    fit(module, max_epochs=1)
    changed = [name for name, value in states(module).items() if not torch.equal(value, before[name])]
    assert changed == ["model.conv_out.weight"]
    with pytest.raises(ConfigurationError, match=r"[Nn]othing to differentiate"):
        made(model=tiny_unet(8, 1, **SMALL).requires_grad_(False), optimise=["weights"])


def test_a_classifier_as_the_loss(tmp_path):
    torch.manual_seed(0)
    judge = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    module = made(loss=ClassifierLoss(judge, target=2), optimizer=lambda p: torch.optim.Adam(p, 0.5))
    loss = fit(module, max_epochs=8).callback_metrics["train/loss"]
    with torch.no_grad():
        assert loss < module.loss(made().images({"index": torch.arange(4)}), {})
    assert not any("judge" in name or "loss" in name for name in module.state_dict())
    images = torch.randn(2, 1, 8, 8)
    labels = {"label": torch.tensor([0, 1])}
    expected = nn.functional.cross_entropy(judge(images), labels["label"])
    torch.testing.assert_close(ClassifierLoss(judge)(images, labels), expected)
    with pytest.raises(ConfigurationError, match="target"):
        ClassifierLoss(judge, target=-1)
    for name, value in (("num_examples", 0), ("classes", 0), ("prompts", []), ("batch_size", 0), ("seed", -1)):
        with pytest.raises(ConfigurationError, match=name):
            SampleRows(**{name: value})


def test_compiled_network_and_accumulation():
    module = made(optimise=["weights"])
    module.model.compile(backend="eager")
    trainer = fit(module, SampleRows(8, batch_size=2), max_epochs=1, accumulate_grad_batches=2)
    assert trainer.global_step == 2

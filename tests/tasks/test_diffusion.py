"""effdl.tasks.diffusion: targets, conditions, training, EMA, sampling, saving as a diffusers pipeline, resuming."""

from __future__ import annotations

import copy
import logging
import warnings

import lightning as L
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader

from effdl.core.errors import ConfigurationError
from effdl.tasks.diffusion import DiffusionModule, diffuse, stream
from effdl.tasks.tiny import (
    tiny_condition_unet,
    tiny_ddpm,
    tiny_stable_diffusion,
    tiny_unet,
)

logging.getLogger("diffusers").setLevel(logging.ERROR)
CONFIG = {
    "sample_size": 8,
    "block_out_channels": [8, 8],
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}


def images(count: int = 4, size: int = 8, channels: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def loader(count: int = 6, **keys) -> DataLoader:
    batches = [{"image": images(seed=i), "label": torch.arange(4) % 3} | keys for i in range(count)]
    return DataLoader(batches, batch_size=None)


def fit(module: DiffusionModule, folder, data: DataLoader | None = None, **kwargs) -> L.Trainer:
    kwargs = {"max_steps": 4} | kwargs
    trainer = L.Trainer(
        accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=bool(kwargs.pop("checkpoints", False)),
        **{k: v for k, v in kwargs.items() if k not in ("val", "ckpt_path")},
    )  # fmt: skip
    trainer.fit(module, data or loader(), kwargs.get("val"), ckpt_path=kwargs.get("ckpt_path"))
    return trainer


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


# Targets and loss


def test_noising_and_targets_are_diffusers():
    scheduler = DDPMScheduler()
    x0, noise, t = images(), images(seed=1), torch.tensor([0, 10, 500, 999])
    noisy, target = diffuse(x0, noise, t, scheduler.alphas_cumprod, "v_prediction")
    assert torch.allclose(noisy, scheduler.add_noise(x0, noise, t), atol=1e-6)
    assert torch.allclose(target, scheduler.get_velocity(x0, noise, t), atol=1e-6)
    assert diffuse(x0, noise, t, scheduler.alphas_cumprod, "epsilon")[1] is noise
    assert diffuse(x0, noise, t, scheduler.alphas_cumprod, "sample")[1] is x0


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_three_predictions_describe_the_same_image(prediction):
    """A network that is right under any of the three gives back x_0 (the scheduler's own formula)."""
    scheduler = DDIMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(10)
    x0, noise = images(1), images(1, seed=1)
    noisy, target = diffuse(x0, noise, torch.tensor([500]), scheduler.alphas_cumprod, prediction)
    x0_again = scheduler.step(target, torch.tensor(500), noisy).pred_original_sample
    assert torch.allclose(x0_again, x0, atol=1e-4)


def test_loss_is_the_mean_squared_error_and_a_hook():
    class Halved(DiffusionModule):
        def compute_loss(self, outputs, batch):
            assert "label" in batch
            return super().compute_loss(outputs, batch) / 2

    batch = next(iter(loader()))
    module, halved = (cls(copy.deepcopy(CONFIG_NET)) for cls in (DiffusionModule, Halved))
    out = module.denoise(batch, torch.Generator().manual_seed(0))
    expected = ((out.prediction - out.target) ** 2).mean()
    assert torch.allclose(module.compute_loss(out, batch), expected)
    assert torch.allclose(halved.compute_loss(out, batch), expected / 2)


CONFIG_NET = tiny_unet(8)


def test_training_learns_to_denoise(tmp_path):
    """Images of one grey each: the noise can be told from the image."""
    greys = torch.linspace(-1, 1, 16).view(4, 4, 1, 1, 1).expand(4, 4, 3, 8, 8).contiguous()
    batches = [{"image": x} for x in greys]

    def error() -> float:
        with torch.no_grad():
            outs = [module.denoise(b, torch.Generator().manual_seed(i)) for i, b in enumerate(batches)]
            return float(torch.stack([module.compute_loss(o, b) for o, b in zip(outs, batches)]).mean())

    module = DiffusionModule(CONFIG, optimizer=lambda p: torch.optim.Adam(p, 1e-2))
    before = error()
    fit(module, tmp_path, DataLoader(batches, batch_size=None), max_steps=60)
    assert error() < 0.5 * before


# Noise


def test_noise_is_a_function_of_seed_epoch_batch_and_process_not_of_the_global_stream(monkeypatch):
    def drawn(epoch=0, batch_idx=0, seed=0, rank=0):
        module = DiffusionModule(tiny_unet(8), seed=seed)
        seen = []
        monkeypatch.setattr(module, "compute_loss", lambda o, b: seen.append(o.noisy) or o.prediction.mean())
        monkeypatch.setattr(type(module), "current_epoch", epoch)
        monkeypatch.setattr(type(module), "global_rank", rank)
        monkeypatch.setattr(module, "log", lambda *a, **k: None)
        batch = next(iter(loader()))
        before = torch.get_rng_state()
        module.training_step(batch, batch_idx)
        assert torch.equal(before, torch.get_rng_state())
        return seen[0]

    base = drawn()
    assert torch.equal(base, drawn())
    for other in (drawn(epoch=1), drawn(batch_idx=1), drawn(seed=1), drawn(rank=1)):
        assert not torch.equal(base, other)


def test_validation_draws_the_same_noise_every_time(tmp_path):
    module = DiffusionModule(CONFIG)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    first, second = (trainer.validate(module, loader(), verbose=False)[0]["val/loss"] for _ in range(2))
    assert first == second > 0


# Conditions


def test_class_labels_reach_the_network_from_dicts_and_tuples():
    module = DiffusionModule(tiny_unet(8, num_classes=3))
    x = images()
    labels = torch.tensor([0, 1, 2, 0])

    def run(batch):
        return module.denoise(batch, torch.Generator().manual_seed(0)).prediction

    assert torch.equal(run({"image": x, "label": labels}), run((x, labels)))
    assert not torch.equal(run((x, labels)), run((x, 2 - labels)))
    with pytest.raises(ConfigurationError, match="label"):
        run({"image": x})


def test_text_reaches_the_network_as_prompts_tokens_or_states():
    pipeline = tiny_stable_diffusion()
    module = DiffusionModule(pipeline)
    x, prompts = images(2, 32), ["a cat", "a dog"]
    ids = pipeline.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    states = pipeline.text_encoder(ids)[0]

    def run(**text):
        return module.denoise({"image": x, **text}, torch.Generator().manual_seed(0)).prediction

    out = run(prompt=prompts)
    assert out.shape == (2, 4, 8, 8)
    assert torch.equal(out, run(input_ids=ids))
    assert torch.equal(out, run(encoder_hidden_states=states))
    assert not torch.equal(out, run(prompt=["a dog", "a cat"]))
    with pytest.raises(ConfigurationError, match="wants text"):
        run()


def test_a_network_without_text_encoder_takes_hidden_states():
    module = DiffusionModule(tiny_condition_unet())
    states = torch.randn(4, 16, 32)
    batch = {"image": images(channels=4), "encoder_hidden_states": states}
    assert module.denoise(batch).prediction.shape == (4, 4, 8, 8)
    with pytest.raises(ConfigurationError, match="text encoder"):
        module.denoise({"image": images(channels=4), "input_ids": torch.zeros(4, 16, dtype=torch.long)})


# Frozen parts, EMA


def test_vae_and_text_encoder_are_not_trained_saved_or_copied(tmp_path):
    pipeline = tiny_stable_diffusion()
    before = copy.deepcopy(pipeline.vae), copy.deepcopy(pipeline.text_encoder), copy.deepcopy(pipeline.unet)
    module = DiffusionModule(pipeline)
    assert {name.split(".")[0] for name in module.state_dict()} == {"model"}
    assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in pipeline.unet.parameters())
    batches = DataLoader([{"image": images(2, 32), "prompt": ["a", "b"]}], batch_size=None)
    fit(module, tmp_path, batches, callbacks=[EMAWeightAveraging(decay=0.5)])
    assert same(before[0], pipeline.vae)
    assert same(before[1], pipeline.text_encoder)
    assert not same(before[2], pipeline.unet)
    assert copy.deepcopy(module).surroundings is module.surroundings


def test_latents_are_scaled_as_the_pipeline_scales_them():
    pipeline = tiny_stable_diffusion()
    surroundings = DiffusionModule(pipeline).surroundings
    factor = pipeline.vae.config.scaling_factor
    ours = surroundings.encode_images(images(2, 32), torch.Generator().manual_seed(0))
    theirs = pipeline.vae.encode(images(2, 32)).latent_dist.sample(torch.Generator().manual_seed(0))
    assert torch.allclose(ours, theirs * factor)
    assert torch.allclose(surroundings.decode_images(ours), pipeline.vae.decode(theirs).sample, atol=1e-5)


def test_ema_is_lightnings_and_what_is_saved_is_the_average(tmp_path):
    one, two, averaged = (DiffusionModule(copy.deepcopy(CONFIG_NET)) for _ in range(3))
    fit(one, tmp_path, max_steps=1)
    fit(two, tmp_path, max_steps=2)
    fit(averaged, tmp_path, max_steps=2, callbacks=[EMAWeightAveraging(decay=0.75)])
    averaged.save_pretrained(tmp_path / "pipe")
    opened = DDPMPipeline.from_pretrained(tmp_path / "pipe", low_cpu_mem_usage=False).unet
    for mean, first, second in zip(opened.parameters(), one.model.parameters(), two.model.parameters()):
        assert torch.allclose(mean, 0.75 * first + 0.25 * second, atol=1e-6)
    assert not same(opened, two.model)


# Sampling


def test_samples_are_images_and_a_function_of_the_seed():
    module = DiffusionModule(tiny_unet(8)).train()
    before = torch.get_rng_state()
    a, b, c = module.sample(3, steps=4), module.sample(3, steps=4), module.sample(3, steps=4, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert a.shape == (3, 3, 8, 8)
    assert a.dtype == torch.float32
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert module.model.training


def test_an_oracle_network_samples_the_data():
    """A network that always answers with one image (prediction="sample") draws that image."""
    truth = images(1)

    class Oracle(torch.nn.Module):
        config = tiny_unet(8).config

        def forward(self, x, t):
            return truth.expand_as(x)

    scheduler = DDIMScheduler()
    module = DiffusionModule(Oracle(), noise_scheduler=scheduler, prediction="sample")
    assert torch.allclose(module.sample(2, steps=10), truth.expand(2, -1, -1, -1), atol=1e-4)


def test_another_scheduler_and_fewer_steps():
    module = DiffusionModule(tiny_unet(8))
    ddim = DDIMScheduler.from_config(module.noise_scheduler.config)
    assert not torch.equal(module.sample(2, steps=3), module.sample(2, steps=3, noise_scheduler=ddim))


def test_class_conditional_samples():
    module = DiffusionModule(tiny_unet(8, num_classes=3))
    out = module.sample(steps=2, labels=[0, 1, 2])
    assert out.shape == (3, 3, 8, 8)
    assert not torch.equal(out, module.sample(steps=2, labels=[1, 1, 1]))


def test_guidance_moves_away_from_the_empty_prompt_as_the_pipeline_does():
    pipeline = tiny_stable_diffusion()
    module = DiffusionModule(pipeline)
    kwargs = {"steps": 2, "prompts": "a cat"}
    plain, guided = module.sample(1, **kwargs), module.sample(1, guidance=3.0, **kwargs)
    assert plain.shape == (1, 3, 32, 32)
    assert not torch.allclose(plain, guided)
    empty = module.sample(1, steps=2, prompts="")
    assert torch.allclose(module.sample(1, guidance=0.0, **kwargs), empty, atol=1e-5)
    latents = torch.randn(1, 4, 8, 8, generator=stream([0], "cpu"))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        "a cat", num_inference_steps=2, guidance_scale=3.0, latents=latents, output_type="pt", negative_prompt=""
    ).images
    assert torch.allclose(theirs, (guided / 2 + 0.5).clamp(0, 1), atol=1e-4)


def test_predict_draws_for_the_conditions_of_the_batches(tmp_path):
    module = DiffusionModule(tiny_unet(8, num_classes=3))
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    module._sample = lambda count, condition, seed: condition["class_labels"]
    assert torch.cat(trainer.predict(module, loader(2))).tolist() == [0, 1, 2, 0] * 2


@pytest.mark.parametrize(
    ("argument", "kwargs"),
    [
        ("count", {"count": 0}),
        ("steps", {"steps": 0}),
        ("labels", {"labels": [1]}),
        ("prompts", {"prompts": "a cat"}),
        ("guidance", {"guidance": 2.0}),
        ("guidance", {"guidance": -1.0}),
    ],
)
def test_sampling_refuses_what_the_network_cannot_do(argument, kwargs):
    with pytest.raises(ConfigurationError, match=argument):
        DiffusionModule(CONFIG).sample(**kwargs)


# Saving and loading


def test_saved_as_a_pipeline_that_diffusers_opens_and_so_do_we(tmp_path):
    module = DiffusionModule(tiny_unet(8), prediction="v_prediction")
    fit(module, tmp_path)
    module.save_pretrained(tmp_path / "pipe")
    opened = DDPMPipeline.from_pretrained(tmp_path / "pipe", low_cpu_mem_usage=False)
    assert same(opened.unet, module.model)
    assert opened.scheduler.config.prediction_type == "v_prediction"
    again = DiffusionModule.from_pretrained(tmp_path / "pipe")
    assert again.prediction == "v_prediction"
    assert again.model.training
    assert torch.allclose(again.sample(2, steps=3), module.sample(2, steps=3), atol=1e-4)


def test_a_stable_diffusion_stays_one(tmp_path):
    from diffusers import StableDiffusionPipeline

    module = DiffusionModule(tiny_stable_diffusion())
    module.save_pretrained(tmp_path)
    opened = StableDiffusionPipeline.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert same(opened.unet, module.model)
    assert type(DiffusionModule(str(tmp_path)).pipeline).__name__ == "StableDiffusionPipeline"


def test_a_network_without_pipeline_saves_and_opens(tmp_path):
    module = DiffusionModule(tiny_condition_unet(), noise_scheduler=DDIMScheduler(beta_end=0.01))
    module.save_pretrained(tmp_path)
    again = DiffusionModule(str(tmp_path))
    assert same(again.model, module.model)
    assert type(again.noise_scheduler) is DDIMScheduler
    assert again.noise_scheduler.config.beta_end == 0.01
    with pytest.raises(ConfigurationError, match="pipeline"):
        _ = module.pipeline


def test_the_folder_of_a_network_opens(tmp_path):
    net = tiny_unet(8)
    net.save_pretrained(tmp_path)
    assert same(DiffusionModule(str(tmp_path)).model, net)


def test_two_modules_of_one_pipeline_do_not_share_their_network():
    pipeline = tiny_ddpm(8)
    a = DiffusionModule(pipeline)
    b = copy.deepcopy(a)
    assert b.pipeline.unet is b.model
    assert a.pipeline.unet is a.model is pipeline.unet
    assert b.model is not a.model


def test_the_callers_scheduler_is_left_alone():
    scheduler = DDPMScheduler()
    DiffusionModule(CONFIG, noise_scheduler=scheduler, prediction="sample")
    assert scheduler.config.prediction_type == "epsilon"


# Lightning


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision(tmp_path, precision):
    module = DiffusionModule(tiny_stable_diffusion() if precision == "bf16-mixed" else tiny_unet(8))
    batch = {"image": images(2, 32), "prompt": ["a", "b"]} if precision == "bf16-mixed" else {"image": images(2)}
    trainer = fit(module, tmp_path, DataLoader([batch], batch_size=None), precision=precision, max_steps=2)
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


def test_a_run_resumed_mid_epoch_is_the_uninterrupted_run_without_any_care_for_random_states(tmp_path):
    """The noise needs no random state; the data's order is fixed here."""

    class Order(torch.utils.data.Dataset):
        def __len__(self):
            return 24

        def __getitem__(self, i):
            return {"image": images(1, seed=i)[0]}

    from effdl.data.loading import ResumableLoader

    def data():
        return ResumableLoader(Order(), batch_size=4, shuffle=True)

    saving = L.pytorch.callbacks.ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    whole = DiffusionModule(copy.deepcopy(CONFIG_NET))
    fit(whole, tmp_path, data(), max_steps=8, checkpoints=True, callbacks=[saving])
    torch.manual_seed(123)
    resumed = DiffusionModule(copy.deepcopy(CONFIG_NET))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(resumed, tmp_path, data(), max_steps=8, ckpt_path=str(tmp_path / "step=4.ckpt"))
    assert same(whole, resumed)


def test_optimizer_and_scheduler_are_injected():
    module = DiffusionModule(
        CONFIG,
        optimizer=lambda p: torch.optim.SGD(p, 0.5),
        scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1),
    )
    made = module.configure_optimizers()
    assert type(made["optimizer"]) is torch.optim.SGD
    assert type(made["lr_scheduler"]["scheduler"]) is torch.optim.lr_scheduler.StepLR


def test_from_yaml():
    from lightning.pytorch.cli import LightningArgumentParser

    parser = LightningArgumentParser()
    parser.add_subclass_arguments(L.LightningModule, "model")
    for model in (
        "tiny",
        CONFIG,
        {"class_path": "diffusers.UNet2DModel", "init_args": CONFIG},
        {"class_path": "effdl.tasks.tiny.tiny_unet", "init_args": {"sample_size": 8}},
    ):
        config = parser.parse_object(
            {
                "model": {
                    "class_path": "effdl.DiffusionModule",
                    "init_args": {
                        "model": model,
                        "noise_scheduler": {"class_path": "diffusers.DDIMScheduler"},
                        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.5}},
                    },
                }
            }
        )
        module = parser.instantiate(config).model
        assert type(module.model).__name__ == "UNet2DModel"
        assert module.model.config.sample_size == (32 if model == "tiny" else 8)
        assert type(module.noise_scheduler) is DDIMScheduler
        assert module.configure_optimizers().defaults["lr"] == 0.5


@pytest.mark.parametrize(
    ("argument", "kwargs"),
    [
        ("model", {"model": 3}),
        ("model", {"model": {"sample_sise": 8}}),
        ("model", {"model": {"_class_name": "UNet3D"}}),
        ("prediction", {"prediction": "noise"}),
        ("seed", {"seed": -1}),
        ("noise_scheduler", {"model": CONFIG, "noise_scheduler": FlowMatchEulerDiscreteScheduler()}),
    ],
)
def test_a_bad_argument_is_named(argument, kwargs):
    with pytest.raises(ConfigurationError, match=argument):
        DiffusionModule(**kwargs)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"model=.*model_index\.json"):
        DiffusionModule(str(tmp_path))

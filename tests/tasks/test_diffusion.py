"""effdl.tasks.diffusion: targets, conditions, training, EMA, resuming."""

from __future__ import annotations

import copy
import warnings

import lightning as L
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader

from effdl.core.errors import ConfigurationError
from effdl.tasks.diffusion import DiffusionModule, diffuse
from effdl.tasks.tiny import tiny_condition_unet, tiny_stable_diffusion, tiny_unet
from tests.tasks.diffusion_parts import CONFIG, CONFIG_NET, fit, images, loader, same

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

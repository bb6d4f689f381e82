"""effdl.tasks.text_to_image: SD 1.x, 2.x, XL and 3: losses, text, training, adapters, samples, files."""

from __future__ import annotations

import copy
import logging
import warnings
from functools import partial

import diffusers
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from effdl.core.errors import ConfigurationError
from effdl.core.noise import alpha_sigma, convert
from effdl.data.captioned import CaptionedImageData
from effdl.tasks import tiny
from effdl.tasks._denoising import logit_normal, min_snr_weight, stream
from effdl.tasks.text_to_image import TINY, TextToImageModule

logging.getLogger("diffusers").setLevel(logging.ERROR)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*does not have many workers.*")
KINDS = {
    "tiny": "StableDiffusionPipeline",
    "tiny-2": "StableDiffusionPipeline",
    "tiny-xl": "StableDiffusionXLPipeline",
    "tiny-3": "StableDiffusion3Pipeline",
}
PROMPTS = ["a cat", "a dog, to the left"]


def make(kind: str = "tiny", **kwargs) -> TextToImageModule:
    """16x16 images: latents of 4x4."""
    pipeline = TINY[kind](16) if isinstance(kind, str) and kind in TINY else kind
    rate = 0.05 if kwargs.get("rank") is None else 2.0  # an adapter begins at zero
    optimizer = partial(torch.optim.SGD, lr=rate, momentum=0.9)
    return TextToImageModule(pipeline, optimizer=optimizer, **{"steps": 0, "prompt_dropout": 0.3} | kwargs)


def data(count: int = 16, batch_size: int = 4) -> CaptionedImageData:
    return CaptionedImageData(image_size=16, batch_size=batch_size, max_train=count, prompt="digit {}", val=0.004)


def fit(module, folder, datamodule=None, **kwargs) -> L.Trainer:
    ckpt = kwargs.pop("ckpt_path", None)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    kwargs = quiet | {"max_steps": 2, "logger": False, "limit_val_batches": 0, "accelerator": "cpu"} | kwargs
    kwargs.setdefault("enable_checkpointing", any(isinstance(c, ModelCheckpoint) for c in kwargs.get("callbacks", [])))
    trainer = L.Trainer(**kwargs)
    trainer.fit(module, datamodule or data(), ckpt_path=ckpt, weights_only=True if ckpt else None)
    return trainer


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, **kwargs):
    kwargs = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(3), "output_type": "pt"} | kwargs
    return quiet(pipeline)("a cat", height=16, width=16, **kwargs).images


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def batch(size: int = 2, **keys) -> dict:
    images = torch.rand(size, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"image": images, "prompt": PROMPTS[:size]} | keys


# Losses


def test_min_snr_weighs_the_same_error_alike_however_the_network_says_it():
    """Hang et al.: min(SNR, gamma) on the error of x_0; the other two weights mean the same loss."""
    table = diffusers.DDPMScheduler().alphas_cumprod.double()
    t = torch.tensor([0, 20, 150, 400, 999])
    x0, noise, out = (torch.randn(5, 7, dtype=torch.float64, generator=stream([i], "cpu")) for i in range(3))
    a, s = alpha_sigma(table, t, x0)
    x_t = a * x0 + s * noise
    losses = []
    for prediction in ("epsilon", "sample", "v_prediction"):
        said, truth = (convert(e, x_t, a, s, "epsilon", prediction) for e in (out, noise))
        losses.append(min_snr_weight(table, t, prediction, 5.0) * (said - truth).square().sum(1))
    snr = (a / s).square().flatten()
    x0_error = (convert(out, x_t, a, s, "epsilon", "sample") - x0).square().sum(1)
    for loss in losses:
        torch.testing.assert_close(loss, snr.clamp(max=5) * x0_error)
    assert snr.max() > 5 > 1 > snr.min()
    assert min_snr_weight(torch.tensor([0.0]), torch.tensor([0]), "epsilon") == 1  # zero terminal SNR
    assert min_snr_weight(torch.tensor([0.0]), torch.tensor([0]), "sample") == 0


def test_min_snr_is_in_the_training_loss_and_not_in_validations():
    plain, weighted = make(), make(min_snr=5.0)
    outputs = weighted.denoise(batch(), stream([0], "cpu"))
    error = (outputs.prediction - outputs.target).square().mean((1, 2, 3))
    weights = min_snr_weight(weighted.noise_scheduler.alphas_cumprod, outputs.timesteps, "epsilon", 5.0)
    torch.testing.assert_close(weighted.compute_loss(outputs, batch()), (weights * error).mean())
    torch.testing.assert_close(plain.compute_loss(outputs, batch()), error.mean())


def test_a_flow_is_noised_as_its_scheduler_does_at_logit_normal_times():
    module = make("tiny-3")
    out = module.denoise(batch(), stream([0], "cpu"))
    scheduler = module.noise_scheduler
    x0 = module.latents(batch(), stream([0], "cpu"))
    noise = out.target + x0
    near = (scheduler.timesteps[None] - out.timesteps[:, None]).abs().argmin(1)
    theirs = scheduler.scale_noise(x0, scheduler.timesteps[near], noise)  # at the nearest of its 1000 times
    assert (theirs - out.noisy).abs().max() < 2e-3 * (noise - x0).abs().max()
    assert abs(noise.std() - 1) < 0.3
    u = logit_normal(200_000, 3.0, "cpu", stream([0], "cpu"))
    quantiles = torch.tensor([0.1, 0.5, 0.9])
    plain = torch.sigmoid(torch.distributions.Normal(0.0, 1.0).icdf(quantiles))
    torch.testing.assert_close(torch.quantile(u, quantiles), 3 * plain / (1 + 2 * plain), atol=5e-3, rtol=0)


def test_min_snr_and_prediction_are_no_matter_of_a_flow():
    for argument, value in (("min_snr", 5.0), ("prediction", "epsilon")):
        with pytest.raises(ConfigurationError, match=argument):
            make("tiny-3", **{argument: value})


# Text


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_the_pipelines_and_dropped_text_what_it_guides_away_from(kind):
    module = make(kind)
    pipeline = module.surroundings.pipeline
    empty = {"do_classifier_free_guidance": True, "device": "cpu", "num_images_per_prompt": 1}
    more = {"prompt_2": None, "prompt_3": None} if kind == "tiny-3" else {}
    with torch.no_grad():
        theirs = pipeline.encode_prompt(prompt=PROMPTS, **more, **empty)
    ours = module.condition(batch())
    torch.testing.assert_close(ours["encoder_hidden_states"], theirs[0])
    mixed = module.condition(batch(dropped=torch.tensor([True, False])))
    torch.testing.assert_close(mixed["encoder_hidden_states"][0], theirs[1][0])
    torch.testing.assert_close(mixed["encoder_hidden_states"][1], theirs[0][1])
    if len(theirs) == 4:
        pooled = next(ours[key] for key in ("text_embeds", "pooled_projections") if key in ours)
        torch.testing.assert_close(pooled, theirs[2])
    if kind == "tiny-xl":
        assert not mixed["encoder_hidden_states"][0].any()


def test_dropped_prompts_are_a_function_of_seed_epoch_and_batch(monkeypatch):
    def dropped(batch_idx=0, epoch=0, seed=0):
        module, seen = make(seed=seed, prompt_dropout=0.5), []
        monkeypatch.setattr(type(module), "current_epoch", epoch)
        monkeypatch.setattr(module, "log", lambda *a, **k: None)
        monkeypatch.setattr(module, "condition", lambda b: seen.append(b["dropped"]) or {"encoder_hidden_states": text})
        before = torch.get_rng_state()
        module.training_step(big, batch_idx)
        assert torch.equal(before, torch.get_rng_state())
        return seen[0]

    text = torch.zeros(64, 16, 32)
    big = {"image": torch.zeros(64, 3, 16, 16), "prompt": ["x"] * 64}
    base = dropped()
    assert torch.equal(base, dropped())
    assert 16 < int(base.sum()) < 48
    assert all(not torch.equal(base, other) for other in (dropped(1), dropped(epoch=1), dropped(seed=1)))


def test_xl_is_told_the_size_of_the_image_unless_the_batch_says_more():
    module, seen = make("tiny-xl"), []
    module.model.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    module.denoise(batch())
    ids = torch.tensor([[32.0, 48.0, 4.0, 0.0, 16.0, 16.0]]).expand(2, 6)
    module.denoise(batch(time_ids=ids))
    assert seen[0].tolist() == [[16, 16, 0, 0, 16, 16]] * 2
    assert torch.equal(seen[1], ids)


def test_a_batch_without_text_is_refused():
    with pytest.raises(ConfigurationError, match="wants text"):
        make().denoise({"image": torch.zeros(1, 3, 16, 16)})


# Training, saving, sampling: all four kinds


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two steps of each kind, whole and through an adapter, with a checkpoint after the first; resumed from there."""
    made = {}

    def get(kind, rank):
        if (kind, rank) not in made:
            folder = tmp_path_factory.mktemp(kind)
            saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
            module = make(kind, rank=rank, gradient_checkpointing=rank is not None)
            fit(module, folder, callbacks=[saving])
            made[kind, rank] = module, folder
        return made[kind, rank]

    return get


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_training_is_the_uninterrupted_and_checkpoints_are_plain(kind, rank, trained, tmp_path):
    whole, folder = trained(kind, rank)
    fresh = make(kind)
    assert {name.split(".")[0] for name in whole.state_dict()} == {"model"}
    resumed = make(kind, rank=rank, gradient_checkpointing=rank is not None)
    torch.manual_seed(99)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(resumed, tmp_path, ckpt_path=str(folder / "step=1.ckpt"))
    assert same(whole.state_dict(), resumed.state_dict())
    checkpoint = torch.load(folder / "step=2.ckpt", weights_only=True)
    before = copy.deepcopy(fresh.state_dict())
    fresh.load_state_dict(checkpoint["state_dict"], strict=True)  # no adapter there
    assert not same(before, fresh.state_dict())
    x, t = torch.randn(2, 4, 4, 4), torch.tensor([10, 500])
    text = fresh.condition(batch())
    with torch.no_grad():
        torch.testing.assert_close(fresh(x, t, **text), whole(x, t, **text), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_it_opens_in_the_stock_pipeline_and_draws_the_same(kind, rank, trained, tmp_path):
    module, _ = trained(kind, rank)
    ours = draw(module.pipeline)
    module.save_pretrained(tmp_path / "pipe")
    stock = getattr(diffusers, KINDS[kind])
    opened = stock.from_pretrained(tmp_path / "pipe")
    torch.testing.assert_close(draw(opened), ours, atol=1e-4, rtol=0)
    untrained = make(kind)
    assert not torch.allclose(draw(untrained.pipeline), ours, atol=1e-4)
    if rank is not None:
        module.save_lora(tmp_path / "adapter")
        pipeline = untrained.surroundings.pipeline
        pipeline.load_lora_weights(str(tmp_path / "adapter"))
        torch.testing.assert_close(draw(pipeline), ours, atol=1e-4, rtol=0)
        assert (tmp_path / "pipe" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    again = TextToImageModule.from_pretrained(tmp_path / "pipe")
    assert again.prediction == module.prediction


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_the_stock_pipelines(kind, trained):
    module, _ = trained(kind, None)
    ours = module.sample(prompts="a cat", steps=3, guidance=4.0)
    latents = torch.randn(1, 4, 4, 4, generator=stream([0], "cpu"))
    theirs = draw(module.pipeline, latents=latents, num_inference_steps=3, guidance_scale=4.0)
    torch.testing.assert_close((ours / 2 + 0.5).clamp(0, 1), theirs, atol=2e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind, tmp_path):
    module = make(kind, rank=2, gradient_checkpointing=True)
    trainer = fit(module, tmp_path, precision="bf16-mixed")
    assert torch.isfinite(trainer.callback_metrics["train/loss"])
    assert module.surroundings.vae.module.dtype == torch.float32


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for flag in (False, True):
        module = make(gradient_checkpointing=flag)
        module.compute_loss(module.denoise(batch(), stream([0], "cpu")), batch()).backward()
        gradients.append([p.grad.clone() for p in module.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other)


def test_an_adapter_alone_is_trained(trained):
    module, _ = trained("tiny", 2)
    base = make("tiny").model.state_dict()
    for name, value in module.model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, base[name.replace(".base_layer", "")])
    assert any(value.any() for name, value in module.model.state_dict().items() if "lora_B" in name)
    with pytest.raises(ConfigurationError, match="rank"):
        make().save_lora("nowhere")


def test_targets_choose_the_layers():
    module = make(rank=2, targets=["*.attn2.to_v"])
    assert {name.split(".")[-4] for name in module.state_dict() if "lora_A" in name} == {"to_v"}


def test_an_adapter_with_an_average_of_the_weights_goes_on_exactly(tmp_path):
    average = partial(EMAWeightAveraging, decay=0.5)
    saving = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, resumed = make(rank=2), make(rank=2)
    fit(whole, tmp_path, callbacks=[average(), saving], max_steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit(resumed, tmp_path, callbacks=[average()], max_steps=3, ckpt_path=str(tmp_path / "step=2.ckpt"))
    assert same(whole.state_dict(), resumed.state_dict())
    make().load_state_dict(torch.load(tmp_path / "step=2.ckpt", weights_only=True)["state_dict"], strict=True)


def test_a_sparse_part_of_the_weights_is_trained_through_its_callback(tmp_path):
    from effdl.callbacks import SaRACallback

    module = make()
    before = copy.deepcopy(module.state_dict())
    fit(module, tmp_path, callbacks=[SaRACallback()])
    changed = sum(int((before[name] != value).sum()) for name, value in module.state_dict().items())
    assert 0 < changed < 0.5 * sum(value.numel() for value in before.values())


def test_validating_and_predicting_alone(tmp_path):
    module = make("tiny-3", steps=2, guidance=2.0, cache=tmp_path / "cache")
    fit(module, tmp_path)
    options = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "enable_checkpointing": False}
    trainer = L.Trainer(limit_predict_batches=1, limit_val_batches=1, **options)
    (metrics,) = trainer.validate(module, data(12), verbose=False)  # other data than the cache's
    assert metrics["val/loss"] > 0
    (images,) = trainer.predict(module, data(12))
    assert images.shape == (4, 3, 16, 16)
    outputs = module.denoise(batch(dropped=torch.tensor([True, False])))
    module.compute_loss(outputs, batch()).backward()  # what was made in inference mode serves in training


# Sample grids


def test_a_grid_at_every_validation_of_the_average_to_each_logger(tmp_path, monkeypatch):
    shown = []

    class Board(CSVLogger):
        class experiment:
            add_image = staticmethod(lambda key, picture, step: shown.append((key, picture, step)))
            log_metrics = save = staticmethod(lambda *args, **kwargs: None)

    module, drawn = make(steps=2, prompts=PROMPTS), []
    sample = module.sample
    monkeypatch.setattr(module, "sample", lambda **k: drawn.append(copy.deepcopy(module.state_dict())) or sample(**k))
    loggers = [CSVLogger(tmp_path, name="files"), Board(tmp_path)]
    average = EMAWeightAveraging(decay=0.5)
    trainer = fit(module, tmp_path, max_steps=8, limit_val_batches=1, logger=loggers, callbacks=[average])
    files = sorted((tmp_path / "files").glob("version_0/samples/*.png"))
    assert [file.stem for file in files] == ["00000004", "00000008"]
    assert [(key, tuple(picture.shape), step) for key, picture, step in shown] == [
        ("samples", (3, 80, 152), s) for s in (4, 8)
    ]
    assert same(drawn[-1], module.state_dict())  # what training ends with is the average
    module.figures(tmp_path)
    assert (tmp_path / "samples.png").is_file()
    assert trainer.global_step == 8


def test_a_grid_at_the_end_of_the_epoch_where_there_is_no_validation(tmp_path):
    module = make("tiny-3", steps=1, prompts=["a cat"])
    fit(module, tmp_path, max_steps=4, logger=CSVLogger(tmp_path, name="files"))
    assert len(list((tmp_path / "files").glob("version_0/samples/*.png"))) == 1


# The cache of encodings


@pytest.mark.parametrize("kind", ["tiny", "tiny-xl", "tiny-3"])
def test_a_run_from_the_cache_is_the_run_with_encoders(kind, tmp_path):
    plain = make(kind)
    fit(plain, tmp_path, limit_val_batches=1, max_steps=4)
    cached = make(kind, cache=tmp_path / "cache")
    trainer = fit(cached, tmp_path, limit_val_batches=1, max_steps=4)
    for one, other in zip(plain.state_dict().values(), cached.state_dict().values()):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert trainer.callback_metrics["val/loss"] > 0
    assert {file.suffix for file in (tmp_path / "cache").rglob("*.*")} == {".safetensors"}


def test_with_a_cache_encoders_are_not_called_again(tmp_path, monkeypatch):
    fit(make(cache=tmp_path, prompts=["x"]), tmp_path)
    again = make(cache=tmp_path, prompts=["x"], steps=1)

    def refuse(*args, **kwargs):
        raise AssertionError("an encoder was called")

    monkeypatch.setattr(type(again.surroundings), "image_moments", refuse)
    monkeypatch.setattr(again.surroundings.text_encoder.module, "forward", refuse)
    again.surroundings._empty = make().surroundings.unconditional("cpu")
    moved = []
    monkeypatch.setattr(again.surroundings, "to", moved.append)
    fit(again, tmp_path, max_steps=4)
    assert set(moved) == {"cpu"}  # before the first step, and after a sample grid


def test_a_stopped_pass_goes_on_and_other_data_makes_another(tmp_path, monkeypatch):
    monkeypatch.setattr("effdl.tasks._encode_cache.ROWS", 8)
    module = make(cache=tmp_path)
    fit(module, tmp_path)
    blocks = sorted(tmp_path.glob("images-*/*.safetensors"))
    assert len(blocks) == 2
    first, times = blocks[0].read_bytes(), blocks[0].stat().st_mtime_ns
    blocks[1].unlink()
    fit(make(cache=tmp_path), tmp_path)
    assert blocks[1].is_file()
    assert blocks[0].stat().st_mtime_ns == times
    assert blocks[0].read_bytes() == first
    fit(make(cache=tmp_path), tmp_path, data(12))
    assert len(list(tmp_path.glob("images-*"))) == 2
    other = TextToImageModule(tiny.tiny_stable_diffusion(16, seed=1), cache=tmp_path, steps=0)
    fit(other, tmp_path)
    assert len(list(tmp_path.glob("images-*"))) == 3
    assert len(list(tmp_path.glob("text-*"))) == 3


def test_what_a_cache_cannot_serve_is_refused(tmp_path):
    augmented = CaptionedImageData(image_size=16, batch_size=4, max_train=8, augment=True)
    with pytest.raises(ConfigurationError, match="augmented"):
        fit(make(cache=tmp_path), tmp_path, augmented)
    unlabelled = torch.utils.data.DataLoader([{"image": torch.zeros(3, 16, 16), "prompt": "a"}] * 4, batch_size=2)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    with pytest.raises(ConfigurationError, match="index"):
        trainer.fit(make(cache=tmp_path), unlabelled)


# Arguments


@pytest.mark.parametrize(
    ("argument", "kwargs"),
    [
        ("model", {"kind": 3}),
        ("model", {"kind": tiny.tiny_ddpm(8)}),
        ("noise_scheduler", {"noise_scheduler": torch.nn.Identity()}),
        ("prediction", {"prediction": "noise"}),
        ("min_snr", {"min_snr": 0}),
        ("prompt_dropout", {"prompt_dropout": 1.5}),
        ("rank", {"rank": 0}),
        ("targets", {"targets": ["*.to_q"]}),
        ("targets", {"rank": 2, "targets": ["*.nothing"]}),
        ("prompts", {"prompts": "a cat"}),
        ("steps", {"steps": -1}),
        ("guidance", {"guidance": -1.0}),
        ("seed", {"seed": -1}),
    ],
)
def test_a_bad_argument_is_named(argument, kwargs):
    with pytest.raises(ConfigurationError, match=argument):
        make(**kwargs)


def test_from_yaml():
    from lightning.pytorch.cli import LightningArgumentParser

    parser = LightningArgumentParser()
    parser.add_subclass_arguments(L.LightningModule, "model")
    inner = {"class_path": "effdl.tasks.tiny.tiny_stable_diffusion", "init_args": {"sample_size": 16}}
    for model in ("tiny-xl", inner):
        arguments = {"model": model, "min_snr": 5.0, "rank": 2, "prompts": ["a cat"]}
        config = parser.parse_object({"model": {"class_path": "effdl.TextToImageModule", "init_args": arguments}})
        module = parser.instantiate(config).model
        assert module.min_snr == 5.0
        assert type(module.model).__name__ == "UNet2DConditionModel"


# Two processes

DDP = """
import logging, os, sys, warnings
import torch, torch.distributed as dist
warnings.simplefilter("ignore")
rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE="2")
dist.init_process_group("gloo", rank=rank, world_size=2)
from lightning.pytorch.strategies import DDPStrategy
from tests.contract.ddp_worker import Joined
from tests.tasks.test_text_to_image import KINDS, data, fit, make
cache, adapter = {"cache": folder + "/cache"}, {"rank": 2, "gradient_checkpointing": True}
for kind, more in zip(KINDS, (cache, adapter, adapter, cache)):
    module = make(kind, **more)
    strategy = DDPStrategy(cluster_environment=Joined(rank), process_group_backend="gloo")
    fit(module, folder, strategy=strategy, devices=2, accumulate_grad_batches=2, limit_val_batches=1)
    for name, value in module.state_dict().items():
        both = [torch.empty_like(value) for _ in range(2)]
        dist.all_gather(both, value)
        assert torch.equal(*both), (kind, name)
    changed = any(not torch.equal(v, w) for v, w in zip(module.parameters(), make(kind, **more).parameters()))
    assert changed, kind
print("equal")
"""


def test_two_processes_end_with_equal_weights(tmp_path):
    import socket
    import subprocess
    import sys

    from tests.support import ROOT

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    commands = [[sys.executable, "-c", DDP, str(rank), port, str(tmp_path)] for rank in range(2)]
    pipe = subprocess.PIPE
    workers = [subprocess.Popen(c, stdout=pipe, stderr=pipe, text=True, cwd=ROOT) for c in commands]
    answers = [worker.communicate(timeout=300) for worker in workers]
    for worker, (out, err) in zip(workers, answers):
        assert worker.returncode == 0, err[-2000:]
        assert "equal" in out

"""effdl.tasks.text_to_image: training, resuming, adapters, files, samples, two processes."""

from __future__ import annotations

import copy
import warnings
from functools import partial

import diffusers
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from effdl.core.errors import ConfigurationError
from effdl.tasks._denoising import stream
from effdl.tasks.text_to_image import TextToImageModule
from tests.support import run_ranks
from tests.tasks.text_to_image_parts import KINDS, batch, data, draw, fit, make, same

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


def test_an_adapter_alone_is_trained(trained):
    module, _ = trained("tiny", 2)
    base = make("tiny").model.state_dict()
    for name, value in module.model.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, base[name.replace(".base_layer", "")])
    assert any(value.any() for name, value in module.model.state_dict().items() if "lora_B" in name)
    with pytest.raises(ConfigurationError, match="rank"):
        make().save_lora("nowhere")


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


# Two processes


def test_two_processes_end_with_equal_weights(tmp_path):
    run_ranks("tests.tasks.text_to_image_ranks", tmp_path)
    for kind in KINDS:
        assert (tmp_path / f"{kind}-equal").is_file()

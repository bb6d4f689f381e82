"""ptq4dm on a Trainer: after a fit with averaged weights, under validate alone, without a Trainer; its report."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from diffusers import DDIMScheduler
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch.utils.data import DataLoader

from effdl.callbacks import DiffusionPTQCallback
from effdl.core.errors import ConfigurationError
from effdl.core.quantized import quantized_inputs, quantized_weights
from effdl.core.random import generator
from effdl.core.report import plain
from effdl.diffusion._ptq4dm_samples import takes_time
from effdl.tasks.diffusion import DiffusionModule
from effdl.tasks.tiny import tiny_stable_diffusion, tiny_unet
from tests.support import QUIET

PLAIN = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (16,)}


def module(num_classes: int | None = 3) -> DiffusionModule:
    return DiffusionModule(tiny_unet(8, 1, num_classes, add_attention=False, **PLAIN))


def data(batches: int = 3) -> DataLoader:
    stream = generator(1)
    made = [
        {"image": torch.randn(4, 1, 8, 8, generator=stream), "label": torch.randint(0, 3, (4,), generator=stream)}
        for _ in range(batches)
    ]
    return DataLoader(made, batch_size=None)


def method(**arguments) -> DiffusionPTQCallback:
    return DiffusionPTQCallback(**{"steps": 4, "num_samples": 16, "batch_size": 8, **arguments})


def trainer(*callbacks, **options) -> Trainer:
    return Trainer(callbacks=list(callbacks), **{**QUIET, "max_epochs": 1, "num_sanity_val_steps": 0, **options})


def test_must_08_a_fit_ends_in_codes_and_its_checkpoint_is_float(tmp_path):
    ptq, made = method(scheduler="DDIMScheduler"), module()
    save = ModelCheckpoint(tmp_path, save_last=True, save_on_train_epoch_end=True)
    trainer(ptq, EMAWeightAveraging(decay=0.5), save).fit(made, data(), data(1))
    records = quantized_weights(made.model)
    layers = {name for name, m in made.model.named_modules() if type(m).__name__.endswith(("Linear", "Conv2d"))}
    assert {f"{name}.weight" for name in layers} == set(records)
    assert set(quantized_inputs(made.model)) == layers
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    bare = module()
    bare.load_state_dict(saved, strict=True)
    for name, record in records.items():  # of the averages, which are what the checkpoint holds
        error = (record.dequantize() - bare.model.get_parameter(name)).abs().flatten(1).amax(1)
        assert (error <= bare.model.get_parameter(name).abs().flatten(1).amax(1)).all()
        assert error.median() <= record.scale.median()
    told = ptq.report()
    assert told["output_error"] < 0.1
    assert told["sample_error"] < 0.1
    assert told["int8_disagrees"] < 0.02
    assert 0.25 < told["artifact_ratio"] < 0.4
    assert sum(told["time_steps"]) == 16
    assert told["layers"]["conv_in.weight"].keys() >= {"bits", "input_bits", "low", "high"}
    assert plain(told)
    ptq.figures(tmp_path)
    assert (tmp_path / "samples.png").stat().st_size > 0
    assert (tmp_path / "time_steps.png").stat().st_size > 0
    assert made.sample(labels=[0, 1], steps=2).shape == (2, 1, 8, 8)  # the quantised module samples


def test_validate_alone_quantises_a_pipeline_of_text_with_guidance():
    made = DiffusionModule(tiny_stable_diffusion(16))
    images = torch.randn(2, 3, 16, 16, generator=generator(0))
    batches = DataLoader([{"image": images, "prompt": ["a", "b c"]}], batch_size=None)
    ptq = method(guidance=4.0, scheduler="DPMSolverMultistepScheduler", steps=3, num_samples=8, batch_size=4)
    trainer(ptq).validate(made, batches, verbose=False)
    assert len(ptq.samples) == 16
    assert {f"model.{name}" for name in quantized_inputs(made.model)} == ptq.inputs.keys()
    assert made.sample(prompts=["a cat"], steps=2, guidance=4.0).shape == (1, 3, 16, 16)
    assert made.pipeline.unet is made.model


def test_without_a_trainer_and_with_a_scheduler_of_its_own():
    made = module(None)
    fp = copy.deepcopy(made.model)
    method(scheduler=DDIMScheduler(), targets="Conv2d", exclude=["conv_in"]).quantize(made)
    records = quantized_weights(made.model)
    assert "conv_in.weight" not in records
    assert all(record.shape[2:] for record in records.values())
    x, t = torch.randn(4, 1, 8, 8, generator=generator(0)), torch.tensor([1, 100, 500, 900])
    with torch.no_grad():
        got, want = made.model(x, t).sample, fp(x, t).sample
    assert 0 < (got - want).norm() < 0.1 * want.norm()


def test_refusals_come_before_training():
    made = module()
    made.noise_scheduler = None
    before = {name: value.clone() for name, value in made.state_dict().items()}
    with pytest.raises(ConfigurationError, match="noise_scheduler"):
        trainer(method()).fit(made, data())
    made = module()
    made.noise_scheduler.register_to_config(prediction_type="nonsense")
    with pytest.raises(ConfigurationError, match="prediction_type"):
        trainer(method()).fit(made, data())
    with pytest.raises(ConfigurationError, match="guidance"):
        trainer(method(guidance=2.0)).validate(module(), data(1), verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    with pytest.raises(ConfigurationError, match="report"):
        method().report()


def test_a_network_without_time_is_refused_before_training():
    classifier = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3))
    assert not takes_time(classifier)
    assert not takes_time(timm.create_model("vit_tiny_patch16_224", img_size=32))  # (x, attn_mask=None, ...)
    assert takes_time(tiny_unet(8, 1))
    assert takes_time(lambda x, t: x)
    assert takes_time(lambda x, t=None: x)
    module = DiffusionModule(tiny_unet(8, 1))
    module.model = classifier
    trainer = Trainer(max_steps=1, logger=False, enable_checkpointing=False, callbacks=[DiffusionPTQCallback(steps=4)])
    with pytest.raises(ConfigurationError, match="takes no time"):
        trainer.fit(module, DataLoader([torch.zeros(2, 1, 8, 8)], batch_size=None))

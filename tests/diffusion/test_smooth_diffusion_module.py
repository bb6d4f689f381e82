"""smooth-diffusion under the Trainer: what it adds, what it leaves alone, what it saves."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, UNet2DModel
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

from effdl.core.adapters import load_lora, lora_layers, merged
from effdl.core.errors import ConfigurationError
from effdl.core.export import save_model
from effdl.data.loading import ResumableLoader
from effdl.diffusion._smooth_diffusion_example import Denoising
from effdl.diffusion.smooth_diffusion import SmoothDiffusionMixin, SmoothDiffusionModule, interpolate
from effdl.tasks.diffusion import DiffusionModule
from effdl.tasks.tiny import tiny_stable_diffusion, tiny_unet
from tests.diffusion.smooth_diffusion_modules import Fused, Late, LightningDenoiser, Manual, NoSchedule, Silent
from tests.support import BARE, quiet_fit

QUIET = {**BARE, "gradient_clip_val": 1.0}


def loader():
    images = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    return ResumableLoader([{"image": image} for image in images], batch_size=4, shuffle=True)


def unet() -> UNet2DModel:
    return tiny_unet(8, 1)


def adam(parameters):
    return torch.optim.AdamW(parameters, 1e-3)


def smooth(**kwargs) -> SmoothDiffusionModule:
    torch.manual_seed(0)
    return SmoothDiffusionModule(**{"model": unet(), "optimizer": adam, "istd_pairs": 0, **kwargs})


def fit(module, callbacks=(), data=None, **kwargs):
    options = {"max_epochs": 1, "num_sanity_val_steps": 0, "gradient_clip_val": 1.0, **kwargs}
    return quiet_fit(module, data or loader(), *callbacks, **options)


def weights(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.fixture
def counted(monkeypatch):
    """Calls of ``torch.autograd.grad``."""
    calls, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
    return calls


def test_must_07_lambda_zero_is_the_plain_trainer(counted):
    plain, off, on = DiffusionModule(unet(), optimizer=adam), smooth(lambda_reg=0.0, rank=None), smooth(rank=None)
    losses = []
    for module in (plain, off, on):
        trainer = fit(module)
        losses.append(trainer.callback_metrics["train/loss_step"])
        if module is off:
            assert not counted
    assert torch.equal(weights(plain), weights(off))
    assert losses[0] == losses[1]
    assert len(counted) == 4
    assert not torch.equal(weights(off), weights(on))


def test_every_and_the_logged_values(counted):
    module = smooth(rank=None, every=2)
    trainer = fit(module)
    assert len(counted) == 2
    logged = {name.partition("/")[2] for name in trainer.callback_metrics if name.startswith("smooth-diffusion/")}
    assert logged == {"penalty", "variation", "mean_variation"}
    assert trainer.callback_metrics["smooth-diffusion/mean_variation"] == module.variation.mean > 0


@pytest.mark.parametrize("rank", [None, 2])
def test_must_08_resume_is_exact_running_mean_included(rank, tmp_path):
    whole = smooth(rank=rank)
    fit(whole)
    save = ModelCheckpoint(tmp_path, filename="third", every_n_train_steps=3, save_top_k=-1)
    fit(smooth(rank=rank), [save])
    checkpoint = torch.load(tmp_path / "third.ckpt", weights_only=True)
    bare = DiffusionModule(unet())
    bare.load_state_dict(checkpoint["state_dict"], strict=True)
    resumed = smooth(rank=rank)
    fit(resumed, ckpt_path=tmp_path / "third.ckpt")
    assert torch.equal(weights(whole), weights(resumed))
    assert whole.variation.mean == resumed.variation.mean > 0
    assert checkpoint["effdl"]["smooth-diffusion"]["mean_variation"] != whole.variation.mean


def test_averaged_adapter_folds_and_resumes(tmp_path):
    save = ModelCheckpoint(tmp_path, filename="saved", every_n_train_steps=3, save_top_k=-1)
    whole = smooth(rank=2)
    fit(whole, [EMAWeightAveraging(decay=0.5), save])
    state = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    for key in ("state_dict", "current_model_state"):
        assert not any("lora" in name or "base_layer" in name for name in state[key])
    resumed = smooth(rank=2)
    fit(resumed, [EMAWeightAveraging(decay=0.5)], ckpt_path=tmp_path / "saved.ckpt")
    assert torch.equal(weights(whole), weights(resumed))


def test_must_09_lora_trains_alone_and_every_export_agrees(tmp_path):
    module, stock = smooth(rank=4), unet()
    layers = lora_layers(module.model)
    assert {name.rpartition(".to_")[2] for name in layers} == {"q", "k", "v", "out.0"}
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trained == sum(4 * (layer.in_features + layer.out_features) for layer in layers.values())
    fit(module, max_epochs=2)
    for name, layer in layers.items():
        assert torch.equal(layer.base_layer.weight, stock.get_submodule(name).weight)
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    want = module.model.eval()(x, t).sample
    assert (want - stock(x, t).sample).abs().max() > 1e-4
    assert torch.allclose(merged(module.model)(x, t).sample, want, atol=1e-5)
    load_lora(stock, module.save_lora(tmp_path / "adapter"))
    assert torch.equal(stock(x, t).sample, want)
    assert save_model(module, tmp_path / "model") == "pretrained"
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "model")
    pipeline.set_progress_bar_config(disable=True)
    images = [
        DDIMPipeline(network, pipeline.scheduler)(
            2, torch.Generator().manual_seed(0), num_inference_steps=3, output_type="np"
        ).images  # fmt: skip
        for network in (pipeline.unet, module.model)
    ]
    assert abs(images[0] - images[1]).max() < 1e-4
    assert (tmp_path / "model" / "pytorch_lora_weights.safetensors").is_file()


def test_text_to_image_adapter_opens_with_diffusers(tmp_path):
    module = smooth(model=tiny_stable_diffusion(), rank=2)
    images = torch.randn(4, 3, 32, 32).clamp(-1, 1)
    data = ResumableLoader([{"image": i, "prompt": "a cat"} for i in images], batch_size=2)
    fit(module, data=data)
    module.save_lora(tmp_path)
    stock = tiny_stable_diffusion()
    stock.load_lora_weights(tmp_path)
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 16, 32))
    assert torch.equal(stock.unet(*inputs).sample, module.model.eval()(*inputs).sample)


def mixed(base) -> type:
    return type("Mine", (SmoothDiffusionMixin, base), {})


def test_a_module_that_builds_late_gets_its_adapter():
    module = mixed(Late)(rank=2)
    assert not lora_layers(module)
    fit(module)
    assert lora_layers(module)
    assert module.variation.mean > 0


def variation_of(change) -> torch.Tensor:
    module = smooth(rank=None)
    change(module)
    fit(module, limit_train_batches=1)
    return module.variation.mean


def test_gradient_checkpointing_and_compilation_change_nothing():
    plain = variation_of(lambda module: None)
    checkpointed = variation_of(lambda module: module.model.enable_gradient_checkpointing())
    assert torch.allclose(plain, checkpointed, rtol=1e-5)
    with pytest.warns(UserWarning, match="eagerly"):
        compiled = variation_of(lambda module: module.model.compile())
    assert torch.equal(plain, compiled)


def three_channels():
    return ResumableLoader([(torch.randn(3, 8, 8), 0) for _ in range(8)], batch_size=4)


@pytest.mark.parametrize(
    ("kind", "named"),
    [("detached", "detaches its input"), ("reentrant", "use_reentrant"), ("fused", "second derivative")],
)
def test_what_cannot_be_differentiated_twice_is_explained(kind, named):
    module = mixed(Denoising)(model=Fused(kind), rank=None)
    with pytest.raises(ConfigurationError, match=named):
        fit(module, data=three_channels())


@pytest.mark.parametrize(
    ("base", "kwargs", "named"),
    [
        (NoSchedule, {}, "noise_scheduler"), (Manual, {}, "automatic optimisation"), (Silent, {}, "did not call"),
        (Denoising, {"network": "unet"}, "network='unet'"),
    ],
)  # fmt: skip
def test_modules_that_do_not_fit_are_told_why(base, kwargs, named):
    module = mixed(base)(rank=None, **kwargs)
    before = weights(module)
    with pytest.raises(ConfigurationError, match=named):
        fit(module, data=three_channels(), gradient_clip_val=None)
    assert torch.equal(before, weights(module))


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: smooth(targets="nowhere"), "targets"),
        (lambda: smooth(istd_pairs=-1), "istd_pairs"),
        (lambda: smooth(rank=None).save_lora("x"), "rank"),
        (lambda: type("Mine", (Denoising, SmoothDiffusionMixin), {}), "must come first"),
    ],
)
def test_refusals_at_construction(make, named):
    with pytest.raises(ConfigurationError, match=named):
        make()


def test_istd_is_logged_and_paths_are_drawn(tmp_path):
    module = smooth(model=tiny_unet(8, 1, num_classes=3), rank=None, istd_pairs=2)
    data = ResumableLoader([{"image": torch.zeros(1, 8, 8), "label": i % 3} for i in range(4)], batch_size=4)
    noise = torch.random.get_rng_state()
    trainer = Trainer(**QUIET)
    (logged,) = trainer.validate(module, data, verbose=False)
    assert logged["val/istd"] > 0
    assert module.report() == {}
    Trainer(**{**QUIET, "num_sanity_val_steps": 1}, max_steps=1).fit(module, data, data)
    assert module.report()["before"]["metrics"]["val/istd"] == pytest.approx(logged["val/istd"])
    module.figures(tmp_path)
    assert (tmp_path / "interpolation.png").stat().st_size > 0
    assert torch.equal(noise, torch.random.get_rng_state())
    start, end = torch.randn(2, 3, 1, 8, 8)
    images = interpolate(module, start, end, points=4, steps=2, condition={"class_labels": torch.arange(3)})
    again = interpolate(module, start[1:2], end[1:2], points=4, steps=2, condition={"class_labels": torch.tensor([1])})
    assert images.shape == (3, 4, 1, 8, 8)
    assert torch.allclose(images[1:2], again, atol=1e-5)


def test_own_loop_without_a_trainer():
    module = mixed(LightningDenoiser)(rank=None)
    loss = module.training_step(torch.randn(2, 1, 8, 8), 0)
    loss.backward()
    assert module.variation.mean > 0
    first = module.variation.mean
    module.training_step(torch.randn(2, 1, 8, 8), 0)
    assert module.variation.mean != first

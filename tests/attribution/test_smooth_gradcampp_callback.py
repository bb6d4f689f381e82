"""smooth-gradcampp: the callback."""

from __future__ import annotations

import json

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from torch import nn
from torch.utils.data import DataLoader

from effdl.attribution._figures import caption
from effdl.callbacks import SmoothGradCAMCallback
from effdl.core.errors import ConfigurationError
from tests.attribution.smooth_gradcampp_parts import small_cnn


class Module(LightningModule):
    """A foreign module with BatchNorm and Dropout, without a forward of its own."""

    def __init__(self, network=None):
        super().__init__()
        self.net = small_cnn() if network is None else network

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.training_step(batch, batch_idx))

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return self.net(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def loader(batches=6, size=4, shuffle=False):
    g = torch.Generator().manual_seed(2)
    rows = [(torch.randn(3, 16, 16, generator=g), int(i) % 5) for i in range(batches * size)]
    return DataLoader(rows, batch_size=size, shuffle=shuffle)


def trainer_with(*callbacks, epochs=1, **options):
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(max_epochs=epochs, callbacks=list(callbacks), **{**quiet, "enable_checkpointing": saves, **options})


class GradWatch(Callback):
    """What ``.grad`` and the training flags are before and after the callbacks between its two copies."""

    def __init__(self, seen):
        self.seen = seen

    def on_validation_batch_end(self, trainer, pl_module, *args):
        grads = [None if p.grad is None else p.grad.clone() for p in pl_module.parameters()]
        self.seen.append((grads, [m.training for m in pl_module.modules()]))


def test_must_09_a_run_with_the_callback_is_bit_identical():
    def run(*callbacks):
        torch.manual_seed(3)
        module = Module()
        # validation in the middle of an accumulation, so that there are gradients to be left alone
        options = {"val_check_interval": 3, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0}
        trainer_with(*callbacks, epochs=2, **options).fit(module, loader(shuffle=True), loader(2))
        return module.state_dict(), torch.get_rng_state()

    bare, stream = run()
    before, after = [], []
    cam = SmoothGradCAMCallback(n_samples=3, every=1, num_images=6)
    with_cam, stream_with_cam = run(GradWatch(before), cam, GradWatch(after))
    assert len(cam.rows) == 6
    assert all(torch.equal(bare[key], with_cam[key]) for key in bare)
    assert torch.equal(stream, stream_with_cam)
    assert any(grad is not None and grad.any() for grads, _ in before for grad in grads)
    for (grads, flags), (grads_after, flags_after) in zip(before, after, strict=True):
        assert flags == flags_after
        for a, b in zip(grads, grads_after):
            assert (a is None and b is None) or torch.equal(a, b)


def test_must_09_training_flags_come_back_when_the_attributor_raises():
    flags = []

    class Flags(SmoothGradCAMCallback):
        def _explain(self, pl_module, x, labels):
            pl_module.net[1].train()
            flags.append([m.training for m in pl_module.modules()])
            try:
                return super()._explain(pl_module, x, labels)
            finally:
                flags.append([m.training for m in pl_module.modules()])
                flags.append([p.grad for p in pl_module.parameters()])

    with pytest.raises(ConfigurationError, match="class_idx=7"):
        trainer_with(Flags(class_idx=7)).validate(Module(), loader(1), verbose=False)
    assert flags[0] == flags[1]
    assert flags[0].count(True) == 1
    assert set(flags[2]) == {None}


class Takes(Logger):
    """A logger that takes images the way W&B's does, or (``tensorboard=True``) TensorBoard's experiment."""

    name, version = "takes", 0

    def __init__(self, tensorboard=False):
        self.images, self.experiment = [], self
        log = self._add_image if tensorboard else self._log_image
        setattr(self, "add_image" if tensorboard else "log_image", log)

    def _log_image(self, key, images, step=None):
        self.images.append((key, images[0].shape, images[0].dtype, step))

    def _add_image(self, tag, image, global_step, dataformats="CHW"):
        assert dataformats == "CHW"
        self._log_image(tag, [image.permute(1, 2, 0).numpy()], global_step)

    def log_metrics(self, metrics, step=None):
        pass

    log_hyperparams = log_metrics


def test_pictures_and_reports_go_to_loggers_and_run_folder(tmp_path):
    takers = [Takes(), Takes(tensorboard=True)]
    cam = SmoothGradCAMCallback(n_samples=2, num_images=2)
    trainer = trainer_with(cam, epochs=2, logger=[CSVLogger(tmp_path), *takers], num_sanity_val_steps=1)
    trainer.fit(Module(), loader(), loader(2))
    folder = tmp_path / "lightning_logs" / "version_0" / "figures"
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"smooth-gradcampp-step={n}.{end}" for n in (12, 6) for end in ("json", "png")]
    report = json.loads((folder / "smooth-gradcampp-step=12.json").read_text())
    assert report["explained_layers"] == ["6"]
    assert {"n_samples": 2, "sigma": 0.15, "seed": 0, "step": 12}.items() <= report.items()
    assert [sorted(row) for row in report["images"]] == [["class", "label", "predicted", "probability", "score"]] * 2
    for taker in takers:
        assert [(key, step) for key, _, _, step in taker.images] == [("smooth-gradcampp/overlay", n) for n in (6, 12)]
        assert taker.images[0][1][2] == 3
    assert cam.figures(tmp_path / "drawn")[0].stat().st_size > 10_000


@pytest.mark.parametrize("options", [{"logger": False}, {"fast_dev_run": 2}, {"write": False}])
def test_nothing_is_written_where_nothing_should_be(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cam = SmoothGradCAMCallback(n_samples=2, num_images=1, write=options.pop("write", True))
    options = {"logger": CSVLogger(tmp_path), **options}
    trainer_with(cam, default_root_dir=tmp_path, **options).fit(Module(), loader(), loader(2))
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".png", ".json")]
    assert len(cam.figure().axes) == 2 + 1


@pytest.mark.parametrize(("every", "steps"), [("1ep", [6, 12, 18]), ("2ep", [12]), (4, [6, 12, 18]), (0.4, [12])])
def test_every_counts_between_analyses(every, steps):
    seen = []

    class Watch(SmoothGradCAMCallback):
        def _finish(self, trainer, pl_module):
            super()._finish(trainer, pl_module)
            seen.append(self.step)

        on_validation_epoch_end = _finish

    cam = Watch(n_samples=1, every=every, num_images=1)
    trainer_with(cam, epochs=3).fit(Module(), loader(), loader(1))
    assert sorted(set(seen) - {0}) == steps
    cam.step = 10**6  # a second, shorter fit starts over
    trainer_with(cam).fit(Module(), loader(), loader(1))
    assert cam.step == 6


def test_the_noise_goes_on_where_it_was_after_a_resume(tmp_path):
    make = lambda: SmoothGradCAMCallback(targets="2", n_samples=3, every="1ep")  # noqa: E731
    whole, first, second = make(), make(), make()
    trainer_with(whole, epochs=2).fit(Module(), loader(), loader(2))
    save = ModelCheckpoint(tmp_path, save_last=True)
    trainer_with(first, save).fit(Module(), loader(), loader(2))
    trainer = trainer_with(second, epochs=2)
    trainer.fit(Module(), loader(), loader(2), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][first.state_key]
    assert sorted(state) == ["generator", "interval", "step"]
    assert torch.equal(whole.generator.get_state(), second.generator.get_state())
    assert second.interval == 6
    assert second.step == 12


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_stages_alone_and_the_class_to_explain(stage):
    module = Module()
    said = [module.eval().net(x).argmax(1).tolist() for x, _ in loader(2)][0]
    for class_idx, want in ((None, said), (3, [3] * 4), ("label", [0, 1, 2, 3])):
        cam = SmoothGradCAMCallback(n_samples=1, class_idx=class_idx, num_images=4)
        getattr(trainer_with(cam), stage)(module, loader(2))
        assert [row["class"] for row in cam.rows] == want
        assert [row["label"] for row in cam.rows] == [0, 1, 2, 3]
        assert cam.maps["6"].shape == (4, 16, 16)


def test_images_are_collected_over_batches_and_the_averaged_weights_explained():
    results = []
    for order in (0, 1):
        torch.manual_seed(0)
        cam, ema = SmoothGradCAMCallback(targets="2", n_samples=2, num_images=6), EMAWeightAveraging(decay=0.5)
        trainer_with(*([cam, ema] if order else [ema, cam])).fit(Module(), loader(), loader(3))
        results.append(cam)
    assert len(results[0].images) == 6
    (first, _), (second, _), *_ = loader(3)
    assert torch.equal(results[0].images, torch.cat([first, second[:2]]))
    assert torch.equal(results[0].maps["2"], results[1].maps["2"])


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precisions_and_compiled_modules(precision):
    cam = SmoothGradCAMCallback(n_samples=2)
    module = torch.compile(Module(), backend="eager") if precision == "bf16-mixed" else Module()
    trainer_with(cam, precision=precision).fit(module, loader(), loader(1))
    (heat,) = cam.maps.values()
    assert heat.dtype == torch.float32
    assert heat.isfinite().all()
    torch.compiler.reset()


def test_transformers_several_networks_and_target_fn():
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=16, patch_size=4, depth=2)
    cam = SmoothGradCAMCallback(n_samples=2, reshape_transform="vit")
    trainer_with(cam).validate(Module(vit), loader(1), verbose=False)
    assert set(cam.maps) == {"blocks.1.norm1"}

    module = Module()
    module.teacher = nn.Linear(2, 2)
    with pytest.raises(ConfigurationError, match="network=None.*2 submodules"):
        trainer_with(SmoothGradCAMCallback()).validate(module, loader(1), verbose=False)
    cam = SmoothGradCAMCallback(n_samples=2, network="net", target_fn=lambda logits: logits.logsumexp(1))
    trainer_with(cam).validate(module, loader(1), verbose=False)
    assert [sorted(row) for row in cam.rows] == [["label", "score"]] * 4
    assert caption(cam.rows[0]).startswith("score")


def test_layers_built_late_and_layers_that_are_not_there():
    class Late(Module):
        def __init__(self):
            super().__init__(nn.Identity())
            self.net = None

        def configure_model(self):
            self.net = small_cnn() if self.net is None else self.net

    cam = SmoothGradCAMCallback(targets="2", n_samples=2)
    trainer_with(cam).fit(Late(), loader(), loader(1))
    assert set(cam.maps) == {"2"}
    for options in ({"targets": "11"}, {"exclude": "layer9"}, {"network": "nett"}):
        with pytest.raises(ConfigurationError, match=next(iter(options))):
            trainer_with(SmoothGradCAMCallback(**options)).fit(Module(), loader(), loader(1))
    with pytest.warns(UserWarning, match="explains validation images"):
        trainer_with(SmoothGradCAMCallback()).fit(Module(), loader())
    with pytest.raises(ConfigurationError, match="figure"):
        SmoothGradCAMCallback().figure()

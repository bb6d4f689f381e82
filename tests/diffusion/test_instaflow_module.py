"""instaflow: the module's stages, resuming, distillation."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from effdl.core.errors import ConfigurationError
from effdl.data.loading import ResumableLoader
from effdl.diffusion._draws import Draws
from effdl.diffusion.instaflow import ReflowModule, euler, rectified_flow_loss
from effdl.tasks.tiny import tiny_stable_diffusion, tiny_unet
from tests.diffusion.instaflow_parts import QUIET, fit, plane, rows


def test_distillation_is_the_flow_loss_at_zero_and_the_student_is_a_copy():
    net, batch = plane(), next(iter(DataLoader(rows(), batch_size=8)))
    module = ReflowModule(net, stage="distill")
    loss = module.training_step(batch, 0)
    x0, x1, c = batch
    torch.testing.assert_close(loss, (x0 + net(x0, torch.zeros(8), c) - x1).square().mean())
    assert module.model is not net
    assert all(torch.equal(a, b) for a, b in zip(module.model.parameters(), net.parameters()))
    for steps in (1, 4):
        times = ReflowModule(net, stage="distill", steps=steps)._times(torch.rand(4000))
        assert sorted(set(times.tolist())) == [i / steps for i in range(steps)]
    times = ReflowModule(net)._times(torch.arange(4000) / 4000)
    assert 1e-3 <= times.min() < 2e-3
    assert times.max() < 1


def test_flow_stage_takes_images_and_draws_its_own_noise():
    module = ReflowModule(plane(), stage="flow")
    batch = {"image": torch.randn(8, 2), "label": torch.arange(8) % 3}
    draws = Draws(0, 0, 0)
    x0, x1, c = module._triplet(batch, draws)
    assert torch.equal(x1, batch["image"])
    assert torch.equal(c, batch["label"])
    assert torch.equal(x0, module._triplet(batch, draws)[0])
    assert not torch.equal(x0, module._triplet(batch, Draws(0, 0, 1))[0])
    state = torch.get_rng_state()
    loss = module.training_step(batch, 0)
    assert torch.equal(state, torch.get_rng_state())
    t = module._times(draws.uniform(8))
    torch.testing.assert_close(loss, rectified_flow_loss(lambda x, t: module.model(x, t, c), x0, x1, t))
    with pytest.raises(ConfigurationError, match="ReflowPairs"):
        ReflowModule(plane()).training_step(batch, 0)


def test_online_reflow_equals_the_pairs_of_its_teacher():
    net = plane()
    module = ReflowModule(net, online_steps=20)
    batch = {"image": torch.zeros(8, 2), "label": torch.arange(8) % 3}
    x0, x1, c = module._triplet(batch, Draws(0, 0, 0))
    torch.testing.assert_close(x1, euler(lambda x, t: net(x, t, c), x0, 20).detach())
    before = [p.clone() for p in net.parameters()]
    fit(module, DataLoader([batch] * 6, batch_size=None), max_epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(before, module.model.parameters()))
    assert not any(p.requires_grad for p in net.parameters())
    assert set(module.state_dict()) == {f"model.{name}" for name in net.state_dict()}


def test_two_processes_draw_what_one_does(monkeypatch):
    import effdl.diffusion._draws as draws

    one = Draws(3, 1, 2)
    noise, uniform = one.noise((8, 2)), one.uniform(8)
    monkeypatch.setattr(draws, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(draws, "rank", lambda rank=rank: rank)
        assert torch.equal(one.noise((4, 2)), noise[rank::2])
        assert torch.equal(one.uniform(4), uniform[rank::2])


class StopAfter(Callback):
    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.batches:
            raise RuntimeError("stopped on purpose")


@pytest.mark.parametrize("online", [None, 3])
def test_must_f_resume_in_mid_reflow(tmp_path, online):
    def make():
        ema = EMAWeightAveraging(decay=0.9)
        module = ReflowModule(plane(), online_steps=online, optimizer=lambda p: torch.optim.Adam(p, 1e-2))
        return module, ema

    def loader():
        x0, x1, label = rows().tensors
        data = torch.utils.data.TensorDataset(x0, label) if online else rows()
        return ResumableLoader(data, batch_size=4, shuffle=True)

    def averaged(path):
        state = torch.load(path, weights_only=True)
        return {**state["state_dict"], **{f"raw.{k}": v for k, v in state["current_model_state"].items()}}

    whole, ema = make()
    fit(whole, loader(), [ema, ModelCheckpoint(tmp_path / "a", save_last=True)])
    stopped, ema = make()
    save = ModelCheckpoint(tmp_path / "b", filename="mid", every_n_train_steps=5, save_top_k=-1)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(stopped, loader(), [ema, save, StopAfter(6)])
    (mid,) = (tmp_path / "b").glob("*.ckpt")
    resumed, ema = make()
    fit(resumed, loader(), [ema, ModelCheckpoint(tmp_path / "c", save_last=True)], ckpt_path=mid)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, atol=1e-6, rtol=0)
    a, c = averaged(tmp_path / "a" / "last.ckpt"), averaged(tmp_path / "c" / "last.ckpt")
    assert set(a) == set(c)
    for name, value in a.items():
        torch.testing.assert_close(c[name], value, atol=1e-6, rtol=0)
    checkpoint = torch.load(mid, weights_only=True)
    assert set(checkpoint["state_dict"]) == {f"model.{name}" for name in plane().state_dict()}  # no teacher
    assert checkpoint["effdl"]["instaflow"]["stage"] == "reflow"
    plane().load_state_dict({k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items()})
    with pytest.raises(ConfigurationError, match="stage"):
        fit(ReflowModule(plane(), stage="distill"), loader(), ckpt_path=mid)


def test_must_f_the_teacher_is_unchanged():
    teacher = plane(3)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    module = ReflowModule(plane(), teacher=teacher, online_steps=2)
    batch = {"image": torch.zeros(8, 2), "label": torch.arange(8) % 3}
    fit(module, DataLoader([batch] * 4, batch_size=None), [EMAWeightAveraging(decay=0.9)], max_epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any("teacher" in name for name, _ in module.named_modules())


def test_online_reflow_of_a_diffusion_model_is_refused():
    with pytest.raises(ConfigurationError, match="online_steps"):
        ReflowModule(tiny_stable_diffusion(16), online_steps=20)


def test_validation_logs_loss_and_straightness():
    val = DataLoader(rows(8), batch_size=4)
    module = ReflowModule(plane())
    logged = fit(module, val=val, max_epochs=1).callback_metrics
    assert {"train/loss", "val/loss", "instaflow/straightness"} <= set(logged)
    distill = fit(ReflowModule(plane(), stage="distill"), val=val, max_epochs=1)
    assert "instaflow/straightness" not in distill.callback_metrics
    again = Trainer(**QUIET).validate(module, val, verbose=False)[0]
    assert again["val/loss"] == pytest.approx(float(logged["val/loss"]), abs=1e-6)


def test_accumulation_and_compiled_student():
    module = ReflowModule(plane())
    module.model.compile(backend="eager")
    trainer = fit(module, accumulate_grad_batches=4, max_epochs=1)
    assert trainer.global_step == 2
    assert not any("_orig_mod" in name for name in module.state_dict())


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("stage", {"stage": "rectify"}), ("steps", {"steps": 0}), ("steps", {"steps": 1.0}), ("eps", {"eps": 0.1}),
        ("eps", {"eps": -1e-3}), ("guidance", {"guidance": -0.1}), ("distance", {"distance": "l1"}),
        ("distance", {"distance": "lpips"}), ("distance", {"stage": "distill", "steps": 4, "distance": "lpips"}),
        ("distance", {"stage": "flow", "distance": nn.L1Loss()}), ("convention", {"convention": "sd"}),
        ("online_steps", {"online_steps": 0}), ("seed", {"seed": -1}),
        ("online_steps", {"stage": "distill", "online_steps": 20}), ("teacher", {"teacher": plane()}),
    ],
)  # fmt: skip
def test_bad_arguments_of_the_module_are_named(name, kwargs):
    with pytest.raises(ConfigurationError, match=name):
        ReflowModule(plane(), **kwargs)


def test_lpips_sees_rgb_images_only(monkeypatch):
    import effdl.diffusion._perceptual as perceptual

    monkeypatch.setattr(perceptual, "lpips", lambda: nn.PairwiseDistance())
    with pytest.raises(ConfigurationError, match="distance"):
        ReflowModule(tiny_unet(16, 1), stage="distill", distance="lpips")
    small = ReflowModule(tiny_unet(8, 3), stage="distill", distance="lpips")
    with pytest.raises(ConfigurationError, match="16 pixels"):
        small.training_step((torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), None), 0)
    right = ReflowModule(tiny_unet(16, 3), stage="distill", distance="lpips")
    right.training_step((torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16), None), 0)


def test_perceptual_distillation_compares_decoded_images():
    pipeline, seen = tiny_stable_diffusion(16), []

    def distance(images, targets):
        seen.append((images, targets))
        return (images - targets).abs().mean((1, 2, 3))

    module = ReflowModule(pipeline, stage="distill", distance=distance)
    batch = {"x0": torch.randn(2, 4, 4, 4), "x1": torch.randn(2, 4, 4, 4), "prompt": ["a", "b"]}
    loss = module.training_step(batch, 0)
    loss.backward()
    images, targets = seen[0]
    assert images.shape == (2, 3, 16, 16)
    assert images.requires_grad
    assert not targets.requires_grad
    vae = pipeline.vae
    torch.testing.assert_close(targets, vae.decode(batch["x1"] / vae.config.scaling_factor).sample.detach())
    assert all(p.grad is not None for p in module.model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in vae.parameters())

"""instaflow: networks and time labels, pair tables, the module's stages, pipelines in and out."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from effdl.core.errors import ConfigurationError
from effdl.data.loading import ResumableLoader
from effdl.diffusion._draws import Draws
from effdl.diffusion.instaflow import (
    CONVENTIONS,
    FlowSource,
    PairTable,
    ReflowModule,
    ReflowPairs,
    StackedDenoiser,
    TimeConvention,
    euler,
    guided_velocity,
    merge_delta,
    rectified_flow_loss,
)
from effdl.tasks.tiny import (
    tiny_clip_text_model,
    tiny_clip_tokenizer,
    tiny_sd3_transformer,
    tiny_stable_diffusion,
    tiny_unet,
)

QUIET = {
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}  # fmt: skip


class Plane(nn.Module):
    """A velocity in the plane, conditioned on one of three classes."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x, t, c):
        return self.net(torch.cat([x, t[:, None], nn.functional.one_hot(c, 3).to(x)], 1))


def plane(seed: int = 0) -> Plane:
    torch.manual_seed(seed)
    return Plane()


def rows(count: int = 32) -> torch.utils.data.TensorDataset:
    g = torch.Generator().manual_seed(0)
    x0 = torch.randn(count, 2, generator=g)
    return torch.utils.data.TensorDataset(x0, 2 * x0 + 1, torch.arange(count) % 3)


def fit(module, data=None, callbacks=(), ckpt_path=None, val=None, **kwargs):
    data = ResumableLoader(rows(), batch_size=4, shuffle=True) if data is None else data
    options = {**QUIET, "max_epochs": 2, "enable_checkpointing": any(hasattr(c, "best_model_path") for c in callbacks)}
    trainer = Trainer(callbacks=list(callbacks), **{**options, **kwargs})
    loaders = {"datamodule": data} if isinstance(data, ReflowPairs) else {"train_dataloaders": data}
    if val is not None:
        loaders["val_dataloaders"] = val
    trainer.fit(module, **loaders, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


# --- networks and time labels ------------------------------------------------------------------------------------


def test_time_labels():
    t = torch.tensor([0.0, 0.25, 1.0])
    assert CONVENTIONS["instaflow"].label(t).tolist() == [1000.0, 750.0, 0.0]  # the single step calls the net at 1000
    assert CONVENTIONS["rectified_flow"].label(t).tolist() == [0.0, 249.75, 999.0]
    assert CONVENTIONS["plain"].label(t).tolist() == t.tolist()
    assert (CONVENTIONS["diffusers"].sign, CONVENTIONS["instaflow"].sign) == (-1.0, 1.0)


def test_conventions_describe_one_flow():
    """The Gaussian flow written for each convention, seen through it, is the same flow."""
    m, s = 1.5, 0.5
    x0 = torch.linspace(-2, 2, 5)[:, None]
    for convention in CONVENTIONS.values():

        def network(x, label, condition, convention=convention):
            t = label / convention.time_scale
            t = (1 - t if convention.reverse_time else t)[:, None]
            return convention.sign * (m + (s - 1) * (x - t * m) / (1 - t + t * s))

        velocity = guided_velocity(convention.denoiser(network), None, None, 1.0)
        torch.testing.assert_close(euler(velocity, x0, 1), m + s * x0)
        torch.testing.assert_close(euler(velocity, x0, 7), m + s * x0)


def test_stock_networks_and_any_callable():
    t, seen = torch.tensor([0.0, 0.5]), []
    for network, shape, condition in (
        (tiny_unet(8, 1, num_classes=3), (1, 8, 8), torch.tensor([0, 2])),
        (tiny_unet(8, 1), (1, 8, 8), None),
        (tiny_stable_diffusion(16).unet, (4, 4, 4), torch.randn(2, 16, 32)),
        (tiny_sd3_transformer(), (4, 8, 8), {"encoder_hidden_states": torch.randn(2, 16, 32),
                                             "pooled_projections": torch.randn(2, 32)}),
        (lambda x, label, c: seen.append(label) or x, (3,), None),
    ):  # fmt: skip
        source = FlowSource(network)
        x = torch.randn(2, *shape)
        assert source.convention.denoiser(network)(x, t, condition).shape == x.shape
        assert source.shape in (shape, None)
    assert seen[0].tolist() == [0.0, 0.5]
    half = tiny_stable_diffusion(16).unet.bfloat16()
    out = CONVENTIONS["instaflow"].denoiser(half)(torch.randn(2, 4, 4, 4), t, torch.randn(2, 16, 32))
    assert out.dtype == torch.float32
    with pytest.raises(ConfigurationError, match="model"):
        TimeConvention().denoiser(lambda x, t, c: x[:, :1])(torch.zeros(2, 2), t, None)


def test_stacked_denoiser_feeds_the_output_on():
    net = plane()
    stacked = StackedDenoiser(net)
    x, t, c = torch.randn(4, 2), torch.rand(4), torch.tensor([0, 1, 2, 0])
    assert torch.equal(stacked(x, t, c), net(net(x, t, c), t, c))
    stacked.networks[0].net[0].weight.data.zero_()
    assert not torch.equal(stacked.networks[1].net[0].weight, torch.zeros(16, 6))
    with pytest.raises(ConfigurationError, match="copies"):
        StackedDenoiser(net, 1)
    fit(ReflowModule(StackedDenoiser(net)), max_epochs=1)


def test_delta_merge():
    base, custom, one_step = (plane(i).state_dict() for i in range(3))
    merged = merge_delta(one_step, custom, base)
    for name in base:
        torch.testing.assert_close(merged[name], one_step[name] + custom[name] - base[name])
    assert all(torch.equal(merge_delta(one_step, base, base)[n], one_step[n]) for n in base)
    with pytest.raises(ConfigurationError, match="custom"):
        merge_delta(one_step, {"other": torch.zeros(1)}, base)
    with pytest.raises(ConfigurationError, match="shape"):
        merge_delta(one_step, custom | {"net.2.bias": torch.zeros(3)}, base)


# --- pair table --------------------------------------------------------------------------------------------------


def solve(x0, condition):
    return 2 * x0 + condition[:, None]


def test_table_restarts_where_it_stopped_and_comes_out_the_same(tmp_path):
    labels = np.arange(50) % 3

    def arrays(folder):
        table = PairTable(folder)
        assert table.finished
        return [np.array(getattr(table, name)) for name in ("x0", "x1", "condition")]

    PairTable.create(tmp_path / "whole", labels, (2,), block=8).fill(solve)
    calls = []

    def dying(x0, condition):
        calls.append(len(x0))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return solve(x0, condition)

    with pytest.raises(KeyboardInterrupt):
        PairTable.create(tmp_path / "stopped", labels, (2,), block=8).fill(dying)
    assert PairTable(tmp_path / "stopped").done.sum() == 2
    PairTable.create(tmp_path / "stopped", labels, (2,), block=8).fill(dying)
    assert calls[3:] == [8, 8, 8, 8, 2]
    for rank in (1, 0):  # two processes, in any order
        PairTable.create(tmp_path / "shared", labels, (2,), block=8).fill(solve, rank, world=2)
    for other in ("stopped", "shared"):
        assert all(np.array_equal(a, b) for a, b in zip(arrays(tmp_path / "whole"), arrays(tmp_path / other)))
    batch = PairTable(tmp_path / "whole")[[7, 3]]
    assert (batch["x0"].dtype, batch["x1"].dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(batch["x1"], solve(batch["x0"], batch["condition"]), atol=5e-3, rtol=0)
    assert len({tuple(row) for row in arrays(tmp_path / "whole")[0].tolist()}) == 50


def test_table_refuses_other_settings_and_damage(tmp_path):
    make = lambda guidance, seed=0: PairTable.create(  # noqa: E731
        tmp_path, [0, 1], (2,), {"guidance": guidance}, seed=seed, dtype="float32"
    )
    make(1.5).fill(solve)
    with pytest.raises(ConfigurationError, match=r"guidance=1\.0 .*1\.5"):
        make(1.0)
    with pytest.raises(ConfigurationError, match="seed=1"):
        make(1.5, 1)
    np.save(tmp_path / "x1.npy", np.zeros((3, 2)))
    with pytest.raises(ConfigurationError, match="equal length"):
        PairTable(tmp_path)
    with pytest.raises(ConfigurationError, match="path"):
        PairTable(tmp_path / "nothing")


def test_table_refuses_a_teacher_of_another_shape_and_overflow(tmp_path):
    with pytest.raises(ConfigurationError, match="teacher"):
        PairTable.create(tmp_path / "a", [0], (2,)).fill(lambda x0, c: x0[:, :1])
    with pytest.raises(ConfigurationError, match="dtype"):
        PairTable.create(tmp_path / "b", [0], (2,)).fill(lambda x0, c: 1e6 + x0)


def test_pairs_follow_the_teacher(tmp_path):
    teacher = plane()
    data = ReflowPairs(tmp_path, teacher, conditions=3, count=40, steps=5, shape=[2], batch_size=8, dtype="float32")
    data.setup()
    batch = next(iter(data.train_dataloader()))
    expected = euler(lambda x, t: teacher(x, t, batch["condition"]), batch["x0"], 5)
    torch.testing.assert_close(batch["x1"], expected)
    assert batch["condition"].tolist() == (batch["index"] % 3).tolist()
    assert len(data.val_dataloader().dataset) == 2
    again = ReflowPairs(tmp_path)  # without a teacher: read
    again.setup()
    assert len(again.table) == 40
    assert again.guidance == 1.0
    with torch.no_grad():
        teacher.net[2].bias += 1
    with pytest.raises(ConfigurationError, match="teacher"):
        ReflowPairs(tmp_path, teacher, conditions=3, count=40, steps=5, shape=[2], dtype="float32").setup()


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("count", {"count": 0}), ("steps", {"steps": 0}), ("guidance", {"guidance": -1.0}), ("block", {"block": 0}),
        ("dtype", {"dtype": "bfloat16"}), ("batch_size", {"batch_size": 0}), ("val", {"val": 1.0}),
        ("seed", {"seed": -1}), ("conditions", {"conditions": []}), ("conditions", {"conditions": "no-such.txt"}),
        ("conditions", {"conditions": 0}), ("teacher", {"teacher": None}),
    ],
)  # fmt: skip
def test_bad_arguments_of_pairs_are_named(tmp_path, name, kwargs):
    with pytest.raises(ConfigurationError, match=name):
        ReflowPairs(tmp_path, **{"teacher": plane(), **kwargs})


def test_pairs_want_to_know_the_shape(tmp_path):
    with pytest.raises(ConfigurationError, match="shape"):
        ReflowPairs(tmp_path, plane()).setup()


# --- the module --------------------------------------------------------------------------------------------------


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


# --- pipelines ---------------------------------------------------------------------------------------------------


def test_text_pipeline_from_pairs_to_a_stock_pipeline(tmp_path):
    from diffusers import StableDiffusionPipeline

    prompts = ["a fox", "a crow", "a cat"]
    tiny_stable_diffusion(16).save_pretrained(tmp_path / "sd")
    data = ReflowPairs(tmp_path / "pairs", str(tmp_path / "sd"), prompts, count=6, steps=2, batch_size=2, val=0.0)
    module = ReflowModule(str(tmp_path / "sd"), convention="diffusers")
    fit(module, data, max_epochs=1)
    assert data.guidance == 6.0
    assert module.record()["guidance"] == 6.0
    module.save_pretrained(str(tmp_path / "reflowed"))
    record = json.loads((tmp_path / "reflowed" / "reflow.json").read_text())
    assert (record["k"], record["stage"], record["convention"]) == (2, "reflow", [1000.0, True, -1.0])

    noise = torch.randn(3, 4, 4, 4)
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "reflowed")
    for name, value in stock.unet.state_dict().items():
        assert torch.equal(value, module.model.state_dict()[name])
    stock.set_progress_bar_config(disable=True)
    images = stock(prompts, latents=noise, num_inference_steps=20, guidance_scale=1.0, output_type="latent").images
    ours = FlowSource(str(tmp_path / "reflowed")).solve(noise, prompts, steps=20)
    assert (images - ours).abs().max() < 0.02 * (ours - noise).abs().max()  # the stock grid begins at sigma = 0.999

    distilled = ReflowModule(str(tmp_path / "reflowed"), stage="distill")
    assert distilled.source.convention == CONVENTIONS["diffusers"]
    assert distilled.record()["k"] == 2
    assert distilled.sample(prompts, steps=1).shape == (3, 3, 16, 16)


def test_sd3_pipeline(tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    text = [CLIPTextModelWithProjection(tiny_clip_text_model().config) for _ in range(2)]
    width = 2 * text[0].config.projection_dim
    pipeline = StableDiffusion3Pipeline(
        transformer=tiny_sd3_transformer(4, joint_attention_dim=width, pooled_projection_dim=width),
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=tiny_stable_diffusion(16).vae,
        text_encoder=text[0], tokenizer=tiny_clip_tokenizer(), text_encoder_2=text[1],
        tokenizer_2=tiny_clip_tokenizer(), text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    source, noise = FlowSource(pipeline), torch.randn(2, 4, 4, 4)
    assert not source.is_diffusion
    ours = source.solve(noise, ["a fox", "a crow"], steps=4, guidance=2.0)
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"latents": noise, "guidance_scale": 2.0, "output_type": "latent", "height": 16, "width": 16}
    stock = pipeline(["a fox", "a crow"], sigmas=[1.0, 0.75, 0.5, 0.25], num_inference_steps=4, **arguments).images
    torch.testing.assert_close(ours, stock, atol=1e-4, rtol=1e-4)
    module = ReflowModule(pipeline, online_steps=2, guidance=2.0)
    module.training_step({"prompt": ["a fox", "a crow"]}, 0).backward()  # no images are needed
    module.save_pretrained(str(tmp_path))
    without = dict.fromkeys(["text_encoder_3", "tokenizer_3", "image_encoder", "feature_extractor"])
    again = StableDiffusion3Pipeline.from_pretrained(tmp_path, **without)
    assert all(torch.equal(v, module.model.state_dict()[k]) for k, v in again.transformer.state_dict().items())


def test_pairs_of_a_diffusion_pipeline_are_its_own_dpm_solver(tmp_path):
    """Our loop against the stock pipeline under DPM-Solver, guided, from the same latents."""
    from diffusers import DPMSolverMultistepScheduler

    pipeline, prompts = tiny_stable_diffusion(16), ["a fox", "a crow"]
    noise = torch.randn(2, 4, 4, 4)
    ours = FlowSource(pipeline).solve(noise, prompts, steps=5, guidance=6.0)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    stock = pipeline(prompts, latents=noise, num_inference_steps=5, guidance_scale=6.0, output_type="latent").images
    torch.testing.assert_close(ours, stock, atol=1e-4, rtol=1e-4)


def test_class_conditional_unet_round_trip(tmp_path):
    from diffusers import UNet2DModel

    module = ReflowModule(tiny_unet(8, 1, num_classes=3), stage="flow")
    batch = {"image": torch.randn(4, 1, 8, 8), "label": torch.arange(4) % 3}
    fit(module, DataLoader([batch] * 2, batch_size=None), max_epochs=1)
    module.save_pretrained(str(tmp_path / "flow"))
    stock = UNet2DModel.from_pretrained(tmp_path / "flow")
    assert all(torch.equal(v, module.model.state_dict()[k]) for k, v in stock.state_dict().items())
    data = ReflowPairs(tmp_path / "pairs", str(tmp_path / "flow"), conditions=3, count=8, steps=2, batch_size=4)
    fit(ReflowModule(str(tmp_path / "flow")), data, max_epochs=1)
    labels = torch.tensor([0, 1, 2])
    assert torch.equal(module.sample(labels, seed=1), module.sample(labels, seed=1))
    assert module.sample(labels).shape == (3, 1, 8, 8)
    with pytest.raises(ConfigurationError, match="guidance"):
        module.sample(labels, guidance=1.5)


def test_must_h_a_distilled_net_is_sampled_with_its_own_number_of_steps():
    module = ReflowModule(plane(), stage="distill", steps=2)
    noise, labels, calls = torch.randn(3, 2), torch.arange(3), []
    module.model.register_forward_hook(lambda *args: calls.append(1))
    module.sample(labels, noise, strict=True)
    assert len(calls) == 2
    with pytest.warns(UserWarning, match="distilled for steps=2"):
        module.sample(labels, noise, steps=1)
    with pytest.raises(ConfigurationError, match="steps=1"):
        module.sample(labels, noise, steps=1, strict=True)


def test_labels_where_text_is_wanted_are_refused():
    module = ReflowModule(tiny_stable_diffusion(16), stage="flow")
    batch = {"image": torch.randn(2, 3, 16, 16), "label": torch.tensor([0, 1])}
    with pytest.raises(ConfigurationError, match="prompt"):
        module.training_step(batch, 0)
    assert torch.isfinite(module.training_step(batch | {"prompt": ["a", "b"]}, 0))

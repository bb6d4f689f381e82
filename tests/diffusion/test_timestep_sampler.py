"""rectified-flow-transformer: another density of the training times, in modules of the house and in somebody else's."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from lightning.pytorch import LightningModule, Trainer
from scipy.stats import kstest
from torch import nn
from torch.utils.data import DataLoader

from effdl.callbacks import SAMCallback, TimestepSamplerCallback
from effdl.callbacks._timestep_sampler_example import Flow
from effdl.core.errors import ConfigurationError
from effdl.core.random import generator
from effdl.diffusion._draws import Draws
from effdl.diffusion.instaflow import ReflowModule
from effdl.diffusion.rectified_flow_transformer import CosMap, LogitNormal, Mode, RectifiedFlowModule, shift_time
from effdl.diffusion.score_sde import ScoreSDEModule, score_matching_loss
from effdl.tasks._denoising import stream
from effdl.tasks.diffusion import DiffusionModule
from effdl.tasks.text_to_image import TextToImageModule
from tests.support import BARE

COUNT = 4000


class Plane(nn.Module):
    """A network in the plane that remembers the labels it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen = nn.Linear(3, 2), []

    def forward(self, x, label, condition=None):
        self.seen.append(label.detach().clone())
        return self.net(torch.cat([x, label[:, None].to(x) / 1000], 1))


def points(count: int = COUNT) -> dict[str, torch.Tensor]:
    return {"image": torch.randn(count, 2, generator=generator(0))}


def fit(module, callback=None, batch=None, batches: int = 1, epochs: int = 1, val=None, **kwargs) -> Trainer:
    torch.manual_seed(0)
    callbacks = kwargs.pop("callbacks", [] if callback is None else [callback])
    trainer = Trainer(max_epochs=epochs, callbacks=callbacks, **BARE, **kwargs.pop("trainer", {}))
    loader = DataLoader([points() if batch is None else batch] * batches, batch_size=None)
    trainer.fit(module, loader, val, **kwargs)
    return trainer


class Probe(TextToImageModule):
    """Draws many times, and trains nothing."""

    def training_step(self, batch, batch_idx):
        self.seen = self._times(COUNT, stream([0], "cpu"))
        return next(self.parameters()).sum() * 0


def times_of(kind: str, callback: TimestepSamplerCallback) -> torch.Tensor:
    """What one training step of a module of the house draws, as times with the noise at 1."""
    if kind in ("tiny", "tiny-3"):
        module = Probe(kind, prompt_dropout=0.0, steps=0)
        fit(module, callback)
        labels = module.seen if kind == "tiny-3" else module.seen + torch.rand(COUNT, generator=generator(1))
        return labels / 1000
    make = {
        "flow": lambda net: RectifiedFlowModule(net), "reflow": lambda net: ReflowModule(net, stage="flow", eps=0.0),
        "sde": lambda net: ScoreSDEModule(net), "ddpm": lambda net: DiffusionModule(net, DDPMScheduler()),
    }[kind]  # fmt: skip
    module = make(Plane())
    fit(module, callback)
    (label,) = module.model.seen
    if kind == "reflow":  # there the noise is at 0, and the plain label is the time
        return 1 - label
    if kind == "ddpm":
        assert not label.is_floating_point()
        label = label + torch.rand(COUNT, generator=generator(1))  # within a cell nothing is said
    return label / (999 if kind == "sde" else 1000)


@pytest.mark.parametrize("kind", ["flow", "reflow", "sde", "ddpm", "tiny", "tiny-3"])
def test_times_of_every_module_follow_the_density(kind: str):
    density = LogitNormal(0.7, 0.6)
    t = times_of(kind, TimestepSamplerCallback("logit_normal(0.7, 0.6)", shift=2.0))
    law = lambda x: density.cdf(shift_time(torch.as_tensor(x), 0.5)).numpy()  # noqa: E731
    assert kstest(t.double().numpy(), law).pvalue > 1e-3
    # and a test that can fail: neither the module's own density nor the unshifted one
    assert kstest(t.double().numpy(), "uniform").pvalue < 1e-6
    assert kstest(t.double().numpy(), lambda x: density.cdf(torch.as_tensor(x)).numpy()).pvalue < 1e-6


@pytest.mark.parametrize(("density", "law"), [("mode(1.29)", Mode(1.29)), ("cosmap", CosMap()), (CosMap(), CosMap())])
def test_a_discrete_schedule_has_the_mass_of_its_cells(density, law):
    module = DiffusionModule(Plane(), DDPMScheduler(num_train_timesteps=10))
    fit(module, TimestepSamplerCallback(density), points(20_000))
    (labels,) = module.model.seen
    edges = torch.linspace(0, 1, 11, dtype=torch.float64)
    share = labels.bincount(minlength=10) / 20_000
    mass = law.cdf(edges).diff()
    assert (share - mass).abs().max() < 4 * (mass * (1 - mass) / 20_000).sqrt().max()


def test_the_loss_is_that_of_a_module_with_this_density_of_its_own():
    """Bit for bit: draws come from the module's generator, and no weight comes in."""
    other = torch.nn.Linear(3, 2).state_dict()
    losses = []
    for module, callbacks in (
        (RectifiedFlowModule(Plane(), density="mode(1.29)", shift=3.0), []),
        (RectifiedFlowModule(Plane()), [TimestepSamplerCallback("mode(1.29)", shift=3.0)]),
        (RectifiedFlowModule(Plane(), shift=3.0), [TimestepSamplerCallback("mode(1.29)")]),  # the module's shift
        (RectifiedFlowModule(Plane()), [TimestepSamplerCallback("mode(1.29)")]),
    ):
        module.model.net.load_state_dict(other)
        losses.append(fit(module, callbacks=callbacks, batches=3).callback_metrics["train/loss"])
    assert losses[0] == losses[1] == losses[2] != losses[3]


def test_weights_of_the_score_matching_loss_stay():
    module, callback = ScoreSDEModule(Plane(), likelihood_weighting=True), TimestepSamplerCallback("cosmap")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    logged = fit(module, callback).callback_metrics
    module.load_state_dict(before)
    draws = Draws(0, 0, 0)
    t = CosMap().sample(COUNT, draws.stream(0)) * (1 - 1e-5) + 1e-5
    noise = draws.noise((COUNT, 2))
    expected = score_matching_loss(module.sde, module.score, points()["image"], t, noise, True, True)
    torch.testing.assert_close(logged["train/loss"], expected.detach())
    torch.testing.assert_close(logged["rectified-flow-transformer/time"], t.mean(), rtol=0, atol=1e-4)


def test_the_old_density_is_back_and_validation_never_saw_another():
    module, val = DiffusionModule(Plane()), DataLoader([points(64)], batch_size=None)
    fit(module, TimestepSamplerCallback("logit_normal(6, 0.1)"), points(64), val=val)
    train, validation = module.model.seen
    assert train.min() > 980
    own = torch.randint(1000, (64,), generator=stream([0, 1, 0, 0], "cpu"))
    assert torch.equal(validation, own)
    assert not {"draw_times", "training_step"} & set(vars(module))
    module.model.seen.clear()
    fit(module, batch=points(64))  # the same trainer's module without the callback
    assert torch.equal(module.model.seen[0], torch.randint(1000, (64,), generator=times_stream()))


def times_stream() -> torch.Generator:
    return stream([0, 0, 0, 0, 0], "cpu")


def test_after_an_error_the_old_density_is_back():
    class Fails(Flow):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            raise RuntimeError("on purpose")

    module = Fails()
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(module, TimestepSamplerCallback(), [torch.randn(4, 3, 8, 8)])
    assert not {"draw_times", "training_step"} & set(vars(module))


# --- somebody else's module --------------------------------------------------------------------------------------


class Recorded(Flow):
    """Somebody's flow, whose network's times are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []
        self.model.register_forward_pre_hook(lambda _module, args: self.seen.append(args[1].clone()))


def test_without_a_generator_draws_are_a_function_of_seed_epoch_and_batch(monkeypatch):
    import effdl.diffusion._draws as draws

    batch, runs = [torch.randn(8, 3, 8, 8)], []
    for seed in (5, 5, 6):
        module = Recorded()
        state = fit(module, TimestepSamplerCallback("cosmap", seed=seed), batch, batches=2, epochs=2)
        runs.append(torch.stack(module.seen))
        assert state.global_step == 4
    assert torch.equal(runs[0], runs[1])
    assert len(runs[0].unique()) == 32
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(runs[0][3], CosMap().sample(8, Draws(5, 1, 1).stream(0)))
    monkeypatch.setattr(draws, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(draws, "rank", lambda rank=rank: rank)
        module = Recorded()
        fit(module, TimestepSamplerCallback("cosmap", seed=5), [batch[0][rank::2]])
        assert torch.equal(module.seen[0], runs[0][0][rank::2])


def test_both_passes_of_sam_see_the_same_times():
    module = Recorded()
    callbacks = [TimestepSamplerCallback("cosmap"), SAMCallback(rho=0.05)]
    fit(module, callbacks=callbacks, batch=[torch.randn(8, 3, 8, 8)], batches=2)
    first, second, third, fourth = module.seen
    assert torch.equal(first, second)
    assert torch.equal(third, fourth)
    assert not torch.equal(first, third)


def test_a_module_of_pytorch_lightning_takes_part():
    import pytorch_lightning

    class Theirs(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.seen = nn.Linear(2, 2), []

        def draw_times(self, count, generator=None):
            return torch.rand(count)

        def training_step(self, batch, batch_idx):
            self.seen.append(self.draw_times(len(batch["image"]), generator=torch.Generator().manual_seed(batch_idx)))
            return self.net(batch["image"]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Theirs()
    trainer = pytorch_lightning.Trainer(max_epochs=1, callbacks=[TimestepSamplerCallback("cosmap")], **BARE)
    trainer.fit(module, DataLoader([points(16)], batch_size=None))
    assert torch.equal(module.seen[0], CosMap().sample(16, generator(0)))


class NoMethod(LightningModule):
    pass


class WrongSignature(Flow):
    def draw_times(self):
        return torch.rand(4)


class NeverCalls(Flow):
    def training_step(self, batch, batch_idx):
        return self.model(batch[0], torch.rand(len(batch[0]))).square().mean()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ReflowModule(Plane(), stage="distill"), "drew no time"), (NeverCalls, "drew no time"),
        (WrongSignature, r"draw_times\(count, generator\)"), (NoMethod, r"draw_times\(count, generator\)"),
    ],
)  # fmt: skip
def test_a_module_that_cannot_take_part_is_told_what_is_missing(make, words: str):
    module = make()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    batch = [torch.randn(4, 3, 8, 8)]
    if isinstance(module, ReflowModule):
        batch = {"x0": torch.randn(4, 2), "x1": torch.randn(4, 2)}
    if isinstance(module, NoMethod):
        module.training_step = lambda batch, batch_idx: None
        module.configure_optimizers = lambda: None
    with pytest.raises(ConfigurationError, match=words):
        fit(module, TimestepSamplerCallback(), batch)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert "draw_times" not in vars(module)


def test_one_density_at_a_time_and_the_same_on_resume(tmp_path):
    two = [TimestepSamplerCallback(), TimestepSamplerCallback("cosmap")]
    with pytest.raises(ConfigurationError, match="one TimestepSamplerCallback"):
        fit(Flow(), callbacks=two, batch=[torch.randn(4, 3, 8, 8)])
    trainer = fit(Flow(), two[1], [torch.randn(4, 3, 8, 8)])
    assert two[1].report().items() >= {"density": "CosMap()", "shift": 1.0}.items()
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    resume = {"batch": [torch.randn(4, 3, 8, 8)], "epochs": 2, "ckpt_path": tmp_path / "a.ckpt", "weights_only": True}
    with pytest.raises(ConfigurationError, match="other arguments of TimestepSamplerCallback"):
        fit(Flow(), two[0], **resume)
    assert fit(Flow(), TimestepSamplerCallback("cosmap"), **resume).global_step == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("density", "gamma"), ("density", "logit_normal(0, 0)"), ("density", "mode(1.76)"), ("density", 3),
     ("convention", "sd3"), ("shift", 0.0), ("shift", float("nan")), ("seed", -1), ("bins", 1), ("bins", 2.5)],
)  # fmt: skip
def test_bad_arguments_are_named(name: str, value):
    with pytest.raises(ConfigurationError, match=name):
        TimestepSamplerCallback(**{name: value})


def test_the_sign_of_diffusers():
    assert TimestepSamplerCallback("logit_normal(1, 1)").sampler.sample(1000, generator(0)).mean() > 0.6
    mirrored = TimestepSamplerCallback("logit_normal(1, 1)", convention="diffusers")
    assert mirrored.sampler.sample(1000, generator(0)).mean() < 0.4

"""score-sde: the module: networks and labels, training and resume, what it serves."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from torch import nn

from effdl.core.errors import ConfigurationError
from effdl.core.noise import expand
from effdl.data.loading import ResumableLoader
from effdl.diffusion.score_sde import (
    VE,
    VP,
    ODESampler,
    PCSampler,
    ScoreAdapter,
    ScoreSDEModule,
    SubVP,
    dequantise,
    score_matching_loss,
)
from tests.diffusion.score_sde_nets import Tame, plane, unet
from tests.support import QUIET, quiet_fit


def points(batch_size: int = 4) -> ResumableLoader:
    x = 0.5 * torch.randn(32, 2, generator=torch.Generator().manual_seed(0))
    return ResumableLoader(torch.utils.data.TensorDataset(x), batch_size=batch_size, shuffle=True)


def fit(module, data=None, callbacks=(), ckpt_path=None, val=None, **kwargs):
    options = {"max_epochs": 2, "num_sanity_val_steps": 0, **kwargs}
    return quiet_fit(module, points() if data is None else data, *callbacks, val=val, ckpt_path=ckpt_path, **options)


# --- networks as scores -------------------------------------------------------------------------------------------


def test_labels_and_signs_of_the_adapter():
    t, x, seen = torch.tensor([0.1, 0.7]), torch.randn(2, 2), []

    def network(x, label):
        seen.append(label)
        return x

    for sde in (VP(), SubVP()):
        torch.testing.assert_close(ScoreAdapter(network, sde)(x, t), -x / expand(sde.std(t), x))
        assert torch.equal(ScoreAdapter(network, sde, "score")(x, t), x)
    ve = VE()
    assert torch.equal(ScoreAdapter(network, ve)(x, t), x)
    torch.testing.assert_close(ScoreAdapter(network, ve, "epsilon")(x, t), -x / expand(ve.std(t), x))
    labels = [999 * t] * 4 + [ve.std(t), 999 * t]
    assert all(torch.equal(a, b) for a, b in zip(seen, labels, strict=True))


def test_stock_networks_half_precision_and_refusals():
    t, x = torch.tensor([1e-3, 0.7]), torch.randn(2, 1, 8, 8)
    positional, fourier = unet(), unet(time_embedding_type="fourier")
    assert ScoreAdapter(positional, VE()).prediction == "epsilon"
    assert ScoreAdapter(fourier, VE()).prediction == "score"
    assert torch.equal(ScoreAdapter(fourier, VE())(x, t), fourier(x, VE().std(t)).sample)
    score = ScoreAdapter(positional, VP())
    torch.testing.assert_close(score(x, t), -positional(x, 999 * t).sample / expand(VP().std(t), x))
    half = ScoreAdapter(unet().bfloat16(), VP())(x, t)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, score(x, t), rtol=0.1, atol=0.1 * float(score(x, t).detach().abs().max()))
    for network, sde in ((fourier, VP()), (unet(num_classes=3), VP())):
        with pytest.raises(ConfigurationError, match="model"):
            ScoreAdapter(network, sde)


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sde", "mean"), [("ve", False), ("vp", True), ("subvp", True)])
def test_a_step_is_the_loss_of_its_equation(sde, mean):
    module = ScoreSDEModule(plane(), sde)
    assert module.reduce_mean is mean
    x0, draws = module._data((torch.randn(8, 2),), 0, 0)
    state = torch.get_rng_state()
    loss = module.training_step((x0,), 0)
    assert torch.equal(state, torch.get_rng_state())
    t, z = draws.uniform(8) * (1 - 1e-5) + 1e-5, draws.noise((8, 2))
    torch.testing.assert_close(loss, score_matching_loss(module.sde, module.score, x0, t, z, False, mean))
    weighted = ScoreSDEModule(plane(), sde, likelihood_weighting=True, reduce_mean=not mean).training_step((x0,), 0)
    expected = score_matching_loss(module.sde, module.score, x0, t, z, True, not mean)
    torch.testing.assert_close(weighted, expected)


def test_dequantisation_is_a_draw_of_the_batch(monkeypatch):
    import effdl.diffusion._draws as draws

    images = torch.randint(17, (4, 1, 8, 8)) / 8 - 1
    module = ScoreSDEModule(unet(), levels=17)
    whole, _ = module._data(images, 3, 1)
    again = dequantise(images, 17, torch.zeros_like(images))
    assert bool(((whole >= again) & (whole < again + 2 / 17 + 1e-6)).all())
    assert not torch.equal(whole, module._data(images, 4, 1)[0])
    monkeypatch.setattr(draws, "world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(draws, "rank", lambda rank=rank: rank)
        assert torch.equal(module._data(images[rank::2], 3, 1)[0], whole[rank::2])


class Losses(Callback):
    """Records what is logged, and whether sampling sees the average."""

    def __init__(self, stop=None):
        self.losses, self.sampled, self.raw, self.stop = [], [], [], stop

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        self.raw.append(pl_module.model.net[0].weight.detach().clone())

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.stop:
            raise RuntimeError("stopped on purpose")

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        weights = {name: value.clone() for name, value in pl_module.model.state_dict().items()}
        self.sampled.append((weights, pl_module.sample(2, steps=20, sampler=PCSampler("euler_maruyama"))))


def test_must_10_resume_is_bit_exact_and_the_average_is_swapped_in_and_back(tmp_path):
    def make():
        adam = lambda parameters: torch.optim.Adam(parameters, 1e-2)  # noqa: E731
        return ScoreSDEModule(plane(), "vp", optimizer=adam, warmup=5), EMAWeightAveraging(decay=0.5)

    whole, ema = make()
    log = Losses()
    fit(whole, callbacks=[ema, log], val=points())
    module, ema = make()
    first = Losses(stop=13)
    save = ModelCheckpoint(tmp_path, filename="mid", every_n_train_steps=12, save_top_k=-1)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(module, callbacks=[ema, save, first], val=points())
    (mid,) = tmp_path.glob("*.ckpt")
    resumed, ema = make()
    second = Losses()
    fit(resumed, callbacks=[ema, second], ckpt_path=mid, val=points())
    assert first.losses[:12] + second.losses == log.losses
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values()))

    (averaged, samples), raw = log.sampled[0], log.raw[7]  # an epoch has eight steps
    assert not torch.equal(averaged["net.0.weight"], raw)
    other = ScoreSDEModule(plane(), "vp")
    other.model.load_state_dict(averaged)
    sampled = other.sample(2, steps=20, sampler=PCSampler("euler_maruyama"), shape=(2,))
    assert torch.equal(sampled, samples)
    plain = make()[0]
    alone = Losses()
    fit(plain, callbacks=[alone], val=points())
    assert alone.losses == log.losses  # the raw weights came back after each validation
    checkpoint = torch.load(mid, weights_only=True)
    assert checkpoint["effdl"]["score-sde"]["sde"] == VP().config()
    assert set(checkpoint["state_dict"]) == {f"model.{name}" for name in plane().state_dict()}
    with pytest.raises(ConfigurationError, match="sde"):
        fit(ScoreSDEModule(plane(), "subvp"), ckpt_path=mid)


def test_validation_likelihood_warmup_and_compiled_network():
    grey = torch.randint(17, (16, 1, 8, 8), generator=torch.Generator().manual_seed(0)) / 8 - 1
    loader = lambda: ResumableLoader(torch.utils.data.TensorDataset(grey), batch_size=8)  # noqa: E731
    module = ScoreSDEModule(Tame(), "subvp", levels=17, likelihood_batches=1, warmup=4)
    module.model.compile(backend="eager")
    trainer = fit(module, loader(), val=loader(), max_epochs=1)
    assert {"train/loss", "val/loss", "score-sde/bits_per_dim"} <= set(trainer.callback_metrics)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 3 / 4)
    before = [p.clone() for p in module.parameters()]
    again = Trainer(**QUIET).validate(module, loader(), verbose=False)[0]
    assert again["score-sde/bits_per_dim"] == pytest.approx(float(trainer.callback_metrics["score-sde/bits_per_dim"]))
    images = Trainer(**QUIET).predict(ScoreSDEModule(module.model, VP(steps=25)), loader())
    assert [part.shape for part in images] == [(8, 1, 8, 8)] * 2
    assert not torch.equal(images[0], images[1])
    assert all(p.grad is None for p in module.parameters()) or all(map(torch.equal, before, module.parameters()))
    assert trainer.lightning_module.report().keys() >= {"bits_per_dim", "likelihood_calls", "pc_calls", "ode_calls"}


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("sde", {"sde": "edm"}), ("sampler", {"sampler": "ddim"}), ("levels", {"levels": 1}),
        ("likelihood_batches", {"likelihood_batches": 1}), ("warmup", {"warmup": 5, "scheduler": lambda o: None}),
        ("ancestral", {"sde": "subvp", "sampler": PCSampler("ancestral")}), ("seed", {"seed": -1}),
        ("likelihood_weighting", {"likelihood_weighting": "g"}), ("reduce_mean", {"reduce_mean": 2}),
        ("model", {"model": nn.Linear}), ("model", {"model": lambda x, t: x}),
    ],
)  # fmt: skip
def test_bad_arguments_of_the_module_are_named(name, kwargs):
    with pytest.raises(ConfigurationError, match=name):
        ScoreSDEModule(**{"model": plane(), **kwargs})


# --- what it serves -----------------------------------------------------------------------------------------------


def test_samples_codes_and_conditions():
    module = ScoreSDEModule(Tame(), VP(steps=30))
    module.train()
    images = module.sample(3, shape=(1, 8, 8))
    module._data((images,), 0, 0)  # from here on it knows the shape
    assert images.shape == (3, 1, 8, 8)
    assert module.model.training
    assert torch.equal(images, module.sample(3))
    assert not torch.equal(images, module.sample(3, seed=1))
    assert not torch.equal(images, module.sample(3, ODESampler(1e-2)))
    x = 0.3 * torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(module.decode(module.encode(x, 1e-7), 1e-7), x, atol=1e-3, rtol=0)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    whole = module.inpaint(x, mask)
    assert float((whole - x)[..., :4].abs().max()) < 0.01
    assert float((whole - x)[..., 4:].abs().max()) > 0.1
    classifier = lambda x, t: x.flatten(1)[:, :3]  # noqa: E731
    assert module.sample(2, classifier=classifier, labels=torch.tensor([0, 2])).shape == (2, 1, 8, 8)
    exact, estimate = (module.likelihood(x, d, tolerance=1e-3) for d in ("exact", "rademacher"))
    torch.testing.assert_close(exact.bits, estimate.bits, atol=1.0, rtol=0)
    colour = ScoreSDEModule(Tame(), VP(steps=25))
    assert colour.colourise(torch.zeros(2, 1, 8, 8)).mean(1).abs().max() < 0.01
    for kwargs in ({"labels": torch.tensor([0])}, {"classifier": classifier, "labels": torch.tensor([0, 1])}):
        with pytest.raises(ConfigurationError, match="labels"):
            module.sample(1, **kwargs)
    with pytest.raises(ConfigurationError, match="shape"):
        ScoreSDEModule(plane()).sample(2)

"""score-sde: the mixin on somebody else's module is the module of the house, at the same seed."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from effdl.core.errors import ConfigurationError
from effdl.data.loading import ResumableLoader
from effdl.diffusion.score_sde import VE, VP, ScoreAdapter, ScoreSDEMixin, ScoreSDEModule, SubVP
from effdl.tasks.diffusion import DiffusionModule
from tests.diffusion.score_sde_nets import plane
from tests.support import BARE

RATE = 0.05


class Theirs(LightningModule):
    """Has never heard of scores: a network under a name of its own, a step, a forward and an optimizer."""

    def __init__(self, net: nn.Module, rate: float = RATE) -> None:
        super().__init__()
        self.net, self.rate, self.stepped = net, rate, 0

    def forward(self, x):
        return self.net(x, torch.zeros(len(x)))

    def training_step(self, batch, batch_idx):
        self.stepped += 1
        return self(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.rate)


class Mine(ScoreSDEMixin, Theirs):
    pass


def network() -> nn.Module:
    return plane(3)


def points() -> ResumableLoader:
    x = 0.5 * torch.randn(32, 2, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    return ResumableLoader(torch.utils.data.TensorDataset(x), batch_size=4, shuffle=True)


def fit(module, callbacks=(), val=True, **kwargs) -> Trainer:
    trainer = Trainer(callbacks=list(callbacks), **{**BARE, "max_epochs": 2, **kwargs})
    trainer.fit(module, points(), points() if val else None)
    return trainer


def sgd(parameters) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, RATE)


SETTINGS = [
    {"sde": VE(0.05, 2.0, 25)}, {"sde": SubVP(steps=30), "levels": 17, "likelihood_batches": 1},
    {"sde": VP(steps=30), "likelihood_weighting": True, "reduce_mean": False, "prediction": "score", "seed": 4},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=["ve", "subvp", "vp"])
def test_losses_samples_and_likelihoods_are_those_of_the_module(settings):
    theirs = Mine(network(), network="net", **settings)
    ours = ScoreSDEModule(network(), optimizer=sgd, **settings)
    first = fit(theirs).callback_metrics
    second = fit(ours).callback_metrics
    assert {name: float(value) for name, value in first.items()} == {k: float(v) for k, v in second.items()}
    assert ("score-sde/bits_per_dim" in first) == ("levels" in settings)
    assert theirs.stepped == 0
    state, want = theirs.net.state_dict(), ours.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in want.items())
    assert not torch.equal(state["net.0.weight"], network().net[0].weight)
    assert torch.equal(theirs.sample(3, steps=25, seed=1), ours.sample(3, steps=25, seed=1))
    assert torch.equal(theirs.sample(2, "ode"), ours.sample(2, "ode"))
    x = torch.tensor([[0.5, -0.25], [0.0, 1.0]])
    assert torch.equal(theirs.likelihood(x, tolerance=1e-3).bits, ours.likelihood(x, tolerance=1e-3).bits)
    assert torch.equal(theirs.encode(x, 1e-3), ours.encode(x, 1e-3))
    assert theirs.record() == ours.record()
    assert theirs.report() == ours.report()


def test_mixin_and_module_take_the_same_arguments():
    """Written twice, since a signature is read by people, editors and jsonargparse; the same types and defaults."""
    own, house = (inspect.signature(cls).parameters for cls in (ScoreSDEMixin, ScoreSDEModule))
    shared = own.keys() & house.keys()
    assert own.keys() - shared == {"args", "network", "kwargs"}
    assert house.keys() - shared == {"model", "warmup", "optimizer", "scheduler"}
    for name in shared - {"sde"}:  # the module's may be None: as the folder records
        assert (own[name].default, own[name].annotation) == (house[name].default, house[name].annotation), name


def test_what_is_theirs_stays_theirs(tmp_path):
    module, bare = Mine(network(), network="net", sde=VP(steps=25)), Theirs(network())
    x = torch.randn(2, 2)
    assert torch.equal(module(x), bare(x))
    assert module.score.prediction == "epsilon"
    t = torch.tensor([0.2, 0.9])
    assert torch.equal(module.score(x, t), ScoreAdapter(module.net, VP())(x, t))
    trainer = fit(module, [EMAWeightAveraging(decay=0.5)])
    assert isinstance(trainer.optimizers[0], torch.optim.SGD)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    bare.load_state_dict(checkpoint["state_dict"], strict=True)
    assert checkpoint["effdl"]["score-sde"] == module.record()
    samples = Trainer(**BARE).predict(module, points())
    assert [tuple(part.shape) for part in samples] == [(4, 2)] * 8
    other = Mine(network(), network="net", sde="ve")
    with pytest.raises(ConfigurationError, match="sde"):
        Trainer(**BARE).fit(other, points(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    module.save_pretrained(tmp_path / "net")
    assert {path.name for path in (tmp_path / "net").iterdir()} == {"model.safetensors", "sde.json"}


def test_a_network_that_is_built_late():
    class Late(LightningModule):
        configure_optimizers = Theirs.configure_optimizers
        rate = RATE

        def configure_model(self):
            if not hasattr(self, "parts"):
                self.parts = nn.ModuleDict({"body": network()})

    class MineLate(ScoreSDEMixin, Late):
        pass

    module, early = MineLate(network="parts.body"), Mine(network(), network="net")
    fit(module, val=False)
    fit(early, val=False)
    assert all(map(torch.equal, module.state_dict().values(), early.state_dict().values()))


def test_a_step_of_ones_own_on_top():
    class Doubled(Mine):
        def training_step(self, batch, batch_idx):
            return 2 * super().training_step(batch, batch_idx)

    whole = Doubled(network(), network="net", rate=RATE / 2)
    fit(whole, val=False)
    plain = Mine(network(), network="net")
    fit(plain, val=False)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(whole.state_dict()[name], value)


def test_what_cannot_work_says_so():
    with pytest.raises(ConfigurationError, match="must come first"):

        class Wrong(Theirs, ScoreSDEMixin):
            pass

    module = Mine(network())  # its network is no "model"
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ConfigurationError, match="network='model'"):
        fit(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

    class Manual(Mine):
        automatic_optimization = False

    with pytest.raises(ConfigurationError, match="automatic optimisation"):
        fit(Manual(network(), network="net"))

    class Taken(ScoreSDEMixin, DiffusionModule):
        pass

    with pytest.raises(ConfigurationError, match=r"prediction.*seed"):
        Taken(network())
    for name, value in (("network", 3), ("network", ""), ("prediction", "sample"), ("levels", 1), ("sde", "edm")):
        with pytest.raises(ConfigurationError, match=name):
            Mine(network(), **{"network": "net", name: value})

"""rectified-flow-transformer: draws and losses by time, as the callback tells them."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from effdl.callbacks import SAMCallback, TimestepSamplerCallback
from effdl.callbacks._timestep_sampler_example import Flow as Theirs
from effdl.core.errors import ConfigurationError
from effdl.diffusion._time_bins import TimeBins, expected_share
from effdl.diffusion._timestep_densities import LogitNormal, Mirrored, Mode, shift_time
from effdl.diffusion.rectified_flow_transformer import VALIDATION_TIMES, RectifiedFlowModule
from effdl.diffusion.score_sde import ScoreSDEModule
from effdl.tasks.diffusion import DiffusionModule
from effdl.tasks.text_to_image import TextToImageModule
from tests.diffusion.timestep_sampler_ranks import (
    BATCH,
    BATCHES,
    BINS,
    QUIET,
    Denoiser,
    Flow,
    Plane,
    Points,
    SaveAt,
    fit_points,
    logged,
)  # fmt: skip
from tests.support import run_ranks

CENTRES = [0.125, 0.375, 0.625, 0.875]


def by_hand(t: torch.Tensor, losses: torch.Tensor) -> dict[str, float]:
    """Shares and mean losses of the four quarters."""
    told = {"time": t.mean().item()}
    for quarter, centre in enumerate(CENTRES):
        inside = [i for i in range(len(t)) if quarter == min(int(4 * t[i].item()), 3)]
        told[f"share_t{centre:.4f}"] = len(inside) / len(t)
        if inside:
            told[f"train_loss_t{centre:.4f}"] = sum(losses[i].item() for i in inside) / len(inside)
    return told


def train(module, callback, batches, val=None, extra: list[Callback] = (), epochs: int = 1) -> Trainer:
    torch.manual_seed(0)
    trainer = Trainer(max_epochs=epochs, callbacks=[callback, *extra], **QUIET)
    trainer.fit(module, DataLoader(batches, batch_size=None), val)
    return trainer


# --- the bins themselves -----------------------------------------------------------------------------------------


def test_bins_count_sum_and_keep_their_ends():
    bins = TimeBins(4)
    assert bins.told() == {"time": None, "share": [None] * 4, "loss": [None] * 4}
    t = torch.tensor([0.0, 0.2499, 0.25, 0.9, 1.0])
    bins.add_times(t)
    bins.add_losses(t, torch.tensor([[1.0, 3.0], [2.0, 2.0], [5.0, 5.0], [0.0, 2.0], [3.0, 3.0]]))
    bins.reduce("cpu")
    bins.reduce("cpu")  # nothing new
    told = bins.told()
    assert told["share"] == [0.4, 0.2, 0, 0.4]
    assert told["loss"] == [2, 5, None, 2]
    assert told["time"] == pytest.approx(t.mean().item())
    assert bins.centres == CENTRES
    assert TimeBins(8).centres == list(VALIDATION_TIMES)


def test_a_loss_that_is_not_finite_stays_in_its_bin_and_half_precision_is_summed_wide():
    bins, t = TimeBins(2), torch.full((4096,), 0.9)
    t[0] = 0.1
    losses = torch.full((4096, 3), 1.001, dtype=torch.bfloat16)
    losses[0] = float("nan")
    bins.add_losses(t, losses)
    bins.reduce("cpu")
    nan, mean = bins.told()["loss"]
    assert nan != nan
    assert mean == losses[1, 0].item()


@pytest.mark.parametrize(("density", "shift"), [(LogitNormal(1, 0.7), 3.0), (Mode(1.29), 1.0)])
def test_the_expected_share_is_that_of_many_draws(density, shift):
    for law in (density, Mirrored(density)):
        t = shift_time(law.sample(100_000, torch.Generator().manual_seed(0)), shift)
        bins = TimeBins(8)
        bins.add_times(t)
        bins.reduce("cpu")
        torch.testing.assert_close(bins.told()["share"], expected_share(law, shift, 8), rtol=0, atol=6e-3)


# --- in a run ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Flow, Denoiser])
def test_shares_and_losses_are_those_of_the_last_epoch_by_hand(make):
    trainer, module, callback = fit_points(make)
    t, losses = module.recorded
    assert len(t) == len(losses) == BATCH * BATCHES
    found, expected = logged(trainer), by_hand(t, losses)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-3 if make is Denoiser else 1e-6)  # labels are cells
    counts = [round(share * len(t)) for name, share in expected.items() if name.startswith("share")]
    assert callback.state_dict()["sums"][0].tolist() == callback.state_dict()["sums"][2].tolist() == counts
    mean = sum(n * found.get(f"train_loss_t{c:.4f}", 0) for n, c in zip(counts, CENTRES)) / len(t)
    assert mean == pytest.approx(losses.mean().item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["sde", "min-snr"])
def test_the_loss_by_time_has_the_weights_of_the_loss(kind):
    callback = TimestepSamplerCallback("cosmap", bins=BINS)
    if kind == "sde":
        module = ScoreSDEModule(Plane(), likelihood_weighting=True)
        batch = {"image": torch.randn(64, 2)}
    else:
        module = TextToImageModule("tiny", min_snr=5, steps=0)
        batch = {"image": torch.rand(16, 3, 32, 32) * 2 - 1, "prompt": ["a"] * 16}
    trainer = train(module, callback, [batch])
    sums = callback.state_dict()["sums"]
    size = len(batch["image"])
    assert sums[2].sum() == size
    loss = trainer.callback_metrics["train/loss" if kind == "sde" else "train/loss_epoch"]
    assert sums[3].sum() / size == pytest.approx(loss.item(), rel=1e-5)


def test_validation_is_told_by_time_too_and_by_the_flow_itself():
    points = [{"image": Points().x}]
    validation = DataLoader(points, batch_size=None)
    callback = TimestepSamplerCallback("logit_normal(3, 1)", bins=BINS)
    module = DiffusionModule(Plane())
    trainer = train(module, callback, points, validation, epochs=2)
    found = logged(trainer)
    names = {f"loss_t{centre:.4f}" for centre in CENTRES}
    assert names <= found.keys()
    counts = callback._seen["val"].sums[2]  # the module's own times, not those of the density
    assert counts.sum() == len(Points())
    assert counts.min() > 0
    mean = sum(n.item() * found[f"loss_t{c:.4f}"] for n, c in zip(counts, CENTRES)) / counts.sum().item()
    assert mean == pytest.approx(trainer.callback_metrics["val/loss"].item(), rel=1e-5)
    # a flow's validation is at fixed times, with the callback and without
    module, callback = RectifiedFlowModule(Plane()), TimestepSamplerCallback(bins=BINS)
    trainer = train(module, callback, points, validation)
    losses = [logged(trainer)[f"loss_t{time:.4f}"] for time in VALIDATION_TIMES]
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(sum(losses) / 8, rel=1e-5)
    assert not names & logged(trainer).keys()


def test_training_is_bit_equal_with_and_without():
    bare = RectifiedFlowModule(Plane(), density="mode(1.29)", shift=2.0)
    runs = [(bare, Callback())]  # the same density, and nobody who listens
    runs += [(RectifiedFlowModule(Plane(), shift=2.0), TimestepSamplerCallback("mode(1.29)", bins=b)) for b in (2, 9)]
    before = bare.state_dict()["model.net.weight"].clone()
    weights = []
    for module, callback in runs:
        train(module, callback, [{"image": Points().x}] * 5, epochs=2)
        weights.append(module.state_dict())
    for name in weights[0]:
        assert torch.equal(weights[0][name], weights[1][name])
        assert torch.equal(weights[0][name], weights[2][name])
    assert not torch.equal(weights[0]["model.net.weight"], before)


@pytest.mark.parametrize("step", [4, 6])  # the end of an epoch, the middle of one
@pytest.mark.parametrize("make", [Flow, Denoiser])
def test_a_resumed_run_tells_the_same_numbers(make, step, tmp_path):
    whole, _, callback = fit_points(make, [SaveAt(step, tmp_path / "a.ckpt")])
    resumed, _, again = fit_points(make, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert logged(resumed) == logged(whole)
    assert torch.equal(again.state_dict()["sums"], callback.state_dict()["sums"])
    assert again.report() == callback.report()


def test_two_processes_tell_the_same_as_all_their_examples(tmp_path):
    run_ranks("tests.diffusion.timestep_sampler_ranks", tmp_path)
    for make in (Flow, Denoiser):
        ranks = [torch.load(tmp_path / f"{make.__name__}-{rank}.pt") for rank in (0, 1)]
        assert ranks[0]["logged"] == ranks[1]["logged"]
        t, losses = (torch.cat(parts) for parts in zip(*(rank["recorded"] for rank in ranks)))
        assert len(t) == BATCH * BATCHES
        expected = by_hand(t, losses)
        assert ranks[0]["logged"] == pytest.approx(expected, rel=1e-5, abs=1e-3 if make is Denoiser else 1e-6)
        assert not torch.equal(ranks[0]["recorded"][0], ranks[1]["recorded"][0])  # so one alone would tell another
        assert ranks[0]["sums"][2].sum() == len(t)
        for rank in ranks:  # the half epoch of both is in the first one's checkpoint
            assert rank["again"] == pytest.approx(rank["logged"], rel=1e-6)
    # as one process with the batches of both
    assert torch.load(tmp_path / "Flow-0.pt")["logged"] == pytest.approx(logged(fit_points(Flow)[0]), rel=1e-4)


def test_a_second_pass_of_a_step_is_not_counted():
    callback = TimestepSamplerCallback("cosmap")
    train(Theirs(), callback, [[torch.randn(8, 3, 8, 8)]] * 3, extra=[SAMCallback(rho=0.05)])
    sums = callback.state_dict()["sums"]
    assert sums[0].sum() == sums[2].sum() == 24


def test_empty_bins_have_a_share_and_no_loss():
    callback = TimestepSamplerCallback("logit_normal(6, 0.1)", bins=BINS)
    found = logged(train(Theirs(), callback, [[torch.randn(8, 3, 8, 8)]]))
    assert found.keys() == {"time", *(f"share_t{centre:.4f}" for centre in CENTRES), "train_loss_t0.8750"}
    assert [found[f"share_t{centre:.4f}"] for centre in CENTRES] == [0, 0, 0, 1]


class Silent(Theirs):
    """Without ``mean_loss``: as somebody's module that has ``draw_times`` alone."""

    mean_loss = None

    def training_step(self, batch, batch_idx):
        t = self.draw_times(len(batch[0]))
        return self.model(batch[0], t).square().mean()


class Scalar(Theirs):
    def training_step(self, batch, batch_idx):
        t = self.draw_times(len(batch[0]))
        return self.mean_loss(self.model(batch[0], t).square().mean())


class Fewer(Theirs):
    def training_step(self, batch, batch_idx):
        t = self.draw_times(len(batch[0]))
        return self.mean_loss(self.model(batch[0], t).square()[1:])


def test_a_module_without_the_second_method_has_shares_alone():
    found = logged(train(Silent(), TimestepSamplerCallback(bins=BINS), [[torch.randn(8, 3, 8, 8)]]))
    assert found.keys() == {"time", *(f"share_t{centre:.4f}" for centre in CENTRES)}


@pytest.mark.parametrize("make", [Scalar, Fewer])
def test_losses_that_are_not_one_per_time_are_refused(make):
    module = make()
    with pytest.raises(ConfigurationError, match="mean_loss"):
        train(module, TimestepSamplerCallback(), [[torch.randn(8, 3, 8, 8)]])
    assert "mean_loss" not in vars(module)


def test_report_and_figure(tmp_path):
    callback = TimestepSamplerCallback("logit_normal(0, 1)", bins=BINS)
    assert callback.report() == {"density": "LogitNormal(mean=0.0, std=1.0)", "shift": 1.0}
    callback.figures(tmp_path)
    assert not list(tmp_path.iterdir())
    points = [{"image": Points().x}]
    train(DiffusionModule(Plane()), callback, points, DataLoader(points, batch_size=None))
    told = callback.report()
    assert sum(told["share"]) == pytest.approx(1)
    assert len(told["train_loss"]) == len(told["val_loss"]) == len(told["times"]) == BINS
    callback.figures(tmp_path)
    assert (tmp_path / "time_bins.png").stat().st_size > 5000

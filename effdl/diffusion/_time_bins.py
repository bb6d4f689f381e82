"""rectified-flow-transformer: how often each part of the time axis was drawn, and the loss there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effdl.core.distributed import all_reduce_sum
from effdl.core.errors import check
from effdl.diffusion._draws import own_rows
from effdl.diffusion._flow import wide
from effdl.diffusion._timestep_densities import TimestepSampler, shift_time


class TimeBins:
    """Equal bins of [0, 1]: times drawn in each, and the mean loss of the examples there.

    Sums are fp64 where the device has it and stay there: nothing waits for them before :meth:`told`. ``sums`` are those
    of all processes, so that a checkpoint of the first one has them.

    Example::

        bins = TimeBins(8)
        bins.add_times(t)                           # [B]
        bins.add_losses(t, losses)                  # [B], [B, ...]
        bins.reduce(t.device)
        bins.told()["loss"]                         # 8 numbers; None where nothing was seen
    """

    def __init__(self, bins: int) -> None:
        self.bins = bins
        self.sums: Tensor | None = None  # [4, bins]: times drawn, their sum; losses seen, their sum
        self._own: Tensor | None = None  # the same of this process alone, since the last reduce

    @property
    def centres(self) -> list[float]:
        """Times in the middle of the bins: for eight those of ``RectifiedFlowModule``'s validation."""
        return [(k + 0.5) / self.bins for k in range(self.bins)]

    def add_times(self, t: Tensor) -> None:
        """Count times ``[n]`` in [0, 1]; 1 belongs to the last bin. Those drawn for all processes count in each."""
        self._add(0, t.detach(), wide(t.detach()))

    def add_losses(self, t: Tensor, losses: Tensor) -> None:
        """Losses ``[B, ...]`` of examples at times ``[B]``, or at this process's rows of times drawn for all.

        Raises:
            ConfigurationError: not one loss per time.
        """
        check(losses.dim() > 0, "mean_loss", "a scalar", "the losses [batch, ...] before they are averaged")
        t = own_rows(t.detach(), len(losses))
        check(len(t) == len(losses), "mean_loss", f"{len(losses)} losses", f"one for each of {len(t)} times drawn")
        each = wide(losses.detach()).reshape(len(losses), -1).mean(1)
        self._add(2, t, each)

    def _add(self, row: int, t: Tensor, values: Tensor) -> None:
        """Number and sum of the values ``[n]`` at times ``[n]``, to a row and the next."""
        index = (wide(t) * self.bins).long().clamp(0, self.bins - 1)
        inside = index == torch.arange(self.bins, device=t.device)[:, None]
        # [bins, n]: its sums have the same order every time, those of a scatter have not
        new = torch.stack([inside.sum(1, dtype=_dtype(t)), torch.where(inside, values, 0).sum(1, dtype=_dtype(t))])
        if self._own is None:
            self._own = new.new_zeros(4, self.bins)
        self._own[row : row + 2] += new

    def reduce(self, device: torch.device | str) -> None:
        """Take what was seen on all processes into the sums: a collective of 4 x bins numbers, no host sync."""
        new, self._own = torch.zeros(4, self.bins, device=device) if self._own is None else self._own, None
        new = new.to(_dtype(new))
        all_reduce_sum(new)
        self.sums = new if self.sums is None else self.sums.to(new) + new

    def told(self) -> dict[str, Any]:
        """Mean ``time``, ``share`` of the times in each bin, mean ``loss`` there; ``None`` where there was nothing."""
        drawn, times, seen, lost = ([0.0] * self.bins,) * 4 if self.sums is None else self.sums.tolist()
        every = sum(drawn)
        return {
            "time": sum(times) / every if every else None,
            "share": [n / every if every else None for n in drawn],
            "loss": [value / n if n else None for value, n in zip(lost, seen)],
        }


def _dtype(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64  # there is no fp64 there


def expected_share(density: TimestepSampler, shift: float, bins: int) -> list[float]:
    """Of each bin, by the density and its shift: ``cdf(S^-1(b)) - cdf(S^-1(a))``."""
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    return density.cdf(shift_time(edges, 1 / shift).clamp(0, 1)).diff().tolist()


def draw_bins(centres: list[float], expected: list[float], told: dict[str, dict[str, Any]], path: Path) -> Path:
    """Two panels over the time: share of the draws beside what the density says, and the losses that were seen.

    Args:
        centres: of the bins.
        expected: share by the density.
        told: :meth:`TimeBins.told` of ``train`` and ``val``, either may be missing.
        path: of the image.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    width = 1 / len(centres)
    shares = [share or 0 for share in told.get("train", {}).get("share", [0] * len(centres))]
    above.bar(centres, shares, 0.9 * width, label="drawn")
    above.plot(centres, expected, "k_", markersize=18, label="density")
    above.set_ylabel("share of the times")
    above.legend()
    for name, side in (("train", -1), ("val", 1)):
        losses = told.get(name, {}).get("loss", [])
        seen = [(centre, loss) for centre, loss in zip(centres, losses) if loss is not None]
        if seen:
            places, heights = zip(*seen)
            below.bar([place + side * 0.22 * width for place in places], heights, 0.42 * width, label=name)
            below.legend()
    below.set(xlabel="time (data 0, noise 1)", ylabel="loss")
    below.margins(y=0.3)  # the legend's place
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path

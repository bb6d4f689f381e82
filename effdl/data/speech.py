"""Spoken digits as log-mel spectrograms: a LightningDataModule over a local npz (`prodiff`)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from effdl.core.errors import check, check_integer, check_number
from effdl.data._splits import SplitData

KEYS = ("audio", "offsets", "label", "speaker", "is_test", "sample_rate")
FLOOR = 1e-5  # power below which all is silence


def log_mel(audio: Tensor, sample_rate: int, bins: int = 20, window: int = 256, hop: int = 128) -> Tensor:
    """Log-mel spectrogram of a mono signal.

    Args:
        audio: ``[N]`` float in [-1, 1].
        sample_rate: in Hz; bins go from 0 to half of it.
        bins: M.
        window, hop: of the short-time Fourier transform (Hann), in samples.

    Returns:
        Natural logarithms of mel powers, at least log(1e-5), ``[M, N // hop + 1]``.

    Example::

        mel = log_mel(torch.randn(8000) / 10, 8000)                   # (20, 63)
    """
    from transformers.audio_utils import mel_filter_bank

    filters = mel_filter_bank(window // 2 + 1, bins, 0, sample_rate / 2, sample_rate, mel_scale="htk")
    spectrum = torch.stft(audio, window, hop, window=torch.hann_window(window), center=True, return_complex=True)
    power = spectrum.abs().square() / window
    return (torch.from_numpy(filters).float().T @ power).clamp(min=FLOOR).log()


class _Clips(Dataset):
    """Collated batches of clips in memory."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["label"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        return {name: column[list(rows)] for name, column in self.columns.items()}


class SpokenDigits(SplitData):
    """Clips of one word each, as log-mels in [-1, 1] with digit and speaker.

    Batches: ``mel`` (B, M, T) float, ``label`` (B,), ``speaker`` (B,), ``mask`` (B, T) bool, False where a clip has
    ended (its mel is silence there). A longer clip is cut.

    Args:
        file: an ``.npz`` with ``audio`` int16 (all clips on end), ``offsets`` (n + 1,), ``label``, ``speaker``,
            ``is_test`` (n,) and ``sample_rate``, such as the free spoken digit dataset (CC BY-SA) put into one file.
        bins, frames: M and T.
        window, hop: in samples.
        batch_size: clips per batch.
        validation: share of the training clips held out for it.
        seed: of the order and of that split.

    Raises:
        ConfigurationError: no such file, or a file without these arrays; numbers out of range.

    Example::

        data = SpokenDigits("fsdd_digits.npz")
        batch = next(iter(data.train_dataloader()))                   # batch["mel"]: (32, 20, 32)
    """

    def __init__(
        self,
        file: str,
        bins: int = 20,
        frames: int = 32,
        window: int = 256,
        hop: int = 128,
        batch_size: int = 32,
        validation: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("bins", bins), ("frames", frames), ("hop", hop), ("batch_size", batch_size)):
            check_integer(name, value, 1)
        check_integer("window", window, 4)
        check_integer("seed", seed, 0)
        check_number("validation", validation, 0, 1, closed="[)")
        check(Path(file).expanduser().is_file(), "file", file, "an existing .npz file")
        self.file, self.bins, self.frames, self.window, self.hop = file, bins, frames, window, hop
        self.batch_size, self.validation, self.seed = batch_size, validation, seed
        self._clips: dict[str, _Clips] | None = None

    def _read(self) -> tuple[dict[str, Tensor], Tensor]:
        return _spectrograms(str(Path(self.file).expanduser()), self.bins, self.frames, self.window, self.hop)

    def _datasets(self) -> dict[str, Any]:
        if self._clips is None:
            columns, is_test = self._read()
            rows = torch.nonzero(~is_test)[:, 0]
            rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))]
            held_out = round(self.validation * len(rows))
            parts = {"train": rows[held_out:], "validation": rows[:held_out], "test": torch.nonzero(is_test)[:, 0]}
            self._clips = {
                name: _Clips({key: column[part] for key, column in columns.items()}) for name, part in parts.items()
            }
        return self._clips

    @property
    def num_classes(self) -> int:
        """Digits."""
        return int(self._read()[0]["label"].max()) + 1

    @property
    def num_speakers(self) -> int:
        """Speakers."""
        return int(self._read()[0]["speaker"].max()) + 1


@lru_cache(maxsize=2)
def _spectrograms(file: str, bins: int, frames: int, window: int, hop: int) -> tuple[dict[str, Tensor], Tensor]:
    """All clips, scaled by the extremes of the training clips to [-1, 1], and which are for testing."""
    with np.load(file, allow_pickle=False) as data:
        check(set(KEYS) <= set(data.files), "file", sorted(data.files), f"the arrays {KEYS}")
        arrays = {key: data[key] for key in KEYS}
    audio, rate = torch.from_numpy(arrays["audio"].astype(np.float32)) / 32768, int(arrays["sample_rate"])
    lengths = np.diff(arrays["offsets"])
    mels = torch.full((len(lengths), bins, frames), float(np.log(FLOOR)))
    mask = torch.zeros(len(lengths), frames, dtype=torch.bool)
    for i, (start, length) in enumerate(zip(arrays["offsets"], lengths)):
        mel = log_mel(audio[start : start + length], rate, bins, window, hop)[:, :frames]
        mels[i, :, : mel.shape[1]], mask[i, : mel.shape[1]] = mel, True
    is_test = torch.from_numpy(arrays["is_test"]).bool()
    low, high = mels[~is_test].min(), mels[~is_test].max()
    columns = {"mel": (2 * (mels - low) / (high - low) - 1).clamp(-1, 1), "mask": mask}
    columns |= {key: torch.from_numpy(arrays[key].astype(np.int64)) for key in ("label", "speaker")}
    return columns, is_test

"""Log-mels, and clips from an npz."""

import numpy as np
import pytest
import torch

from effdl.core.errors import ConfigurationError
from effdl.data.speech import SpokenDigits, log_mel


def tone(hertz, seconds=0.2, rate=8000):
    return 0.5 * torch.sin(2 * torch.pi * hertz * torch.arange(int(seconds * rate)) / rate)


def test_a_higher_tone_lights_a_higher_bin():
    peaks = [int(log_mel(tone(hertz), 8000).mean(1).argmax()) for hertz in (300, 800, 2000, 3500)]
    assert peaks == sorted(set(peaks))
    assert float(log_mel(torch.zeros(1600), 8000).max()) == pytest.approx(np.log(1e-5))


@pytest.fixture
def file(tmp_path):
    clips = [tone(300 + 200 * i, 0.1 + 0.05 * i).numpy() for i in range(12)]
    np.savez(
        tmp_path / "clips.npz", audio=(32767 * np.concatenate(clips)).astype(np.int16),
        offsets=np.cumsum([0, *map(len, clips)]), label=np.arange(12) % 4, speaker=np.arange(12) % 2,
        is_test=np.arange(12) % 3 == 0, sample_rate=8000,
    )  # fmt: skip
    return str(tmp_path / "clips.npz")


def test_batches_of_clips(file):
    data = SpokenDigits(file, frames=24, batch_size=4, validation=0.25)
    assert (len(data.train_dataset), len(data.val_dataset), len(data.test_dataset)) == (6, 2, 4)
    assert (data.num_classes, data.num_speakers) == (4, 2)
    batch = next(iter(data.train_dataloader()))
    assert batch["mel"].shape == (4, 20, 24)
    assert batch["mask"].shape == (4, 24)
    assert batch["label"].dtype == torch.long
    assert float(batch["mel"].min()) >= -1
    assert float(batch["mel"].max()) <= 1
    test = data.test_dataset.__getitems__(range(4))
    lengths = test["mask"].sum(1)
    assert lengths.tolist() == sorted(lengths.tolist())
    assert (test["mel"][~test["mask"][:, None].expand_as(test["mel"])] == -1).all()


def test_what_is_missing_is_said(tmp_path, file):
    with pytest.raises(ConfigurationError, match="file"):
        SpokenDigits(str(tmp_path / "none.npz"))
    np.savez(tmp_path / "other.npz", audio=np.zeros(3))
    with pytest.raises(ConfigurationError, match="offsets"):
        SpokenDigits(str(tmp_path / "other.npz")).setup()
    with pytest.raises(ConfigurationError, match="validation"):
        SpokenDigits(file, validation=1.0)

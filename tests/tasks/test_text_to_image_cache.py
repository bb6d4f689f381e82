"""effdl.tasks.text_to_image: sample grids, and the cache of encodings."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers import CSVLogger

from effdl.core.errors import ConfigurationError
from effdl.data.captioned import CaptionedImageData
from effdl.tasks import tiny
from effdl.tasks.text_to_image import TextToImageModule
from tests.tasks.text_to_image_parts import PROMPTS, data, fit, make, same

# Sample grids


def test_a_grid_at_every_validation_of_the_average_to_each_logger(tmp_path, monkeypatch):
    shown = []

    class Board(CSVLogger):
        class experiment:
            add_image = staticmethod(lambda key, picture, step: shown.append((key, picture, step)))
            log_metrics = save = staticmethod(lambda *args, **kwargs: None)

    module, drawn = make(steps=2, prompts=PROMPTS), []
    sample = module.sample
    monkeypatch.setattr(module, "sample", lambda **k: drawn.append(copy.deepcopy(module.state_dict())) or sample(**k))
    loggers = [CSVLogger(tmp_path, name="files"), Board(tmp_path)]
    average = EMAWeightAveraging(decay=0.5)
    trainer = fit(module, tmp_path, max_steps=8, limit_val_batches=1, logger=loggers, callbacks=[average])
    files = sorted((tmp_path / "files").glob("version_0/samples/*.png"))
    assert [file.stem for file in files] == ["00000004", "00000008"]
    assert [(key, tuple(picture.shape), step) for key, picture, step in shown] == [
        ("samples", (3, 80, 152), s) for s in (4, 8)
    ]
    assert same(drawn[-1], module.state_dict())  # what training ends with is the average
    module.figures(tmp_path)
    assert (tmp_path / "samples.png").is_file()
    assert trainer.global_step == 8


def test_a_grid_at_the_end_of_the_epoch_where_there_is_no_validation(tmp_path):
    module = make("tiny-3", steps=1, prompts=["a cat"])
    fit(module, tmp_path, max_steps=4, logger=CSVLogger(tmp_path, name="files"))
    assert len(list((tmp_path / "files").glob("version_0/samples/*.png"))) == 1


# The cache of encodings


@pytest.mark.parametrize("kind", ["tiny", "tiny-xl", "tiny-3"])
def test_a_run_from_the_cache_is_the_run_with_encoders(kind, tmp_path):
    plain = make(kind)
    fit(plain, tmp_path, limit_val_batches=1, max_steps=4)
    cached = make(kind, cache=tmp_path / "cache")
    trainer = fit(cached, tmp_path, limit_val_batches=1, max_steps=4)
    for one, other in zip(plain.state_dict().values(), cached.state_dict().values()):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert trainer.callback_metrics["val/loss"] > 0
    assert {file.suffix for file in (tmp_path / "cache").rglob("*.*")} == {".safetensors"}


def test_with_a_cache_encoders_are_not_called_again(tmp_path, monkeypatch):
    fit(make(cache=tmp_path, prompts=["x"]), tmp_path)
    again = make(cache=tmp_path, prompts=["x"], steps=1)

    def refuse(*args, **kwargs):
        raise AssertionError("an encoder was called")

    monkeypatch.setattr(type(again.surroundings), "image_moments", refuse)
    monkeypatch.setattr(again.surroundings.text_encoder.module, "forward", refuse)
    again.surroundings._empty = make().surroundings.unconditional("cpu")
    moved = []
    monkeypatch.setattr(again.surroundings, "to", moved.append)
    fit(again, tmp_path, max_steps=4)
    assert set(moved) == {"cpu"}  # before the first step, and after a sample grid


def test_a_stopped_pass_goes_on_and_other_data_makes_another(tmp_path, monkeypatch):
    monkeypatch.setattr("effdl.tasks._encode_cache.ROWS", 8)
    module = make(cache=tmp_path)
    fit(module, tmp_path)
    blocks = sorted(tmp_path.glob("images-*/*.safetensors"))
    assert len(blocks) == 2
    first, times = blocks[0].read_bytes(), blocks[0].stat().st_mtime_ns
    blocks[1].unlink()
    fit(make(cache=tmp_path), tmp_path)
    assert blocks[1].is_file()
    assert blocks[0].stat().st_mtime_ns == times
    assert blocks[0].read_bytes() == first
    fit(make(cache=tmp_path), tmp_path, data(12))
    assert len(list(tmp_path.glob("images-*"))) == 2
    other = TextToImageModule(tiny.tiny_stable_diffusion(16, seed=1), cache=tmp_path, steps=0)
    fit(other, tmp_path)
    assert len(list(tmp_path.glob("images-*"))) == 3
    assert len(list(tmp_path.glob("text-*"))) == 3


def test_what_a_cache_cannot_serve_is_refused(tmp_path):
    augmented = CaptionedImageData(image_size=16, batch_size=4, max_train=8, augment=True)
    with pytest.raises(ConfigurationError, match="augmented"):
        fit(make(cache=tmp_path), tmp_path, augmented)
    unlabelled = torch.utils.data.DataLoader([{"image": torch.zeros(3, 16, 16), "prompt": "a"}] * 4, batch_size=2)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    with pytest.raises(ConfigurationError, match="index"):
        trainer.fit(make(cache=tmp_path), unlabelled)

"""What the tests of text to image share: tiny modules, captioned data, a short run, a drawing."""

from __future__ import annotations

import logging
import warnings
from functools import partial

import lightning as L
import torch

from effdl.data.captioned import CaptionedImageData
from effdl.tasks.text_to_image import TINY, TextToImageModule
from tests.support import quiet_fit

logging.getLogger("diffusers").setLevel(logging.ERROR)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", ".*does not have many workers.*")
KINDS = {
    "tiny": "StableDiffusionPipeline",
    "tiny-2": "StableDiffusionPipeline",
    "tiny-xl": "StableDiffusionXLPipeline",
    "tiny-3": "StableDiffusion3Pipeline",
}
PROMPTS = ["a cat", "a dog, to the left"]


def make(kind: str = "tiny", **kwargs) -> TextToImageModule:
    """16x16 images: latents of 4x4."""
    pipeline = TINY[kind](16) if isinstance(kind, str) and kind in TINY else kind
    rate = 0.05 if kwargs.get("rank") is None else 2.0  # an adapter begins at zero
    optimizer = partial(torch.optim.SGD, lr=rate, momentum=0.9)
    return TextToImageModule(pipeline, optimizer=optimizer, **{"steps": 0, "prompt_dropout": 0.3} | kwargs)


def data(count: int = 16, batch_size: int = 4) -> CaptionedImageData:
    return CaptionedImageData(image_size=16, batch_size=batch_size, max_train=count, prompt="digit {}", val=0.004)


def fit(module, folder, datamodule=None, **kwargs) -> L.Trainer:
    options = {"default_root_dir": folder, "max_steps": 2, "limit_val_batches": 0} | kwargs
    return quiet_fit(module, datamodule or data(), *options.pop("callbacks", ()), **options)


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, **kwargs):
    kwargs = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(3), "output_type": "pt"} | kwargs
    return quiet(pipeline)("a cat", height=16, width=16, **kwargs).images


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def batch(size: int = 2, **keys) -> dict:
    images = torch.rand(size, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"image": images, "prompt": PROMPTS[:size]} | keys

"""score-sde: where a score network comes from, and the folder it goes to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from effdl.core.capture import uncompiled
from effdl.core.errors import check
from effdl.core.export import WEIGHTS, save_safetensors
from effdl.diffusion._denoiser import kind
from effdl.diffusion._score_sde_equations import SDE

RECORD = "sde.json"
DDPM_STEPS = 1000  # label i of DDPM's table is 999 t at t = i / 999


def open_network(model: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A network and what ``sde.json`` says beside it, ``{}`` without one.

    Args:
        model: an ``nn.Module``, a diffusers pipeline, folder or configuration, ``"tiny"``.
    """
    record: dict[str, Any] = {}
    if isinstance(model, (str, Path)) and (Path(model) / RECORD).is_file():
        record = json.loads((Path(model) / RECORD).read_text("utf-8"))
    if not isinstance(model, nn.Module):
        from effdl.tasks._diffusers import take_apart

        model, _, surroundings = take_apart(str(model) if isinstance(model, Path) else model)
        check(surroundings.vae is None, "model", "a latent pipeline", "a network on pixels",
              "Take its unet, and encode the data before.")  # fmt: skip
    check(isinstance(model, nn.Module), "model", type(model).__name__, "a torch.nn.Module to train")
    return model, record


def save_network(folder: str | Path, network: nn.Module, sde: SDE, prediction: str, record: dict[str, Any]) -> None:
    """Write the network as stock diffusers opens it, and ``sde.json``.

    A vp network that predicts noise is a DDPM: the folder is that of a ``DDPMPipeline``, which samples from it as it
    is. A ``UNet2DModel`` of another equation lies in ``unet/`` (beside ``scheduler/``, a ``ScoreSdeVeScheduler``, for
    ve). Any other network becomes ``model.safetensors``.
    """
    network, folder = uncompiled(network), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not kind(network):
        save_safetensors(network, folder / WEIGHTS)
    elif sde.name == "vp" and prediction == "epsilon":
        from diffusers import DDPMPipeline

        DDPMPipeline(network, _ddpm(sde)).save_pretrained(str(folder))
    else:
        network.save_pretrained(str(folder / "unet"))
        if sde.name == "ve":
            from diffusers import ScoreSdeVeScheduler

            options = {"sigma_min": sde.sigma_min, "sigma_max": sde.sigma_max, "sampling_eps": sde.eps}
            ScoreSdeVeScheduler(sde.steps, snr=sde.snr, **options).save_pretrained(str(folder / "scheduler"))
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def _ddpm(sde: SDE) -> Any:
    from diffusers import DDPMScheduler

    b0, b1 = (beta / DDPM_STEPS for beta in (sde.schedule.beta_min, sde.schedule.beta_max))
    return DDPMScheduler(DDPM_STEPS, b0, b1, variance_type="fixed_large", clip_sample=False)

"""Networks for the tests of score-sde."""

from __future__ import annotations

import torch
from torch import nn

from effdl.tasks.tiny import tiny_unet


class Plane(nn.Module):
    """A network in the plane, told a label."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x, label):
        return self.net(torch.cat([x, label[:, None].to(x) / 1000], 1))


def plane(seed: int = 0) -> Plane:
    torch.manual_seed(seed)
    return Plane()


class Tame(nn.Module):
    """Noise is what is there: a network whose ODE is quickly solved (an untrained U-Net's is chaotic)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.9))

    def forward(self, x, label):
        return self.weight * x


def unet(**kwargs):
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    return tiny_unet(8, 1, norm_num_groups=4, **blocks, **kwargs)

"""dsnot: the calibration tokens of its tests."""

from __future__ import annotations

import torch


def tokens(count=2, length=12, vocabulary=64):
    g = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1, vocabulary, (2, length), generator=g)} for _ in range(count)]

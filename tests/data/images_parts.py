"""What the tests of image data share."""

from __future__ import annotations


def batches(loader) -> list[list[int]]:
    return [batch["index"].tolist() for batch in loader]

"""A short name for what a cached file was made from: weights, tensors, strings, numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def fingerprint(*parts: Any) -> str:
    """Sixteen hex digits of networks (names and values of their state), tensors, arrays, and plain values.

    Lists, tuples and mappings are gone through; anything else counts by its ``repr``.

    Example::

        folder = cache / fingerprint(vae, images, {"size": 64})
    """
    digest = hashlib.sha256()
    for part in parts:
        _add(digest, part)
    return digest.hexdigest()[:16]


def _add(digest: Any, part: Any) -> None:
    if isinstance(part, nn.Module):
        for name, tensor in part.state_dict().items():
            digest.update(name.encode())
            _add(digest, tensor)
    elif isinstance(part, Tensor):
        digest.update(part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(part, Mapping):
        for key, value in part.items():
            _add(digest, key)
            _add(digest, value)
    elif isinstance(part, (list, tuple)):
        digest.update(f"{len(part)}:".encode())
        for value in part:
            _add(digest, value)
    else:
        text = part if isinstance(part, bytes) else (part if isinstance(part, str) else repr(part)).encode()
        digest.update(f"{len(text)}:".encode() + text)

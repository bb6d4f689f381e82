"""What the two processes of ``test_text_to_image_training.py`` run: every kind, from a cache or through an adapter."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from tests.joined import joined_ddp
from tests.tasks.text_to_image_parts import KINDS, data, fit, make


def run(rank: int, folder: str) -> None:
    cache, adapter = {"cache": folder + "/cache"}, {"rank": 2, "gradient_checkpointing": True}
    for kind, more in zip(KINDS, (cache, adapter, adapter, cache), strict=True):
        module = make(kind, **more)
        before = [p.detach().clone() for p in module.parameters()]
        strategy = joined_ddp(rank)
        fit(module, folder, data(), strategy=strategy, devices=2, accumulate_grad_batches=2, limit_val_batches=1)
        for name, value in module.state_dict().items():
            both = [torch.empty_like(value) for _ in range(2)]
            dist.all_gather(both, value)
            assert torch.equal(*both), (kind, name)
        assert any(not torch.equal(v, w) for v, w in zip(module.parameters(), before)), kind
        Path(folder, f"{kind}-equal").touch()

"""What the two processes of ``test_nupes.py`` run; apart, so that they start without importing the tests."""

from __future__ import annotations

import torch
from torch import nn

from effdl.compression._nupes_inputs import power_input
from effdl.compression._nupes_learning import Learning
from effdl.compression._nupes_network import learn_network
from effdl.compression.nupes import power_records
from effdl.core.input_ranges import input_histograms


def learned(rank: int) -> dict[str, list[torch.Tensor]]:
    """Codes and exponents from one rank's batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    records = power_records({n: p.detach() for n, p in model.named_parameters() if p.dim() > 1}, 2, 0.7)
    batches = [torch.randn(32, 1, 6, 6, generator=torch.Generator().manual_seed(rank))]
    found = learn_network(model, records, batches, Learning(exponent=True, iterations=40))
    return {name: [r.codes, r.scale, r.exponent] for name, r in found.items()}


def ranges(seeds: list[int]) -> dict[str, list[torch.Tensor]]:
    """Input ranges from the batches of these ranks."""
    torch.manual_seed(0)
    layers = {"0": nn.Linear(6, 6), "1": nn.Linear(6, 2)}
    model = nn.Sequential(layers["0"], nn.ReLU(), layers["1"])
    batches = [(1 + seed) * torch.randn(32, 6, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    seen = input_histograms(layers, lambda: [model(batch) for batch in batches])
    records = {name: power_input(found, 4) for name, found in seen.items()}
    return {name: [record.scale, record.zero_point, record.exponent] for name, record in records.items()}


def run(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save({"learned": learned(rank), "ranges": ranges([rank])}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()

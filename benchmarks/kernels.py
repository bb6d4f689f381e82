"""Integer kernels beside float and beside torchao's own quantisation; low rank beside Composer's rule."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from benchmarks.race import in_turns, ratios
from effdl.core.deploy import deploy, observe
from effdl.core.factorize import factorize, is_cheaper, max_rank, select_factorizable
from effdl.core.quantized import quantize_
from effdl.core.quantizers import symmetric


def _mlp() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1000)]
    return nn.Sequential(*layers).eval()


def _coded(model: nn.Module, bits: int = 8) -> nn.Module:
    coded = copy.deepcopy(model)
    quantize_(coded, {n: symmetric(p.detach(), bits) for n, p in coded.named_parameters() if p.dim() > 1})
    return coded


def int8(pairs: int, batch: int) -> list[dict[str, Any]]:
    """Our codes through ``torch.ops.quantized`` and torchao's tensors, torchao's own quantisation, and float: an MLP of
    1024 wide layers on one and on ``batch`` rows, and timm's resnet18 at 64x64."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig
        from torchao.quantization import quantize_ as torchao_quantize
    except ImportError:
        return [{"name": "int8: torchao is not installed (pip install 'effdl[torchao]')"}]
    model = _mlp()
    coded, theirs = _coded(model), copy.deepcopy(model)
    torchao_quantize(theirs, Int8WeightOnlyConfig())
    networks = {"float": model, "torch-int8": deploy(coded, "torch-int8"), "torchao": deploy(coded, "torchao"),
                "theirs": theirs, "lut": coded}  # fmt: skip
    found = []
    for rows in (1, batch):
        x = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(1))
        found += _rows(networks, x, pairs, f"MLP 1024, {rows} rows", (("torch-int8", "float"), ("torchao", "theirs")))
    return [*found, *_resnet(pairs, batch)]


def _resnet(pairs: int, batch: int) -> list[dict[str, Any]]:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10).eval()
    x = torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    coded = _coded(model)
    fast = deploy(coded, "torch-int8", activations=observe(coded, [x]))
    networks = {"float": model, "torch-int8": fast, "dense": deploy(coded, "dense")}
    return _rows(networks, x, pairs, f"resnet18, {batch} images", (("torch-int8", "float"), ("dense", "float")))


@torch.inference_mode()
def _rows(
    networks: dict[str, nn.Module], x: torch.Tensor, pairs: int, title: str, races: tuple
) -> list[dict[str, Any]]:
    runs = {name: (lambda network=network: network(x)) for name, network in networks.items()}
    outputs = {name: run() for name, run in runs.items()}
    times = in_turns(runs, pairs)
    size = outputs["float"].abs().max()
    rows = []
    for ours, other in races:
        apart = float((outputs[ours] - outputs[other]).abs().max() / size)
        rows.append({"name": f"{title}: {ours} / {other}", **ratios(times, ours, other), "difference": apart})
    return rows


def low_rank(pairs: int, batch: int) -> list[dict[str, Any]]:
    """``core.factorize`` at the ranks of Composer's rule (a quarter of the shorter side, where that is cheaper) over
    the dense network: timm's resnet18 at 64x64. The rule is arithmetic; Composer, whose package pins another torch, is
    not run."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10).eval()
    layers, _ = select_factorizable(model, exclude=["conv1", "fc"])
    ranks = {name: max(1, max_rank(layer.weight.shape, "channel") // 4) for name, layer in layers.items()}
    ranks = {name: r for name, r in ranks.items() if is_cheaper(layers[name].weight.shape, r, "channel")}
    small = factorize(model, ranks)
    x = torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    rows = _rows({"float": model, "low rank": small}, x, pairs, f"resnet18, {batch} images", (("low rank", "float"),))
    share = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
    return [{**row, "parameters": share} for row in rows]

"""Which block, timestep and pooling separate the classes best: one pass per timestep, a probe per candidate."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effdl.core.batch import unpack
from effdl.core.capture import evaluating
from effdl.core.errors import check, check_choice
from effdl.core.random import generator
from effdl.diffusion._feature_extractor import DiffusionFeatureExtractor
from effdl.diffusion._feature_heads import pooled

PROBES = ("logistic", "ridge")
TIMESTEPS = (10, 50, 90, 150, 300)
CHUNK = 128  # images at a time
Labelled = tuple[Tensor, Tensor]


def probe_accuracy(train: Labelled, test: Labelled, probe: str = "logistic", penalty: float = 1.0) -> float:
    """Accuracy of a linear probe on standardised features.

    Args:
        train, test: features ``[N, D]`` and labels ``[N]``.
        probe: ``"logistic"`` (scikit-learn, L2 with C = 1 / penalty) or ``"ridge"`` onto one-hot labels (closed form).
        penalty: > 0.
    """
    check_choice("probe", probe, PROBES)
    mean, std = train[0].mean(0), train[0].std(0).clamp(min=1e-6)
    x, x_test = ((part[0] - mean) / std for part in (train, test))
    if probe == "ridge":
        y = nn.functional.one_hot(train[1].long()).to(x)
        # the dual form: as many equations as examples, however many features
        gram = x @ x.T + penalty * torch.eye(len(x)).to(x)
        predicted = (x_test @ (x.T @ torch.linalg.solve(gram, y - y.mean(0))) + y.mean(0)).argmax(1)
        return float((predicted == test[1].to(predicted.device)).float().mean())
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # not converged: a probe, not a result
        model = LogisticRegression(C=1 / penalty, max_iter=500).fit(x.cpu().numpy(), train[1].cpu().numpy())
    return float(model.score(x_test.cpu().numpy(), test[1].cpu().numpy()))


@torch.no_grad()
def search_blocks(
    extractor: DiffusionFeatureExtractor,
    train: Labelled,
    test: Labelled,
    blocks: Iterable[int] | None = None,
    timesteps: Sequence[int] = TIMESTEPS,
    pools: Sequence[int] = (1, 2),
    probe: str = "logistic",
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Accuracy of every (block, timestep, pool), best first.

    Args:
        extractor: its network, schedule and condition are used; which block it reads itself does not matter.
        train, test: images (or latents) ``[N, C, H, W]`` and labels ``[N]``.
        blocks: numbers; ``None``: all.
        timesteps: candidates.
        pools: candidates; those larger than a block's side are left out.
        probe: see :func:`probe_accuracy`.
        seed: of the noise.

    Returns:
        Rows ``{"block", "name", "timestep", "pool", "accuracy"}``.

    Example::

        best = search_blocks(extractor, (images[:100], labels[:100]), (images[100:], labels[100:]))[0]
    """
    names = {number: name for number, _, name in extractor.blocks()}
    chosen = sorted(names) if blocks is None else list(blocks)
    check(set(chosen) <= set(names), "blocks", chosen, f"numbers from 1 to {len(names)}")
    rows = []
    with evaluating(extractor.network):
        for t in timesteps:
            images = enumerate((train[0], test[0]))
            parts = [_pooled_features(extractor, x, t, chosen, pools, seed + i) for i, x in images]
            for block, pool in parts[0]:
                both = [(part[block, pool], labels) for part, (_, labels) in zip(parts, (train, test))]
                accuracy = probe_accuracy(*both, probe)
                rows.append({"block": block, "name": names[block], "timestep": t, "pool": pool, "accuracy": accuracy})
    return sorted(rows, key=lambda row: -row["accuracy"])


def _pooled_features(
    extractor: DiffusionFeatureExtractor, x: Tensor, t: int, blocks: Sequence[int], pools: Sequence[int], seed: int
) -> dict[tuple[int, int], Tensor]:
    random, found = generator(seed, x.device), {}
    for part in x.split(CHUNK):
        for block, z in extractor.at(part, t, blocks, random).items():
            for pool in pools:
                if pool <= min(z.shape[2:]):
                    found.setdefault((block, pool), []).append(pooled([z], pool).cpu())
    return {key: torch.cat(values) for key, values in found.items()}


@torch.no_grad()
def baseline_rows(
    train: Labelled, test: Labelled, models: Sequence[str] = (), pretrained: bool = False, probe: str = "logistic"
) -> list[dict[str, Any]]:
    """The same probe on the pixels and on the pooled features of timm models: what the diffusion features must beat.

    Args:
        train, test: images in [-1, 1] ``[N, C, H, W]`` and labels.
        models: timm names.
        pretrained: with the hub's weights; else random ones, which is the honest lower line offline.
        probe: see :func:`probe_accuracy`.
    """
    import timm

    rows = [{"name": "pixels", "accuracy": probe_accuracy(*((x.flatten(1).cpu(), y) for x, y in (train, test)), probe)}]
    for name in models:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, in_chans=train[0].shape[1]).eval()
        parts = [(torch.cat([model(part.cpu()) for part in x.split(CHUNK)]), y) for x, y in (train, test)]
        start = "pretrained" if pretrained else "random weights"
        rows.append({"name": f"{name}, {start}", "accuracy": probe_accuracy(*parts, probe)})
    return rows


def draw_sweep(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Accuracy over block and timestep, the best pooling of each."""
    from matplotlib.figure import Figure

    blocks, times = (sorted({row[key] for row in rows}) for key in ("block", "timestep"))
    table = [[max(r["accuracy"] for r in rows if (r["block"], r["timestep"]) == (b, t)) for b in blocks] for t in times]
    figure = Figure(figsize=(1.5 + 0.5 * len(blocks), 1.5 + 0.5 * len(times)), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(table, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(blocks)), blocks)
    axes.set_yticks(range(len(times)), times)
    axes.set(xlabel="block", ylabel="timestep", title="accuracy of the probe")
    figure.colorbar(shown)
    figure.savefig(path)
    return path


def told(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A sweep as a method's report tells it: all rows, and the best five beside the baselines as a table."""
    if not rows:
        return {}
    found = [row for row in rows if "block" in row]
    shown = {f"block {row['block']}, t {row['timestep']}, pool {row['pool']}": row for row in found[:5]}
    shown |= {row["name"]: row for row in rows if "block" not in row}
    table = {name: {"probe": f"{100 * row['accuracy']:.1f} %"} for name, row in shown.items()}
    return {"sweep": list(rows), "layers": table}


def first_images(loader: Any, count: int, device: torch.device) -> Labelled | None:
    """The first images and labels of a loader; ``None`` without one."""
    loader = loader[0] if isinstance(loader, (list, tuple)) and loader else loader
    if not loader:
        return None
    images, labels, have = [], [], 0
    for batch in loader:
        x, y, _ = unpack(batch)
        images, labels, have = [*images, x], [*labels, y], have + len(x)
        if have >= count:
            break
    return torch.cat(images)[:count].to(device), torch.cat(labels)[:count].to(device)


def check_timm(names: Sequence[str]) -> None:
    """Raise unless ``names`` is a list of timm models."""
    import timm

    listed = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    check(listed and all(timm.is_model(name) for name in names), "baselines", names, "a list of timm models")

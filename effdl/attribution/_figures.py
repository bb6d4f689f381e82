"""Heat-maps over images, as figures that a person wants to look at. Without pyplot: no display, no global state."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from effdl.attribution._layers import resize

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 8  # samples side by side; more of them start a new block of rows


def displayable(image: Tensor) -> np.ndarray:
    """A (C, H, W) image in any normalisation -> (H, W, 3) in [0, 1], stretched to its own range.

    One or two channels, or more than three, are shown as their mean in grey.
    """
    image = image.detach().float().cpu()
    image = image if image.shape[0] == 3 else image.mean(0, keepdim=True).expand(3, -1, -1)
    low, high = image.amin(), image.amax()
    image = (image - low) / (high - low) if high > low else torch.zeros_like(image)
    return image.permute(1, 2, 0).numpy()


def overlay(image: np.ndarray, heat: Tensor, side: int = 256, colors: str = "inferno") -> np.ndarray:
    """Heat (H, W) in [0, 1] over an image (H, W, 3), which stays visible in pale grey; small images are enlarged."""
    from matplotlib import colormaps

    zoom = max(1, side // max(image.shape[:2]))
    grey = image.mean(-1, keepdims=True).repeat(zoom, 0).repeat(zoom, 1)
    smooth = resize(heat.detach().float().cpu()[None], grey.shape[:2])[0].clamp(0, 1).numpy()
    opacity = 0.75 * smooth[..., None] ** 0.7
    return (1 - opacity) * (0.2 + 0.6 * grey) + opacity * colormaps[colors](smooth)[..., :3]


def overlay_figure(
    images: Tensor,
    maps: Mapping[str, Tensor],
    titles: Sequence[str],
    title: str = "",
    wrong: Sequence[bool] = (),
    size: float = 1.6,
) -> Figure:
    """One column per sample: the input above, below it the overlay of each layer.

    Args:
        images: (B, C, H, W).
        maps: {layer: (B, H, W) in [0, 1]}.
        titles: B captions, such as ``"cat, 97 %"``.
        title: of the whole figure.
        wrong: captions to print in red.
        size: inches per picture.

    Example::

        figure = overlay_figure(x, cam(x), ["cat, 97 %", "dog, 81 %"])
        figure.savefig("overlay.png", dpi=150)
    """
    from matplotlib.figure import Figure

    count, kinds = len(images), len(maps) + 1
    columns = min(count, COLUMNS)
    rows = kinds * -(-count // columns)
    figure = Figure(figsize=(size * columns + 1.0, size * rows + 0.25 * rows / kinds + 0.4), layout="compressed")
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.flat:
        one.set(xticks=[], yticks=[])
        one.spines[:].set_visible(False)
    for i, image in enumerate(map(displayable, images)):
        block, column = kinds * (i // columns), i % columns
        axes[block, column].imshow(image, interpolation="nearest")
        axes[block, column].set_title(titles[i], fontsize=9, color="firebrick" if any(wrong[i : i + 1]) else "black")
        for row, (layer, heat) in enumerate(maps.items(), block + 1):
            axes[row, column].imshow(overlay(image, heat[i]))
            if column == 0:
                axes[row, column].set_ylabel(f"layer {layer}" if layer.isdigit() else layer, fontsize=9)
    figure.get_layout_engine().set(h_pad=0.02, w_pad=0.02, hspace=0, wspace=0)
    figure.suptitle(title, fontsize=11)
    _scale(figure, axes)
    return figure


def _scale(figure: Figure, axes: np.ndarray) -> None:
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(cmap="inferno"), ax=axes, shrink=0.6, aspect=30, pad=0.01)
    bar.set_ticks([0, 1], labels=["none", "most"])
    bar.set_label("evidence for the class", fontsize=9)
    bar.outline.set_visible(False)


def caption(row: Mapping[str, Any], classes: Sequence[str] | None = None) -> str:
    """``cat  97 %``, or ``dog  71 %, true cat`` where the explained class is not the label; else the score."""

    def name(index: int) -> str:
        return str(classes[index]) if classes is not None and index < len(classes) else str(index)

    if "class" not in row:
        return f"score {row['score']:.3g}"
    text = f"{name(row['class'])}  {100 * row['probability']:.0f} %"
    return text if row.get("label", row["class"]) == row["class"] else f"{text}, true {name(row['label'])}"


def png(figure: Figure, dpi: int = 120) -> bytes:
    """The drawn figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi, bbox_inches="tight")
    return file.getvalue()


def pixels(picture: bytes) -> Tensor:
    """A PNG as uint8 (3, H, W), for loggers."""
    from matplotlib.image import imread

    return torch.from_numpy((255 * imread(io.BytesIO(picture))[..., :3]).round().astype(np.uint8)).permute(2, 0, 1)

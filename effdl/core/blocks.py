"""Where a network repeats itself: its list of transformer blocks."""

from __future__ import annotations

from torch import nn

from effdl.core.capture import named_module
from effdl.core.errors import ConfigurationError
from effdl.core.select import matches

LINEAR = (nn.Linear, "Conv1D")  # transformers' Conv1D is a Linear with a transposed weight


def find_blocks(model: nn.Module, name: str | None = None, kinds: tuple = LINEAR) -> dict[str, nn.Module]:
    """The repeated blocks of a network in their order, by qualified name.

    Args:
        model: a transformers model, a timm ViT, or any network.
        name: the list's name (``"model.layers"``); ``None``: the longest ``nn.ModuleList`` of equal classes that is
            not itself inside a block and whose blocks hold a layer of ``kinds``, or else such an ``nn.Sequential``.
        kinds: layer types (or class names) that the caller will treat.

    Returns:
        the blocks, or ``{"": model}`` where nothing repeats: the whole network as one block.

    Raises:
        ConfigurationError: there is no list under ``name``.
    """
    if name is not None:
        found = named_module(model, name, "blocks")
        if not isinstance(found, (nn.ModuleList, nn.Sequential)):
            raise ConfigurationError(f"blocks={name!r} is a {type(found).__name__}, not a list of blocks.")
        return {f"{name}.{key}": block for key, block in found.named_children()}
    for container in (nn.ModuleList, nn.Sequential):
        lists = {n: m for n, m in model.named_modules() if isinstance(m, container) and _repeats(m, kinds)}
        outer = {n: m for n, m in lists.items() if not any(o == "" or n.startswith(f"{o}.") for o in lists if o != n)}
        if outer:
            size = {n: sum(p.numel() for p in m.parameters()) for n, m in outer.items()}
            best = max(outer, key=lambda n: (len(outer[n]), size[n]))
            return {f"{best}.{key}".lstrip("."): block for key, block in outer[best].named_children()}
    return {"": model}


def _repeats(blocks: nn.ModuleList | nn.Sequential, kinds: tuple) -> bool:
    """Equal classes, each with a layer of ``kinds`` below it (a list of bare layers is no list of blocks)."""
    if not len(blocks) or len({type(block) for block in blocks}) > 1 or len({id(b) for b in blocks}) < len(blocks):
        return False
    return all(any(n and any(matches("", m, k) for k in kinds) for n, m in b.named_modules()) for b in blocks)

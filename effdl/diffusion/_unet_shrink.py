"""Smaller U-Nets cut out of larger ones: fewer blocks per stage, fewer transformer layers, perhaps no middle.

Used by koala and by A-SDM. Everything that is kept is a stock diffusers U-Net of another configuration.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from effdl.core.errors import ConfigurationError, check, check_integer

U = TypeVar("U", bound=nn.Module)
PerStage = int | Sequence[int]

_UP_PAIR = re.compile(r"^up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)(?=\.|$)")


@dataclass(frozen=True)
class ShrinkSpec:
    """What to keep of a U-Net.

    Args:
        layers_per_block: (residual, attention) pairs of a down stage, the first ones; an up stage keeps as many and its
            last. One number or one per down stage; ``None``: all.
        depth: transformer layers in each ``Transformer2DModel``, the first ones. One number or one per down stage
            (the middle has the innermost stage's; one that nothing uses is not looked at); ``None``: all.
        mid: whether to keep the middle.

    Raises:
        ConfigurationError: a number below 1 (the U-Net's own bounds are checked by :func:`shrink_unet`).

    Example::

        KOALA_1B, KOALA_700M = ShrinkSpec(1, (1, 2, 6)), ShrinkSpec(1, (1, 2, 5), mid=False)      # of SDXL
    """

    layers_per_block: PerStage | None = None
    depth: PerStage | None = None
    mid: bool = True

    def __post_init__(self) -> None:
        for argument in ("layers_per_block", "depth"):
            value = getattr(self, argument)
            if isinstance(value, Sequence) and not isinstance(value, str):
                for entry in value:
                    check_integer(argument, entry, 1)
            elif value is not None:
                check_integer(argument, value, 1)
        check(isinstance(self.mid, bool), "mid", self.mid, "True or False")


KOALA_1B = ShrinkSpec(1, (1, 2, 6))
KOALA_700M = ShrinkSpec(1, (1, 2, 5), mid=False)


def shrink_unet(unet: U, spec: ShrinkSpec) -> tuple[U, dict[str, str]]:
    """A smaller U-Net with the weights of the larger: nothing in it is initialised at random.

    The channels of the skip connections fix which pairs of an up stage can stay: the first takes the stage below, the
    last the skip of the stage above. Of the transformer layers the first stay: later neighbours differ little.

    Args:
        unet: a ``UNet2DConditionModel`` or ``UNet2DModel``, on any device (``meta`` too); left as it is.
        spec: what to keep.

    Returns:
        ``(student, key_map)``: a stock U-Net of the same class, dtype, device and mode with copied weights, and the
        teacher's name of every one of its tensors.

    Raises:
        ConfigurationError: no stock U-Net, more than it has, another number of stages, depths that differ within one.

    Example::

        with torch.device("meta"):                                       # counts only; weights need no such thing
            sdxl = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config("sdxl", subfolder="unet"))
        student, key_map = shrink_unet(sdxl, KOALA_700M)
        sum(p.numel() for p in student.parameters())                     # 782_822_724
    """
    config = shrunk_config(unet.config if hasattr(unet, "config") else {}, spec, type(unet).__name__)
    with torch.device("meta"):
        student = type(unet).from_config(config)
    rename = teacher_name(student.config, unet.config)
    key_map = {key: rename(key) for key in student.state_dict()}
    state = unet.state_dict()
    student.load_state_dict({key: _copy(state, source) for key, source in key_map.items()}, strict=True, assign=True)
    check(not any(b.is_meta for b in student.buffers()) or any(p.is_meta for p in unet.parameters()), "unet",
          type(unet).__name__, "a U-Net without buffers that its state_dict leaves out")  # fmt: skip
    return student.train(unet.training), key_map


def _copy(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ConfigurationError(f"unet: it has no {name!r}, which the smaller one inherits: its layers were replaced.")
    return state[name].detach().clone()


def shrunk_config(config: Mapping[str, Any], spec: ShrinkSpec, kind: str = "unet") -> dict[str, Any]:
    """The configuration of the smaller U-Net; errors as in :func:`shrink_unet`."""
    known = "layers_per_block" in config and "down_block_types" in config
    check(known, "unet", kind, "a UNet2DConditionModel or a UNet2DModel")
    # without "_use_default_values", whose entries from_config would set back to their defaults
    new, stages = {key: value for key, value in config.items() if key[0] != "_"}, len(config["down_block_types"])
    if spec.layers_per_block is not None:
        new["layers_per_block"] = _fewer("layers_per_block", spec.layers_per_block, config["layers_per_block"], stages)
    if spec.depth is not None:
        old = config.get("transformer_layers_per_block")
        check(old is not None, "depth", spec.depth, f"None: a {kind} has no transformer layers")
        flat = isinstance(old, int) or all(isinstance(entry, int) for entry in old)
        flat = flat and config.get("reverse_transformer_layers_per_block") is None
        check(flat, "unet", old, "one transformer_layers_per_block per stage")
        new["transformer_layers_per_block"] = _fewer("depth", spec.depth, old, stages, _attended(config))
    if not spec.mid:
        new["mid_block_type"] = None
    return new


def _fewer(argument: str, asked: PerStage, have: PerStage, stages: int, where: Sequence[bool] = ()) -> PerStage:
    """``asked`` per stage, never more than there are; a stage that is not ``where`` keeps what it has."""
    whole = isinstance(have, int)
    asked, have = per_stage(asked, stages), per_stage(have, stages)
    check(len(asked) == stages, argument, asked, f"one number, or {stages}: one for each down stage")
    for stage, (want, most) in enumerate(zip(asked, have)):
        used = not where or where[stage]
        check(not used or want <= most, argument, want, f"an integer from 1 to {most}, what down stage {stage} has")
    kept = [want if not where or where[i] else most for i, (want, most) in enumerate(zip(asked, have))]
    return kept[0] if whole and len(set(kept)) == 1 else kept


def _attended(config: Mapping[str, Any]) -> list[bool]:
    """Which entries of ``transformer_layers_per_block`` are used: by a down stage, its up stage, or the middle."""
    down, up = config["down_block_types"], reversed(config["up_block_types"])
    used = ["CrossAttn" in a or "CrossAttn" in b for a, b in zip(down, up)]
    used[-1] |= "CrossAttn" in (config["mid_block_type"] or "")
    return used


def per_stage(value: PerStage, stages: int) -> list[int]:
    """One number for each of the stages, in the order of the down blocks."""
    return [value] * stages if isinstance(value, int) else list(value)


def teacher_name(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> Callable[[str], str]:
    """Names of the smaller U-Net's modules and tensors -> those of the larger that they are cut from.

    Equal, but for the last pair of each up stage, which is the last of the larger too. Takes two configurations.
    """
    stages = len(student["down_block_types"])
    few, many = (per_stage(config["layers_per_block"], stages)[::-1] for config in (student, teacher))

    def rename(name: str) -> str:
        found = _UP_PAIR.match(name)
        if found is None:
            return name
        stage, kind, pair = int(found[1]), found[2], int(found[3])
        pair = many[stage] if pair == few[stage] else pair
        return f"up_blocks.{stage}.{kind}.{pair}{name[found.end() :]}"

    return rename

"""pdp: dead channels fall silent, and at the end they are taken out of the network."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from effdl.core.calibrate import to_device
from effdl.core.capture import evaluating
from effdl.core.errors import ConfigurationError
from effdl.core.masks import MaskStore, unpack
from effdl.core.report import ForwardProbe
from effdl.core.reweight import plain_copy
from effdl.core.select import Weight
from effdl.core.structure import ChannelGroup, Counts, channel_groups, channel_parameters, compact, swap_children

_MIXING = (nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
_MAKERS = (nn.modules.conv._ConvNd, nn.Linear)


def dead_channels(model: nn.Module, store: MaskStore) -> dict[str, Tensor]:
    """Layers below ``model`` with masked output channels, and which (bool, True: dead)."""
    names = {module: name for name, module in model.named_modules()}
    dead = {}
    for key, mask in store.masks.items():
        weight = store.weights[key]
        if isinstance(weight.module, _MAKERS) and weight.module in names:
            gone = mask.movedim(1 if weight.transposed else 0, 0).flatten(1).eq(0).all(1).cpu()
            if gone.any():
                dead[names[weight.module]] = gone
    return dead


def silent_masks(probe: ForwardProbe, dead: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For biases and BatchNorm parameters: bool, ``False`` behind a channel that every layer of its group has dead."""
    plain, masks = plain_copy(probe.model).eval(), {}
    for group in channel_groups(plain, _inputs(probe), dead):
        gone = _dead_in_all(plain, group, dead)
        for name, _, member in channel_parameters(plain, group):
            if plain.get_parameter(name).dim() == 1:
                keep = masks.setdefault(name, torch.ones(plain.get_parameter(name).shape, dtype=torch.bool))
                keep[member.index[gone[member.channel]]] = False
    return masks


def _dead_in_all(model: nn.Module, group: ChannelGroup, dead: Mapping[str, Tensor]) -> Tensor:
    gone = torch.full((group.size,), not group.is_output)
    if any(isinstance(model.get_submodule(member.name), _MIXING) for member in group.members):
        return torch.zeros_like(gone)
    for member in group.of_role("out"):
        own = dead.get(member.name)
        alive = torch.ones(len(member.index), dtype=torch.bool) if own is None else ~own[member.index]
        gone[member.channel[alive]] = False
    return gone


class Compaction:
    """Of one run: dead channels are silenced while the network heals, and taken out at its end.

    Args:
        wanted: ``False`` makes every method do nothing.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.silenced = MaskStore(())
        self.counts: Counts | None = None
        self.full: nn.Module | None = None

    def silence(self, probe: ForwardProbe, store: MaskStore) -> None:
        """Zero what stands behind the dead channels, now and after each step (:meth:`project`)."""
        if not self.wanted or self.silenced.masks or probe.inputs is None:
            return
        try:
            if dead := dead_channels(probe.model, store):
                self._keep(probe.model, silent_masks(probe, dead))
                self.project()
        except ConfigurationError as error:
            self._give_up(error)

    def _give_up(self, error: ConfigurationError) -> None:
        """A trained network is worth more than a small one."""
        self.wanted = False
        rank_zero_warn(f"compact: the network keeps its dead channels. {error}")

    def _keep(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        owners = {name: name.rpartition(".") for name in masks}
        self.silenced = MaskStore(Weight(name, model.get_submodule(o), own) for name, (o, _, own) in owners.items())
        for name, mask in masks.items():
            self.silenced.set(name, mask)

    def project(self) -> None:
        """Optimizers move biases and BatchNorms of dead channels: back to zero."""
        self.silenced.apply_()

    def take_out(self, probe: ForwardProbe, store: MaskStore) -> None:
        """Make the network smaller: it stays the object, with smaller layers.

        Where dead channels are heard through an activation that is not zero at zero, or are coupled in a way the
        dependency graph does not see, the network stays as it is, with a warning.
        """
        if not self.wanted:
            return
        full = copy.deepcopy(probe.model)
        self.silence(probe, store)
        self.project()
        try:
            with evaluating(probe.model):
                small, counts = compact(probe.model, _inputs(probe), dead_channels(probe.model, store))
            self.full, self.counts = full, counts
            swap_children(probe.model, small)
        except ConfigurationError as error:
            probe.model.load_state_dict(full.state_dict())
            self._give_up(error)

    def state(self) -> dict[str, Any]:
        return self.silenced.state()

    def load_state(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        self._keep(model, {name: unpack(mask) for name, mask in state.items()})


def _inputs(probe: ForwardProbe) -> tuple[Any, ...]:
    args, kwargs = probe.inputs or ((), {})
    if not args or kwargs:
        raise ConfigurationError("compact=True needs a network that is called with positional inputs alone.")
    return to_device(args, next(probe.model.parameters()).device)

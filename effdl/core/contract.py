"""What a public class tells the contract suite (``tests/contract``) about itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ContractExample:
    """A tiny run of one public class, returned by its classmethod ``contract_example()``.

    Args:
        kwargs: constructor arguments of the class (for a Mixin: keyword arguments of the combined class).
        bad: for *every* constructor argument one value (or a list of values) that must be refused with a
            ``ConfigurationError`` naming the argument; an argument that takes anything maps to ``ContractExample.ANY``.
        module: makes the LightningModule to train. ``None``: the suite's own foreign classifier (Callback, Mixin)
            or the class itself built with ``kwargs`` (Module).
        data: ``batch_size -> train dataloader`` with an order that is a function of (seed, epoch), resumable; eight
            batches of 4 are plenty. ``None``: the suite's own 8x8 image batches ``(x, y)``.
        example_input: ``module -> tuple of tensors`` for export; ``None``: the first batch's inputs.
        finished: ``module -> nn.Module`` to export; ``None``: ``module.model`` where there is one, else the module.
        rebuild: for methods that change the architecture on purpose: ``bare module -> module`` with the documented
            rebuilt architecture, into which a checkpoint loads strictly; ``None``: the bare module.
        manual: the class optimises by hand (no SAM, no clipping by the Trainer).
        second: arguments of a second instance beside the first (other layers, say); ``None``: the same arguments,
            and then Lightning's own refusal of two callbacks with one state key is fine too.
        zeros_stay: weights that another callback holds at zero are still zero in the finished model. ``False`` where
            zero is no level: such a callback must then be refused.
        ddp_equals_single: two processes with batches of B end where one with batches of 2B does. ``False`` where the
            method means something else on purpose (its docstring and its own tests say what).
    """

    ANY = "any value is legal"

    kwargs: dict[str, Any] = field(default_factory=dict)
    bad: dict[str, Any] = field(default_factory=dict)
    module: Callable[[], Any] | None = None
    data: Callable[[int], Any] | None = None
    example_input: Callable[[Any], tuple] | None = None
    finished: Callable[[Any], Any] | None = None
    rebuild: Callable[[Any], Any] | None = None
    manual: bool = False
    second: dict[str, Any] | None = None
    zeros_stay: bool = True
    ddp_equals_single: bool = True

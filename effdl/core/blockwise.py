"""Running a network block by block on a few batches, each block on what the already treated ones make of them.

Post-training methods change one transformer block after the other: what the embeddings and the first blocks compute is
not computed again, and only one block's activations are in memory.

Example::

    def prune(block: Block) -> None:
        linears = {n: m for n, m in block.module.named_modules() if isinstance(m, nn.Linear)}
        statistics = input_statistics(block, linears)     # core.input_statistics
        for name, linear in linears.items():
            linear.weight.data *= mask_of(linear.weight, statistics[name])

    run_blocks(model, batches, prune)
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from effdl.core.batch import unpack
from effdl.core.blocks import find_blocks
from effdl.core.calibrate import to_device
from effdl.core.capture import evaluating, first_tensor, uncompiled
from effdl.core.errors import ConfigurationError


class _LastBlockError(Exception):
    """Raised to leave the model's forward where the last block would start."""


@dataclass
class Call:
    """How the model called a block with one batch: everything but the hidden states, which change on the way."""

    args: tuple
    kwargs: dict[str, Any]
    keyword: str | None = None  # under which the hidden states came, None: first positional argument
    tokens: Tensor | None = None  # bool (B, T), False at padding; None: all count

    @classmethod
    def split(cls, args: tuple, kwargs: dict[str, Any], tokens: Tensor | None = None) -> tuple[Tensor, Call]:
        """The hidden states of a call, and the rest."""
        if args:
            return args[0], cls(args[1:], dict(kwargs), None, tokens)
        keyword = "hidden_states" if "hidden_states" in kwargs else None
        keyword = keyword or next((k for k, v in kwargs.items() if isinstance(v, Tensor)), None)
        if keyword is None:
            raise ConfigurationError("the model calls its blocks without a tensor: their inputs cannot be caught.")
        return kwargs[keyword], cls((), {k: v for k, v in kwargs.items() if k != keyword}, keyword, tokens)

    def __call__(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output for these hidden states; the first tensor where it returns more."""
        args, kwargs = to_device((self.args, self.kwargs), hidden.device)
        named = {} if self.keyword is None else {self.keyword: hidden}
        return first_tensor(block(*(() if named else (hidden,)), *args, **named, **kwargs))


@dataclass
class Block:
    """One block, when it is its turn.

    Args:
        index, name, module, device: which, and where it runs.
        calls: one per batch.
        inputs: hidden states per batch, (B, T, C), made by the already treated blocks.
        dense_inputs: the same made by the untouched network, ``None`` unless asked for.
        dense_outputs: what the untouched block makes of ``dense_inputs``: the targets of a reconstruction.
    """

    index: int
    name: str
    module: nn.Module
    calls: list[Call]
    inputs: list[Tensor]
    dense_inputs: list[Tensor] | None = None
    dense_outputs: list[Tensor] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def full_name(self, layer: str) -> str:
        """A layer's name in the whole model."""
        return ".".join(part for part in (self.name, layer) if part)

    @torch.no_grad()
    def run(self, hidden: list[Tensor] | None = None) -> Iterator[Tensor]:
        """Outputs of the block as it is now, batch by batch, for its inputs or other ones."""
        for call, states in zip(self.calls, self.inputs if hidden is None else hidden):
            yield call(self.module, states.to(self.device))

    def observe(self, layers: Mapping[str, nn.Module], see: Callable[[str, Tensor, Tensor | None], None]) -> None:
        """Run all batches and call ``see(name, input, tokens)`` for each input of each layer (names as in ``layers``).

        Hooks are removed whatever happens. A layer that the block does not call (an expert without tokens, an
        ``out_proj`` that attention reads directly) is not seen.
        """
        tokens: Tensor | None = None
        handles = []

        def hook(name: str) -> Callable[..., None]:
            def seen(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
                see(name, first_tensor((args, kwargs)).detach(), tokens)

            return seen

        try:
            for name, layer in layers.items():
                handles.append(layer.register_forward_pre_hook(hook(name), with_kwargs=True))
            outputs = self.run()
            for call in self.calls:
                tokens = None if call.tokens is None else call.tokens.to(self.device)
                next(outputs)
        finally:
            for handle in handles:
                handle.remove()


def run_blocks(
    model: nn.Module,
    batches: Iterable[Any],
    treat: Callable[[Block], None],
    *,
    blocks: str | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    dense: bool = False,
    device: torch.device | str | None = None,
    store: torch.device | str | None = None,
) -> None:
    """Call ``treat`` on each block in turn; its outputs after that are the next block's inputs.

    Args:
        model: in the state it is to be treated in. It runs in eval mode, without cache and without gradients (enable
            them inside ``treat`` where needed); flags and configuration are put back, also after an error.
        batches: of the user's data: mappings with the model's argument names (an ``attention_mask`` (B, T) leaves
            padding out of all statistics), tuples whose first entry is the input, or tensors.
        treat: changes the block in place.
        blocks: name of the list of blocks; ``None``: see ``core.blocks.find_blocks``.
        forward: ``(model, batch) -> anything``, where the model is called in another way.
        dense: also run the untouched blocks, for ``Block.dense_inputs`` and ``dense_outputs``.
        device: one block at a time is moved there and back (a model larger than the accelerator).
        store: where hidden states wait; ``None``: where they were made.

    Raises:
        ConfigurationError: no batch; blocks that are not called one after another, each on the output of the former.

    Cost: three forward passes (one catches all keyword arguments of all blocks), with ``dense`` four.
    """
    model = uncompiled(model)
    found = find_blocks(model, blocks)
    homes = [_home(block) for block in found.values()]
    with evaluating(model), without_cache(model):
        hidden, calls = _catch(model, found, batches, forward or call_model, device)
        hidden = [states.to(store) if store is not None else states for states in hidden]
        dense_hidden = list(hidden) if dense else None
        for index, (name, module) in enumerate(found.items()):
            at = torch.device(device) if device is not None else homes[index]
            block = Block(index, name, module.to(at), [c[index] for c in calls], hidden, dense_hidden, None, at)
            try:
                if dense_hidden is not None:
                    block.dense_outputs = _stored(block.run(dense_hidden), store)
                treat(block)
                if index + 1 < len(found):
                    hidden, dense_hidden = _stored(block.run(), store), block.dense_outputs
            finally:
                module.to(homes[index])


def _home(block: nn.Module) -> torch.device:
    return next((p.device for p in block.parameters()), torch.device("cpu"))


def _stored(outputs: Iterable[Tensor], store: torch.device | str | None) -> list[Tensor]:
    return [states if store is None else states.to(store) for states in outputs]


@torch.no_grad()
def _catch(
    model: nn.Module, blocks: dict[str, nn.Module], batches: Iterable[Any], forward: Callable, device: Any
) -> tuple[list[Tensor], list[list[Call]]]:
    """The first block's hidden states, and for each batch the calls of all blocks."""
    first: list[Tensor] = []
    calls: list[list[Call]] = []
    tokens: Tensor | None = None
    last: Tensor | None = None

    def before(index: int) -> Callable[..., Any]:
        def hook(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            if device is not None:
                block.to(device)
                args, kwargs = to_device((args, kwargs), device)
            states, call = Call.split(args, kwargs, tokens)
            if index != len(calls[-1]) or not (index == 0 or last is states or torch.equal(last, states)):
                raise ConfigurationError(
                    f"blocks: {names[index]!r} is not called once, in order, on what the block before it returned; "
                    "this network cannot be run block by block. Name another list of blocks."
                )
            calls[-1].append(call)
            if index == 0:
                first.append(states)
            if index + 1 == len(blocks):
                raise _LastBlockError
            return args, kwargs

        return hook

    def after(home: torch.device) -> Callable[..., None]:
        def hook(block: nn.Module, _args: tuple, output: Any) -> None:
            nonlocal last
            last = first_tensor(output)
            if device is not None:
                block.to(home)

        return hook

    names = list(blocks)
    homes = [_home(block) for block in blocks.values()]
    handles = []
    try:
        for index, block in enumerate(blocks.values()):
            handles.append(block.register_forward_pre_hook(before(index), with_kwargs=True))
            handles.append(block.register_forward_hook(after(homes[index])))
        for batch in batches:
            last, tokens = None, token_mask(batch)
            calls.append([])
            with contextlib.suppress(_LastBlockError):
                forward(model, batch)
            if len(calls[-1]) != len(blocks):
                raise ConfigurationError(f"blocks: the model called {len(calls[-1])} of {len(blocks)} blocks.")
    finally:
        for handle in handles:
            handle.remove()
        for block, home in zip(blocks.values(), homes):
            block.to(home)
    if not first:
        raise ConfigurationError("calibration_batches: there is no batch to calibrate on.")
    return first, calls


def call_model(model: nn.Module, batch: Any) -> Any:
    """``model(**batch)`` without labels where the forward takes the batch's keys, else ``model(inputs)``."""
    if isinstance(batch, Mapping):
        taken = inspect.signature(model.forward).parameters
        kwargs = {k: v for k, v in batch.items() if k in taken and k not in ("labels", "label")}
        if kwargs:
            return model(**kwargs)
    return model(unpack(batch).inputs)


def token_mask(batch: Any) -> Tensor | None:
    """Which tokens count, bool (B, T), from a batch's ``attention_mask``; ``None``: all."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Key-value caches off in every transformers configuration of the model, put back afterwards."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "use_cache")}
    before = {key: config.use_cache for key, config in configs.items()}
    try:
        for config in configs.values():
            config.use_cache = False
        yield
    finally:
        for key, config in configs.items():
            config.use_cache = before[key]

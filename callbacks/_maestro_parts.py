"""maestro: the step of a whole and a cut network, and the architecture of its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from effdl.compression.maestro import Prefix, decompose, split_attention
from effdl.core.batch import logits_of
from effdl.core.distill import soft_cross_entropy
from effdl.core.errors import ConfigurationError
from effdl.core.factorize import factorize, join, ranks_in


def two_passes(network: Callable[[], nn.Module], prefixes: Callable[[], Mapping[str, Prefix]]) -> Callable[..., Any]:
    """A wrapper of ``training_step``: CE(f(x), y) of the whole network, and CE(f_cut(x), softmax f(x)) of the cut one.

    Args:
        network: gives the network whose output are the logits; it is called a second time with the same inputs.
        prefixes: gives the pairs, showing what the cut network has of them.
    """

    def step(call_next: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        model, cut, seen = network(), {prefix: prefix.active for prefix in prefixes().values()}, []
        listen = model.register_forward_hook(lambda _, *call: seen.append(call), with_kwargs=True)
        try:
            for prefix in cut:
                prefix.show()
            output = call_next(*args, **kwargs)
        finally:
            listen.remove()
            for prefix, active in cut.items():
                prefix.show(active)
        inputs, named, answer = seen[-1] if seen else ((), {}, None)
        logits = logits_of(answer) if seen else None
        if logits is None:
            raise ConfigurationError(
                f"full_pass=True needs the logits of {type(model).__name__}, whose forward gave none in "
                "training_step. Compile the network after attaching, or set full_pass=False."
            )
        extra = soft_cross_entropy(logits_of(model(*inputs, **named)), logits.detach().float().softmax(-1))
        if isinstance(output, Mapping):
            return {**output, "loss": output["loss"] + extra}
        return output + extra

    return step


def rebuild(module: nn.Module) -> nn.Module:
    """The architecture of a checkpoint of training, by default arguments: every layer a pair at full rank."""
    decompose(module)
    return module


def as_saved(load: Callable[..., None], checkpoint: dict[str, Any], module: nn.Module, known: list[str]) -> None:
    """A wrapper of ``on_load_checkpoint``: pairs where, and of the size that, the checkpoint has them."""
    state = checkpoint["state_dict"]
    join(module, known)
    attention = [name for name, layer in module.named_modules() if isinstance(layer, nn.MultiheadAttention)]
    split_attention(module, [n for n in attention if not {f"{n}.in_proj_weight", f"{n}.q_proj_weight"} & state.keys()])
    factorize(module, *ranks_in(module, state), inplace=True)
    load(checkpoint)

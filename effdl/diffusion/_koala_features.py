"""Where the features of a teacher and a student U-Net are compared, and how they are recorded."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from effdl.core.capture import capture, named_module
from effdl.core.errors import ConfigurationError, check, check_choice

#: Feature -> the modules whose output it is (a tuple's first tensor).
FEATURES = {
    "sa": r".*transformer_blocks\.\d+\.attn1",
    "ca": r".*transformer_blocks\.\d+\.attn2",
    "ffn": r".*transformer_blocks\.\d+\.ff",
    "res": r".*resnets\.\d+",
    "lf": r"down_blocks\.\d+|mid_block|up_blocks\.\d+",
    "lf_outer": r"down_blocks\.0|up_blocks\.{last}",
}
TAPS = ("out", "probs", "block")
Groups = dict[str, dict[str, str]]


def feature_pairs(
    student: nn.Module,
    teacher: nn.Module,
    features: str | Sequence[str] | Mapping[str, str],
    rename: Callable[[str], str],
    tap: str = "out",
) -> Groups:
    """Which module of the student learns from which of the teacher.

    Args:
        student, teacher: the U-Nets.
        features: names in ``FEATURES``, or pairs of one's own: ``{student's module: teacher's module}``.
        rename: the teacher's name of a student's module, as ``_unet_shrink.teacher_name`` gives it.
        tap: of ``"sa"``: ``"out"`` the attention's output (B, HW, C) before it is added to the residual stream,
            ``"probs"`` its probabilities (B heads, HW, HW), ``"block"`` the transformer layer's output (B, HW, C).

    Returns:
        ``{feature: {student's module: teacher's module}}``; a user's own pairs are the feature ``"own"``.

    Raises:
        ConfigurationError: an unknown feature or tap, one that the U-Net has not, self-attention that is none, channels
            that differ at a pair, probabilities where no eager attention computes them.

    Example::

        pairs = feature_pairs(student, teacher, ("sa", "lf_outer"), teacher_name(student.config, teacher.config))
    """
    check_choice("tap", tap, TAPS)
    names = [name for name, _ in student.named_modules()]
    if isinstance(features, Mapping):
        groups = {"own": dict(features)}
    else:
        features = [features] if isinstance(features, str) else list(features)
        check(len(features) > 0, "features", features, f"at least one of {', '.join(FEATURES)}, or a map of modules")
        groups = {feature: {name: rename(name) for name in _matching(feature, names)} for feature in features}
    if tap == "block" and "sa" in groups:
        groups["sa"] = {a.removesuffix(".attn1"): b.removesuffix(".attn1") for a, b in groups["sa"].items()}
    for feature, pairs in groups.items():
        for ours, theirs in pairs.items():
            ends = named_module(student, ours, "features"), named_module(teacher, theirs, "features")
            if feature != "own":
                _check_pair(ours, theirs, *ends)
    if "sa" in groups:
        _check_self_attention(teacher, groups["sa"].values() if tap == "probs" else ())
    return groups


def _matching(feature: str, names: Sequence[str]) -> list[str]:
    check_choice("features", feature, FEATURES)
    last = max((int(found[1]) for name in names if (found := re.fullmatch(r"up_blocks\.(\d+)", name))), default=0)
    pattern = FEATURES[feature].replace("{last}", str(last))
    found = [name for name in names if re.fullmatch(pattern, name)]
    what = "a feature that the network has"
    check(len(found) > 0, "features", feature, what, f"It has no module {pattern!r}: name modules of its own.")
    return found


def _check_pair(ours: str, theirs: str, student: nn.Module, teacher: nn.Module) -> None:
    """The last parameter of a block, an attention, a resnet or a feed-forward is as wide as its output."""
    ends = [list(module.parameters())[-1:] for module in (student, teacher)]
    widths = [end[0].shape[0] if end else None for end in ends]
    fix = "Features are compared as they are, without a projection."
    check(widths[0] == widths[1], "features", f"{ours}: {widths[0]} channels", f"{widths[1]}, as {theirs} has", fix)


def _check_self_attention(teacher: nn.Module, eager: Iterable[str]) -> None:
    only_cross = getattr(teacher, "config", {}).get("only_cross_attention", False)
    crossed = any(only_cross) if isinstance(only_cross, (list, tuple)) else only_cross
    check(not crossed, "features", "sa", "another feature: in this U-Net (only_cross_attention) attn1 reads the text")
    for name in eager:
        processor = type(named_module(teacher, name).processor).__name__
        check(processor == "AttnProcessor", "tap", "probs", f"'out' with {processor}, which never has probabilities",
              "Give the teacher the eager one: teacher.set_attn_processor(AttnProcessor()).")  # fmt: skip


@contextlib.contextmanager
def recorded(root: nn.Module, groups: Mapping[str, Iterable[str]], tap: str = "out") -> Iterator[dict[str, Tensor]]:
    """The features of the forward passes inside, ``{module: tensor}``; the last pass wins.

    Args:
        root: the U-Net.
        groups: ``{feature: modules}``.
        tap: as in :func:`feature_pairs`.

    Example::

        with recorded(unet, {"sa": ["mid_block.attentions.0.transformer_blocks.0.attn1"]}) as seen:
            unet(x, t, text)
    """
    probabilities = list(groups.get("sa", ())) if tap == "probs" else []
    outputs = {name for feature, names in groups.items() if not (probabilities and feature == "sa") for name in names}
    with capture(root, outputs) as seen, _probabilities(root, probabilities, seen):
        yield seen


@contextlib.contextmanager
def _probabilities(root: nn.Module, names: Iterable[str], seen: dict[str, Tensor]) -> Iterator[None]:
    """What the eager attention processor asks its module for, kept in ``seen``."""
    modules = {name: named_module(root, name) for name in names}

    def recording(name: str, module: nn.Module) -> Callable[..., Tensor]:
        def get_attention_scores(*args: Tensor, **kwargs: Tensor) -> Tensor:
            seen[name] = type(module).get_attention_scores(module, *args, **kwargs)
            return seen[name]

        return get_attention_scores

    try:
        for name, module in modules.items():
            module.get_attention_scores = recording(name, module)
        yield
    finally:
        for module in modules.values():
            vars(module).pop("get_attention_scores", None)


def paired(
    groups: Mapping[str, Mapping[str, str]], student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]
) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """The recorded features of every group in pairs: ``{feature: (student's, teacher's)}``.

    Raises:
        ConfigurationError: a module that did not run, features of different shape.
    """
    for ours, theirs in ((a, b) for pairs in groups.values() for a, b in pairs.items()):
        if ours not in student or theirs not in teacher:
            missing = ours if ours not in student else theirs
            fix = "A compiled network that has run before sees no new hook: call torch.compiler.reset() before fit."
            raise ConfigurationError(f"features: {missing!r} did not run in this step. {fix}")
        shapes = tuple(student[ours].shape), tuple(teacher[theirs].shape)
        check(shapes[0] == shapes[1], "features", f"{ours}: {shapes[0]}", f"the teacher's shape {shapes[1]}")
    return {
        feature: ([student[a] for a in pairs], [teacher[b] for b in pairs.values()])
        for feature, pairs in groups.items()
    }

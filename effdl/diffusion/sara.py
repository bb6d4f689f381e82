"""sara: fine-tune the weights that do nothing, as a sparse update (Hu et al., "SaRA", ICLR 2025, arXiv 2409.06633).

The entries of a pretrained network whose magnitude is below a threshold theta, the mask ``M = |P| < theta``, are
trained; no other entry moves. What is optimised is the vector ``p = P[M]``, so gradient and Adam's moments have nnz(M)
entries:

1. ``P`` with ``p`` written over it is what the layer computes with; ``dL/dP`` exists inside one backward only, and
   ``dL/dp = (dL/dP)[M]`` (:func:`overwrite`).
2. ``L = L_task + lambda ||P * M||_*``: the nuclear norm keeps the update's rank low (:func:`nuclear_norm`).
3. Half-way the mask is taken again, ``M' = |P| < theta``: what grew past theta stays at what it learned, the rest goes
   on with fresh moments (:meth:`SparseWeight.reselect`).

The trained values alone are the artifact (:func:`save_delta`, :func:`apply_deltas`); merged, the network is dense.
The official code differs in three places, where the paper's intent is kept: it starts from ``|p|`` (which flips
signs), its rank loss does not reach the optimised vector, and the step that re-selects updates nothing.

Example::

    from effdl.diffusion.sara import learning_rate, sparsify

    sparse = sparsify(unet, threshold=2e-3)
    optimizer = torch.optim.AdamW([weight.leaf for weight in sparse.values()], learning_rate(2e-3))
    ...                                              # train: every other parameter is frozen
    save_delta("style.safetensors", sparse)          # a few MB
    for weight in sparse.values():
        weight.detach()                              # the plain, dense network
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from effdl.core.errors import ConfigurationError, check
from effdl.core.quantized import quantized_weights
from effdl.core.select import NothingMatched, Targets, Weight, as_list, matches, refuse_sharded, select_modules
from effdl.diffusion._sara_delta import Delta, apply_deltas, load_delta, save_delta
from effdl.diffusion._sara_weight import SUFFIX, SparseWeight, nuclear_norm, overwrite, small

__all__ = [
    "SUFFIX",
    "Delta",
    "SparseWeight",
    "apply_deltas",
    "learning_rate",
    "load_delta",
    "masks_of",
    "nuclear_norm",
    "overwrite",
    "quantile_threshold",
    "save_delta",
    "small",
    "sparsify",
    "trainable_weights",
]
SAMPLE = 1 << 24  # entries at most that a quantile is taken of
SHARES = (1e-4, 0.6)  # of the entries that may sensibly train


def quantile_threshold(weights: Iterable[Tensor], fraction: float) -> float:
    """theta below which ``fraction`` of all entries lie (at most; of more than 2^24 entries every k-th is looked at).

    Raises:
        ConfigurationError: more than that share is exactly zero.

    Example::

        theta = quantile_threshold(unet.parameters(), 0.2)
    """
    weights = list(weights)
    stride = math.ceil(sum(w.numel() for w in weights) / SAMPLE)
    sample = torch.cat([w.detach().abs().reshape(-1)[::stride].float() for w in weights])
    theta = float(sample.kthvalue(min(int(fraction * sample.numel()), sample.numel() - 1) + 1).values)
    check(theta > 0, "fraction", fraction, "more than the share of weights that are exactly zero", "Give a threshold.")
    return theta


def learning_rate(threshold: float) -> float:
    """The official rule ``1e-3 exp(-350 theta)``: the larger the weights that train, the smaller their rate.

    Made for Stable Diffusion's theta of 5e-4 to 5e-3. A small network has larger weights: there it says too little.

    Example::

        assert round(learning_rate(2e-3), 6) == 0.000497
    """
    return 1e-3 * math.exp(-350 * threshold)


def trainable_weights(root: nn.Module, targets: Targets = None, exclude: Targets = None) -> list[Weight]:
    """Every parameter (biases, norms, embeddings too) of the selected modules and of what they contain that asks for a
    gradient; one shared by several modules once, and not at all where one of them is excluded.

    Raises:
        ConfigurationError: nothing matched; a parameter that is integer, meta or sharded.
    """
    names = {""}  # parameters of the root itself too
    if targets is not None or exclude is not None:
        chosen = set(select_modules(root, targets, exclude))
        names = chosen if targets is not None else names
    left_out = [m for n, m in root.named_modules() if n and any(matches(n, m, t) for t in as_list(exclude))]
    seen = {id(parameter) for module in left_out for parameter in module.parameters()}
    fix = "Quantised base weights cannot be trained: load the network in floating point."
    for name in quantized_weights(root):
        owner = root.get_submodule(name.rpartition(".")[0])
        check(any(owner is m for part in left_out for m in part.modules()), name, "codes", "floating point", fix)
    found = []
    for name, module in root.named_modules():
        parents = {".".join(name.split(".")[:i]) for i in range(1, name.count(".") + 2)} | {""}
        for attribute, parameter in module._parameters.items() if parents & names else ():
            if parameter is None or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            weight = Weight(f"{name}.{attribute}".lstrip("."), module, attribute)
            check(parameter.is_floating_point(), weight.name, parameter.dtype, "a floating-point parameter", fix)
            if parameter.requires_grad:
                refuse_sharded(weight)
                found.append(weight)
    if not found:
        raise NothingMatched(f"targets={targets!r}: no selected layer has a parameter to train.")
    return found


def masks_of(weights: list[Weight], threshold: float | None, fraction: float | None, force: bool) -> list[SparseWeight]:
    """The sparse weights with at least one entry, not yet attached.

    Raises:
        ConfigurationError: too few or too many entries to be a sensible choice (unless ``force``), none at all.
    """
    check(threshold is not None or fraction is not None, "threshold", None, "theta > 0, or a fraction")
    threshold = quantile_threshold([w.data for w in weights], fraction) if fraction is not None else threshold
    sparse = [SparseWeight(weight, float(threshold)) for weight in weights]
    share = sum(s.index.numel() for s in sparse) / sum(w.data.numel() for w in weights)
    argument, value = ("threshold", threshold) if fraction is None else ("fraction", fraction)
    check(share > 0, argument, value, "one above the smallest magnitude: no weight lies below it")
    sensible = SHARES[0] <= share <= SHARES[1]
    fix = f"It selects {share:.4%}. fraction=0.1 chooses it for this network; force=True trains these all the same."
    check(force or sensible, argument, value, f"one that selects {SHARES[0]:.2%} to {SHARES[1]:.0%} of them", fix)
    return [s for s in sparse if s.index.numel()]


def sparsify(
    root: nn.Module,
    threshold: float | None = None,
    fraction: float | None = None,
    targets: Targets = None,
    exclude: Targets = None,
    force: bool = False,
    make: Callable[[list[Weight]], list[SparseWeight]] | None = None,
) -> dict[str, SparseWeight]:
    """Let the small weights of a network train, and nothing else: every parameter but the new leaves is frozen.

    Args:
        root: any network, changed in place (:meth:`SparseWeight.detach` merges).
        threshold: theta > 0; or
        fraction: the share of the selected weights that trains, which chooses theta.
        targets, exclude: modules, as in ``core.select``; default all.
        force: accept a share outside of 0.01 % to 60 %.
        make: other masks from the selected parameters, in the place of ``|P| < theta``.

    Returns:
        Parameter name to :class:`SparseWeight`, of those with at least one entry.

    Raises:
        ConfigurationError: see :func:`masks_of` and :func:`trainable_weights`; a weight that is seen through a function
            already.
    """
    weights = trainable_weights(root, targets, exclude)
    chosen = masks_of(weights, threshold, fraction, force) if make is None else make(weights)
    for sparse in chosen:
        if sparse.weight.module.__dict__.get("_effdl_transforms", {}).get(sparse.weight.attribute):
            raise ConfigurationError(
                f"{sparse.weight.name} is seen through another method's function: let sara be first."
            )
    for parameter in root.parameters():
        parameter.requires_grad_(False)
    for sparse in chosen:
        sparse.attach(root)
    return {sparse.weight.name: sparse for sparse in chosen}

"""Masks: the edges of how they are chosen, and a store that follows its weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from effdl.compression.gradual_pruning import magnitude_masks
from effdl.core.errors import ConfigurationError
from effdl.core.masks import (
    MaskStore,
    block_mask,
    channel_mask,
    global_top_k_masks,
    keep_count,
    n_m_mask,
    pack,
    top_k_mask,
    unpack,
)
from effdl.core.select import Weight, select_weights


def scores(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def store_of(model):
    store = MaskStore(select_weights(model))
    for name, mask in magnitude_masks(list(store.weights.values()), 0.5).items():
        store.set(name, mask)
    return store


# ---- choosing -----------------------------------------------------------------------------------------------------


def test_ties_keep_exactly_k_of_the_lowest_indices():
    tied = torch.tensor([[1.0, 3.0, 1.0], [1.0, 0.0, 1.0]])
    assert top_k_mask(tied, 3).tolist() == [[True, True, True], [False, False, False]]
    assert top_k_mask(torch.zeros(2, 3), 4).sum() == 4  # a zero weight is kept where nothing larger is left
    assert top_k_mask(tied, 6).all()
    assert keep_count(10, 0.99) == 1
    assert keep_count(5, 0.5) == 2  # 2.5, rounded half to even


@pytest.mark.parametrize("dim", [0, 1, 2, 3])
def test_n_m_keeps_the_largest_of_each_group_along_any_dimension(dim):
    values = scores(4, 8, 12, 4)
    mask = n_m_mask(values, 1, 4, dim)
    groups, kept = (t.movedim(dim, -1).reshape(-1, 4) for t in (values, mask))
    for group, keep in zip(groups, kept):
        assert keep.tolist() == (group > group.min()).tolist()
    assert n_m_mask(torch.ones(1, 4), 2, 4).tolist() == [[True, True, False, False]]  # ties: the lower index stays
    with pytest.raises(ConfigurationError, match="divisible by 4, got 6"):
        n_m_mask(scores(4, 6), 2, 4)


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [(nn.Linear(8, 3), 1), (Conv1D(3, 8), 0), (nn.Conv2d(8, 3, 3), 1), (nn.ConvTranspose2d(8, 3, 3), 0),
     (nn.Conv1d(16, 6, 3, groups=2), 1)],
    ids=["linear", "hf-conv1d", "conv2d", "transposed", "grouped"],
)  # fmt: skip
def test_n_m_groups_and_channels_follow_a_layers_own_directions(layer, inputs):
    (weight,) = select_weights(nn.Sequential(layer))
    mask = magnitude_masks([weight], 0.5, granularity="2:4")[weight.name]
    assert mask.movedim(inputs, -1).reshape(-1, 4).sum(1).eq(2).all()
    outputs = 1 - inputs
    whole = magnitude_masks([weight], 0.5, granularity="channel")[weight.name].movedim(outputs, 0).flatten(1)
    assert (whole.all(1) | ~whole.any(1)).all()
    assert whole.any(1).sum() == keep_count(weight.data.shape[outputs], 0.5)


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_blocks_at_the_edge_pool_what_they_have(pooling):
    values, (bh, bw) = scores(5, 7), (2, 3)
    corners = list(itertools.product(range(0, 5, bh), range(0, 7, bw)))
    pool = torch.mean if pooling == "avg" else torch.amax
    pooled = torch.stack([pool(values[i : i + bh, j : j + bw]) for i, j in corners])
    mask = block_mask(values, 0.5, (bh, bw), pooling)
    kept = [bool(mask[i, j]) for i, j in corners]
    assert kept == (pooled >= pooled.sort().values[-keep_count(9, 0.5)]).tolist()
    for (i, j), keep in zip(corners, kept):
        assert mask[i : i + bh, j : j + bw].eq(keep).all()
    with pytest.raises(ConfigurationError, match="2-D weight, got shape"):
        block_mask(scores(2, 2, 2), 0.5, (1, 1))


def test_channels_go_by_their_norm():
    values = torch.tensor([[3.0, 0.0], [2.0, 2.5], [0.1, 0.1]])
    assert channel_mask(values, 1).tolist() == [[False, False], [True, True], [False, False]]
    assert channel_mask(values, 1, dim=1).tolist() == [[True, False]] * 3


def test_a_global_threshold_leaves_each_tensor_its_largest():
    tensors = [scores(50), scores(3, 4, seed=1) * 1e-6, torch.zeros(5)]
    masks = global_top_k_masks(tensors, 20)
    assert [int(mask.sum()) for mask in masks] == [18, 1, 1]
    assert masks[1].flatten()[tensors[1].argmax()]
    assert masks[1].shape == (3, 4)
    assert [int(m.sum()) for m in global_top_k_masks(tensors, 1)] == [1, 1, 1]  # the floor may exceed the budget
    free = global_top_k_masks([scores(40), scores(40, seed=1)], 30)
    assert torch.equal(torch.cat(free), top_k_mask(torch.cat([scores(40), scores(40, seed=1)]), 30))


@pytest.mark.parametrize("shape", [(1,), (8,), (9,), (3, 5), (2, 3, 2, 2), (0, 4)])
def test_packing_is_exact_at_eight_entries_a_byte(shape):
    mask = scores(*shape) > 0.5
    packed = pack(mask)
    assert packed["bits"].numel() == -(-mask.numel() // 8)
    assert packed["bits"].dtype == torch.uint8
    again = unpack(packed)
    assert again.dtype == torch.bool
    assert torch.equal(again, mask)


# ---- the store ----------------------------------------------------------------------------------------------------


def test_a_state_dict_gets_new_tensors_under_every_name_of_a_tied_weight():
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    store, before = store_of(model), model["a"].weight.clone()
    state = dict(model.state_dict())
    kept = store.apply_to_state(state)
    assert sorted(kept) == ["a.weight", "b.weight", "c.weight"]
    assert (state["a.weight"] == 0).sum() == 8
    assert state["b.weight"] is state["a.weight"]
    assert torch.equal(kept["b.weight"], before)
    assert torch.equal(model["a"].weight, before)  # never in place: the state aliases live weights
    other = {"elsewhere": torch.ones(2)}
    assert store.apply_to_state(other) == {}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_masks_follow_a_module_to_another_dtype(dtype):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    store = store_of(model)
    model.to(dtype)
    store.apply_()
    assert {mask.dtype for mask in store.masks.values()} == {dtype}
    assert float(store.sparsity()) == 0.5
    model[0].weight = nn.Parameter(torch.ones_like(model[0].weight))  # surgery or loading may replace the object
    store.apply_()
    assert float(store.sparsity()) == 0.5


def test_gradients_and_moments_are_zeroed_under_the_mask():
    model = nn.Sequential(nn.Linear(8, 8), nn.Embedding(8, 8, sparse=True))
    optimizer = torch.optim.Adam(model[0].parameters(), amsgrad=True)
    model[0](torch.randn(3, 8)).sum().backward()
    model[1](torch.tensor([1])).sum().backward()
    optimizer.step()
    store = store_of(model)
    store.apply_to_gradients_()
    store.apply_to_moments_(optimizer)
    dead = store.masks["0.weight"] == 0
    state = optimizer.state[model[0].weight]
    for tensor in (model[0].weight.grad, state["exp_avg"], state["exp_avg_sq"], state["max_exp_avg_sq"]):
        assert not tensor[dead].any()
        assert tensor[~dead].all()
    assert state["step"] == 1
    assert model[1].weight.grad.is_sparse  # left alone


def test_sparsity_is_measured_from_the_weights_or_as_seen_through_masks():
    model = nn.Sequential(nn.Linear(8, 8))
    store = store_of(model)
    assert float(store.sparsity()) == 0.0
    assert float(store.sparsity(masked=True)) == 0.5
    store.apply_()
    assert float(store.sparsity()) == 0.5
    assert store.report() == {"0.weight": {"numel": 64, "nonzero": 32, "sparsity": 0.5}}


def test_masks_of_other_weights_are_refused_before_any_is_taken():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    saved = store_of(model).state()
    again = MaskStore(select_weights(model))
    again.load_state(saved)
    assert all(torch.equal(again.masks[name], mask) for name, mask in store_of(model).masks.items())
    fewer = MaskStore(select_weights(model, "0"))
    with pytest.raises(ConfigurationError, match=r"mask for 1\.weight of shape \[8, 8\]"):
        fewer.load_state(saved)
    wider = nn.Sequential(nn.Linear(8, 8), nn.Linear(9, 8))
    with pytest.raises(ConfigurationError, match="this run selects no such weight"):
        (store := MaskStore([Weight(f"{i}.weight", wider[i], "weight") for i in (0, 1)])).load_state(saved)
    assert fewer.masks == store.masks == {}

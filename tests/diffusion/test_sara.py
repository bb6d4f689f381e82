"""sara: official numbers, what a layer sees and what its gradient reaches, the rank term."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effdl.core.errors import ConfigurationError
from effdl.core.quantized import quantize_
from effdl.core.quantizers import symmetric
from effdl.diffusion.sara import (
    learning_rate,
    nuclear_norm,
    overwrite,
    quantile_threshold,
    small,
    sparsify,
    trainable_weights,
)
from tests.diffusion.sara_nets import net, trained
from tests.support import golden

GOLD = golden("sara")


class Golden(nn.Module):
    """The two-layer network of the golden file."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
        self.load_state_dict({name: torch.tensor(value) for name, value in GOLD["init"].items()})

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


# ---- official numbers ------------------------------------------------------------------------------------------------


def test_must_01_golden_parity():
    model, x, y = Golden(), torch.tensor(GOLD["X"]), torch.tensor(GOLD["Y"])
    sparse = sparsify(model, threshold=GOLD["threshold"])
    for name, mask in GOLD["mask_stage1"].items():
        assert torch.equal(sparse[name].mask(), torch.tensor(mask) > 0), name
    rule = {"lr": GOLD["lr"], "weight_decay": GOLD["weight_decay"], "betas": GOLD["betas"], "eps": GOLD["eps"]}
    optimizer, losses = torch.optim.AdamW([s.leaf for s in sparse.values()], **rule), []
    for call in range(1, GOLD["calls"] + 1):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        losses.append(loss.item())
        loss.backward()
        if call == GOLD["progressive_iter"] + 1:  # the official step that selects again updates nothing
            for weight in sparse.values():
                weight.reselect()
            optimizer.state.clear()
            continue
        optimizer.step()
        for weight in sparse.values():
            weight.hold_()
    for name, mask in GOLD["mask_stage2"].items():
        stage2 = torch.zeros(sparse[name].weight.data.numel())
        stage2[sparse[name].index] = sparse[name].active
        assert torch.equal(stage2, torch.tensor(mask).flatten()), name
        sparse[name].detach()
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(GOLD["loss_before_each_call"]), atol=1e-6, rtol=0)
    errors = [(p - torch.tensor(GOLD["final_weights"][n])).abs().max().item() for n, p in model.named_parameters()]
    print(f"\ngolden: weights {max(errors):.1e}")
    assert max(errors) < 1e-6
    buggy = torch.tensor(GOLD["loss_official_with_abs_bug"])
    assert (torch.tensor(losses)[1:] - buggy[1:]).abs().min() > 1e-3  # signs are kept


def test_must_01_official_rule_of_the_rate():
    for threshold, rate in GOLD["lr_rule"].items():
        assert learning_rate(float(threshold)) == pytest.approx(rate, rel=1e-6)


def test_must_04_nuclear_parity():
    gold = GOLD["nuclear"]
    w, mask = torch.tensor(gold["W"]), torch.tensor(gold["mask"])
    assert torch.equal(small(w, gold["threshold"]), mask > 0)
    norm, gradient = nuclear_norm(w * mask)
    assert norm.item() == pytest.approx(gold["nuclear_norm_of_masked"], abs=1e-5)
    error = (gradient * mask - torch.tensor(gold["grad_on_masked_entries"])).abs().max().item()
    print(f"\nnuclear gradient: {error:.1e}")
    assert error < 1e-5
    assert nuclear_norm(torch.zeros(3, 4))[1].abs().max() == 0


def effective_rank(matrix: torch.Tensor) -> float:
    s = torch.linalg.svdvals(matrix)
    p = s / s.sum()
    return float(torch.exp(-(p * p.clamp_min(1e-12).log()).sum()))


def test_must_04_the_rank_term_alone_lowers_norm_and_rank():
    torch.manual_seed(0)
    for factor in (1.0, 0.0):
        layer = nn.Linear(48, 64, bias=False)
        nn.init.normal_(layer.weight, std=0.02)
        (sparse,) = sparsify(layer, threshold=0.01).values()
        optimizer = torch.optim.AdamW([sparse.leaf], 1e-4, weight_decay=0)
        norms, ranks = [], []
        for _ in range(50):
            norms.append(nuclear_norm(sparse.matrix())[0].item())
            ranks.append(effective_rank(sparse.matrix()))
            optimizer.zero_grad()
            sparse.add_nuclear_gradient_(factor)
            optimizer.step()
        pairs = list(zip(norms, norms[1:])), list(zip(ranks, ranks[1:]))
        if factor:
            print(f"\nnuclear norm {norms[0]:.2f} -> {norms[-1]:.2f}, effective rank {ranks[0]:.1f} -> {ranks[-1]:.1f}")
            assert all(b < a for kind in pairs for a, b in kind)
        else:
            assert all(b == a for kind in pairs for a, b in kind)
    assert sparse.matrix("delta").abs().max() == 0
    assert torch.equal(sparse.matrix() != 0, sparse.mask() & (layer.weight != 0))


# ---- what a layer sees -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["parameter", "channels_last", "tensor", "compiled", "bfloat16"])
def test_gradient_of_the_leaf_is_the_dense_one_at_its_positions(form):
    torch.manual_seed(0)
    weight, x = torch.randn(4, 3, 3, 3), torch.randn(2, 3, 5, 5)
    if form == "channels_last":
        weight = weight.to(memory_format=torch.channels_last)
    dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
    weight, x = weight.to(dtype), x.to(dtype)
    index = (weight.abs() < 0.7).flatten().nonzero()[:, 0]
    base = nn.Parameter(weight.clone(), requires_grad=False)
    base = base if form != "tensor" else base.data
    leaf = nn.Parameter(torch.randn(len(index)))
    active = (torch.arange(len(index)) % 3 > 0).float()
    see = torch.compile(overwrite, backend="aot_eager") if form == "compiled" else overwrite
    dense = weight.clone().flatten().index_copy_(0, index, leaf.detach().to(dtype)).view(weight.shape).requires_grad_()
    for which in (None, active):
        seen = see(base, leaf, index, which)
        torch.testing.assert_close(seen, dense, rtol=0, atol=0)
        (got,) = torch.autograd.grad(F.conv2d(x, seen).square().sum(), leaf)
        (want,) = torch.autograd.grad(F.conv2d(x, dense).square().sum(), dense)
        want = want.flatten()[index].float() * (1 if which is None else active)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert got.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(see(base, leaf, index), dense, rtol=0, atol=0)


def test_a_step_between_forward_and_backward_is_an_error():
    base, index = nn.Parameter(torch.randn(4, 4), requires_grad=False), torch.arange(5)
    leaf = nn.Parameter(torch.zeros(5))
    loss = overwrite(base, leaf, index).square().sum()
    with torch.no_grad():
        leaf.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_second_derivatives_of_the_leaf():
    base, x = nn.Parameter(torch.randn(3, 3), requires_grad=False), torch.randn(5, 3)
    index, leaf = torch.tensor([1, 5, 6]), nn.Parameter(torch.randn(3))
    (gradient,) = torch.autograd.grad((x @ overwrite(base, leaf, index)).pow(3).sum(), leaf, create_graph=True)
    (curvature,) = torch.autograd.grad(gradient.sum(), leaf)
    dense = overwrite(base.data, leaf.detach(), index).requires_grad_()
    row = torch.autograd.functional.hessian(lambda w: (x @ w).pow(3).sum(), dense).view(9, 9)[index][:, index]
    torch.testing.assert_close(curvature, row.sum(0), rtol=1e-4, atol=1e-4)


def test_must_02_only_small_entries_move():
    model = net()
    before = copy.deepcopy(model.state_dict())
    sparse = trained(model, fraction=0.3)
    assert not any(hasattr(type(m), "_effdl_swapped") for m in model.modules())
    assert set(dict(model.named_parameters())) == set(before)
    for name, value in model.state_dict().items():
        moved = value != before[name]
        mask = sparse[name].mask() if name in sparse else torch.zeros_like(moved)
        assert not (moved & ~mask).any(), name
        assert torch.equal(mask, before[name].abs() < next(iter(sparse.values())).threshold), name
    assert sum(int((model.state_dict()[n] != before[n]).sum()) for n in sparse) > 500


def test_ties_copies_and_recurrent_layers():
    torch.manual_seed(0)
    tied = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    tied[2].weight = tied[0].weight
    sparse = sparsify(tied, fraction=0.5)
    assert [n for n in sparse if "weight" in n] == ["0.weight"]
    twin = copy.deepcopy(tied)
    assert twin[0].weight_sara is not tied[0].weight_sara
    with torch.no_grad():
        tied[0].weight_sara.add_(1)
        assert torch.equal(tied[0].weight, tied[2].weight)
        assert not torch.equal(tied[0].weight, twin[2].weight)
        assert torch.equal(twin[0].weight, twin[2].weight)
    seen = tied[0].weight.detach().clone()
    for weight in sparse.values():
        weight.detach()
    assert torch.equal(tied[0].weight, seen)
    assert tied[0].weight is tied[2].weight

    lstm = nn.LSTM(5, 7)
    sparse = sparsify(lstm, fraction=0.3)
    lstm(torch.randn(3, 2, 5))[0].sum().backward()
    assert all(s.leaf.grad.abs().sum() > 0 for s in sparse.values())


def test_which_parameters():
    model = net()
    model[3].weight.requires_grad_(False)  # the user's choice is kept
    names = [w.name for w in trainable_weights(model)]
    assert names == ["0.weight", "0.bias", "3.bias", "4.weight", "4.bias", "5.weight", "5.bias"]
    assert [w.name for w in trainable_weights(model, targets="Linear", exclude="5")] == ["3.bias"]
    theta = quantile_threshold(list(net().parameters()), 0.2)
    share = sum(int((p.abs() < theta).sum()) for p in net().parameters()) / sum(p.numel() for p in net().parameters())
    assert share == pytest.approx(0.2, abs=1e-3)
    sparse = sparsify(model, threshold=0.01, targets="5")
    assert set(sparse) == {"5.weight", "5.bias"}
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["5.weight_sara", "5.bias_sara"]


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({}, "or a fraction"),
        ({"threshold": 1e-9, "targets": "Linear"}, "no weight lies below"),
        ({"threshold": 1.0}, "60 %|60%"),
        ({"fraction": 0.9}, "force=True"),
        ({"fraction": 0.2, "targets": "nothing"}, "matches no layer"),
    ],
)
def test_choices_that_cannot_work_change_nothing(kwargs, said):
    model = net()
    with pytest.raises(ConfigurationError, match=said):
        sparsify(model, **kwargs)
    assert all(p.requires_grad for p in model.parameters())
    assert "weight_sara" not in str(model.state_dict().keys())
    assert sparsify(model, threshold=1.0, force=True)


def test_integer_and_zero_weights_are_named():
    model = net()
    model[3].weight = nn.Parameter(torch.zeros(80, 16, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigurationError, match=r"3.weight.*floating"):
        sparsify(model, fraction=0.2)
    model = net()
    quantize_(model, {"3.weight": symmetric(model[3].weight.detach(), 8)})
    with pytest.raises(ConfigurationError, match=r"3.weight.*Quantised"):
        sparsify(model, fraction=0.2)
    assert sparsify(model, fraction=0.2, exclude="3")
    model = net()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(ConfigurationError, match="exactly zero"):
        sparsify(model, fraction=0.2)

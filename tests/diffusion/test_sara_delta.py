"""sara: delta files."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from effdl.core.errors import ConfigurationError
from effdl.diffusion.sara import apply_deltas, load_delta, save_delta
from tests.diffusion.sara_nets import net, trained


@pytest.mark.parametrize("indices", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_must_05_delta_file(tmp_path, indices, dtype):
    class Cast(nn.Sequential):
        def forward(self, x):
            return super().forward(x.to(dtype)).float()

    model = Cast(*net()).to(dtype)
    base = copy.deepcopy(model)
    sparse = trained(model, fraction=0.2)
    path = save_delta(tmp_path / "delta.safetensors", sparse, indices)
    trained_entries = sum(s.index.numel() for s in sparse.values())
    size = dtype.itemsize + (4 if indices else 0)
    assert path.stat().st_size < 1.2 * trained_entries * size + 2000 * (dtype.itemsize < 4 or indices)
    again = apply_deltas(copy.deepcopy(base), path)
    assert any(not torch.equal(a, b) for a, b in zip(base.parameters(), model.parameters()))
    for a, b in zip(again.parameters(), model.parameters()):
        assert torch.equal(a, b)
    assert load_delta(path).threshold == next(iter(sparse.values())).threshold


def test_must_05_wrong_bases_are_refused(tmp_path):
    model, base = net(), net()
    path = save_delta(tmp_path / "delta.safetensors", trained(model, fraction=0.2))
    with pytest.raises(ConfigurationError, match=r"0.weight has \d+ entries below .* the delta \d+"):
        apply_deltas(net(1), path)
    with torch.no_grad():
        base[5].weight[base[5].weight > 0.09] += 1e-6
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ConfigurationError, match="not the ones"):
        apply_deltas(base, path)
    with pytest.raises(ConfigurationError, match="no parameter '0.weight'"):
        apply_deltas(nn.Linear(2, 2), path)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_deltas_of_one_base_add(tmp_path):
    base, models = net(), [net(), net()]
    paths = [
        save_delta(tmp_path / f"{i}.safetensors", trained(model, 3 + i, fraction=share))
        for i, (model, share) in enumerate(zip(models, (0.1, 0.3)))
    ]
    mixed = apply_deltas(net(), {str(paths[0]): 0.5, str(paths[1]): -2.0})
    for p, a, b, got in zip(*(m.parameters() for m in (base, *models, mixed))):
        torch.testing.assert_close(got, p + 0.5 * (a - p) - 2.0 * (b - p), rtol=1e-5, atol=1e-6)

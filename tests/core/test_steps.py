"""Wrapping methods, counting optimizer steps, listening to logits."""

from __future__ import annotations

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from effdl.core.batch import unpack
from effdl.core.errors import ConfigurationError
from effdl.core.steps import after_optimizer_step, require_automatic_optimization, tap_logits, wrap


class Module(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        return 10.0 + self.net(batch).sum().detach() * 0

    def forward(self, x):
        return self.net(x)


def add(number, log=None):
    def wrapper(step, *args):
        out = step(*args)
        if log is not None:
            log.append(number)
        return out + number

    return wrapper


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_wrappers_leave_in_any_order_without_a_trace(order):
    module, x = Module(), torch.ones(2, 4)
    log: list[int] = []
    handles = [wrap(module, "training_step", add(n, log)) for n in (1, 2, 4)]
    assert float(module.training_step(x, 0)) == 17
    assert log == [1, 2, 4]  # the first one added is the innermost
    left = [1, 2, 4]
    for i in order:
        handles[i].remove()
        handles[i].remove()
        left.remove((1, 2, 4)[i])
        assert float(module.training_step(x, 0)) == 10 + sum(left)
    assert "training_step" not in module.__dict__


def test_an_instance_attribute_that_was_there_comes_back():
    module = Module()
    own = lambda batch, batch_idx: torch.tensor(5.0)  # noqa: E731
    module.training_step = own
    handle = wrap(module, "training_step", add(1))
    assert float(module.training_step(None, 0)) == 6
    handle.remove()
    assert module.training_step is own


def test_the_signature_is_still_the_users():
    module = Module()
    wrap(module, "training_step", add(1))
    assert list(inspect.signature(module.training_step).parameters) == ["batch", "batch_idx"]


def test_a_deep_copy_wrapped_again_does_not_reach_the_original():
    module = Module()
    wrap(module, "training_step", add(1))
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.net.weight.fill_(float("nan"))  # 10 + nan * 0 = nan: shows whose network ran
    wrap(twin, "training_step", add(2))
    assert torch.isnan(twin.training_step(torch.ones(2, 4), 0))
    assert float(module.training_step(torch.ones(2, 4), 0)) == 11


def test_somebody_elses_wrapper_on_top_keeps_working():
    module = Module()
    handle = wrap(module, "training_step", add(1))
    ours = module.training_step
    module.training_step = lambda *args: ours(*args) * 2
    handle.remove()
    assert float(module.training_step(torch.ones(2, 4), 0)) == 20


def test_after_optimizer_step_counts_real_steps_and_refuses_look_alikes():
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], 0.1)
    seen = []
    handles = after_optimizer_step(SimpleNamespace(optimizers=[optimizer]), seen.append, "Me")
    for _ in range(3):
        weight.grad = torch.ones(3)
        optimizer.step()
    handles[0].remove()
    optimizer.step()
    assert seen == [optimizer] * 3
    with pytest.raises(ConfigurationError, match="register_step_post_hook"):
        after_optimizer_step(SimpleNamespace(optimizers=[object()]), seen.append, "Me")
    with pytest.raises(ConfigurationError, match="automatic_optimization=False"):
        require_automatic_optimization(SimpleNamespace(automatic_optimization=False), "Me")


def test_tap_sees_the_one_forward_of_the_step():
    module, x = Module(), torch.randn(2, 4)
    with tap_logits(module) as tap:
        module.training_step(x, 0)  # calls a child, not forward
    assert torch.equal(tap.logits(), module.net(x))
    with tap_logits(module) as tap:
        module(x)
    assert tap.logits().requires_grad
    with tap_logits(module, network="net") as tap:
        module(x)
    assert tap.logits().shape == (2, 3)
    assert not module._forward_hooks
    assert not module.net._forward_hooks


def test_tap_that_saw_nothing_says_so():
    with tap_logits(Module()) as tap:
        pass
    with pytest.raises(ConfigurationError, match="no logits"):
        tap.logits()


def test_unpack_knows_dicts_and_tuples():
    x, y, i = torch.ones(2), torch.zeros(2), torch.arange(2)
    ours, theirs = {"image": x, "label": y, "index": i}, {"pixel_values": x, "labels": y, "idx": i}
    for batch in (ours, theirs, (x, y, i), [x, y, i]):
        assert all(a is b for a, b in zip(unpack(batch), (x, y, i)))
    assert unpack((x, y)).index is None
    assert unpack(x).inputs is x
    assert unpack({"a": x, "b": y}, input_key="a", label_key="b").labels is y
    with pytest.raises(ConfigurationError, match="input_key"):
        unpack({"a": x})
    with pytest.raises(ConfigurationError, match="no key 'z'"):
        unpack({"image": x}, label_key="z")

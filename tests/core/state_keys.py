"""The method of ``test_callback_base.py`` and its state keys, which ``python -m tests.core.state_keys`` prints."""

from __future__ import annotations

import sys
import types
from functools import partial
from pathlib import Path

if __name__ == "__main__":  # the keys need nothing of lightning, whose import takes seconds
    fake = types.ModuleType("lightning.pytorch.callbacks")
    fake.Callback = object
    sys.modules |= dict.fromkeys(("lightning", "lightning.pytorch", "lightning.pytorch.callbacks"), fake)

import torch
from torch import nn

from effdl.callbacks._base import MethodCallback
from effdl.core.errors import ConfigurationError
from effdl.core.masks import pack
from effdl.core.paper import Paper
from effdl.core.steps import Handle, wrap


class Method(MethodCallback):
    paper = Paper(slug="my-method", title="T", authors=("A, B",), year=2020)

    def __init__(self, targets=None, rate=0.5, fails=None):
        self.targets, self.rate, self.fails = targets, rate, fails
        self.undone, self.steps = [], 0

    def attach(self, trainer, pl_module, stage):
        self.keep(self.same_arguments_on_resume(trainer, pl_module))
        self.keep(wrap(pl_module, "training_step", lambda step, *args: step(*args)))
        self.keep(Handle(lambda: self.undone.append("first")) for _ in range(1))
        self.keep([Handle(lambda: self.undone.append("second"))])
        if self.fails == "attach":
            raise ConfigurationError("attach fails")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps += 1
        if self.fails == "step":
            raise RuntimeError("step fails")

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state_dict):
        self.steps = state_dict["steps"]


KEYS = [
    {},
    {"rate": 0.25},
    {"targets": "a"},
    {"targets": ["a", "b"]},
    {"targets": {"e", "d", "c", "b", "a"}},  # whose order is another in each process
    {"targets": {"b": 1, "a": nn.Linear}},
    {"targets": nn.Linear},
    {"targets": nn.Conv2d},
    {"targets": torch.float16},
    {"targets": torch.bfloat16},
    {"targets": Path("a")},
    {"targets": Path("b")},
    {"targets": partial(torch.optim.SGD, lr=0.1)},
    {"targets": partial(torch.optim.SGD, lr=0.2)},
    {"targets": torch.tensor([1.0, 2.0])},
    {"targets": torch.relu},
    {"targets": nn.ReLU()},
    {"targets": pack},
    {"targets": object()},  # of which nothing but the type is the same in the next process
]


def state_keys():
    return [Method(**kwargs).state_key for kwargs in KEYS]


if __name__ == "__main__":
    print(*state_keys())

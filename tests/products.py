"""What truly enters a network's products, whatever its layers say of themselves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class Operands(TorchFunctionMode):
    """Keeps in ``seen`` what ``note`` makes of the arguments of every call of one of ``functions``."""

    def __init__(self, functions, note):
        super().__init__()
        self.functions, self.note, self.seen = functions, note, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self.functions:
            self.seen.append(self.note(*args))
        return function(*args, **(kwargs or {}))


def matmul_levels():
    """Distinct values of both operands of every ``torch.matmul``."""
    return Operands((torch.matmul,), lambda *args: tuple(x.unique().numel() for x in args))


@torch.no_grad()
def operands(model, x):
    """The first operand of every linear layer's and convolution's product, in the order of the products."""
    with Operands((F.linear, F.conv2d), lambda x, *rest: x.detach()) as watch:
        model.eval()(x)
    return watch.seen

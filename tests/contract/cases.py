"""Every public class of the catalogue as a runnable case, and how a case is run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import lightning.pytorch as lightning
import pytest
import torch
from torch import nn

from effdl import catalog
from effdl.core.contract import ContractExample
from effdl.core.export import product
from tests.contract.foreign import ForeignClassifier, classifier, pictures
from tests.support import BARE as QUIET


@dataclass(frozen=True)
class Case:
    """One public class, ready to run."""

    entry: catalog.Entry

    @cached_property
    def cls(self) -> type:
        return catalog.load(self.entry)

    @cached_property
    def example(self) -> ContractExample:
        return self.cls.contract_example()

    @property
    def attaches(self) -> bool:
        return self.entry.kind in ("callback", "mixin")

    def callback(self, **over: Any) -> Any:
        return self.cls(**{**self.example.kwargs, **over})

    def callbacks(self) -> list[Any]:
        return [self.callback()] if self.entry.kind == "callback" else []

    def bare(self, plain: bool = False) -> Any:
        """The module as it is without effdl's class; for a Module the class itself."""
        _ = self.example  # making it may draw numbers, so it comes before the seed
        torch.manual_seed(0)
        if self.entry.kind in ("callback", "mixin"):
            if self.entry.kind == "callback" and self.example.module is not None:
                return self.example.module()
            return ForeignClassifier(plain=plain)
        return self.module()

    def module(self, plain: bool = False, **over: Any) -> Any:
        """The module to train: with the mixin in, with a callback's target still untouched."""
        _ = self.example
        torch.manual_seed(0)
        kwargs = {**self.example.kwargs, **over}
        if self.entry.kind == "callback":
            return self.bare(plain)
        if self.example.module is not None and not over:
            return self.example.module()
        if self.entry.kind == "mixin":
            return type("Mine", (self.cls, ForeignClassifier), {})(plain=plain, **kwargs)
        return self.cls(**kwargs)

    def loader(self, batch_size: int = 4) -> Any:
        return pictures(batch_size) if self.example.data is None else self.example.data(batch_size)

    def fit(
        self, callbacks: Any = (), module: Any = None, ckpt_path: Any = None, val: bool = True, **kwargs: Any
    ) -> Any:
        """One seeded run with the case's callback and some more; returns (trainer, module)."""
        module = self.module() if module is None else module
        torch.manual_seed(1)
        options = {**QUIET, "max_epochs": 2, **kwargs}
        given = options.pop("own_callbacks", None)
        own = self.callbacks() if given is None else given
        options["enable_checkpointing"] = any(hasattr(c, "best_model_path") for c in callbacks)
        trainer = lightning.Trainer(callbacks=[*own, *callbacks], **options)
        loaders = (self.loader(), self.loader() if val else None)
        trainer.fit(module, *loaders, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return trainer, module

    def network(self, module: Any) -> nn.Module:
        return product(module) if self.example.finished is None else self.example.finished(module)

    def inputs(self, module: Any) -> tuple:
        if self.example.example_input is not None:
            return self.example.example_input(module)
        from effdl.core.batch import unpack

        return (unpack(next(iter(self.loader()))).inputs,)

    def rebuilt(self) -> Any:
        """What a checkpoint must load into: the bare module, or the documented rebuilt architecture."""
        bare = self.bare()
        return bare if self.example.rebuild is None else self.example.rebuild(bare)


def _attaches_or_tells(entry: catalog.Entry) -> bool:
    """Layers and activations (``PowerNorm``) are no way to attach; callbacks, mixins, modules must have an example."""
    return entry.kind in ("callback", "mixin", "module") or hasattr(catalog.load(entry), "contract_example")


CASES = {entry.name: Case(entry) for entry in catalog.entries() if _attaches_or_tells(entry)}


def every(row: str, *kinds: str, attaches: bool = False) -> Any:
    """Parametrise over the classes for which a row holds; a declared exception is shown as a skip with its reason."""
    parameters = []
    for name, case in CASES.items():
        if (kinds and case.entry.kind not in kinds) or (attaches and not case.attaches):
            continue
        reason = case.entry.contract_exceptions.get(row)
        marks = [pytest.mark.skip(reason=f"{row}: {reason}")] if reason else []
        parameters.append(pytest.param(case, id=name, marks=marks))
    return pytest.mark.parametrize("case", parameters)


def state_of(module: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Bit equality of nested states."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor), where
        assert a.shape == b.shape, where
        assert torch.equal(torch.nan_to_num(a.float()), torch.nan_to_num(b.float())), f"{where} differs"
    elif isinstance(a, dict):
        assert sorted(map(str, a)) == sorted(map(str, b)), where
        for key in a:
            if str(key).endswith("_ms"):  # wall time
                continue
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{where}[{i}]")
    else:
        assert a == b or (a != a and b != b), f"{where}: {a!r} != {b!r}"


def traces(module: Any) -> dict[str, Any]:
    """What attaching leaves on a module: instance attributes over methods, swapped classes, hooks."""
    found: dict[str, Any] = {}
    for name, sub in module.named_modules():
        wrapped = sorted(k for k, v in sub.__dict__.items() if hasattr(v, "_effdl_chain"))
        hooks = {k: len(v) for k, v in sub.__dict__.items() if k.endswith("_hooks") and v}
        swapped = hasattr(type(sub), "_effdl_swapped")
        if wrapped or hooks or swapped:
            found[name] = (wrapped, hooks, swapped)
    return found


def weights(module: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten().float() for p in module.parameters()])


def shell(module: Any) -> Any:
    """The same network under ``pytorch_lightning``."""
    import pytorch_lightning

    return classifier(pytorch_lightning.LightningModule)(model=module.model)


def first(output: Any) -> torch.Tensor:
    """The tensor of a network's output."""
    return output if isinstance(output, torch.Tensor) else next(iter(getattr(output, "values", lambda: output)()))

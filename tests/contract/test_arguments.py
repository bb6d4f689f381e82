"""The contract's rows C8 and C9: bad arguments are refused by name, good ones survive YAML."""

from __future__ import annotations

import contextlib
import inspect
import json

import jsonargparse
import pytest

from effdl import catalog
from effdl.core.contract import ContractExample
from effdl.core.errors import ConfigurationError
from tests.contract.cases import CASES, Case, assert_same, every, state_of, traces


def arguments(case: Case) -> list[str]:
    """The class's own constructor arguments; a mixin's ``*args, **kwargs`` belong to the next class."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(case.cls.__init__).parameters.values()
    return [p.name for p in parameters if p.name != "self" and p.kind not in kinds]


@every("C8")
def test_c08_every_argument_refuses_a_bad_value_by_name(case: Case):
    bad = case.example.bad
    assert sorted(bad) == sorted(arguments(case)), "contract_example().bad must name every constructor argument"
    for argument, values in bad.items():
        if values == ContractExample.ANY:
            continue
        for value in values if isinstance(values, list) else [values]:
            with pytest.raises(ConfigurationError) as raised:
                refuse(case, argument, value)
            assert argument in str(raised.value), f"{argument}={value!r}: {raised.value}"


def refuse(case: Case, argument: str, value) -> None:
    if case.entry.kind != "callback":
        case.module(**{argument: value})
        return
    callback = case.callback(**{argument: value})
    module = case.module()
    before, clean = state_of(module), traces(module)
    try:
        case.fit(module=module, own_callbacks=[callback], max_epochs=1)
    finally:
        assert_same(before, state_of(module))
        assert traces(module) == clean


@every("C9")
def test_c09_arguments_round_trip_through_yaml(case: Case):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--it", type=case.cls)
    kwargs = {k: v for k, v in case.example.kwargs.items() if _is_plain(v)}
    parsed = parser.parse_object({"it": {"class_path": case.entry.class_path, "init_args": kwargs}})
    again = parser.parse_string(parser.dump(parsed, skip_validation=True))
    assert again.as_dict() == parsed.as_dict()
    for name, value in kwargs.items():
        assert json.dumps(again.it.init_args[name], default=str) == json.dumps(value, default=str)


def _is_plain(value) -> bool:
    return isinstance(value, (str, int, float, bool, list, tuple, dict, type(None)))


@pytest.mark.parametrize("slug", sorted({case.entry.slug for case in CASES.values() if case.entry.paper}))
def test_c09_recipe_parses_and_prints_its_config(slug, capsys):
    from effdl.cli import main

    with contextlib.suppress(SystemExit):
        main(["run", slug, "--print_config"])
    printed = capsys.readouterr().out
    assert any(f".{entry.name}" in printed or (entry.concrete and entry.concrete in printed)
               for entry in catalog.of_slug(slug)), printed[:400]  # fmt: skip

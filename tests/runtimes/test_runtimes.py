"""The table of runtimes, and that the record of each has what its abilities promise."""

from __future__ import annotations

import inspect
from typing import Any, get_args

import pytest

from edgetune.config import RuntimeName
from edgetune.errors import MissingDependencyError
from edgetune.runtimes import RUNTIMES, find_runtime
from edgetune.runtimes.execution import ACCELERATING

PARAMETERS = {
    "abilities": [],
    "version": [],
    "open_session": ["bundle", "parameters", "optimizer", "plan"],
    "open_forward": ["bundle", "parameters", "plan"],
    "place": ["bundle", "plan", "batch", "length"],
    "has_device": ["kind"],
    "install": ["notice"],
}


def parameters_of(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_the_table_has_the_names_that_can_be_asked_for() -> None:
    assert set(get_args(RuntimeName)) - {"auto"} == RUNTIMES.keys()


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_runtime_has_what_its_record_asks_for(name: RuntimeName) -> None:
    found = {key: value for key, value in vars(find_runtime(name)).items() if value is not None}
    assert {key: parameters_of(function) for key, function in found.items()} == {key: PARAMETERS[key] for key in found}


@pytest.mark.parametrize("name", RUNTIMES)
def test_what_an_accelerator_takes_is_there(name: RuntimeName) -> None:
    runtime, facts = find_runtime(name), ACCELERATING.get(name)
    assert (runtime.place is not None) is (facts is not None)
    assert (runtime.has_device is not None) is (facts is not None and len(facts.device_types) > 1)


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_runtime_executes_something(name: RuntimeName) -> None:
    runtime = find_runtime(name)
    try:
        abilities = runtime.abilities()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    assert abilities.whole or abilities.exact or abilities.int8 or runtime.place
